"""DDP hooks in copies and files of hooked models, in DDP's reducer in Python, and in models on a part of the ranks."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import qpass.comm
import ranks
from compiled_traffic import value
from qpass.comm.training import hook_state
from qpass.errors import AgreementError

CASES = [
    "copies_and_files", "python_reducer", "python_reducer_with_feedback", "python_reducer_of_other_gradients",
    "python_reducer_counts_steps", "python_reducer_compiled", "a_group_of_its_own", "none_is_the_default_group",
]  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    return ranks.run(__file__, 3, CASES)


@pytest.mark.parametrize("case", CASES)
def test_hooked_models(said: dict[str, list[str]], case: str) -> None:
    assert said[case] == [ranks.OK] * 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 48))


def hooked(hook: Any, model: nn.Module | None = None) -> DistributedDataParallel:
    parallel = DistributedDataParallel(model or network())
    if hook is not None:
        parallel.register_comm_hook(None, hook)
    return parallel


def steps(model: Any, count: int, first: int = 0) -> list[Tensor]:
    """The gradients of the last of `count` steps."""
    for step in range(first, first + count):
        model.zero_grad()
        model(value(10 * step + dist.get_rank(), 4, 64)).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def near(found: list[Tensor], expected: list[Tensor], most: float) -> bool:
    """All close, relative to their norm, and none the same: plain gradients were not compressed."""
    pairs = list(zip(found, expected, strict=True))
    return all(0 < (own - other).norm() < most * other.norm() for own, other in pairs)


def copies_and_files(rank: int, world: int) -> None:
    """What rounding took so far goes with the hook; the groups and the parameters of the model that it served stay."""
    hook = qpass.comm.ddp_hook(4, error_feedback=True)
    model = hooked(hook)
    steps(model, 3)
    file = io.BytesIO()
    torch.save(model, file)
    assert len(file.getvalue()) < 4 * 4 * sum(parameter.numel() for parameter in model.parameters())
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    hooks = [copy.deepcopy(hook), copies[1]._comm_hooks[0][0]]
    fresh = qpass.comm.ddp_hook(4, error_feedback=True)
    expected = steps(model, 1, first=3)
    for each, copied in zip(copies, hooks, strict=True):
        each.register_comm_hook(None, copied)
        assert equal(steps(each, 1, first=3), expected)
        assert copied.statistics.bytes == hook.statistics.bytes
    forgetful = copy.deepcopy(copies[0])
    forgetful.register_comm_hook(None, fresh)
    assert not equal(steps(forgetful, 1, first=3), expected)


def in_python(hook: Any, model: nn.Module | None = None) -> DistributedDataParallel:
    """The model as DDP's reducer in Python serves it, which it chooses when it is made."""
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        return hooked(hook, model)


def python_reducer(rank: int, world: int) -> None:
    """The values are those of the reducer in C++: neither depends on how gradients are grouped."""
    hook = qpass.comm.ddp_hook()
    assert equal(steps(in_python(hook), 3), steps(hooked(qpass.comm.ddp_hook()), 3))
    # 32, 1, 24 and 1 rows of 130 bytes, each a multiple of 3 on the wire, to 2 of 3 ranks twice, in 3 steps
    assert hook.statistics.bytes == 3 * 2 * (33 + 3 + 24 + 3) * 130 * 2 // 3
    assert {row.sent_as for row in qpass.report(hook, strict=True).rows} == {"int8:128:bf16"}


def python_reducer_with_feedback(rank: int, world: int) -> None:
    """With one gradient for ever, the mean over 32 steps is nearer to the plain one than any single step is."""
    x = value(rank, 4, 64)

    def mean(model: Any) -> list[Tensor]:
        found = []
        for _ in range(32):
            model.zero_grad()
            model(x).square().mean().backward()
            found.append([parameter.grad.clone() for parameter in model.parameters()])
        return [torch.stack(each).mean(0) for each in zip(*found, strict=True)]

    plain = mean(hooked(None))
    fed = mean(in_python(qpass.comm.ddp_hook(4, error_feedback=True)))
    without = mean(in_python(qpass.comm.ddp_hook(4)))
    for own, other, expected in zip(fed, without, plain, strict=True):
        assert (own - expected).norm() < 0.2 * (other - expected).norm()


class Odd(nn.Module):
    """A transposed weight, a complex one, and a table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(48, 64).t())
        self.complex = nn.Parameter(torch.randn(48, dtype=torch.complex64))
        self.table = nn.Embedding(50, 48, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.turned * self.complex).abs() + self.table(torch.tensor([1, 2 + dist.get_rank()])).sum(0)


def python_reducer_of_other_gradients(rank: int, world: int) -> None:
    torch.manual_seed(0)
    odd = Odd()
    plain, found = steps(hooked(None, copy.deepcopy(odd)), 1), steps(in_python(qpass.comm.ddp_hook(), odd), 1)
    names = [name for name, _ in odd.named_parameters()]
    for name, own, other in zip(names, found, plain, strict=True):
        assert own.is_sparse == other.is_sparse == (name == "table.weight")
        assert own.dtype == other.dtype
        if own.is_sparse:
            assert torch.equal(own.to_dense(), other.to_dense())
        else:
            assert near([own], [other], 0.05), name


def python_reducer_counts_steps(rank: int, world: int) -> None:
    """A step is over once a parameter comes again, in time for the warm-up to end."""
    hook = qpass.comm.ddp_hook(warm_up=2)
    model, plain = in_python(hook), hooked(None)
    for step in range(3):
        expected, found = steps(plain, 1, step), steps(model, 1, step)
        if step < 2:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # torch sums buckets in another order
        else:
            assert near(found, expected, 0.05)
        assert hook.statistics.steps == step, (hook.statistics.steps, step)


def python_reducer_compiled(rank: int, world: int) -> None:
    """Traced by compiled autograd, the hook runs between two graphs."""
    for chosen in ({}, {"bits": 4, "error_feedback": True}):
        expected = steps(hooked(qpass.comm.ddp_hook(**chosen)), 3)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
            model = torch.compile(hooked(qpass.comm.ddp_hook(**chosen)), backend="aot_eager")
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                found = steps(model, 3)
        assert near(found, expected, 1e-4) or equal(found, expected)  # a graph may sum in another order


def a_group_of_its_own(rank: int, world: int) -> None:
    group = dist.new_group([0, 1])
    if rank < 2:
        model = DistributedDataParallel(network(), process_group=group)
        model.register_comm_hook(model.process_group, qpass.comm.ddp_hook())
        found = steps(model, 2)
        expected = steps(DistributedDataParallel(network(), process_group=group), 2)
        assert near(found, expected, 0.05)
    dist.barrier()


def none_is_the_default_group(rank: int, world: int) -> None:
    """Last: whoever waited for rank 2 has given up. What is missing is said with what to write instead."""
    group = dist.new_group([0, 1])
    if rank < 2:
        model = DistributedDataParallel(network(), process_group=group)
        hook = qpass.comm.ddp_hook()

        def refuse(*_: Any, **__: Any) -> None:
            raise AgreementError("rank 2 said nothing", hint="make the same calls")

        original, hook_state.agree_on_settings = hook_state.agree_on_settings, refuse
        model.register_comm_hook(None, hook)
        try:
            with pytest.raises(
                RuntimeError, match=r"default group, of 3 ranks.*register_comm_hook\(model.process_group"
            ):
                steps(model, 1)
        finally:
            hook_state.agree_on_settings = original
    dist.barrier()
