"""Uses the installed extension as a user does, and prints what prepare, convert, report, diff and compile see."""

from __future__ import annotations

import json
from typing import Any

import torch
from qpass_extension import ClampInputs, HalfRange
from torch import Tensor, nn

import qpass
from qpass import passes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.fc(x), torch.sigmoid(x))


def outcome(report: Any) -> dict[str, list[str]]:
    return {row.op: [row.outcome, row.kernel, row.reason] for row in report.rows}


def quantized_for(target: str, model: nn.Module, x: Tensor, **options: Any) -> Any:
    config = qpass.presets.int8_static(compute_dtype=None)
    prepared = qpass.prepare(model, (x,), config=config, target=target, **options)
    prepared(x)
    return prepared, qpass.convert(prepared)


def main() -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(8, 16)
    said: dict[str, Any] = {}

    prepared, quantized = quantized_for("x86_with_addcmul", model, x)
    lowered = qpass.lower(quantized)
    said["prepared"] = outcome(qpass.report(prepared))
    said["lowered"] = outcome(qpass.report(lowered))
    said["diff"] = str(qpass.diff(quantized, lowered))
    said["sqnr"] = qpass.sqnr(lowered, model, [x])
    said["exact"] = bool(torch.equal(lowered(x), quantized(x)))
    compiled = torch.compile(quantized, backend="qpass")
    with torch.no_grad():
        said["distance"] = float((compiled(x) - quantized(x)).abs().max())
    report = qpass.report(compiled)
    said["compiled"], said["compiled for"] = outcome(report), report.target

    _, toy = quantized_for("toy", model, x)
    report = qpass.report(qpass.lower(toy))
    said["toy"], said["toy's name"] = outcome(report), report.target
    said["plain x86"] = outcome(qpass.report(quantized_for("x86", model, x)[0]))

    config = qpass.presets.int8_static(compute_dtype=None)
    pipeline = passes.prepare_pipeline(config, "x86_with_addcmul").before("annotate", ClampInputs(0.5))
    with qpass.record() as recorded:
        prepared = qpass.prepare(model, (x,), pipeline=pipeline)
    prepared(x)
    said["clamped"] = bool(torch.equal(prepared(x), torch.addcmul(x, model.fc(x.clamp(-0.5, 0.5)), torch.sigmoid(x))))
    said["recorded"] = {found.name: found.changes for found in recorded}
    said["notes"] = list(qpass.report(prepared).notes)
    said["operations clamped in prepare"] = outcome(qpass.report(prepared))

    prepared, _ = quantized_for("x86_with_addcmul", model, x)
    late = passes.convert_pipeline().before("lower_observers", ClampInputs(0.5))
    said["clamped in convert"] = outcome(qpass.report(qpass.convert(prepared, pipeline=late)))

    spec = qpass.QuantizationSpec(torch.uint8, symmetric=False, observer=HalfRange)
    config = qpass.Config(activation=spec, weight=config.weight)
    prepared = qpass.prepare(nn.Sequential(nn.Linear(16, 16)).eval(), (x,), config=config)
    prepared(x)
    kinds = {type(module).__name__ for module in prepared.modules()}
    said["observers"] = [kind for kind in kinds if "Range" in kind]
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    (node,) = qpass.convert(prepared).graph.find_nodes(op="call_function", target=quantize)
    said["scale times codes over range"] = node.args[1] * 255 / float(x.max() - x.min())
    print(json.dumps(said))


if __name__ == "__main__":
    main()
