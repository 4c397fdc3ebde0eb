"""Data-parallel training over compressed gradients: a character model learns Python from the standard library.

    torchrun --nproc-per-node 2 examples/train_ddp.py

The same small transformer is trained from the same weights on the same text once with torch's own all_reduce and once
for each compressed form. With ``--fsdp`` it is sharded by FSDP2, whose parameters then travel compressed as well.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from characters import CharacterModel, Run, print_runs, train
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qpass.comm


def shard(model: CharacterModel) -> nn.Module:
    """FSDP2: every layer of the transformer is a unit of its own, the rest is one more."""
    for layer in model.layers.layers:
        fully_shard(layer)
    return fully_shard(model)


def train_over(wire: str, steps: int, fsdp: bool) -> Run:
    """Train from seed 0; ``wire`` says what gradients travel as: "fp32", "int8" or "int4 + feedback"."""
    torch.manual_seed(0)
    codec, _, feedback = wire.partition(" + ")
    model = shard(CharacterModel()) if fsdp else DistributedDataParallel(CharacterModel())
    if fsdp:
        sender = qpass.comm.compress_fsdp(model, all_gather="fp32" if codec == "fp32" else "int8", reduce_scatter=codec)
    else:
        sender = qpass.comm.ddp_hook(format=codec, error_feedback=bool(feedback))
        model.register_comm_hook(None, sender)
    return train(model, steps, sent=lambda: sender.statistics.bytes)


def main() -> dict[str, Run]:
    """Train each way, and let rank 0 print the end points of the loss, the bytes sent and the time a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fsdp", action="store_true", help="shard the model by FSDP2 instead of copying it by DDP")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wires = ["fp32", "int8", "int4"] if options.fsdp else ["fp32", "int8", "int4 + feedback"]
    runs = {wire: train_over(wire, options.steps, options.fsdp) for wire in wires}
    if dist.get_rank() == 0:
        kind = "FSDP2" if options.fsdp else "DDP"
        title = f"{options.steps} steps of {kind} on {dist.get_world_size()} ranks, loss on unseen text"
        print_runs(title, "gradients as", runs)
    dist.destroy_process_group()
    return runs


if __name__ == "__main__":
    main()
