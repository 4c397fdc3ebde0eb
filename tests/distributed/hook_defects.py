"""What can be wrong with a quantizing DDP hook, each as a check that runs on all ranks of a group of 4."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import quantization_hooks as torch_hooks

import qpass.comm
from distributed import repaired_hooks

IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "torch": (torch_hooks.quantization_pertensor_hook, torch_hooks.quantization_perchannel_hook),
    "torch, repaired for gloo": (repaired_hooks.pertensor_hook, repaired_hooks.perchannel_hook),
    "qpass": (qpass.comm.quantization_pertensor_hook, qpass.comm.quantization_perchannel_hook),
}


@dataclass
class Bucket:
    """What a hook reads of `dist.GradBucket`, which only DDP can make: here the gradient of one parameter."""

    values: Tensor
    parameter: Tensor | None = None

    def buffer(self) -> Tensor:
        return self.values

    def parameters(self) -> list[Tensor]:
        return [self.values if self.parameter is None else self.parameter]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


@dataclass
class Hooks:
    """The two hooks of one implementation, and the groups to call them on."""

    pertensor: Callable[..., Any]
    perchannel: Callable[..., Any]
    everyone: dist.ProcessGroup
    pair: dist.ProcessGroup
    alone: dist.ProcessGroup

    def both(self, values: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        group = group or self.everyone
        return [hook(group, Bucket(values.clone())).wait() for hook in (self.pertensor, self.perchannel)]


def averages_on_gloo(hooks: Hooks) -> None:
    values = torch.randn(1000)
    expected = values.clone()
    dist.all_reduce(expected)
    for result in hooks.both(values):
        assert (result - expected / 4).abs().max() < 0.05  # steps of 1 / 32 at most for values within +-4


def sends_its_part_of_the_bytes(hooks: Hooks) -> None:
    """A 4th of the gradient to each of 3 ranks, twice: 1.5 bytes an element, not 3."""
    with collectives() as made:
        hooks.perchannel(hooks.everyone, Bucket(torch.randn(32 * 1024))).wait()
    assert sum(sent for _, sent in made) < 1.52 * 32 * 1024


def keeps_small_gradients(hooks: Hooks) -> None:
    values = torch.linspace(0.5e-10, 1e-10, 512)
    for result in hooks.both(values):
        assert ((result - values).abs() / values).max() < 0.01


def keeps_inf_in_its_block(hooks: Hooks) -> None:
    values = torch.ones(4096)
    if dist.get_rank() == 1:
        values[5] = torch.inf
    for result in hooks.both(values):
        assert not result[5].isfinite()
        assert (result[512:] - 1).abs().max() < 0.01


def keeps_an_outlier_in_its_block(hooks: Hooks) -> None:
    values = torch.ones(4096)
    values[5] = 1e6
    for result in hooks.both(values):
        assert (result[512:] - 1).abs().max() < 0.01


def pads_only_what_needs_it(hooks: Hooks) -> None:
    with collectives() as made:
        hooks.perchannel(hooks.pair, Bucket(torch.randn(512))).wait()
    assert sum(sent for _, sent in made) < 1.1 * 512


def is_lossless_alone(hooks: Hooks) -> None:
    values = torch.randn(1000)
    for result in hooks.both(values, hooks.alone):
        assert torch.equal(result, values)


def keeps_the_dtype(hooks: Hooks) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for result in hooks.both(torch.ones(1000, dtype=dtype)):
            assert result.dtype == dtype


def needs_one_collective(hooks: Hooks) -> None:
    """Of 2 ranks. The first call of its kind may make groups and compare notes, so the second is counted."""
    hooks.perchannel(hooks.pair, Bucket(torch.randn(1024))).wait()
    with collectives() as made:
        hooks.perchannel(hooks.pair, Bucket(torch.randn(1024))).wait()
    assert len(made) == 1


def never_waits_in_a_callback(hooks: Hooks) -> None:
    with waits_in_callbacks() as waits:
        hooks.perchannel(hooks.everyone, Bucket(torch.randn(1024))).wait()
    assert not waits


DEFECTS: dict[str, Callable[[Hooks], None]] = {
    function.__name__: function
    for function in (
        averages_on_gloo, sends_its_part_of_the_bytes, keeps_small_gradients, keeps_inf_in_its_block,
        keeps_an_outlier_in_its_block, pads_only_what_needs_it, is_lossless_alone, keeps_the_dtype,
        needs_one_collective, never_waits_in_a_callback,
    )
}  # fmt: skip
FINE_ONCE_REPAIRED = {"averages_on_gloo"}


def verdicts() -> dict[tuple[str, str], str]:
    """(implementation, check) -> "" or what went wrong on this rank."""
    rank = dist.get_rank()
    pairs, alone = ([dist.new_group(ranks) for ranks in groups] for groups in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]))
    found = {}
    for name, functions in IMPLEMENTATIONS.items():
        assert dist.group.WORLD is not None
        hooks = Hooks(*functions, dist.group.WORLD, pairs[rank // 2], alone[rank])
        for check, run in DEFECTS.items():
            torch.manual_seed(rank)
            try:
                run(hooks)
                found[name, check] = ""
            except Exception as error:
                found[name, check] = f"{type(error).__name__}: {str(error).strip() or 'wrong'}"[:200]
            dist.barrier()
    return found


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Records the collectives that this rank starts, with the bytes that each makes it send."""
    made: list[tuple[str, int]] = []
    shares = {
        "all_gather": lambda args, world: args[1].nbytes * (world - 1),
        "all_gather_into_tensor": lambda args, world: args[1].nbytes * (world - 1),
        "all_gather_single": lambda args, world: args[1].nbytes * (world - 1),
        "all_to_all_single": lambda args, world: args[1].nbytes * (world - 1) // world,
        "all_reduce": lambda args, world: 2 * args[0].nbytes * (world - 1) // world,
    }
    originals = {name: getattr(dist, name) for name in shares}

    def recording(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            group = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, dist.ProcessGroup)), None)
            made.append((name, shares[name](args, dist.get_world_size(group))))
            return originals[name](*args, **kwargs)

        return call

    for name in shares:
        setattr(dist, name, recording(name))
    try:
        yield made
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextmanager
def waits_in_callbacks() -> Iterator[list[str]]:
    """Records every wait, inside a callback of a future, for a future that is not complete."""
    future, inside, waits = torch._C.Future, threading.local(), list[str]()  # the base of torch.futures.Future
    then, wait = future.then, future.wait

    def marking_then(self: Any, callback: Callable[[Any], Any]) -> Any:
        def marked(done: Any) -> Any:
            inside.callback = True
            try:
                return callback(done)
            finally:
                inside.callback = False

        return then(self, marked)

    def noting_wait(self: Any) -> Any:
        if getattr(inside, "callback", False) and not self.done():
            waits.append(threading.current_thread().name)
        return wait(self)

    future.then, future.wait = marking_then, noting_wait  # type: ignore[method-assign]
    try:
        yield waits
    finally:
        future.then, future.wait = then, wait  # type: ignore[method-assign]
