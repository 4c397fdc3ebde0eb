"""Signal to quantization noise at every matched node of two graphs, in one run of both side by side.

The two graphs advance together: as soon as both have computed a value, its noise is added up and forgotten, and each
frees values that nothing reads any more. So the memory is that of one forward and a little of the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from qpass.capture.export import FirstBatch, capture
from qpass.inspect.matching.absorbed import absorbed
from qpass.inspect.matching.match import match
from qpass.inspect.render.plot import plot_sqnr
from qpass.inspect.render.sqnr_text import html, text
from qpass.inspect.snapshot import snapshot
from qpass.inspect.unchanged import copied, unchanged
from qpass.inspect.values.nodes import NodeView, Snapshot
from qpass.inspect.values.noise import NodeNoise, NoiseData

BLOCK = 1 << 15
"""Values compared at once: their float64 copies stay small."""
OPERATIONS = ("call_function", "call_method", "call_module")


class SqnrByNode(NoiseData):
    """dB by the path of each compared node of ``b``, in the order of the graph; ``str()`` is the worst ten.

    :class:`NoiseData` has its content.
    """

    def __str__(self) -> str:
        return text(self)

    def __repr__(self) -> str:
        return f"<SqnrByNode: {len(self)} nodes>"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": html(self)}

    def plot(self) -> Any:
        """A matplotlib figure: dB along the graph, the worst ten by name."""
        return plot_sqnr(self)


def sqnr_by_node(a: Any, b: Any, batches: list[Any]) -> SqnrByNode:
    """The SQNR of every operation of ``b`` that has a pair in the reference ``a``, over all ``batches``.

    Sums run in float64. A place where both values are equal, infinite ones included, has no noise; a value that is not
    finite where the other is has infinite noise. Left out are values that are not floats in both graphs
    (codes), and, with a note, the insides of regions. ``a`` and ``b`` are graphs, exported programs, or modules,
    captured on the first batch.
    """
    left, right = _graph(a, batches[0]), _graph(b, batches[0])
    before, after = snapshot(left), snapshot(right)
    pairs = _compared(before, after, match(before, after))
    sums: dict[int, list[float]] = {}
    with unchanged(a, left, right):
        for batch in batches:
            with torch.no_grad():
                steps = _steps(left, batch), _steps(right, batch)
                for index, ref, x in _in_step(*steps, before, after, pairs):
                    signal, noise = _energies(ref, x)
                    total = sums.setdefault(index, [0.0, 0.0])
                    total[0] += signal
                    total[1] += noise
                    del ref, x  # they would live on while the next ones are computed
    reference = {right: left for left, right in pairs.items()}
    ratios = {index: decibels(*energies) for index, energies in sorted(sums.items())}
    inputs = _ratio_of_inputs(after, ratios)
    nodes = [
        NodeNoise(after.nodes[index], before.nodes[reference[index]], ratio, _own(inputs[index], ratio))
        for index, ratio in ratios.items()
    ]
    return SqnrByNode(nodes, Counter(view.region for view in after.nodes if view.region and view.op in OPERATIONS))


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; ``inf`` without noise, ``-inf`` with infinite noise or none but noise."""
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal and math.isfinite(noise) else -math.inf


def _graph(model: Any, batch: Any) -> fx.GraphModule:
    if isinstance(model, FirstBatch):
        return model.captured
    if isinstance(model, ExportedProgram):
        found: fx.GraphModule = model.module(check_guards=False)
        return found
    if isinstance(model, fx.GraphModule):
        return model
    return capture(model, batch if isinstance(batch, Mapping) else _args(batch))


def _args(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _compared(before: Snapshot, after: Snapshot, pairs: Mapping[int, int]) -> dict[int, int]:
    """The pairs whose values may be compared: floating-point results of operations outside regions.

    Where an operation was folded into the one before it, as a batch norm is, the value after it is compared.
    """
    chosen = dict(pairs)
    heirs = {right: left for left, right in pairs.items()}
    for view in before.nodes:
        heir = absorbed(before, after, chosen, view) if view.index not in pairs and view.op == "call_function" else None
        if heir is not None and heir in heirs:
            chosen.pop(heirs[heir], None)
            chosen[view.index], heirs[heir] = heir, view.index
    return {
        left: right
        for left, right in chosen.items()
        if _is_value(before.nodes[left]) and _is_value(after.nodes[right]) and not _holds_codes(after, right)
    }


def _is_value(view: NodeView) -> bool:
    floats = view.val is None or (isinstance(view.val, Tensor) and view.val.is_floating_point())
    return view.op in OPERATIONS and not view.region and floats


def _holds_codes(graph: Snapshot, index: int) -> bool:
    """Whether a float result is one of integer codes, as pooling codes in float32 is."""
    inputs = [graph.nodes[source] for source in graph.nodes[index].inputs[:1]]
    casts = [graph.nodes[view.inputs[0]].val for view in inputs if view.operator.startswith("aten.to.") and view.inputs]
    return any(isinstance(val, Tensor) and not val.is_floating_point() for val in casts)


class _Run(fx.Interpreter):
    """A graph that is run one node at a time."""

    def values(self, inputs: list[Any]) -> Iterator[tuple[str, Any]]:
        self.args_iter: Iterator[Any] = _taken(inputs)
        for node in self.graph.nodes:
            self.env[node] = value = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                self.env.pop(dead, None)
            yield node.name, value
            del value


def _taken(values: list[Any]) -> Iterator[Any]:
    """The values in order, each out of the list as it is given: it lives as long as its reader keeps it."""
    values.reverse()
    while values:
        yield values.pop()


def _steps(gm: fx.GraphModule, batch: Any) -> Iterator[tuple[str, Any]]:
    """Every node's value. The batch is copied at the first step, and no name here holds the copy. It is freed after its
    last reader, as any other value is, so that the copies of both graphs are not alive at once."""
    yield from _Run(gm).values(_inputs(gm, copied(batch)))


def _inputs(gm: fx.GraphModule, batch: Any) -> list[Any]:
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (_args(batch), {})
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is not None and info.in_spec is not None:
        from qpass.torch_private import tree_flatten_spec

        return list(tree_flatten_spec((args, kwargs), info.in_spec) if info.in_spec.num_children == 2 else args)
    return [*args, *kwargs.values()]


def _in_step(
    left: Iterator[tuple[str, Any]], right: Iterator[tuple[str, Any]], before: Snapshot, after: Snapshot,
    pairs: Mapping[int, int],
) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """(index in ``after``, reference, value), both graphs run no further ahead of each other than they must."""
    index_of = {view.name: view.index for view in after.nodes if not view.region}
    partner = {view.name: pairs[view.index] for view in before.nodes if view.index in pairs}
    wanted = set(pairs.values())
    early: dict[int, Any] = {}  # values of ``after`` that wait for their reference
    late: dict[int, Any] = {}  # references that wait for the value
    for name, ref in left:
        index = partner.get(name)
        if index is None or not isinstance(ref, Tensor):
            del ref
            continue
        late[index] = ref
        while index in late and index not in early:
            found = next(right, None)
            if found is None:
                break
            at = index_of[found[0]]
            if at in late:
                yield from _both(at, late.pop(at), found[1])
            elif at in wanted:
                early[at] = found[1]
            del found
        if index in early and index in late:
            yield from _both(index, late.pop(index), early.pop(index))
        del ref


def _both(index: int, ref: Tensor, x: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The two values of a pair, where they can be compared after all."""
    floats = ref.is_floating_point() and isinstance(x, Tensor) and x.is_floating_point()
    if floats and x.shape == ref.shape:
        yield index, ref, x


def _energies(ref: Tensor, x: Tensor) -> tuple[float, float]:
    """The sums of squares of a reference and of the noise on it, in float64, block by block."""
    signal = noise = 0.0
    for one, other in zip(_blocks(ref), _blocks(x), strict=True):
        one, other = one.double(), other.double()
        difference = (one - other).masked_fill_(one == other, 0.0).nan_to_num_(math.inf, math.inf, -math.inf)
        signal += float(one.nan_to_num_(0.0, 0.0, 0.0).square_().sum())
        noise += float(difference.square_().sum())
    return signal, noise


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Parts of at most about ``BLOCK`` values, cut along the longest dimensions; views, no copies."""
    if tensor.numel() <= BLOCK:
        yield tensor
        return
    dim = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
    for half in tensor.tensor_split(2, dim):
        yield from _blocks(half)


def _ratio_of_inputs(graph: Snapshot, ratios: Mapping[int, float]) -> list[float]:
    """For each node the lowest ratio among the values that it was made from; ``inf`` where they are exact."""
    given: list[float] = []
    passed: list[float] = []  # a node that was not compared passes on what it was given
    for view in graph.nodes:
        given.append(min((passed[source] for source in view.inputs), default=math.inf))
        passed.append(ratios.get(view.index, given[-1]))
    return given


def _own(given: float, ratio: float) -> float:
    """The ratio that is left when the noise of an input is taken from that of the result."""
    added = _noise(ratio) - _noise(given)
    return -10 * math.log10(added) if 0 < added < math.inf else (-math.inf if added > 0 else math.inf)


def _noise(ratio: float) -> float:
    """Noise in units of the signal."""
    return math.inf if ratio == -math.inf else 10 ** (-ratio / 10)
