"""How far an exact lowering may be from the reference: every value of the reference graph with a radius around it.

A lowering is exact up to the order of its sums, so its values start within a few units in the last place of the
reference's. That stays invisible until a value lies so close to a tie that it rounds to the neighbouring code, or to
the neighbouring bfloat16; from there on the difference travels. One lowering does round once more: where rows of
bfloat16 meet a weight of codes, a kernel may return the sum of products in bfloat16, so that every such product is
wider by ``2**-8`` of its sum. Here the reference graph is interpreted on intervals
``value +- radius``: sums widen them by their rounding error, a quantize node widens them by a code where, and only
where, both codes lie within the interval, and every other operation carries them on. Whatever an exact lowering
returns lies inside, and an error of one code anywhere else lies outside.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from qpass.ir.match import normalized
from qpass.islands.qdq import as_dequantize, cast_of
from qpass.islands.views import JOINS, MONOTONE, MOVES, carried
from qpass.ops import graph_ops as qd
from qpass.quantize.passes.assign_compute_dtype import ROWS
from qpass.spec import PerChannel

aten = torch.ops.aten

UNIT = 2.0**-24
"""A float32 operation is off by at most this times its result."""
FEW = 8 * UNIT
"""The same for a handful of operations in two programs: a polynomial for exp or erf, two scales, a bias."""
BFLOAT16 = 2.0**-8
"""Attention in bfloat16 rounds its probabilities; on other values it may round each to the neighbour. A sum of products
of bfloat16 rows is off by at most this times itself once it is rounded, see `_sum_is_rounded`."""


@dataclass(frozen=True)
class Near:
    """A tensor of the reference graph, and elementwise how far another exact program's may be from it (float64)."""

    value: Tensor
    radius: Tensor

    @property
    def wide(self) -> Tensor:
        return self.value.double()

    def within(self, other: Tensor) -> bool:
        """Whether ``other`` has this shape and dtype and lies within the radius everywhere."""
        same = (other.shape, other.dtype) == (self.value.shape, self.value.dtype)
        return same and bool(((other.double() - self.wide).abs() <= self.radius).all())

    def end(self, side: int) -> Tensor:
        """The lower (0) or upper (1) end in the dtype of the value; codes saturate as the quantize node does."""
        end = self.wide + (2 * side - 1) * self.radius
        if not self.value.dtype.is_floating_point:
            info = torch.iinfo(self.value.dtype)
            end = end.clamp(info.min, info.max)
        return end.to(self.value.dtype)


Rule = Callable[..., tuple[Tensor, Tensor]]
"""The arguments of an operator, Near or plain -> its result in float64 and the radius before the result is rounded."""


def bounds(reference: fx.GraphModule, inputs: Sequence[Any]) -> list[Near]:
    """The results of ``reference`` on ``inputs``, flat, each with the radius that holds for every exact lowering."""
    with torch.no_grad():
        results = _Interpreter(reference).run(*inputs)
    return [_near(result) for result in (results if isinstance(results, (tuple, list)) else (results,))]


def _near(x: Any) -> Near:
    return x if isinstance(x, Near) else Near(x, torch.zeros_like(x, dtype=torch.float64))


class _Interpreter(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        exact = not any(isinstance(leaf, Near) for leaf in _leaves((args, kwargs)))
        if n.op != "call_function" or (exact and n.target not in RULES):
            return getattr(self, n.op)(n.target, args, kwargs)
        if n.target is operator.getitem:
            return args[0][args[1]]
        value = n.target(*_values(args), **_values(kwargs))  # type: ignore[operator]
        if not _holds_tensor(value) or n.target in READS_SHAPE:
            return value
        if n.target in DECIDES:
            return _decided(n.target, value, args)
        if n.target in CHOOSE:
            return _choose(n.target, value, args)
        if n.target in EXACT:
            return _ends(n.target, value, args, kwargs)
        if n.target not in RULES:
            raise NotImplementedError(f"no bound is known for {n.target}")
        return self._rounded(n, value)

    def _rounded(self, n: fx.Node, value: Tensor) -> Near:
        def given(argument: fx.Node) -> Any:
            found = self.env[argument]
            return _near(found) if isinstance(found, Tensor) else found

        arguments = {k: fx.node.map_arg(v, given) for k, v in normalized(n).items()}
        result, radius = RULES[n.target](**arguments)
        if _sum_is_rounded(n):
            bias = arguments["self"] if n.target is aten.addmm.default else arguments.get("bias")
            sums = result if bias is None else result - bias.wide  # the kernels add the bias in float32, after that
            radius = radius + BFLOAT16 * (sums.abs() + radius)
        if value.dtype == torch.bfloat16:
            candidates = [(result + side * radius).to(torch.bfloat16) for side in (-1, 1)]
            radius = torch.stack([(c.double() - value.double()).abs() for c in candidates]).amax(0)
        return Near(value, radius)


def _sum_is_rounded(n: fx.Node) -> bool:
    """Whether this is a product whose kernels round its sum to bfloat16: ``Bfloat16Rows``, which x86 chooses since
    int8_weight_only rounds rows to bfloat16. Those take rows of bfloat16 and codes with one scale per channel alone;
    every other product keeps the bound of a sum in float32."""
    if n.target not in ROWS:
        return False
    x, w = (n.args[place] for place in ROWS[n.target])
    rows = cast_of(x, torch.float32)
    while as_dequantize(w) is None and len(carried(w)) == 1:  # type: ignore[arg-type]
        (w,) = carried(w)  # type: ignore[arg-type]
    weight = as_dequantize(w)
    per_channel = weight is not None and isinstance(weight.qparams.granularity, PerChannel)
    return per_channel and rows is not None and rows.meta["val"].dtype == torch.bfloat16


# ---- operators that round nothing: both ends of the interval, exactly


def _ends(target: Any, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that is monotone in each of its arguments, on all corners of their intervals."""
    moving = [index for index, argument in enumerate(args) if any(isinstance(x, Near) for x in _leaves(argument))]
    corners = []
    for sides in itertools.product((0, 1), repeat=len(moving)):
        corner = list(args)
        for index, side in zip(moving, sides, strict=True):
            corner[index] = tree_map(lambda x, side=side: x.end(side) if isinstance(x, Near) else x, args[index])
        corners.append(target(*corner, **kwargs))
    if isinstance(value, (tuple, list)):
        return [_around(part, [corner[index] for corner in corners]) for index, part in enumerate(value)]
    return _around(value, corners)


def _around(value: Tensor, corners: Sequence[Tensor]) -> Near:
    """``value`` and the distance to the farthest of ``corners``."""
    distances = [(corner.double() - value.double()).abs().reshape(value.shape) for corner in corners]
    return Near(value, torch.stack(distances).amax(0).nan_to_num(nan=0.0))  # -inf, a masked score, is near itself


def _decided(target: Any, value: Tensor, args: tuple[Any, ...]) -> Tensor:
    """A yes or no for each element, which must be the same on both ends of its interval: an infinity stays one."""
    if not all(torch.equal(target(args[0].end(side)), value) for side in (0, 1)):
        raise NotImplementedError(f"no bound is known for {target} of values that may be infinite or not")
    return value


def _choose(target: Any, value: tuple[Tensor, Tensor], args: tuple[Any, ...]) -> tuple[Near, Near]:
    """Scale and zero point are monotone in the smallest and in the largest value: all corners of those two."""
    x, *rest = args
    per_token = "per_token" in str(target)

    def extreme(end: Tensor, largest: bool) -> Tensor:
        rows = end if per_token else end.flatten()
        return rows.amax(-1, keepdim=True) if largest else rows.amin(-1, keepdim=True)

    found = [
        target(torch.cat([extreme(low, False), extreme(high, True)], -1), *rest)
        for low, high in itertools.product((x.end(0), x.end(1)), repeat=2)
    ]
    scale, zero_point = (_around(value[i], [corner[i] for corner in found]) for i in (0, 1))
    return scale, zero_point


# ---- operators that round: their error, and what they make of the radii they are given


def _product(call: Callable[..., Tensor]) -> Rule:
    """A sum of K products x * w, plus b: K roundings in one order and K in another."""

    def rule(x: Any, w: Any, b: Any = None, *rest: Any) -> tuple[Tensor, Tensor]:
        x, w, b = _near(x), _near(w), None if b is None else _near(b)
        terms = w.value.numel() // max(1, w.value.shape[0])
        size = call(x.wide.abs(), w.wide.abs(), None if b is None else b.wide.abs(), *rest)
        radius = call(x.radius, w.wide.abs() + w.radius, None if b is None else b.radius, *rest)
        radius = radius + call(x.wide.abs(), w.radius, None, *rest) + 2 * (terms + 8) * UNIT * size
        return call(x.wide, w.wide, None if b is None else b.wide, *rest), radius

    return rule


def _conv(**given: Any) -> tuple[Tensor, Tensor]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    rank = given["weight"].value.dim() - 2
    call = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[rank]
    return _product(call)(*(given[name] for name in names))


def _linear(input: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor]:
    return _product(torch.nn.functional.linear)(input, weight, bias)


def _plus(y: Tensor, b: Tensor | None) -> Tensor:
    return y if b is None else y + b


def _matmul(a: Any, b: Any, bias: Any = None) -> tuple[Tensor, Tensor]:
    return _product(lambda x, w, c: _plus(x @ w, c))(a, b, bias)


def _add(x: Any, other: Any, alpha: Any = 1, sign: int = 1) -> tuple[Tensor, Tensor]:
    assert alpha == 1
    if not isinstance(other, (Tensor, Near)):
        other = torch.tensor(other)
    x, other = _near(x), _near(other)
    return x.wide + sign * other.wide, x.radius + other.radius + FEW * (x.wide.abs() + other.wide.abs())


def _mul(x: Any, other: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(other, (Tensor, Near)):
        other = torch.tensor(other)
    x, other = _near(x), _near(other)
    product = x.wide * other.wide
    radius = x.radius * other.wide.abs() + x.wide.abs() * other.radius + x.radius * other.radius
    return product, radius + FEW * product.abs()


def _lipschitz(call: Callable[..., Tensor], constant: float) -> Rule:
    """``|f(x) - f(y)| <= constant * |x - y|``, and an error of a few units of ``x`` in f itself."""

    def rule(x: Any, *rest: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        return call(x.wide, *rest, **keywords), constant * x.radius + FEW * x.wide.abs()

    return lambda **given: rule(given.pop("self" if "self" in given else "input"), **given)


def _linear_map(call: Callable[..., Tensor]) -> Rule:
    """Averages: linear, with weights that are not negative; a sum of few terms."""

    def rule(**given: Any) -> tuple[Tensor, Tensor]:
        x, rest = given.pop("self" if "self" in given else "input"), list(given.values())
        return call(x.wide, *rest), call(x.radius, *rest) + 16 * FEW * call(x.wide.abs(), *rest)

    return rule


def _softmax_of(scores: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """No probability changes by more than the factor ``exp(2 r)`` when no score changes by more than r."""
    p = torch.softmax(scores, -1)
    return p, p * torch.expm1(2 * radius.amax(-1, keepdim=True)) + 16 * FEW * p


def _softmax(self: Any, dim: int, dtype: Any = None) -> tuple[Tensor, Tensor]:
    assert dim in (-1, self.value.dim() - 1)
    radius = self.radius + FEW * self.wide.abs()
    if self.value.dtype == torch.bfloat16:  # Inductor scales scores after it took their maximum off, and in float32
        radius = radius + BFLOAT16 / 2 * self.wide.abs()
    return _softmax_of(self.wide, radius.masked_fill(self.wide.isinf(), 0))


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, scale: Any, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = _near(query), _near(key), _near(value)
    assert attn_mask is None
    factor = q.value.shape[-1] ** -0.5 if scale is None else scale
    scores, radius = _product(lambda x, w, c: factor * (x @ w))(q, Near(k.value.mT, k.radius.mT))
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores, radius = scores.masked_fill(hidden, -torch.inf), radius.masked_fill(hidden, 0)
    p, p_radius = _softmax_of(scores, radius)
    rounding = UNIT
    if q.value.dtype == torch.bfloat16:  # the same kernel on the same values returns the same; on others, see BFLOAT16
        same = not any(near.radius.any() for near in (q, k, v))
        rounding, p_radius = (0.0, 0 * p_radius) if same else (BFLOAT16, p_radius)
    reach = v.wide.abs() + v.radius
    return p @ v.wide, p_radius @ reach + p @ v.radius + 16 * rounding * (p @ v.wide.abs())


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float, cudnn_enable: bool
) -> tuple[Tensor, Tensor]:
    """Centring adds the mean of the radii; the deviation, a norm, changes by no more than the norm of the change."""
    x = input
    assert len(normalized_shape) == 1
    radius = x.radius + 16 * FEW * x.wide.abs().amax(-1, keepdim=True)
    centred, change = x.wide - x.wide.mean(-1, keepdim=True), radius + radius.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    moved = change.square().mean(-1, keepdim=True).sqrt()
    least = (deviation - moved).clamp(min=eps**0.5)
    y = centred / deviation
    change = torch.minimum(change / least + y.abs() * moved / least, y.abs() + x.value.shape[-1] ** 0.5)
    w, b = (1.0 if weight is None else weight.wide), (0.0 if bias is None else bias.wide)
    return y * w + b, change * abs(w) + 16 * FEW * (abs(y * w) + abs(b))


def _batch_norm(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float,
    eps: float, cudnn_enabled: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = [1, -1] + [1] * (input.value.dim() - 2)
    factor = (running_var.wide + eps).rsqrt() * weight.wide
    shift = bias.wide - running_mean.wide * factor
    size = (running_mean.wide * factor).abs() + bias.wide.abs()
    factor, shift, size = factor.reshape(shape), shift.reshape(shape), size.reshape(shape)
    return input.wide * factor + shift, input.radius * factor.abs() + FEW * ((input.wide * factor).abs() + size)


QUANTIZE = {qd.quantize_per_tensor.default, qd.quantize_per_tensor.tensor, qd.quantize_per_token.default}
DEQUANTIZE = {qd.dequantize_per_tensor.default, qd.dequantize_per_tensor.tensor, qd.dequantize_per_token.default}
CHOOSE = {
    qd.choose_qparams.tensor, qd.choose_qparams_symmetric.tensor, qd.choose_qparams_per_token.default,
    qd.choose_qparams_per_token_asymmetric.default,
}  # fmt: skip

EXACT: frozenset[Any] = MOVES | MONOTONE | JOINS | QUANTIZE | DEQUANTIZE | {
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.to.dtype, aten.chunk.default,
    aten.detach.default, aten.masked_fill.Scalar, aten.clamp.default, aten.where.self,
}  # fmt: skip
"""Monotone in every argument, and the same arithmetic in every program. ``where(isinf(x), x, clamp(x))`` stands before
a cast to bfloat16 of values that may lie beyond it; the condition of `where` is known, see `DECIDES`."""

DECIDES: frozenset[Any] = frozenset({aten.isinf.default})
"""x -> bool: no bound where values within the radius differ in it."""

READS_SHAPE: frozenset[Any] = frozenset({aten.new_ones.default})
"""The result does not depend on any value."""

RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _conv, aten.conv2d.default: _conv, aten.conv3d.default: _conv,
    aten.matmul.default: lambda self, other: _matmul(self, other),
    aten.mm.default: lambda self, mat2: _matmul(self, mat2),
    aten.addmm.default: lambda self, mat1, mat2, beta, alpha: _matmul(mat1, mat2, self),
    aten.add.Tensor: lambda self, other, alpha: _add(self, other, alpha),
    aten.bmm.default: lambda self, mat2: _matmul(self, mat2),
    aten.sub.Tensor: lambda self, other, alpha: _add(self, other, alpha, -1),
    aten.mul.Tensor: lambda self, other: _mul(self, other),
    aten.mul.Scalar: lambda self, other: _mul(self, other),
    aten.gelu.default: _lipschitz(torch.nn.functional.gelu, 1.13),
    aten.silu.default: _lipschitz(torch.nn.functional.silu, 1.1),
    aten.hardswish.default: _lipschitz(torch.nn.functional.hardswish, 1.5),
    aten.sigmoid.default: _lipschitz(torch.sigmoid, 0.25),
    aten.tanh.default: _lipschitz(torch.tanh, 1.0),
    aten.avg_pool2d.default: _linear_map(aten.avg_pool2d.default),
    aten.adaptive_avg_pool2d.default: _linear_map(aten.adaptive_avg_pool2d.default),
    aten.adaptive_avg_pool1d.default: _linear_map(aten.adaptive_avg_pool1d.default),
    aten.mean.dim: _linear_map(lambda x, dim, keepdim, dtype: x.mean(dim, keepdim)),
    aten.softmax.int: _softmax,
    aten.scaled_dot_product_attention.default: _attention,
    aten.layer_norm.default: _layer_norm,
    aten.batch_norm.default: _batch_norm,
}  # fmt: skip


# ---- small things


def _leaves(argument: Any) -> Iterable[Any]:
    if isinstance(argument, dict):
        argument = list(argument.values())
    if isinstance(argument, (tuple, list)):
        return [leaf for item in argument for leaf in _leaves(item)]
    return [argument]


def _values(arguments: Any) -> Any:
    return tree_map(lambda x: x.value if isinstance(x, Near) else x, arguments)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))
