"""The graph module of every stage, and copies of it that share its tensors."""

from __future__ import annotations

import copy
import linecache
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from qpass import torch_private
from qpass.errors import InputError, QpassError
from qpass.ir.attributes import get_constant, is_persistent, owner_of, replace_submodule
from qpass.ir.exporting import asked_for_tensors, warn_of_export
from qpass.ir.input_mismatch import input_mismatch
from qpass.ir.straight_through import StraightThrough, wants_gradients
from qpass.ir.training_modules import TrainingModule


class GraphModule(fx.GraphModule):
    """The graph module of qpass. It takes the text of its code with it when it is freed.

    torch.fx keeps the text of every ``forward`` that it generated, for tracebacks. Each takes some kilobytes, and a
    process that quantizes many models would grow without end. The module cannot be pickled: torch.fx would trace the
    graph again, without its ``meta``.
    """

    def __init__(self, root: Any, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name)
        if isinstance(root, nn.Module):
            keep_order(self, root)

    def _deepcopy_init(self) -> Any:
        return GraphModule.__init__

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``; what the model's own ``train()`` leaves in evaluation mode stays there."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, TrainingModule) and module.held:
                module.eval()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``forward``; InputError where it fails on inputs that the graph does not hold for.

        Gradients pass straight through the rounding of a quantized graph. A lowered graph has none, and raises.
        """
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            warn_of_export(self)
        try:
            if wants_gradients(self, args, kwargs):
                return StraightThrough(self)(*args, **kwargs)
            return super().__call__(*args, **kwargs)
        except QpassError:
            raise
        except Exception as error:
            found = input_mismatch(self, args, kwargs, error)
            if found is None:
                raise
            raise found from error

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As of every module. torch.export asks for them first, and is warned about the graph."""
        asked_for_tensors(self)
        return super().named_buffers(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            f"{type(self).__name__} is a graph of qpass, and pickle would lose what was decided about it",
            hint="write a quantized one with qpass.save; of a prepared one keep the state_dict(), and load it into the "
            "result of the same call of qpass.prepare",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        """A copy with tensors of its own, packed weights among them, which copy.deepcopy cannot look into."""
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor.layout == torch_private.mkldnn_layout:
                memo.setdefault(id(tensor), tensor.detach().clone())
        result = super().__deepcopy__(memo)
        assert isinstance(result, GraphModule)
        type(result).__name__ = type(self).__name__
        for name, module in self.named_modules():  # torch.fx makes every buffer a persistent one
            result.get_submodule(name)._non_persistent_buffers_set |= module._non_persistent_buffers_set
        return result

    def __copy__(self) -> GraphModule:
        """A copy that shares all tensors; its graph is its own."""
        result = copy_graph_module(self)
        assert isinstance(result, GraphModule)
        result._state_dict_hooks = self._state_dict_hooks.copy()
        result._load_state_dict_pre_hooks = copy.deepcopy(self._load_state_dict_pre_hooks, {id(self): result})
        return result

    def recompile(self) -> Any:
        code = super().recompile()
        file = type(self).forward.__code__.co_filename
        weakref.finalize(self, _forget, file).atexit = False
        return code


torch_private.skip_code(GraphModule.__call__.__code__)  # Dynamo's frame is that of forward


class Draft(GraphModule):
    """A graph module whose graph is still being changed. It has no code, and cannot be called before `rebuild`."""

    def recompile(self) -> Any:
        """Nothing: the code would be that of a graph that is about to change."""


def copy_graph_module(gm: fx.GraphModule, kind: type[GraphModule] = GraphModule) -> fx.GraphModule:
    """A copy of the graph, its sub-graphs and its module tree that shares every tensor and observer with ``gm``.

    Holder modules are new, so that constants may be added to the copy without touching the original; parameters and
    buffers are the same tensors, so no weight is copied. What the graph does not read is left behind. A ``Draft`` is
    for the caller that will rebuild it.
    """
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    result_value = graph.graph_copy(gm.graph, mapping)
    source_output = gm.graph.output_node()
    graph.output(result_value).meta = copy.copy(source_output.meta)
    graph.set_codegen(gm.graph._codegen)
    return rebuild(gm, graph, kind)


def rebuild(gm: fx.GraphModule, graph: fx.Graph | None = None, kind: type[GraphModule] = GraphModule) -> fx.GraphModule:
    """A module around ``graph`` (by default ``gm``'s own) that holds just what the graph reads, tensors shared.

    Its code is generated from the graph as it is now, that of its sub-graphs too.
    """
    graph = gm.graph if graph is None else graph
    result = kind(gm, graph, type(gm).__name__)
    result.meta = {key: copy.copy(value) for key, value in gm.meta.items()}
    result.training = gm.training
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        value = get_constant(gm, node.target)
        if isinstance(value, fx.GraphModule):
            region = copy_graph_module(value, kind) if graph is not gm.graph else rebuild(value, kind=kind)
            replace_submodule(result, node.target, region)
        elif not is_persistent(gm, node.target):
            owner, leaf = owner_of(result, node.target)
            owner._non_persistent_buffers_set.add(leaf)
    return result


def keep_order(module: nn.Module, like: nn.Module) -> None:
    """Order the sub-modules of a graph module, which come as its graph reads them, as they are in ``like``."""
    rank = {name: place for place, name in enumerate(like._modules)}
    module._modules = dict(sorted(module._modules.items(), key=lambda item: rank.get(item[0], len(rank))))
    for name, child in module._modules.items():
        if type(child) is nn.Module and isinstance(other := like._modules.get(name), nn.Module):
            keep_order(child, other)


def _forget(file: str) -> None:
    linecache.cache.pop(file, None)
    sources = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", None)
    if sources is not None:
        sources.pop(file, None)
