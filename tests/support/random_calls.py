"""Random calls of the operators: every overload, dtype, layout, axis and range, sound ones and wrong ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic.decomposed import OPERATORS
from qpass.arithmetic.numerics import CODE_RANGES

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((), (7,), (0,), (1,), (6, 8), (3, 0), (0, 4), (1, 5), (2, 3, 4), (2, 3, 4, 6), (1, 1, 3, 1))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "permuted": lambda x: x.permute(_reversed(x)).contiguous().permute(_reversed(x)),
    "sliced": lambda x: torch.cat([x, x], -1)[..., ::2].narrow(-1, 0, x.shape[-1]) if x.dim() else x,
    "offset": lambda x: torch.cat([x[:1], x])[min(1, len(x)) :] if x.dim() else x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() and len(x) else x,
}


@dataclass
class Call:
    """One call of an overload by its name (`qpass.arithmetic.decomposed.OPERATORS`), and what it was made from."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    about: str = ""

    def on(self, move: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor moved."""
        args = tuple(move(a) if isinstance(a, Tensor) else a for a in self.args)
        return Call(self.name, args, self.kwargs, self.about)


def random_call(name: str, rng: random.Random, wrong: str | None = None, floats: tuple[Any, ...] = FLOATS) -> Call:
    """A call of `name` that is sound, or wrong in the way that is said (where the overload can be wrong in it)."""
    shape, layout = rng.choice(SHAPES), rng.choice(list(LAYOUTS))
    needs_dims = "channel" in name
    if needs_dims and not shape:
        shape = (6, 8)
    dtype = rng.choice(floats)
    x = LAYOUTS[layout]((torch.randn(shape) * 3).to(dtype))
    code = rng.choice(list(CODE_RANGES))
    low, high = CODE_RANGES[code]
    if code in (torch.int8, torch.uint8) and rng.random() < 0.4:
        low, high = rng.choice([(-8, 7), (-127, 127), (-2, 1)] if code == torch.int8 else [(0, 15), (0, 127), (0, 3)])
    if wrong == "bounds":
        low, high = low - 1, high + 1
    if wrong == "order":
        low, high = high, low
    if wrong == "dtype":
        code = rng.choice([torch.int64, torch.float32, torch.bool, torch.int4, torch.uint4])
    bounds: tuple[Any, ...] = (low, high, code)
    about = f"{name} {wrong or 'sound'} {dtype} {code} {layout} {tuple(shape)} {low}..{high}"
    if name == "convert_element_type.no_fuse":
        return Call(name, (x, rng.choice(FLOATS)), about=about)
    if "choose" in name:
        middle = (rng.choice([1e-5, 1e-8]),) if ".tensor" in name else ()
        return Call(name, (x, *(bounds[:2] if middle else ()), *middle, code), about=about)
    if name.startswith("dequantize"):
        stored = code if code in CODE_RANGES else torch.int8
        x = LAYOUTS[layout]((torch.randint(0, 3, shape)).to(stored))
    qparams, tail = _qparams(name, x, rng, wrong)
    if "tensor2" in name:
        bounds = (torch.tensor(low), torch.tensor(high), code)
    if name == "fake_quant_per_channel":
        return Call(name, (x, *qparams, *tail, low, high), about=about)
    if "_group" in name:
        arguments = (x, *qparams, *bounds, *tail)
    else:
        arguments = (x, *qparams, *tail, *bounds)
    if not name.startswith("dequantize"):
        return Call(name, arguments, about=about)
    out = rng.choice(FLOATS)
    if name in ("dequantize_per_token", "dequantize_per_channel_group"):
        return Call(name, (*arguments, out), about=about)
    return Call(name, arguments, {"out_dtype": out} if rng.random() < 0.7 else {}, about)


def wrong_ways(name: str) -> list[str]:
    """In which ways a call of that overload can be wrong."""
    schema = OPERATORS[name][0]
    ways = {"count": "Tensor scale", "axis": "int axis", "group": "int group_size", "order": "int quant_min"}
    ways |= {"bounds": "int quant_min", "dtype": "ScalarType dtype"}
    if name == "convert_element_type.no_fuse":
        return ["none"]
    if name == "fake_quant_per_channel":  # takes any range that some integer dtype holds
        ways = {"count": "Tensor scale", "axis": "int axis", "order": "int quant_min"}
    return [way for way, argument in ways.items() if argument in schema]


def calls(count: int, seed: int, wrong: float = 0.25, floats: tuple[Any, ...] = FLOATS) -> list[Call]:
    """`count` calls, the overloads in turn; a share of `wrong` of them is made wrong in one way."""
    rng = random.Random(seed)
    names = list(OPERATORS)
    return [
        random_call(name, rng, rng.choice(wrong_ways(name)) if rng.random() < wrong else None, floats)
        for name in (names[i % len(names)] for i in range(count))
    ]


def _reversed(x: Tensor) -> list[int]:
    return list(range(x.dim()))[::-1]


def _qparams(name: str, x: Tensor, rng: random.Random, wrong: str | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    off = 1 if wrong == "count" else 0
    tail: tuple[Any, ...] = ()
    if "per_tensor" in name:
        if "tensor." not in name:
            return (rng.uniform(0.01, 0.3) * rng.choice([1, -1]), rng.randint(-3, 3)), ()
        shape: tuple[int, ...] = rng.choice([(), (1,), (1, 1)]) if not off else (2,)
    elif "_group" in name:
        columns = x.shape[-1]
        size = rng.choice([d for d in range(1, columns + 1) if columns % d == 0] or [1])
        shape = (*x.shape[:-1], columns // size + off)
        tail = (0 if wrong == "group" else size,)
    elif "_token" in name:
        shape = (*x.shape[:-1], 1 + off)
        if rng.random() < 0.3:
            shape = (torch.Size(shape).numel(),)
    else:
        axis = rng.randrange(-x.dim(), x.dim())
        shape = (x.shape[axis] + off,)
        tail = (x.dim() + rng.randint(0, 2) if wrong == "axis" else axis,)
    scales = (torch.rand(shape) * 0.3 + 0.01) * rng.choice([1, -1])
    zero_points: Tensor | None = torch.randint(-3, 4, shape, dtype=rng.choice([torch.int32, torch.int64, torch.int8]))
    if rng.random() < 0.3:
        scales = scales.to(rng.choice([torch.float64, torch.bfloat16]))
    if rng.random() < 0.2:
        zero_points = zero_points.to(torch.float32)
    if name in ("dequantize_per_channel", "dequantize_per_channel_group") and rng.random() < 0.3:
        zero_points = None
    return (scales, zero_points), tail
