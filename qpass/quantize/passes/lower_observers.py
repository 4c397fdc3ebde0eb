"""Turn observers into q/dq pairs, weights into stored codes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.arithmetic import graph_ops as ops
from qpass.arithmetic.decompositions import table
from qpass.arithmetic.numerics import quantize_weight
from qpass.arithmetic.tiling import BLOCK
from qpass.errors import CalibrationError
from qpass.ir.constants import Constants, expression
from qpass.ir.editor import Editor
from qpass.ir.fake import fake_call
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.origins import Derived
from qpass.ir.source import where
from qpass.quantize.passes.assign_compute_dtype import COMPUTE_DTYPE
from qpass.quantize.passes.insert_observers import is_trained, observers
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec
from qpass.spec.fake_quantize import FakeQuantizeBase
from qpass.spec.observers import observer_for
from qpass.spec.observers.min_max import RangeObserver

ObservedQParams = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LowerObservers(Pass):
    """``observer(x)  ->  dequantize(quantize(x))``, and ``observer(w)  ->  dequantize(codes)`` for a stored weight

    Static parameters are written into the graph as numbers, dynamic ones as ``choose_qparams``. A weight's codes,
    scales and zero points become constants; the float weight is no longer read. The scale is the one that the weight
    was trained with, if it was, else what its observer chooses for its values now.
    """

    def requires(self, gm: fx.GraphModule) -> None:
        constants = Constants(gm)
        blind = [
            node for node, name in observers(gm)
            if node.args[0] not in constants and not _needs_no_data(gm.get_submodule(name))
        ]  # fmt: skip
        if blind:
            seen = [bool(getattr(gm.get_submodule(str(node.target)), "nonfinite", False)) for node in blind]
            lines = [
                where(next(iter(node.users))) + (": NaN and infinities alone" if some else "")
                for node, some in zip(blind, seen, strict=True)
            ]
            places = "\n         ".join(dict.fromkeys(lines))
            raise CalibrationError(
                f"{len(blind)} observers saw no {'finite ' if all(seen) else ''}data",
                where=places,
                hint="run the prepared model on representative batches (qpass.calibrate) that reach these places, "
                "or leave them in float with config.keep_float(module=...)",
            )

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit, constants = Editor(gm, self.name), Constants(gm)
        found, notes = list(observers(gm)), list[str]()
        for node, name in found:
            observer: Any = gm.get_submodule(name)
            spec: QuantizationSpec = observer.spec
            if node.args[0] in constants:
                result = self._weight(node, observer, edit, constants)
            elif spec.dynamic:
                result = self._dynamic(node, spec, edit)
            else:
                result = self._static(node, observer, edit, notes)
            node.replace_all_uses_with(result)
            gm.graph.erase_node(node)
        for name in dict.fromkeys(name for _, name in found):
            gm.delete_submodule(name)
        return PassResult(len(found), tuple(notes))

    def _static(self, node: fx.Node, observer: Any, edit: Editor, notes: list[str]) -> fx.Node:
        scale, zero_point = observer.calculate_qparams()
        spec: QuantizationSpec = observer.spec
        notes += self._about_data(node, observer)
        largest = max(abs(float(getattr(observer, end, 0.0))) for end in ("min_val", "max_val"))
        if float(scale) <= spec.smallest_scale and largest > 0:
            notes.append(
                f"{where(next(iter(node.users)))}: values of at most {largest:.1e} are rounded in steps of "
                f"{float(scale):.1e}, the smallest scale; give the activation's spec a smaller eps"
            )
        qparams = (float(scale), int(zero_point), *spec.range, spec.dtype)
        x, place = node.args[0], {"like": node, "before": node}
        val = fake_call(x, call=torch.empty_like, dtype=spec.dtype)
        codes = edit.call(ops.quantize_per_tensor.default, x, *qparams, val=val, **place)
        return edit.call(ops.dequantize_per_tensor.default, codes, *qparams, val=float_val(x), **place)

    def _about_data(self, node: fx.Node, observer: Any) -> list[str]:
        """Notes on calibration data that look wrong: absurd values, and one value alone."""
        watched = observer.activation_post_process if isinstance(observer, FakeQuantizeBase) else observer
        if not isinstance(watched, RangeObserver):
            return []
        found = [watched.outliers.note(watched.leaves_outliers_out)]
        if watched.has_data and bool((watched.min_val == watched.max_val).all()):
            found.append(f"calibration saw the one value {float(watched.min_val.flatten()[0]):.3g} alone")
        return [f"{where(next(iter(node.users)))}: {text}" for text in found if text]

    def _dynamic(self, node: fx.Node, spec: QuantizationSpec, edit: Editor) -> fx.Node:
        x, place = node.args[0], {"like": node, "before": node}
        per_token = isinstance(spec.granularity, PerToken)
        arguments: tuple[Any, ...]
        if per_token:
            op = ops.choose_qparams_per_token if spec.symmetric else ops.choose_qparams_per_token_asymmetric
            choose, arguments = op.default, (x, spec.dtype)
        else:
            op = ops.choose_qparams_symmetric if spec.symmetric else ops.choose_qparams
            choose, arguments = op.tensor, (x, *spec.range, spec.smallest_scale, spec.dtype)
        # torch's own shape function is wrong about these dtypes, so the fake values come from the decomposition
        val = fake_call(x, *arguments[1:], call=table()[choose])
        chosen = edit.call(choose, *arguments, val=val, **place)
        scale = edit.call(operator.getitem, chosen, 0, **place)
        zero_point = edit.call(operator.getitem, chosen, 1, **place)
        tail = (scale, zero_point, *spec.range, spec.dtype)
        if per_token:
            codes = edit.call(ops.quantize_per_token.default, x, *tail, **place)
            result = edit.call(ops.dequantize_per_token.default, codes, *tail, torch.float32, **place)
        else:
            codes = edit.call(ops.quantize_per_tensor.tensor, x, *tail, **place)
            result = edit.call(ops.dequantize_per_tensor.tensor, codes, *tail, **place)
        for reader in (chosen, codes):
            reader.meta[COMPUTE_DTYPE] = torch.float32  # qparams of bfloat16 values would be bfloat16 themselves
        return result

    def _weight(self, node: fx.Node, observer: Any, edit: Editor, constants: Constants) -> fx.Node:
        spec: QuantizationSpec = observer.spec
        qparams = observer.calculate_qparams() if is_trained(observer) else None
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        names, compute = expression(source)
        parts = _parts_of(source, spec, constants, qparams)
        base = str(source.target) if source.op == "get_attr" else names[0]
        stored = []
        for index, (suffix, value) in enumerate(zip(("codes", "scale", "zero_point"), parts, strict=True)):
            derived = Derived(names, _part(index, compute, spec, qparams))
            stored.append(edit.constant(f"{base}_{suffix}", value, like=node, before=node, derived=derived))
        place = {"like": node, "before": node}
        if isinstance(spec.granularity, PerChannel):
            tail = (*stored, spec.granularity.axis, *spec.range, spec.dtype)
            return edit.call(ops.dequantize_per_channel.default, *tail, val=float_val(source), **place)
        if isinstance(spec.granularity, PerGroup):
            tail = (*stored, *spec.range, spec.dtype, spec.granularity.group_size, torch.float32)
            return edit.call(ops.dequantize_per_channel_group.default, *tail, **place)
        assert isinstance(spec.granularity, PerTensor)
        return edit.call(ops.dequantize_per_tensor.tensor, *stored, *spec.range, spec.dtype, **place)


def _needs_no_data(observer: Any) -> bool:
    return bool(observer.spec.dynamic or observer.has_data)


def float_val(x: Any) -> Any:
    """The fake value of a dequantized ``x``: that of ``x`` itself where it is float32 already, else computed."""
    val = x.meta.get("val")
    return val if isinstance(val, torch.Tensor) and val.dtype == torch.float32 else None


def quantized_parts(
    w: torch.Tensor, spec: QuantizationSpec, qparams: ObservedQParams | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero point of a weight: the given ones, or what its observer chooses for its values now.

    Codes lie in memory as the weight does: a convolution with a channels-last weight returns a channels-last image.
    """
    with torch.no_grad():
        scale, zero_point = observed_qparams(w, spec) if qparams is None else qparams
        if isinstance(spec.granularity, PerGroup):
            rows = w.reshape(-1, spec.granularity.group_size)
            codes = quantize_weight(rows, scale.flatten(), zero_point.flatten(), 0, *spec.range, spec.dtype)
            codes = codes.reshape(w.shape)
        else:
            axis = spec.granularity.axis if isinstance(spec.granularity, PerChannel) else None
            codes = quantize_weight(w, scale, zero_point, axis, *spec.range, spec.dtype)
        if codes.stride() != w.stride():
            codes = torch.empty_like(w, dtype=codes.dtype).copy_(codes)
    return codes, scale, zero_point


def observed_qparams(w: torch.Tensor, spec: QuantizationSpec) -> ObservedQParams:
    """What a fresh observer chooses for a weight."""
    observer = observer_for(spec)
    observer(w)
    return observer.calculate_qparams()


def _parts_of(
    source: fx.Node, spec: QuantizationSpec, constants: Constants, given: ObservedQParams | None
) -> tuple[torch.Tensor, ...]:
    """The parts of a constant; of a product ``w * factor`` with a factor for each row, as folding a batch norm leaves
    it, some rows at a time: the whole product would be one more float copy of the weight."""
    if source.target is not torch.ops.aten.mul.Tensor or spec.granularity != PerChannel(0):
        return quantized_parts(constants.value(source), spec, given)
    w, factor = (constants.value(argument) for argument in source.args)  # type: ignore[arg-type]
    if factor.shape != (len(w), *[1] * (w.dim() - 1)):
        return quantized_parts(constants.value(source), spec, given)
    codes = torch.empty_like(w, dtype=spec.dtype)
    chosen = []
    for rows in torch.arange(len(w)).split(max(1, BLOCK // max(1, w[0].numel()))):
        block = slice(int(rows[0]), int(rows[-1]) + 1)
        own = None if given is None else (given[0][block], given[1][block])
        codes[block], *qparams = quantized_parts(w[block] * factor[block], spec, own)
        chosen.append(qparams)
    scale, zero_point = (torch.cat(part) for part in zip(*chosen, strict=True))
    return codes, scale, zero_point


def _part(index: int, compute: Any, spec: QuantizationSpec, qparams: ObservedQParams | None) -> Any:
    return lambda *values: quantized_parts(compute(*values), spec, qparams)[index]
