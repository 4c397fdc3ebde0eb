"""The peers, each in several settings: ``build(model, example_inputs, calibration_batches) -> Peer``, a callable.

A build raises when the peer is not installed or cannot run the model. Some crash instead, so build one peer a process.
"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
Batches = Sequence[Inputs]
Options = dict[str, Any]


@dataclass
class Peer:
    """A built model: call it with torch tensors. ``kernels`` counts the int8 kernels it runs, where the peer tells."""

    run: Callable[..., Any]
    kernels: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


Build = Callable[[nn.Module, Inputs, Batches], Peer]

FREEZING = {"freezing": True}
TUNED = {"freezing": True, "max_autotune": True}
INT8_KERNEL = re.compile(r"(?<=torch\.ops\.onednn\.)q\w+(?=\S*\()|(?<=inline void )\w*micro_gemm(?=\w*\()")
"""In Inductor's code: calls of oneDNN's quantized ops, and GEMM templates that max_autotune may put in their place."""


# ---- Inductor -------------------------------------------------------------------------------------------------------


def inductor(
    model: nn.Module, example_inputs: Inputs, calibration_batches: Batches, *, options: Options, autocast: bool = False
) -> Peer:
    return _compiled(model, example_inputs, options, autocast=autocast)


def inductor_bfloat16(
    model: nn.Module, example_inputs: Inputs, calibration_batches: Batches, *, options: Options
) -> Peer:
    """The whole model in bfloat16, as against autocast's choice of ops."""
    peer = _compiled(copy.deepcopy(model).bfloat16(), tuple(map(_bf16, example_inputs)), options)
    return Peer(lambda *inputs: peer(*map(_bf16, inputs)))


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16() if x.is_floating_point() else x


def _compiled(model: nn.Module, inputs: Inputs, options: Options, *, autocast: bool = False) -> Peer:
    """The model compiled by Inductor without gradients, and the int8 kernels found in its generated code.

    The options are set for the process while it compiles: with ``torch.compile(options=...)`` Dynamo would not see
    ``freezing``, and buffers, which torchao's int8 weights are, would stay inputs of the graph.
    """
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(model)

    def run(*args: Tensor) -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return compiled(*args)

    with torch._inductor.config.patch(options):
        _, code = run_and_get_code(run, *inputs)
    return Peer(run, Counter(INT8_KERNEL.findall("\n".join(code))))


# ---- torchao PT2E ----------------------------------------------------------------------------------------------------


def torchao(
    model: nn.Module,
    example_inputs: Inputs,
    calibration_batches: Batches,
    *,
    dynamic: bool,
    options: Options,
    autocast: bool = False,
) -> Peer:
    quantized = torchao_quantized(model, example_inputs, calibration_batches, dynamic=dynamic)
    peer = _compiled(quantized, example_inputs, options, autocast=autocast)
    if not peer.kernels:
        raise RuntimeError("compiled, but to dequantized float: no int8 kernel in the generated code")
    return peer


def torchao_quantized(model: nn.Module, example_inputs: Inputs, batches: Batches, *, dynamic: bool) -> nn.Module:
    """torchao's PT2E flow for x86 up to the quantized reference graph."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    # strict: without source_fn_stack its annotator raises on a module called twice (ResNet's one ReLU a block)
    exported = torch.export.export(model, example_inputs, strict=True).module()
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
        quantized = convert_pt2e(prepared)
    move_exported_model_to_eval(quantized)
    return quantized


# ---- OpenVINO --------------------------------------------------------------------------------------------------------


def openvino(model: nn.Module, example_inputs: Inputs, calibration_batches: Batches, *, precision: str) -> Peer:
    """NNCF's post-training quantization; ``precision`` ("f32", "bf16") is what the layers left in float run in."""
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    attention = any("Attention" in type(m).__name__ or isinstance(m, nn.LayerNorm) for m in model.modules())
    shapes = [(list(x.shape), ov.Type.f32 if x.is_floating_point() else ov.Type.i64) for x in example_inputs]
    converted = ov.convert_model(model, example_input=example_inputs, input=shapes)
    quantized = nncf.quantize(
        converted,
        nncf.Dataset([[x.numpy() for x in batch] for batch in calibration_batches]),
        preset=nncf.QuantizationPreset.PERFORMANCE,
        model_type=nncf.ModelType.TRANSFORMER if attention else None,
        subset_size=len(calibration_batches),
    )
    channels_last = [x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in example_inputs]
    if any(channels_last):
        steps = ov.preprocess.PrePostProcessor(quantized)
        for i, last in enumerate(channels_last):
            if last:
                steps.input(i).tensor().set_layout(ov.Layout("NHWC"))
                steps.input(i).model().set_layout(ov.Layout("NCHW"))
        quantized = steps.build()

    properties = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = ov.Core().compile_model(quantized, "CPU", properties)
    request = compiled.create_infer_request()

    def run(*inputs: Tensor) -> list[Any]:
        arrays = [
            x.permute(0, 2, 3, 1).numpy() if last else x.numpy() for x, last in zip(inputs, channels_last, strict=True)
        ]
        return list(request.infer(arrays, share_inputs=True, share_outputs=True).values())

    kinds = Counter(str(op.get_rt_info()["primitiveType"]) for op in compiled.get_runtime_model().get_ops())
    return Peer(run, {kind: count for kind, count in kinds.items() if kind.endswith("8")})


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------


def onnxruntime(model: nn.Module, example_inputs: Inputs, calibration_batches: Batches) -> Peer:
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def feed(names: list[str], inputs: Inputs) -> dict[str, Any]:
        return {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}

    class Reader(CalibrationDataReader):
        def __init__(self, names: list[str]) -> None:
            self.feeds = iter([feed(names, batch) for batch in calibration_batches])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        exported, cleaned, int8 = (str(Path(folder, name)) for name in ("float.onnx", "clean.onnx", "int8.onnx"))
        torch.onnx.export(model, example_inputs, exported, dynamo=True, external_data=False, verbose=False)
        quant_pre_process(exported, cleaned, skip_symbolic_shape=True)
        names = [i.name for i in ort.InferenceSession(cleaned, providers=["CPUExecutionProvider"]).get_inputs()]
        quantize_static(
            cleaned,
            int8,
            Reader(names),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(int8, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Any]:
        return session.run(None, feed(names, inputs))

    return Peer(run)


SYSTEMS: dict[str, dict[str, dict[str, Build]]] = {
    "inductor": {
        "inductor fp32": {"default": partial(inductor, options={}), "freezing": partial(inductor, options=FREEZING)},
        "inductor bf16": {
            "autocast": partial(inductor, options=FREEZING, autocast=True),
            "bfloat16()": partial(inductor_bfloat16, options=FREEZING),
        },
    },
    "torchao": {
        f"torchao {kind}": {
            "freezing": partial(torchao, dynamic=dynamic, options=FREEZING),
            "bf16": partial(torchao, dynamic=dynamic, options=FREEZING, autocast=True),
            "max_autotune": partial(torchao, dynamic=dynamic, options=TUNED),
            "bf16+max_autotune": partial(torchao, dynamic=dynamic, options=TUNED, autocast=True),
        }
        for kind, dynamic in (("static", False), ("dynamic", True))
    },
    "openvino": {"openvino int8": {p: partial(openvino, precision=p) for p in ("f32", "bf16")}},
    "onnxruntime": {"onnxruntime int8": {"QDQ u8s8": onnxruntime}},
}
"""Peer -> system -> setting -> build. A system is reported in its fastest setting."""
