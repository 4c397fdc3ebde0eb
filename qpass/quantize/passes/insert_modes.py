"""Put in what training does differently: dropout, random branches, and batch norms by the statistics of the batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qpass.ir.attributes import free_name, get_constant, replace_submodule, set_constant, take_over
from qpass.ir.branch import Branch
from qpass.ir.editor import Editor
from qpass.ir.gradient import DETACH
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.match import normalized, set_arguments
from qpass.ir.observer import is_observer
from qpass.ir.source import module_path
from qpass.ir.training_modules import (
    BY_MODE,
    DROPOUT,
    FLAGGED,
    Attention,
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Dropout,
    Flagged,
    FoldedBias,
    FoldedWeight,
    FoldFactor,
    TrainingChange,
    TrainingModule,
)
from qpass.quantize.passes.annotate import FOLD
from qpass.quantize.passes.set_dropout_aside import ASIDE, Aside
from qpass.spec.fake_quantize import FakeQuantizeBase
from qpass.spec.observers import observer_for

aten = torch.ops.aten

OWN = ((nn.BatchNorm1d, BatchNorm1d), (nn.BatchNorm3d, BatchNorm3d), (nn.modules.batchnorm._BatchNorm, BatchNorm2d))
"""Which class stands for a batch norm of the model; for what is none of torch's three, a `BatchNorm2d`."""


@dataclass(frozen=True)
class InsertModes(Pass):
    """Each operator marked as differing in training becomes a module of `qpass.modes`, and dropout is back::

        batch_norm(conv(x, fq(w), b), gamma, beta, mean, var)
        ->  f = fold_factor_0(gamma, var, enabled)
            w1 = folded_weight_0(w, f)
            b1 = folded_bias_0(b, f, beta, mean, enabled)
            norm(conv(x, fq(w1), b1), gamma, beta, mean, var, count, f, enabled)

    where ``enabled`` is the ``fake_quant_enabled`` of ``fq``, and ``norm`` stands where the model's stood. One
    that is not folded becomes ``norm`` alone, and a functional one ``batch_norm_0``. What is random stands where the
    model's module stood, too, or is ``dropout_0`` below the module that calls it. `RemoveModes` is the inverse.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit = Editor(gm, self.name)
        moved: dict[fx.Node, fx.Node] = {}
        aside = gm.meta.pop(ASIDE, [])
        for entry in aside:
            moved[entry.node] = put_back(entry, moved, edit)
        calls = Counter(node.target for node in gm.graph.nodes if is_observer(node))
        shared = {target for target, count in calls.items() if count > 1}
        marked = [(node, mode) for node in gm.graph.nodes if (mode := node.meta.pop(BY_MODE, None)) is not None]
        for node, mode in marked:
            if node.target in DROPOUT:
                source = normalized(node)["input"]
                replace(node, dropout_of(node, mode), "dropout", (source,), edit, mode)
            elif node.op == "call_module":
                replace(node, branch_of(node, edit.gm), "branch", node.args, edit, mode)
            elif node.target is aten.scaled_dot_product_attention.default:
                given = normalized(node)
                del given["dropout_p"]
                replace(node, Attention(mode.p), "attention", tuple(given.values()), edit, mode)
            elif node.target in FLAGGED:
                given = normalized(node)
                del given[FLAGGED[node.target]]
                name = node.target._schema.name.rpartition("::")[2]
                replace(node, Flagged(node.target), name, tuple(given.values()), edit, mode)
            else:
                self._batch_norm(node, mode, shared, edit)
        return PassResult(len(aside) + len(marked))

    def _batch_norm(self, bn: fx.Node, mode: TrainingChange, shared: set[Any], edit: Editor) -> None:
        given = normalized(bn)
        affine = (given["weight"], given["bias"])
        statistics = (given["running_mean"], given["running_var"])
        count = count_of(bn, mode, edit)
        conv = given["input"]
        observed = normalized(conv)["weight"] if FOLD in bn.meta else None
        if observed is None or not is_fake_quantize(edit.gm, observed):
            call(bn, norm_of(bn, mode, edit), (conv, *affine, *statistics, count), edit)
            return
        own = own_observer(observed, conv, shared, edit)
        name = f"{own.target}.fake_quant_enabled"
        enabled = edit.attribute(name, like=conv, before=own, value=get_constant(edit.gm, name))
        place: dict[str, Any] = {"like": conv, "before": own, "val": statistics[1].meta.get("val")}
        read: tuple[Any, ...] = (affine[0], statistics[1], enabled)
        norm = norm_of(bn, mode, edit)
        module: Any = edit.gm.get_submodule(norm)
        factor = insert(FoldFactor(module), "fold_factor", read, edit, mode, **place)
        read = (normalized(conv)["bias"], factor, affine[1], statistics[0], enabled)
        bias = insert(FoldedBias(module), "folded_bias", read, edit, mode, **place)
        place["val"] = own.meta.get("val")
        own.args = (insert(FoldedWeight(), "folded_weight", (own.args[0], factor), edit, mode, **place),)
        set_arguments(conv, weight=own, bias=bias)
        call(bn, norm, (conv, *affine, *statistics, count, factor, enabled), edit)


def put_back(aside: Aside, moved: dict[fx.Node, fx.Node], edit: Editor) -> fx.Node:
    """Insert what was set aside: behind the fake-quantize where its readers have one in common, else before them.

    ``moved``: what stands for the nodes that were put back already.
    """
    source = moved.get(aside.source, aside.source)
    place: dict[str, Any] = {"like": aside.node, "before": aside.following}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for user in aside.users:
        for read in user.all_input_nodes:
            if read is source or (is_observer(read) and read.args[0] is source):
                readers.setdefault(read, []).append(user)
    shared = next(iter(readers)) if len(readers) == 1 and source.op != "get_attr" else source
    if aside.mode is None:
        call = edit.call(DETACH, shared, val=shared.meta.get("val"), **place)
    else:
        others = (still_there(moved.get(other, other), edit) for other in aside.others)
        module, kind = (
            (dropout_of(aside.node, aside.mode), "dropout") if aside.node.target in DROPOUT
            else (branch_of(aside.node, edit.gm), "branch")
        )  # fmt: skip
        name = add(module, kind, aside.node, edit, aside.mode)
        call = edit.module(name, shared, *others, val=shared.meta.get("val"), **place)
    for read, users in readers.items():
        new = call
        if read is not shared:
            new = edit.module(str(read.target), call, val=read.meta.get("val"), **place)
        for user in users:
            user.replace_input_with(read, new)
        if not read.users and read is not source:
            edit.graph.erase_node(read)
    return call


def own_observer(observed: fx.Node, conv: fx.Node, shared: set[Any], edit: Editor) -> fx.Node:
    """The observer call of a folded weight: one of its own, since each batch norm scales the weight differently.

    ``shared``: the observers that are called at several places.
    """
    if len(observed.users) == 1 and observed.target not in shared:
        conv.prepend(observed)  # behind the parameters of the batch norm
        return observed
    name = free_name(edit.gm, str(observed.target))
    observer: Any = edit.gm.get_submodule(str(observed.target))
    edit.gm.add_module(name, observer_for(observer.spec))
    return edit.module(name, observed.args[0], like=conv, before=conv, val=observed.meta.get("val"))


def is_fake_quantize(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is the call of an observer that rounds."""
    return is_observer(node) and isinstance(gm.get_submodule(str(node.target)), FakeQuantizeBase)


def dropout_of(node: fx.Node, mode: TrainingChange) -> Dropout:
    """The module that does what a dropout operator does."""
    return Dropout(DROPOUT[node.target], mode.p)


def branch_of(node: fx.Node, gm: fx.GraphModule) -> Branch:
    """A `Branch` that does what the one that capture made does."""
    made = gm.get_submodule(str(node.target))
    assert isinstance(made, Branch)
    return Branch(made.body)


def still_there(node: fx.Node, edit: Editor) -> fx.Node:
    """A node, or another of the same constant where nothing read it meanwhile."""
    if not node._erased:
        return node
    value, first = get_constant(edit.gm, str(node.target)), next(iter(edit.graph.nodes))
    return edit.attribute(str(node.target), like=node, before=first, value=value)


def count_of(bn: fx.Node, mode: TrainingChange, edit: Editor) -> fx.Node | None:
    """The ``num_batches_tracked`` of a batch norm, under the name that it has in the model."""
    if not mode.tracked or mode.count is None:
        return None
    owner, _, leaf = mode.tracked.rpartition(".")
    if not hasattr(edit.gm.get_submodule(owner), leaf):
        set_constant(edit.gm, mode.tracked, mode.count)
    return edit.attribute(mode.tracked, like=bn, before=bn, value=mode.count)


def insert(
    module: TrainingModule, name: str, arguments: tuple[Any, ...], edit: Editor, mode: TrainingChange, **place: Any
) -> fx.Node:
    """Insert the call of a new sub-module that the model has no counterpart of."""
    name = edit.numbered(name)
    edit.gm.add_module(name, module.train(mode.training))
    module.held = mode.held
    return edit.module(name, *arguments, **place)


def add(module: TrainingModule, kind: str, node: fx.Node, edit: Editor, mode: TrainingChange) -> str:
    """Add a sub-module, which is in the mode that the model's own is in; its name.

    It stands where the model's stood, if that held nothing else, and serves each call of that. Else it is
    ``kind_0`` below the module that called the operator ``node``, and whatever sets the mode of that sets its own.
    """
    path = module_path(node)
    there = find(edit.gm, path) if mode.alone else None
    if isinstance(there, Dropout) and isinstance(module, Dropout) and str(there) == str(module):
        return path
    name = path if mode.alone and there is None else edit.numbered(f"{path}.{kind}" if path else kind)
    if not edit.gm.add_submodule(name, module.train(mode.training)):
        name = edit.numbered(kind)  # a tensor has that name
        edit.gm.add_module(name, module)
    module.held = mode.held
    return name


def find(gm: fx.GraphModule, path: str) -> nn.Module | None:
    """The sub-module at a dotted path, None where there is none."""
    return dict(gm.named_modules()).get(path)


def norm_of(bn: fx.Node, mode: TrainingChange, edit: Editor) -> str:
    """The name of the sub-module that does what a batch norm does: that of the model's own, where there is one.

    It takes the parameters and statistics over, so their names stay.
    """
    given = normalized(bn)
    mean = given["running_mean"]
    path = str(mean.target).rpartition(".")[0] if mean.op == "get_attr" else ""
    there = edit.gm.get_submodule(path)
    if path and isinstance(there, BatchNorm):
        return path
    kind = next((own for theirs, own in OWN if mode.kind is not None and issubclass(mode.kind, theirs)), None)
    if not path or kind is None or type(there) is not nn.Module:
        return add(BatchNorm(given["eps"], mode.momentum), "batch_norm", bn, edit, mode)
    module = kind(given["eps"], mode.momentum)
    take_over(module, there)
    for name in ("weight", "bias"):
        module._parameters.setdefault(name, None)
    module._buffers.setdefault("num_batches_tracked", None)
    module.num_features, module.affine = mean.meta["val"].shape[0], module.weight is not None
    module.track_running_stats = True
    replace_submodule(edit.gm, path, module.train(mode.training))
    module.held = mode.held
    return path


def call(bn: fx.Node, name: str, arguments: tuple[Any, ...], edit: Editor) -> None:
    """Put the call of a sub-module in the place of an operator; decisions about the operator stay with it."""
    new = edit.module(name, *arguments, like=bn, before=bn)
    new.meta = {**bn.meta, **new.meta}
    bn.replace_all_uses_with(new)
    edit.graph.erase_node(bn)


def replace(
    node: fx.Node, module: TrainingModule, name: str, arguments: tuple[Any, ...], edit: Editor, mode: TrainingChange
) -> None:
    """Put the call of a new sub-module in the place of an operator."""
    call(node, add(module, name, node, edit, mode), arguments, edit)
