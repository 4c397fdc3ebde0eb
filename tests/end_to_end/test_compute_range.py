"""bfloat16, in which float operations run by default, turns no finite value into NaN or infinity, and no angle into
another one: masks as models make them, at the places where models put them, through every preset."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from pipeline_run import Do
from qpass import presets

SMALLEST = torch.finfo(torch.float32).min
HIDDEN = torch.zeros(2, 6, 6, dtype=torch.bool)
HIDDEN[0, :, 4:] = True
HIDDEN[1, 2] = True  # a row that is all masked, as those of padding on the left are
HIDDEN[1, 0, 0] = True
X = torch.linspace(-40, 40, 2 * 6 * 8).reshape(2, 6, 8).sin()

Maker = Callable[[Any, Tensor], Tensor]
INPUTS: dict[str, Callable[[], Tensor]] = {
    **{
        name: lambda value=value: HIDDEN * value
        for name, value in {"float32": SMALLEST, "1e9": -1e9, "near": 0.9999 * SMALLEST}.items()
    },
    # float32 still tells scores of -65504 from those of -65503; in a row that is all masked that is all there is
    "half": lambda: (HIDDEN & ~HIDDEN.all(-1, keepdim=True)) * -65504.0,
    "float64": lambda: (HIDDEN * SMALLEST).double(),
    "largest": lambda: torch.where(HIDDEN, SMALLEST, torch.finfo(torch.float32).max),
}
"""Masks that come in, to be added."""

MAKERS: dict[str, Maker] = {
    "product": lambda m, hidden: (1.0 - (~hidden).float()) * SMALLEST,
    "product of integers": lambda m, hidden: (1 - (~hidden).to(torch.int64)).to(torch.float32) * SMALLEST,
    "where": lambda m, hidden: torch.where(hidden, SMALLEST, 0.0),
    "where of tensors": lambda m, hidden: torch.where(hidden, torch.tensor(SMALLEST), torch.tensor(0.0)),
    "masked_fill": lambda m, hidden: torch.zeros(2, 6, 6).masked_fill(hidden, SMALLEST),
    "full": lambda m, hidden: torch.full((2, 6, 6), SMALLEST) * hidden,
    "full_like": lambda m, hidden: torch.full_like(hidden, SMALLEST, dtype=torch.float32).masked_fill(~hidden, 0.0),
    "written": lambda m, hidden: _written(hidden),
    "nan_to_num": lambda m, hidden: torch.zeros(2, 6, 6).masked_fill(hidden, -math.inf).nan_to_num(),
    "minimum": lambda m, hidden: torch.minimum(torch.where(hidden, SMALLEST, 0.0), torch.zeros(6)),
    "split": lambda m, hidden: torch.cat([torch.where(hidden, SMALLEST, 0.0)] * 2, 1).split(6, 1)[1],
    "padded": lambda m, hidden: torch.nn.functional.pad(
        torch.where(hidden, SMALLEST, 0.0), (1, 1), value=SMALLEST
    )[..., 1:-1],
    "buffer": lambda m, hidden: m.mask.clone(),
    "parameter": lambda m, hidden: m.stored.unsqueeze(0).squeeze(0),
    "double": lambda m, hidden: (hidden.double() * SMALLEST).float(),
    "two masks": lambda m, hidden: torch.where(hidden, SMALLEST, 0.0) + torch.where(hidden, -1e9, 0.0),
    "infinite": lambda m, hidden: torch.where(hidden & (hidden.sum(-1, keepdim=True) < 6), -math.inf, 0.0),
}  # fmt: skip
"""Masks that the graph makes, to be added."""


def _written(hidden: Tensor) -> Tensor:
    mask = torch.zeros(2, 6, 6)
    mask[:, 2:] = SMALLEST
    return mask * hidden


def additive(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 2 + mask.float(), -1) @ v


def mask_first(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(mask.float().add(q @ k.mT * 0.5).float(), -1) @ v


def maximum(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT / 2 + mask.float()
    return torch.softmax(torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)), -1) @ v


def fused(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    mask = mask.float().unsqueeze(1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5).squeeze(1)


def handwritten(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT / 2 + mask.float()
    parts = (scores - scores.amax(-1, keepdim=True)).exp()
    return parts / parts.sum(-1, keepdim=True) @ v


def filled(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(torch.where(mask < -1e4, mask.float(), q @ k.mT / 2), -1) @ v


def product(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The mask itself is a factor: of a product that underflows or is finite."""
    return torch.softmax((mask.float() * 1e-38).exp(), -1) @ (mask.float() @ (v * 1e-30)).tanh() + q


POSITIONS = {f.__name__: f for f in (additive, mask_first, maximum, fused, handwritten, filled, product)}
PRESETS = {
    "static": presets.int8_static, "dynamic": presets.int8_dynamic, "weight-only": presets.int8_weight_only,
}  # fmt: skip


def model_of(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    model = Do(lambda m, *args: forward(m, *args), q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8)).eval()
    model.register_buffer("mask", HIDDEN * SMALLEST)
    model.register_buffer("frequencies", 10000.0 ** -(torch.arange(4) / 4))
    model.register_buffer("anchors", torch.tensor([1.0, 257, 301, 1023, 2047, 4095]))
    model.stored = nn.Parameter(HIDDEN * SMALLEST, requires_grad=False)
    return model


Cases = dict[str, Tensor]


@torch.no_grad()
def assert_as_in_float32(forward: Callable[..., Cases], preset: str, *inputs: Tensor, tolerance: float = 0.05) -> None:
    """Against the same rounded model that computes the rest in float32; and it is as finite as the float model."""
    model, results = model_of(forward), []
    for dtype in (None, torch.bfloat16):
        prepared = qpass.prepare(model, inputs, config=PRESETS[preset](compute_dtype=dtype))  # type: ignore[operator]
        expected = prepared(*inputs)
        results.append(qpass.convert(prepared)(*inputs))
    for name, value in results[1].items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        near = torch.isclose(value, results[0][name], atol=tolerance, rtol=0, equal_nan=True)
        assert near.all(), f"{name}: {value[~near]} for {results[0][name][~near]}"


# Scores, probabilities and values, all about 1, are rounded to 8 bits each: 3 * 2**-9, and where a code flips between
# the two models, a step of 2/255 more; 0.05 is three times that. A row weighted wrongly is off by 0.3 and more.
@pytest.mark.parametrize("preset", ["static", "weight-only"])
def test_a_mask_from_outside_means_what_it_means_in_float32(preset: str) -> None:
    def forward(m: Any, x: Tensor, *masks: Tensor) -> Cases:
        named = dict(zip(INPUTS, masks, strict=True))
        return {f"{mask}, {position}": POSITIONS[position](m, m.q(x), m.k(x), m.v(x), named[mask])
                for position in POSITIONS for mask in INPUTS}  # fmt: skip

    assert_as_in_float32(forward, preset, X, *(make() for make in INPUTS.values()))


def test_a_mask_that_the_graph_makes_means_what_it_means_in_float32() -> None:
    def forward(m: Any, x: Tensor, hidden: Tensor) -> Cases:
        return {f"{maker}, {position}": POSITIONS[position](m, m.q(x), m.k(x), m.v(x), MAKERS[maker](m, hidden))
                for position in ("additive", "fused", "filled", "handwritten") for maker in MAKERS}  # fmt: skip

    assert_as_in_float32(forward, "static", X, HIDDEN)


@torch.no_grad()
def test_a_row_of_infinities_is_nan_as_in_float32_and_no_other_row_is() -> None:
    model = model_of(lambda m, x, mask: additive(m, m.q(x), m.k(x), m.v(x), mask))
    mask = torch.where(HIDDEN, -math.inf, 0.0)
    prepared = qpass.prepare(model, (X, mask), config=presets.int8_static(compute_dtype=torch.bfloat16))
    expected = prepared(X, mask).isnan()
    assert expected.any(-1).sum() == 1
    assert torch.equal(qpass.convert(prepared)(X, mask).isnan(), expected)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_compiled_models_keep_masked_rows_finite(preset: str) -> None:
    def forward(m: Any, x: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = m.q(x), m.k(x), m.v(x)
        masks = (mask, MAKERS["product"](m, hidden))
        first, second = (additive(m, q, k, v, each) + fused(m, q, k, v, each) for each in masks)
        return first + second

    model, inputs = model_of(forward), (X, HIDDEN * SMALLEST, HIDDEN)
    prepared = qpass.prepare(model, inputs, config=PRESETS[preset](compute_dtype=torch.bfloat16))  # type: ignore[operator]
    prepared(*inputs)
    quantized = qpass.convert(prepared)
    compiled = torch.compile(quantized, backend="qpass")(*inputs)
    torch.testing.assert_close(compiled, quantized(*inputs), atol=0.2, rtol=0)  # four of the sums above
    torch.testing.assert_close(compiled[1, 2], 4 * model.v(X)[1].mean(0), atol=0.2, rtol=0)


# ---- values that fit, and lose what they are


POSITION_IDS = torch.arange(6).expand(2, 6) * 802 + 1001
"""Odd numbers of 10 bits and more."""


def rotary(frequency: Callable[[Any, Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        angles = frequency(m, positions)
        angles = torch.cat([angles, angles], -1)
        q, k = m.q(x), m.k(x)
        q, k = (y * angles.cos() + torch.cat([-y[..., 4:], y[..., :4]], -1) * angles.sin() for y in (q, k))
        return q @ k.mT

    return forward


ANGLES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "matmul": lambda m, p: (m.frequencies[None, :, None] @ p[:, None, :].float()).transpose(1, 2),
    "einsum": lambda m, p: torch.einsum("bi,j->bij", p.float(), m.frequencies),
    "product": lambda m, p: p.float()[..., None] * m.frequencies,
    "outer": lambda m, p: torch.outer(p.flatten().float(), m.frequencies).unflatten(0, (2, 6)),
    "linear": lambda m, p: torch.nn.functional.linear(p.float()[..., None], m.frequencies[:, None] + p.sum() * 0),
    "floats": lambda m, p: (p * 1.0).unsqueeze(-1) @ m.frequencies[None],
}


@pytest.mark.parametrize("preset", ["static", "weight-only"])
def test_rotary_angles_are_those_of_float32(preset: str) -> None:
    def forward(m: Any, x: Tensor, positions: Tensor) -> Cases:
        return {kind: rotary(ANGLES[kind])(m, x, positions) for kind in ANGLES}

    # q and k, about 1, are rounded to 8 bits, 8 products are added: far below what an angle makes that is off by 2
    assert_as_in_float32(forward, preset, X, POSITION_IDS, tolerance=0.1)


WHOLE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "sum": lambda m, y, p: (y + p.float()[..., None]) - p.float()[..., None],
    "number": lambda m, y, p: y - 10000.5 + 10000.5,
    "anchors": lambda m, y, p: (y + m.anchors[:, None]) - m.anchors[:, None],
    "concatenation": lambda m, y, p: torch.cat([y, p.float()[..., None]], -1)[..., -1:] - p[..., None] + y,
    "cumsum": lambda m, y, p: (y * 0 + (p > 0).to(torch.int64).cumsum(1).float()[..., None] * 1001) - y,
    "product": lambda m, y, p: p.float()[:, None] @ m.anchors[:, None].expand(2, 6, 8) + y,
    "index": lambda m, y, p: (m.v(y) * 0 + (p + 0.5).floor()[..., None] % 7) + y,
}


def test_whole_numbers_beyond_256_are_not_rounded() -> None:
    def forward(m: Any, x: Tensor, positions: Tensor) -> Cases:
        y = m.q(x)
        return {kind: WHOLE[kind](m, y * y, positions) for kind in WHOLE}

    assert_as_in_float32(forward, "weight-only", X, POSITION_IDS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_models_of_other_dtypes_keep_masked_rows_finite(dtype: torch.dtype) -> None:
    def forward(m: Any, x: Tensor, hidden: Tensor) -> Tensor:
        y = m.q(x.float()).to(dtype)
        mask = torch.zeros(2, 6, 6, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        return torch.softmax(y @ y.mT + mask, -1) @ y

    model = model_of(forward)
    prepared = qpass.prepare(model, (X, HIDDEN), config=presets.int8_static(compute_dtype=torch.bfloat16))
    expected = prepared(X, HIDDEN)
    torch.testing.assert_close(qpass.convert(prepared)(X, HIDDEN), expected, atol=0.05, rtol=0)
