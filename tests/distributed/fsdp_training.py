"""Small trainings of FSDP2, plain and compressed, measured on both ranks of a gloo group of 2."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import qpass.comm
from distributed.ddp_training import is_equal_everywhere, network

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(policy: MixedPrecisionPolicy | None = None) -> FSDPModule:
    """The two first linears are units of their own; the last one belongs to the root."""
    net = network()
    assert isinstance(net, nn.Sequential)
    options = {} if policy is None else {"mp_policy": policy}
    for layer in (net[0], net[2]):
        fully_shard(layer, **options)
    return fully_shard(net, **options)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def train(
    model: Any, steps: int, broken: bool = False, optimizer: torch.optim.Optimizer | None = None, first: int = 0
) -> Tensor:
    """The whole parameters' values after so many steps, the first of which has the given number, in one dimension."""
    optimizer = optimizer or optimizer_of(model)
    for step in range(first, first + steps):
        data = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x, labels = torch.randn(16, 37, generator=data), torch.randint(10, (16,), generator=data)
        loss = nn.functional.cross_entropy(model(x).float(), labels)
        if broken and dist.get_rank() == 1:
            loss = loss * torch.inf
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.full_tensor().detach().flatten() for parameter in model.parameters()])


def resumed(**chosen: Any) -> bool:
    """Whether a run that was saved after 3 steps and continued in a new model ends where the first run ends."""
    models = [sharded(), sharded()]
    for model in models:
        qpass.comm.compress_fsdp(model, **chosen)
    optimizers = [optimizer_of(model) for model in models]
    train(models[0], 3, optimizer=optimizers[0])
    saved = copy.deepcopy((models[0].state_dict(), optimizers[0].state_dict()))
    train(models[1], 1, optimizer=optimizers[1])  # it is a used model that takes the state over
    models[1].load_state_dict(saved[0])
    optimizers[1].load_state_dict(saved[1])
    pairs = zip(models, optimizers, strict=True)
    return torch.equal(*(train(model, 3, optimizer=optimizer, first=3) for model, optimizer in pairs))


def figures() -> dict[str, Any]:
    """name -> what was measured on this rank."""
    plain = train(sharded(), 6)
    found: dict[str, Any] = {}
    ways: dict[str, dict[str, Any]] = {
        "both": {}, "gradients": {"all_gather": None}, "parameters": {"reduce_scatter": None},
        "int4": {"reduce_scatter": "int4"}, "neither": {"all_gather": None, "reduce_scatter": None},
    }  # fmt: skip
    for name, chosen in ways.items():
        model = sharded()
        done = qpass.comm.compress_fsdp(model, **chosen)
        parameters = train(model, 6)
        found[name] = ((parameters - plain).norm() / plain.norm()).item() if is_equal_everywhere(parameters) else -1.0
        found[f"{name}: ratio"] = done.statistics.ratio
    found["modules"] = done.modules
    found["repeatable"] = torch.equal(parameters, plain)

    bf16 = [sharded(BF16), sharded(BF16)]
    done = qpass.comm.compress_fsdp(bf16[1])
    ends = [train(model, 3) for model in bf16]
    found["bfloat16"] = ((ends[1] - ends[0]).norm() / ends[0].norm()).item()
    found["bfloat16: dtype"] = str(ends[1].dtype)
    found["bfloat16: ratio"] = done.statistics.ratio

    gathered = sharded()
    qpass.comm.compress_fsdp(gathered)
    shards = [parameter.to_local().clone() for parameter in gathered.parameters()]
    unsharded = gathered[0].weight.full_tensor()
    gathered[0].unshard()
    found["rounded"] = ((gathered[0].weight - unsharded).norm() / unsharded.norm()).item()
    found["computes alike"] = is_equal_everywhere(gathered[0].weight.detach().clone())
    gathered[0].reshard()
    after = [parameter.to_local() for parameter in gathered.parameters()]
    found["shards kept"] = all(torch.equal(*pair) for pair in zip(shards, after, strict=True))

    divided = [sharded(), sharded()]
    qpass.comm.compress_fsdp(divided[1])
    for model in divided:
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)
                part.set_gradient_divide_factor(4.0)
    ends = [train(model, 3) for model in divided]
    found["divided"] = ((ends[1] - ends[0]).norm() / ends[0].norm()).item()

    broken = sharded()
    qpass.comm.compress_fsdp(broken)
    found["inf is seen"] = not train(broken, 1, broken=True).isfinite().all().item()

    found["resumed"] = [resumed(), resumed(reduce_scatter="int4:32:bf16:hadamard")]

    fast = qpass.comm.Link(bandwidth=1e12, latency=1e-6, encode=1e9, decode=1e9)
    declined = sharded()
    done = qpass.comm.compress_fsdp(declined, link=fast)
    found["declined"] = torch.equal(train(declined, 6), plain)
    found["declined: ratio"] = done.statistics.ratio

    for name, asked in {"nothing sharded": network(), "feedback": sharded()}.items():
        try:
            qpass.comm.compress_fsdp(asked, error_feedback=name == "feedback")
        except qpass.QpassError as error:
            found[name] = str(error)
    return found
