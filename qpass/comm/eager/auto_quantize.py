"""auto_quantize: a function of `torch.distributed`, such as dist.all_reduce -> the same function, sending codes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qpass.comm.eager import collectives, functional
from qpass.comm.eager.finished import Finished
from qpass.comm.eager.traced import traced
from qpass.comm.wire.codec import Codec, codec
from qpass.comm.wire.operators import FLOATS
from qpass.errors import InputError, near

Call = dict[str, Any]


class DQuantType(Enum):
    """The form in which values are sent: cast to float16 or bfloat16, or as codes with a scale for each block."""

    FP16 = "fp16"
    BFP16 = "bfp16"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8_e4m3"

    def __str__(self) -> str:
        return self.value

    @property
    def codec(self) -> Codec:
        """The codec of that name."""
        return codec(self.value)


class Plan(NamedTuple):
    """How one call is carried out compressed: ``start()`` sends, ``finish()`` afterwards fills the caller's buffers."""

    start: Callable[[], dist.Work | None]
    finish: Callable[[], None] | None = None


def auto_quantize(
    func: Callable[..., Any], qtype: DQuantType | Codec, quant_loss: float | None = None
) -> Callable[..., Any]:
    """`func` with compression: called in every way in which `func` can be called, with the same effect.

    The caller's own buffers are written, in their own dtype, shape and strides; ``async_op=True`` returns a Work, after
    whose ``wait()`` they are complete; the arguments may be positional or by keyword. `torch.compile` takes the calls
    into its graph that it takes from `torch.distributed` too: all but ``async_op=True``, ``broadcast``, ``all_to_all``.

    `func` itself sends in full what compression cannot help or must not touch: integers, booleans, complex
    numbers, dtypes that are no longer than their codes, reductions other than SUM and AVG, groups of one rank.

    Writing to a buffer has no gradient, as in `torch.distributed`. The functions that return new tensors,
    `torch.distributed._functional_collectives`, keep their gradient: see `qpass.comm.eager.functional`.

    Args:
        func: ``all_gather all_gather_into_tensor all_gather_single all_reduce all_to_all all_to_all_single broadcast
            reduce_scatter reduce_scatter_tensor reduce_scatter_single`` of `torch.distributed`, or ``all_gather_single
            all_reduce all_to_all_single broadcast reduce_scatter_single`` of its ``_functional_collectives``, also by
            their ``_tensor`` and ``_autograd`` names.
        qtype: what values travel as.
        quant_loss: received floating-point values are divided by it, lists of tensors as well.

    Raises:
        InputError: `func` is none of these.
    """
    how = qtype if isinstance(qtype, Codec) else DQuantType(qtype).codec
    signature = inspect.signature(func)
    if func in functional.FUNCTIONS:
        return _functional(func, how, signature, quant_loss)
    name = _name_of(func)
    plan_of, outputs_of = PLANS[name]

    @torch.compiler.disable
    def eager(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        if dist.get_rank(call["group"]) < 0:
            return func(*args, **kwargs)  # not a member: dist says so, and nothing is written
        outputs = outputs_of(call)
        plan = plan_of(call, how) if _compressible(call, how) else None
        if plan is None:
            plan = Plan(lambda: func(*args, **kwargs))
        if quant_loss is not None and all(output.is_floating_point() for output in outputs):
            plan = Plan(plan.start, _both(plan.finish, lambda: _divide(outputs, quant_loss)))
        work = plan.start()
        if plan.finish is None:
            return work
        if work is not None:
            return Finished(work, plan.finish, outputs)
        plan.finish()
        return None

    compiling = traced(name, how, quant_loss, eager)

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return compiling(*args, **kwargs) if torch.compiler.is_compiling() else eager(*args, **kwargs)

    return wrapper


def _functional(
    func: Callable[..., Any], how: Codec, signature: inspect.Signature, quant_loss: float | None
) -> Callable[..., Any]:
    run = functional.FUNCTIONS[func]

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        tensor = call["self"]
        shorter = tensor.dtype in FLOATS and how.bits_per_element < 8 * tensor.element_size()
        result = run(call, how) if shorter and call.get("reduceOp", "sum").lower() in ("sum", "avg") else func(**call)
        return result / quant_loss if quant_loss is not None and result.is_floating_point() else result

    return torch.compiler.disable(wrapper)


def _name_of(func: Callable[..., Any]) -> str:
    for name in PLANS:
        if getattr(dist, name, None) is func:
            return name
    asked = getattr(func, "__name__", repr(func))
    raise InputError(
        f"auto_quantize does not know {asked!r}{near(asked, PLANS)}",
        hint=f"pass one of these functions of torch.distributed: {', '.join(sorted(PLANS))}",
    )


def _compressible(call: Call, how: Codec) -> bool:
    """Whether every rank of the call compresses: read from what all ranks share, dtype, reduction and group."""
    if dist.get_world_size(call["group"]) == 1:
        return False
    values = [tensor for name, value in call.items() if name not in NOT_DATA for tensor in _tensors(value)]
    dtypes = {tensor.dtype for tensor in values}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        return False  # of unequal dtypes dist itself says what is wrong with them
    return call.get("op", dist.ReduceOp.SUM) in SUMS and how.bits_per_element < 8 * values[0].element_size()


SUMS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
NOT_DATA = ("group", "op", "async_op", "src", "group_src", "output_split_sizes", "input_split_sizes")


def _tensors(value: Any) -> Sequence[Tensor]:
    return value if isinstance(value, (list, tuple)) else [value]


def _divide(outputs: Sequence[Tensor], by: float) -> None:
    for output in outputs:
        output.div_(by)


def _both(first: Callable[[], None] | None, second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        if first is not None:
            first()
        second()

    return both


# One plan a collective: (the call's arguments, the codec) -> Plan, or None to leave the call to torch


def _all_gather(call: Call, how: Codec) -> Plan | None:
    outputs, tensor = call["tensor_list"], call["tensor"]
    if len({output.numel() for output in outputs}) != 1:
        return None  # some backends can, and the others say that they cannot
    gathered = tensor.new_empty(len(outputs) * outputs[0].numel())
    start = functools.partial(collectives.all_gather, gathered, tensor, **_rest(call, how))
    return Plan(start, lambda: _fill(outputs, gathered))


def _all_gather_single(call: Call, how: Codec) -> Plan:
    tensors = call["output_tensor"], call["input_tensor"]
    return Plan(functools.partial(collectives.all_gather, *tensors, **_rest(call, how)))


def _all_reduce(call: Call, how: Codec) -> Plan:
    return Plan(functools.partial(collectives.all_reduce, call["tensor"], **_rest(call, how)))


def _reduce_scatter(call: Call, how: Codec) -> Plan | None:
    inputs = call["input_list"]
    if len({part.numel() for part in inputs}) != 1:
        return None
    values = _joined(inputs)
    return Plan(functools.partial(collectives.reduce_scatter, call["output"], values, **_rest(call, how)))


def _reduce_scatter_single(call: Call, how: Codec) -> Plan:
    return Plan(functools.partial(collectives.reduce_scatter, call["output"], call["input"], **_rest(call, how)))


def _all_to_all(call: Call, how: Codec) -> Plan:
    outputs, inputs = call["output_tensor_list"], call["input_tensor_list"]
    splits = [output.numel() for output in outputs], [part.numel() for part in inputs]
    received = inputs[0].new_empty(sum(splits[0]))
    start = functools.partial(collectives.all_to_all, received, _joined(inputs), *splits, **_rest(call, how))
    return Plan(start, lambda: _fill(outputs, received))


def _all_to_all_single(call: Call, how: Codec) -> Plan:
    splits = [call[name] or None for name in ("output_split_sizes", "input_split_sizes")]  # dist: [] means even, too
    run = functools.partial(collectives.all_to_all, call["output"], call["input"], splits[0], splits[1])
    return Plan(functools.partial(run, **_rest(call, how)))


def _broadcast(call: Call, how: Codec) -> Plan:
    rest = _rest(call, how) | {"group_src": call["group_src"]}
    return Plan(functools.partial(collectives.broadcast, call["tensor"], call["src"], **rest))


Plans = dict[str, tuple[Callable[[Call, Codec], Plan | None], Callable[[Call], Sequence[Tensor]]]]

PLANS: Plans = {
    "all_gather": (_all_gather, lambda call: call["tensor_list"]),
    "all_gather_into_tensor": (_all_gather_single, lambda call: [call["output_tensor"]]),
    "all_gather_single": (_all_gather_single, lambda call: [call["output_tensor"]]),
    "all_reduce": (_all_reduce, lambda call: [call["tensor"]]),
    "all_to_all": (_all_to_all, lambda call: call["output_tensor_list"]),
    "all_to_all_single": (_all_to_all_single, lambda call: [call["output"]]),
    "broadcast": (_broadcast, lambda call: [call["tensor"]]),
    "reduce_scatter": (_reduce_scatter, lambda call: [call["output"]]),
    "reduce_scatter_single": (_reduce_scatter_single, lambda call: [call["output"]]),
    "reduce_scatter_tensor": (_reduce_scatter_single, lambda call: [call["output"]]),
}
"""Function of `torch.distributed` -> how it is planned, and which of a call's arguments it writes to."""


def _rest(call: Call, how: Codec) -> Call:
    op = {"op": call["op"]} if "op" in call else {}
    return {"group": call["group"], "codec": how, "async_op": bool(call["async_op"]), **op}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def _fill(outputs: Sequence[Tensor], flat: Tensor) -> None:
    with torch.no_grad():
        for output, part in zip(outputs, flat.split([output.numel() for output in outputs]), strict=True):
            output.copy_(part.view(output.shape))
