"""What can be wrong with auto_quantize, each as a check that runs on both ranks of a group of 2."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.algorithms._quantization import quantization as torch_quantization

import qpass.comm
from qpass.comm.eager.traced import traced

Wrap = Callable[..., Any]
EXACT = torch.arange(12, dtype=torch.float32).reshape(4, 3)  # whole numbers this small are exact in both 16-bit types


@dataclass
class Kit:
    """One implementation's auto_quantize and its types."""

    wrap: Wrap
    types: Any

    def fp16(self, func: Wrap, quant_loss: float | None = None) -> Wrap:
        return self.wrap(func, self.types.FP16, quant_loss)

    def bfp16(self, func: Wrap) -> Wrap:
        return self.wrap(func, self.types.BFP16)


KITS = {
    "torch": Kit(torch_quantization.auto_quantize, torch_quantization.DQuantType),
    "qpass": Kit(qpass.comm.auto_quantize, qpass.comm.DQuantType),
}


def mine() -> Tensor:
    """`EXACT`, 100 more on rank 1."""
    return EXACT + 100 * dist.get_rank()


def buffers(like: Tensor) -> list[Tensor]:
    return [torch.full_like(like, -1) for _ in range(dist.get_world_size())]


def uneven() -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Input, expected output, output and input splits: rank 0 keeps 1 row and sends 3, rank 1 halves."""
    sends = [1, 3] if dist.get_rank() == 0 else [2, 2]
    receives = [1, 2] if dist.get_rank() == 0 else [3, 2]
    expected = torch.empty(sum(receives), 3)
    dist.all_to_all_single(expected, mine(), receives, sends)
    return mine(), expected, receives, sends


def splits_by_keyword(kit: Kit) -> None:
    tensor, expected, receives, sends = uneven()
    output = torch.empty_like(expected)
    kit.fp16(dist.all_to_all_single)(output, tensor, output_split_sizes=receives, input_split_sizes=sends)
    assert torch.equal(output, expected)


def splits_by_position(kit: Kit) -> None:
    tensor, expected, receives, sends = uneven()
    output = torch.empty_like(expected)
    kit.fp16(dist.all_to_all_single)(output, tensor, receives, sends)
    assert torch.equal(output, expected)


def everything_by_keyword(kit: Kit) -> None:
    outputs = buffers(EXACT)
    kit.fp16(dist.all_gather)(tensor_list=outputs, tensor=mine(), group=None, async_op=False)
    assert torch.equal(torch.stack(outputs), torch.stack([EXACT, EXACT + 100]))


def group_by_position(kit: Kit) -> None:
    output = [torch.full_like(EXACT, -1)]
    alone = [dist.new_group([0]), dist.new_group([1])][dist.get_rank()]
    kit.fp16(dist.all_gather)(output, mine(), alone)
    assert torch.equal(output[0], mine())


def wrong_argument_is_a_type_error(kit: Kit) -> None:
    """As in dist itself. Nothing is sent."""
    with pytest.raises(TypeError, match="out_splits"):
        kit.fp16(dist.all_to_all_single)(torch.empty(4), torch.empty(4), out_splits=[2, 2])


def quant_loss_of_lists(kit: Kit) -> None:
    outputs = buffers(EXACT)
    kit.fp16(dist.all_gather, 2.0)(outputs, mine())
    assert torch.equal(torch.stack(outputs), torch.stack([EXACT / 2, EXACT / 2 + 50]))


def quant_loss_of_all_to_all(kit: Kit) -> None:
    outputs = buffers(EXACT[:2])
    kit.fp16(dist.all_to_all, 2.0)(outputs, list(mine().split(2)))
    half = EXACT.split(2)[dist.get_rank()] / 2
    assert torch.equal(torch.stack(outputs), torch.stack([half, half + 50]))


def writes_the_buffers_of_the_caller(kit: Kit) -> None:
    outputs = buffers(EXACT)
    kept = list(outputs)
    kit.fp16(dist.all_gather)(outputs, mine())
    assert torch.equal(torch.stack(kept), torch.stack([EXACT, EXACT + 100]))


def bfp16_of_any_shape(kit: Kit) -> None:
    for shape in ((), (12,), (2, 3, 2)):
        tensor = torch.full(shape, 3.0 + dist.get_rank())
        outputs = buffers(tensor)
        kit.bfp16(dist.all_gather)(outputs, tensor)
        assert all(torch.equal(output, torch.full(shape, 3.0 + rank)) for rank, output in enumerate(outputs))


def bfp16_of_transposed(kit: Kit) -> None:
    outputs = buffers(EXACT.t())
    kit.bfp16(dist.all_gather)(outputs, mine().t())
    assert torch.equal(torch.stack(outputs), torch.stack([EXACT.t(), EXACT.t() + 100]))


def writes_to_strided_buffers(kit: Kit) -> None:
    whole = torch.full((3, 8), -1.0)
    kit.fp16(dist.all_to_all_single)(whole[:, ::2].t(), mine())
    assert torch.equal(whole[:, 1::2], torch.full((3, 4), -1.0))
    part = EXACT.split(2)[dist.get_rank()]
    assert torch.equal(whole[:, ::2].t(), torch.cat([part, part + 100]))


def leaves_strangers_alone(kit: Kit) -> None:
    """A rank that is not in the group: dist warns and does nothing."""
    only_rank_0 = dist.new_group([0])
    output = [torch.full_like(EXACT, -1)]
    kit.fp16(dist.all_gather, 2.0)(output, mine(), group=only_rank_0)
    assert torch.equal(output[0], EXACT / 2 if dist.get_rank() == 0 else torch.full_like(EXACT, -1))


def integers_pass_through(kit: Kit) -> None:
    for tensor in (torch.tensor([2**40 + 1, -70000]), torch.tensor([True, False]), torch.tensor([1 + 2j])):
        outputs = buffers(tensor)
        kit.fp16(dist.all_gather)(outputs, tensor)
        assert all(torch.equal(output, tensor) for output in outputs)


def keeps_the_dtype(kit: Kit) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        outputs = buffers(EXACT.to(dtype))
        kit.fp16(dist.all_gather)(outputs, EXACT.to(dtype))
        assert all(output.dtype == dtype and torch.equal(output, EXACT.to(dtype)) for output in outputs)


def keeps_inf(kit: Kit) -> None:
    tensor = torch.tensor([1.0, torch.inf, -torch.inf])
    outputs = buffers(tensor)
    kit.fp16(dist.all_gather)(outputs, tensor)
    assert all(torch.equal(output, tensor) for output in outputs)


def types_have_names(kit: Kit) -> None:
    assert [str(kit.types.FP16), str(kit.types.BFP16)] == ["fp16", "bfp16"]


def asynchronous(kit: Kit) -> None:
    outputs = buffers(EXACT)
    work = kit.fp16(dist.all_gather, 2.0)(outputs, mine(), None, True)
    assert isinstance(work, dist.Work)
    work.wait()
    assert work.is_completed()
    assert torch.equal(torch.stack(outputs), torch.stack([EXACT / 2, EXACT / 2 + 50]))


def has_gradients(kit: Kit) -> None:
    """Where torch has them: the functional collectives. A gather's gradient is a reduce_scatter of W gradients."""
    tensor = mine().requires_grad_()
    gathered = kit.fp16(functional.all_gather_single)(tensor, 0, dist.group.WORLD)
    (gathered * torch.arange(8.0)[:, None]).sum().backward()
    rows = torch.arange(8.0).split(4)[dist.get_rank()]
    assert torch.equal(tensor.grad, 2 * rows[:, None].expand(4, 3))


def can_be_compiled(kit: Kit) -> None:
    """Into one graph, as dist's own all_gather can; a call that waits later, or a broadcast, breaks it, as in dist."""
    gather, reduce = kit.fp16(dist.all_gather, 2.0), kit.fp16(dist.all_reduce)

    def doubled(tensor: Tensor) -> Tensor:
        outputs = [torch.empty_like(tensor), torch.empty_like(tensor)]
        gather(outputs, 2 * tensor)
        total = tensor.clone()
        reduce(total)
        return torch.stack([*outputs, total]) + 1

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    expected = torch.stack([EXACT, EXACT + 100, 2 * EXACT + 100]) + 1
    assert torch.equal(compiled(mine()), expected)
    assert torch.equal(doubled(mine()), expected)


def knows_the_other_collectives(kit: Kit) -> None:
    both, rank = 2 * EXACT + 100, dist.get_rank()
    tensor = mine()
    kit.fp16(dist.all_reduce)(tensor)
    assert torch.equal(tensor, both)
    output = torch.empty(8, 3)
    kit.fp16(dist.all_gather_into_tensor)(output, mine())
    assert torch.equal(output, torch.cat([EXACT, EXACT + 100]))
    half = torch.empty(2, 3)
    kit.fp16(dist.reduce_scatter_tensor)(half, mine())
    assert torch.equal(half, both.split(2)[rank])
    kit.fp16(dist.reduce_scatter)(half.zero_(), list(mine().split(2)))
    assert torch.equal(half, both.split(2)[rank])
    tensor = mine()
    kit.fp16(dist.broadcast)(tensor, group_src=1)
    assert torch.equal(tensor, EXACT + 100)


def rounds_in_blocks(kit: Kit) -> None:
    """int8, int4 and fp8: an error of half a step of the block's largest value, which is 11 or 111."""
    for name, share in {"INT8": 0.5 / 127, "INT4": 0.5 / 7, "FP8": 2.0**-4}.items():
        outputs = buffers(EXACT)
        kit.wrap(dist.all_gather, getattr(kit.types, name))(outputs, mine())
        errors = torch.stack(outputs) - torch.stack([EXACT, EXACT + 100])
        assert 0 < errors.abs().max() <= 111 * share * 1.01


DEFECTS: dict[str, Callable[[Kit], None]] = {
    function.__name__: function
    for function in (
        splits_by_keyword, splits_by_position, everything_by_keyword, group_by_position,
        wrong_argument_is_a_type_error, quant_loss_of_lists, quant_loss_of_all_to_all,
        writes_the_buffers_of_the_caller, bfp16_of_any_shape, bfp16_of_transposed, writes_to_strided_buffers,
        leaves_strangers_alone, integers_pass_through, keeps_the_dtype, keeps_inf, types_have_names, asynchronous,
        has_gradients, can_be_compiled, knows_the_other_collectives, rounds_in_blocks,
    )
}  # fmt: skip


def verdicts(name: str) -> dict[tuple[str, str], str]:
    """(implementation, check) -> "" or what went wrong on this rank.

    Some of torch's failures leave the group broken, so each check of an implementation but qpass's has a group of its
    own, which takes the place of the default one.
    """
    found = {}
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(folder)
    for check, run in DEFECTS.items():
        try:
            run(KITS[name])
            found[name, check] = ""
        except (Exception, pytest.fail.Exception) as error:
            found[name, check] = f"{type(error).__name__}: {str(error).strip() or 'wrong'}"[:120]
        if name == "qpass":
            dist.barrier()
        else:
            start_anew(Path(folder[0], check))
    return found


def start_anew(store: Path) -> None:
    """A fresh default group of the same ranks, which meet at a file of that name."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    gc.collect()  # tracebacks hold the old group in cycles, and the other rank waits while its connections are open
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)


def forms() -> dict[str, str]:
    """Function -> how the call that was unlike dist's own was made, or "": each split into positional and keyword."""
    rank, world, everyone = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    sends, receives = ([1, 3], [1, 2]) if rank == 0 else ([2, 2], [3, 2])

    def calls() -> dict[str, dict[str, Any]]:
        """Fresh arguments, in the order of the signature."""
        rows = torch.zeros(sum(receives), 3)
        half, whole = torch.zeros(2, 3), torch.zeros(8, 3)
        splits = {"output_split_sizes": receives, "input_split_sizes": sends}
        asked = {"group": everyone, "async_op": False}
        reduced = {"op": dist.ReduceOp.SUM, **asked}
        return {
            "all_gather": {"tensor_list": buffers(EXACT), "tensor": mine(), **asked},
            "all_gather_single": {"output_tensor": whole, "input_tensor": mine(), **asked},
            "all_gather_into_tensor": {"output_tensor": whole, "input_tensor": mine(), **asked},
            "all_reduce": {"tensor": mine(), **reduced},
            "all_to_all": {"output_tensor_list": buffers(half), "input_tensor_list": list(mine().split(2)), **asked},
            "all_to_all_single": {"output": rows, "input": mine(), **splits, **asked},
            "broadcast": {"tensor": mine(), "src": 1, **asked, "group_src": None},
            "reduce_scatter": {"output": half, "input_list": list(mine().split(2)), **reduced},
            "reduce_scatter_single": {"output": half, "input": mine(), **reduced},
            "reduce_scatter_tensor": {"output": half, "input": mine(), **reduced},
        }  # fmt: skip

    found = {}
    for name, arguments in calls().items():
        func = getattr(dist, name)
        compressed = qpass.comm.auto_quantize(func, qpass.comm.DQuantType.FP16)
        wrong = []
        for positional in range(len(arguments) + 1):
            for async_op in (False, True):
                results = []
                for run in (func, compressed):
                    call = calls()[name] | {"async_op": async_op}
                    values, names = list(call.values()), list(call)
                    keywords = dict(zip(names[positional:], values[positional:], strict=True))
                    work = run(*values[:positional], **keywords)
                    if async_op:
                        work.wait()
                    results.append((work is None, [t.clone() for value in values for t in tensors(value)]))
                same = all(torch.equal(*pair) for pair in zip(results[0][1], results[1][1], strict=True))
                if not same or results[0][0] != results[1][0]:
                    wrong.append(f"{positional} positional, async_op={async_op}")
        found[name] = "; ".join(wrong)
    assert world == 2
    return found


def tensors(value: Any) -> list[Tensor]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Tensor)]


def gradients() -> dict[str, bool]:
    """Functional collective -> whether its result and its gradient are torch's own."""
    everyone, tensor = dist.group.WORLD, mine()
    calls: dict[str, tuple[Any, ...]] = {
        "all_gather_single": (0, everyone), "all_gather_tensor": (1, everyone), "all_reduce": ("sum", everyone),
        "reduce_scatter_single": ("sum", 0, everyone), "all_to_all_single": (None, None, everyone),
        "reduce_scatter_single_autograd": ("SUM", 0, everyone), "all_to_all_single_autograd": (*uneven()[2:], everyone),
    }  # fmt: skip
    found = {}
    for name, arguments in calls.items():
        func = getattr(functional, name)
        results = []
        for run in (func, qpass.comm.auto_quantize(func, qpass.comm.DQuantType.FP16)):
            leaf = tensor.clone().requires_grad_()
            result = run(leaf, *arguments)
            (result * torch.arange(float(result.numel())).view(result.shape)).sum().backward()
            results.append((result.detach().clone(), leaf.grad))
        found[name] = all(torch.equal(*pair) for pair in zip(*results, strict=True))
    averaged = qpass.comm.auto_quantize(functional.all_reduce, qpass.comm.DQuantType.FP16)
    leaf = tensor.clone().requires_grad_()
    averaged(leaf, "avg", everyone).sum().backward()
    found["average"] = torch.equal(leaf.grad, torch.ones_like(leaf))
    return found


def traceable() -> dict[str, bool]:
    """Function -> whether the form that graphs hold gives what the eager one does, bit for bit, in int8."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    values = torch.randn(world * 5, 77)
    sends = [1 + 4 * world * (other == rank) for other in range(world)]
    received = torch.tensor(sends)
    everyone = [torch.empty_like(received) for _ in range(world)]
    dist.all_gather(everyone, received)
    takes = [int(other[rank]) for other in everyone]
    calls: dict[str, Callable[[], tuple[Any, ...]]] = {
        "all_gather": lambda: ([torch.zeros(5, 77) for _ in range(world)], values[:5]),
        "all_gather_single": lambda: (torch.zeros_like(values), values[:5]),
        "all_reduce": lambda: (values.clone(), dist.ReduceOp.AVG),
        "all_reduce, two-shot": lambda: (values.repeat(30, 1),),
        "all_to_all_single": lambda: (torch.zeros(sum(takes), 77), values, takes, sends),
        "reduce_scatter": lambda: (torch.zeros(5, 77), list(values.split(5))),
        "reduce_scatter_single": lambda: (torch.zeros(5, 77), values, dist.ReduceOp.AVG),
    }
    found = {}
    for case, arguments in calls.items():
        name = case.partition(",")[0]
        eager = qpass.comm.auto_quantize(getattr(dist, name), qpass.comm.DQuantType.INT8)
        results = []
        for run in (eager, traced(name, qpass.comm.codec("int8"), None, eager)):
            call = arguments()
            run(*call)
            results.append(torch.cat([output.flatten() for output in tensors(call[0])]))
        found[case] = torch.equal(*results) and bool(results[0].any())
    return found
