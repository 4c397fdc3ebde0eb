"""The cost model of collectives: seconds plain and compressed, the break-even size, and a decision in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from qpass.arithmetic.numerics import dtype_name
from qpass.errors import ConfigError, near

if TYPE_CHECKING:
    import sympy

    from qpass.comm.wire.codec import Codec

# Per collective, in multiples of n / W: (sent by each rank, encoded by each rank, decoded by each rank), and the
# messages that follow each other in the plain and in the compressed form; n counts the elements of the whole tensor
# that the collective moves (the larger of its input and output), W the ranks. Bytes are those of the ring forms,
# messages those of the tree forms: the best that gloo and NCCL do for large and for small tensors. The compressed
# all_reduce is the two-shot one.
FORMS: dict[str, tuple[str, str, str, str, str]] = {
    "all_reduce": ("2*(W - 1)", "W + 1", "2*W", "2*ceiling(log(W, 2))", "2"),
    "reduce_scatter": ("W - 1", "W", "W", "ceiling(log(W, 2))", "1"),
    "all_gather": ("W - 1", "1", "W", "ceiling(log(W, 2))", "1"),
    "all_to_all": ("W - 1", "W", "W", "1", "1"),
    "broadcast": ("W", "W", "W", "ceiling(log(W, 2))", "ceiling(log(W, 2))"),
}


GAIN = 0.9
"""Compression pays where it takes at most this share of the plain time: a guess that is 10 % off must not cost."""


@dataclass(frozen=True)
class Link:
    """The constants of one process group and one codec, equal on all ranks: see `calibrate_link`.

    Args:
        bandwidth: bytes a second that one rank sends while it also receives.
        latency: seconds from sending a small message to its arrival.
        encode, decode: bytes a second of float32 that the codec encodes or decodes on one rank.
        overhead: seconds that a compressed collective costs beside bytes and messages.
    """

    bandwidth: float
    latency: float
    encode: float
    decode: float
    overhead: float = 0.0

    def __post_init__(self) -> None:
        for name in ("bandwidth", "latency", "encode", "decode", "overhead"):
            value = getattr(self, name)
            least = 0.0 if name in ("latency", "overhead") else math.ulp(0.0)
            if not (math.isfinite(value) and value >= least):
                raise ConfigError(f"Link {name} must be {'positive' if least else 'at least 0'}, not {value!r}")


@dataclass(frozen=True)
class Decision:
    """Whether a collective is sent compressed, and why; falsy when it is not.

    Attributes:
        compress: the decision.
        plain, compressed: expected seconds of the two forms; nan where the question does not arise.
        break_even: elements of the whole tensor from which on compression pays, or None where no size is large enough.
        reason: the decision in words.
    """

    compress: bool
    plain: float
    compressed: float
    break_even: int | None
    reason: str

    def __bool__(self) -> bool:
        return self.compress

    def __str__(self) -> str:
        return self.reason


@cache
def symbols() -> dict[str, sympy.Symbol]:
    """The symbols of the cost expressions, all positive, by name.

    ``n`` elements, ``W`` ranks, ``b`` bytes an element of the tensor, ``p`` bytes an element of its payload, ``B``
    bandwidth, ``L`` latency, ``E`` and ``D`` float32 bytes a second encoded and decoded, ``F`` overhead in seconds.
    """
    import sympy  # takes a third of a second to import, which a program that never asks for a decision need not pay

    return {name: sympy.Symbol(name, positive=True) for name in ("n", "W", "b", "p", "B", "L", "E", "D", "F")}


@cache
def seconds(collective: str) -> tuple[sympy.Expr, sympy.Expr]:
    """Expressions for the time of a collective, ``(plain, compressed)``, over `symbols`.

    Coding and sending are added up although the schedules overlap them: the model may decline what would have paid a
    little, and does not ask for what costs. One float32 is 4 bytes to the codec whatever the tensor's dtype.

    Raises:
        ConfigError: no such collective.
    """
    import sympy

    if collective not in FORMS:
        raise ConfigError(f"No collective is named {collective!r}{near(collective, FORMS)}")
    s = symbols()
    sent, encoded, decoded, plain_messages, messages = (sympy.sympify(text, locals=s) for text in FORMS[collective])
    share = s["n"] / s["W"]
    plain = sent * share * s["b"] / s["B"] + plain_messages * s["L"]
    wire = sent * share * s["p"] / s["B"] + messages * s["L"]
    coding = 4 * share * (encoded / s["E"] + decoded / s["D"])
    return plain, wire + coding + s["F"]


@cache
def break_even(collective: str) -> sympy.Expr:
    """The size in elements at which the compressed form takes `GAIN` of the plain time; negative where none does."""
    import sympy

    plain, compressed = seconds(collective)
    (size,) = sympy.solve(sympy.Eq(sympy.Rational(str(GAIN)) * plain, compressed), symbols()["n"])
    return size


@lru_cache(maxsize=1 << 12)  # a training step asks the same again
def decide(collective: str, numel: int, dtype: torch.dtype, world_size: int, codec: Codec, link: Link) -> Decision:
    """Whether one collective is worth compressing.

    Every argument is the same on all ranks, so all ranks decide alike without asking each other.

    Args:
        collective: one of `FORMS`: all_reduce, reduce_scatter, all_gather, all_to_all, broadcast.
        numel: elements of the whole tensor: of the input, or of all_gather's output. For an all_to_all with uneven
            splits, a number that the ranks have agreed on.
        dtype: of the tensor.
        world_size: ranks of the group.
        codec: what would be sent instead.
        link: constants of the group, from `calibrate_link`.
    """
    nan = math.nan
    if collective not in FORMS:
        seconds(collective)  # raises
    if not dtype.is_floating_point:
        return Decision(False, nan, nan, None, f"{collective} of {dtype_name(dtype)} is never compressed")
    if world_size == 1 or numel == 0:
        return Decision(
            False, 0.0, 0.0, None, f"{collective} over {world_size} rank(s) of {numel} elements sends nothing"
        )
    payload = codec.payload_bytes(numel) / numel
    if payload >= dtype.itemsize:
        of_each = f"the {dtype.itemsize} of {dtype_name(dtype)}"
        reason = f"{codec} sends {payload:.2f} bytes an element, no fewer than {of_each}"
        return Decision(False, nan, nan, None, f"{collective} is sent plain: {reason}")
    values = (
        world_size,
        dtype.itemsize,
        payload,
        link.bandwidth,
        link.latency,
        link.encode,
        link.decode,
        link.overhead,
    )
    plain, compressed = (float(value) for value in _compiled(collective)(numel, *values))
    pays = compressed <= GAIN * plain
    slope = _slope(collective)(1, *values)
    gains = slope > 0  # with every element; below, compression saves messages at best
    fixed = [float(value) for value in _compiled(collective)(0, *values)]  # seconds that no element costs
    size = (fixed[1] - GAIN * fixed[0]) / slope if slope else 0.0  # `break_even`, which has no value without a slope
    least = max(1, math.ceil(size)) if gains else None
    if not slope:
        when = "pays at any size" if pays else "never pays on this link"
    elif gains:
        when = f"pays from {least:,} elements on" if size > 0 else "pays at any size"
    else:
        when = f"pays below {math.ceil(size):,} elements only" if size > 0 else "never pays on this link"
    reason = (
        f"{collective} of {numel:,} {dtype_name(dtype)} over {world_size} ranks is sent "
        f"{'as ' + str(codec) if pays else 'plain'}: {_time(compressed)} compressed, {_time(plain)} plain; "
        f"compression {when}"
    )
    return Decision(pays, plain, compressed, least, reason)


@cache
def _compiled(collective: str) -> Callable[..., Any]:
    """`seconds` as one function of the symbols in their order."""
    import sympy

    return sympy.lambdify(list(symbols().values()), list(seconds(collective)), "math")


@cache
def _slope(collective: str) -> Callable[..., Any]:
    """Seconds that compression saves an element, of `GAIN` of the plain time."""
    import sympy

    plain, compressed = seconds(collective)
    return sympy.lambdify(list(symbols().values()), sympy.diff(GAIN * plain - compressed, symbols()["n"]), "math")


def _time(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"
