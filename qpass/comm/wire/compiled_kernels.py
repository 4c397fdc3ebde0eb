"""The kernels of the wire formats, compiled by Inductor on first use and kept; eager where there is no compiler.

A kernel is compiled once for a wire format, a dtype and a number of payloads, for any number of rows from two up. The
width of a row is a constant: Inductor misreads byte buffers of symbolic width. Eager and compiled give the same bits,
so it never matters which one a rank runs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpass import torch_private
from qpass.comm.wire import kernels as wire_kernels
from qpass.comm.wire.format import SCALES, WireFormat
from qpass.comm.wire.kernels import NONE, Hints

log = logging.getLogger(__name__)

CompiledKernel = Callable[..., Any]

COMPILE_FROM = 1 << 16
"""Elements from which a kernel is worth compiling (seconds, once); smaller calls use it only if it is there."""

_ROWS = 16  # of the example that is traced: any number but 0 and 1
_compiled: dict[tuple[Any, ...], CompiledKernel | None] = {}
_lock = threading.Lock()


def encode_kernel(wire: WireFormat, dtype: torch.dtype, device: torch.device, numel: int) -> CompiledKernel:
    """``kernel(x [rows, row], *codes, scales, *numbers)`` writes codes and scales; views as `encoded` makes them.

    numbers: the seed and the first element's number, int64 scalars, for stochastic formats; else nothing.
    """

    def encode(x: Tensor, *tensors: Tensor, hints: Hints = NONE) -> None:
        codes, scales = tensors[: wire.code_pieces], tensors[wire.code_pieces]
        new_codes, new_scales = wire_kernels.encode_rows(x, wire, tensors[wire.code_pieces + 1 :], hints)
        for out, piece in zip(codes, new_codes, strict=True):
            out.copy_(piece)
        scales.view(new_scales.dtype).copy_(new_scales)

    def example(rows: int) -> list[Tensor]:
        x = torch.empty(rows, wire.row, dtype=dtype, device=device)
        # Each from memory of its own: views of one payload would be taken for aliases that may overlap.
        outs = [encoded(_payload(rows, wire, device), wire)[part] for part in range(wire.code_pieces + 1)]
        numbers = [torch.empty((), dtype=torch.int64, device=device) for _ in range(2 * wire.stochastic)]
        return [x, *outs, *numbers]

    return _kernel(("encode", wire, dtype, device), numel, encode, example)


def reduce_kernel(
    wire: WireFormat, dtype: torch.dtype, device: torch.device, numel: int, world: int, divisor: int
) -> CompiledKernel:
    """``kernel(*outs, *payloads [rows, width])`` writes the sum of `world` payloads over `divisor`.

    outs: the `wire.pieces` equal pieces, ``[rows, row / pieces]``, of ``[rows, row]``.
    """

    def reduce(*tensors: Tensor, hints: Hints = NONE) -> None:
        outs, payloads = tensors[: wire.pieces], tensors[wire.pieces :]
        sums = wire_kernels.reduce_rows((split(payload, wire) for payload in payloads), wire, divisor, hints)
        for out, total in zip(outs, sums, strict=True):
            out.copy_(total)

    def example(rows: int) -> list[Tensor]:
        outs = [
            torch.empty(rows, wire.row, dtype=dtype, device=device).chunk(wire.pieces, dim=1)[piece]
            for piece in range(wire.pieces)
        ]
        return [*outs, *(_payload(rows, wire, device) for _ in range(world))]

    return _kernel(("reduce", wire, dtype, device, world, divisor), numel, reduce, example)


def split(payload: Tensor, wire: WireFormat) -> tuple[Tensor, Tensor]:
    """``uint8 [rows, width] -> codes uint8 [rows, code_bytes], scales [rows, row / block]``, views of their bytes."""
    scales = payload.view(wire_kernels.SCALE_DTYPES[wire.scale])
    return payload[:, : wire.code_bytes], scales[:, wire.code_bytes // SCALES[wire.scale] :]


def encoded(payload: Tensor, wire: WireFormat) -> list[Tensor]:
    """``uint8 [rows, width]`` -> views for what `wire_kernels.encode_rows` returns, in its dtypes: codes, scales."""
    codes, scales = split(payload, wire)
    if wire.format == "fp8_e4m3":
        codes = codes.view(torch.float8_e4m3fn)
    return [*codes.chunk(wire.code_pieces, dim=1), scales]


def _constant(size: int, device: torch.device) -> Tensor:
    """`wire_kernels.hadamard` as a constant of the graph, which would else compute it again for every element."""
    signs = [[1.0 - 2.0 * ((row & column).bit_count() & 1) for column in range(size)] for row in range(size)]
    return torch.tensor(signs, device=device)


def _kernel(
    key: tuple[Any, ...], numel: int, function: CompiledKernel, example: Callable[[int], list[Tensor]]
) -> CompiledKernel:
    if key not in _compiled and numel >= COMPILE_FROM:
        with _lock:  # torch's tracing is not thread-safe
            if key not in _compiled:
                _compiled[key] = _compile(function, example)
    return _compiled.get(key) or function


def _payload(rows: int, wire: WireFormat, device: torch.device) -> Tensor:
    return torch.empty(rows, wire.width, dtype=torch.uint8, device=device)


def _compile(function: CompiledKernel, example: Callable[[int], list[Tensor]]) -> CompiledKernel | None:
    """`function`, compiled for tensors like ``example(rows)`` with any number of rows but 0 and 1."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    from qpass.torch_private import FakeTensorMode, compile_fx

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    any_rows: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    rows = mode.from_tensor(torch.empty(_ROWS, device="cpu"), symbolic_context=any_rows).shape[0]
    with mode:
        fakes = example(rows)
    if fakes[0].device.type == "cpu" and not _has_compiler():
        log.warning("no C++ compiler was found: codecs run eagerly, about 20 times slower")
        return None

    def kernel(*tensors: Tensor) -> None:
        function(*tensors, hints=Hints(getattr(torch.ops._inductor_test, "realize", NONE.keep), _constant))

    with torch.no_grad(), torch_private.tracing(torch_private.TracingContext(mode)):
        graph = make_fx(kernel, tracing_mode="fake")(*fakes)
        compiled: Any = compile_fx(graph, fakes)
    if shapes.guards:  # nobody would check them
        log.warning("a codec was compiled for some numbers of rows only, and runs eagerly: %s", shapes.guards)
        return None
    return compiled


def _has_compiler() -> bool:
    from qpass.torch_private import get_cpp_compiler
    from qpass.torch_private import inductor_exc as exc

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True
