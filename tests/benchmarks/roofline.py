"""The floor under a quantized model's latency: its GEMMs and convolutions as int8 kernels, and nothing between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
onednn = torch.ops.onednn
Kernel = Callable[[], Tensor]

X_ZERO_POINT = 0  # what follows a ReLU; other zero points add a compensation to some kernels


def roofline(
    model: nn.Module, example_inputs: tuple[Tensor, ...], calibration_batches: Any = None
) -> Callable[..., None]:
    """A function that runs every GEMM and convolution of ``model(*example_inputs)`` once, uint8 codes to uint8 codes.

    Each runs on its shape in the model, with weights of its own; GEMMs that follow each other on one input run as one.
    Matrix products of two activations (attention) are not counted.
    """
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        model(*example_inputs)
    kernels = [_qlinear(*shape[1:]) if shape[0] == "gemm" else _qconv(*shape[1:]) for shape in recorder.shapes]

    def run(*_: Tensor) -> None:
        for kernel in kernels:
            kernel()

    return run


class _Recorder(TorchDispatchMode):
    """Notes ``("gemm", M, K, N)`` and ``("conv", input shape, weight shape, stride, padding, dilation, groups)``."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[Any, ...]] = []
        self._last: Tensor | None = None  # kept alive, so that an equal address means the same tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.addmm.default, aten.mm.default):
            x, w = args[-2:]
            self._gemm(x, w.shape[1])
        elif func is aten.convolution.default:
            x, w, _, stride, padding, dilation, _, _, groups = args
            self.shapes.append(("conv", x.shape, w.shape, stride, padding, dilation, groups))
        return func(*args, **(kwargs or {}))

    def _gemm(self, x: Tensor, outputs: int) -> None:
        rows, inner = x.shape
        if self._last is not None and (self._last.data_ptr(), self._last.shape) == (x.data_ptr(), x.shape):
            outputs += self.shapes.pop()[3]
        self._last = x
        self.shapes.append(("gemm", rows, inner, outputs))


def _qlinear(m: int, k: int, n: int) -> Kernel:
    x = torch.randint(0, 256, (m, k), dtype=torch.uint8)
    weight, bias = onednn.qlinear_prepack(_codes(n, k), [m, k]), torch.randn(n)
    scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int32)
    rest = (weight, scales, zeros, bias, 0.1, 128, torch.uint8, "none", [], "")
    return lambda: onednn.qlinear_pointwise(x, 0.02, X_ZERO_POINT, *rest)


def _qconv(x_shape: Any, w_shape: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Kernel:
    x = torch.randint(0, 256, x_shape, dtype=torch.uint8)
    if len(x_shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    scales, zeros = torch.full((w_shape[0],), 0.01), torch.zeros(w_shape[0], dtype=torch.int32)
    weight = onednn.qconv_prepack(
        _codes(*w_shape), scales, 0.02, X_ZERO_POINT, stride, padding, dilation, groups, list(x_shape)
    )
    rest = (weight, scales, zeros, torch.randn(w_shape[0]), stride, padding, dilation, groups)
    return lambda: onednn.qconv_pointwise(x, 0.02, X_ZERO_POINT, *rest, 0.1, 128, torch.uint8, "none", [], "")


def _codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)
