"""Sharded training with its collectives inside the compiled graph, and those in int8: SimpleFSDP.

    torchrun --nproc-per-node 2 examples/train_simple_fsdp.py
    torchrun --nproc-per-node 2 examples/train_simple_fsdp.py --codec int4 --feedback

Every parameter is a DTensor, cut between the ranks, and is gathered where the model reads it; the backward pass sums
the gradient and cuts it again. Since ``torch.compile`` sees all of that, the compiler can compress it: the same small
transformer is trained from the same weights on the same text, once by ``backend="inductor"`` and once by
``backend="qpass"``, forward and backward. With ``--feedback`` what rounding takes from a gradient goes with the next.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from characters import LAYERS, CharacterModel, Run, print_runs, train
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.utils.parametrize import register_parametrization
from wire import bytes_sent

import qpass


class Gathered(nn.Module):
    """A sharded parameter as the model reads it: whole. Its gradient is averaged over the ranks, each keeps a part."""

    def forward(self, shard: DTensor) -> Tensor:
        """The shard of this rank -> the whole parameter, on every rank."""
        return shard.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("avg")])


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut every parameter of ``model`` along its first dimension, in place."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
            setattr(module, name, part)
            register_parametrization(module, name, Gathered(), unsafe=True)  # unsafe: a DTensor becomes a plain tensor
    return model


def train_with(backend: str, options: dict[str, Any] | None, steps: int, layers: int) -> tuple[Run, nn.Module]:
    """Train from seed 0; returns also the compiled model."""
    torch.manual_seed(0)
    model = shard(CharacterModel(layers), init_device_mesh("cpu", (dist.get_world_size(),)))
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
    return train(model, steps, bytes_sent, compiled), compiled


def main() -> dict[str, Run]:
    """Train both ways; rank 0 prints the end points of the loss, bytes and time a step, and what became of what."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--codec", default="int8", help="of weights and gradients")
    parser.add_argument("--feedback", action="store_true", help="error feedback for gradients")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    inductor, _ = train_with("inductor", None, options.steps, options.layers)
    policy = qpass.comm.Policy(options.codec, feedback=qpass.comm.Feedback() if options.feedback else None)
    coded, compiled = train_with("qpass", {"comm": policy}, options.steps, options.layers)
    runs = {"inductor": inductor, f"qpass {options.codec}": coded}
    if dist.get_rank() == 0:
        title = f"{options.steps} steps of SimpleFSDP on {dist.get_world_size()} ranks, loss on unseen text"
        print_runs(title, "compiled by", runs)
        print(f"\n{qpass.report(compiled)}")
    dist.destroy_process_group()
    return runs


if __name__ == "__main__":
    main()
