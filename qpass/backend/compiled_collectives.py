"""The collectives of one compilation: what was decided about each, also where a cache served the graph."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.autograd.graph import register_multi_grad_hook

from qpass import torch_private
from qpass.comm.eager.agreement import agree_on_plan, debug
from qpass.comm.eager.group import group_of, process_group
from qpass.comm.graph.collective_records import CollectiveRecords, take, unmatched
from qpass.comm.policy.policy import Policy
from qpass.comm.wire.feedback import Feedback
from qpass.errors import QpassWarning
from qpass.torch_private import CompileContext, TracingContext, tree_leaves

log = logging.getLogger(__name__)

NONE = """comm was asked for, and a compiled graph has no collective
  where: default DDP and FSDP2 communicate beside the graph, from hooks
  to do: give DDP qpass.comm.ddp_hook("int8") by register_comm_hook, and FSDP2 to qpass.comm.compress_fsdp"""


class CompiledCollectives:
    """The collectives of a compilation of ``gm``, graph by graph. A backward graph may be compiled later.

    Each collective is a line of the log. A collective that the policy wants compressed and the rules decline is a
    warning. So are overrides that match nothing, and compilations without any collective. Where the policy
    says that the ranks run the same programs (`join`), they compare their decisions before a graph first runs. With
    `qpass.comm.debug` they always do, also when a frame is compiled again. Where the policy has a feedback, graphs of a
    training step run with it, for the parameters of their first run alone.

    Attributes:
        graphs: the records of the collectives, graph by graph.
    """

    def __init__(
        self, gm: fx.GraphModule, policy: Policy, strict: bool = False, backward: bool = False, training: bool = False
    ) -> None:
        from qpass.comm.graph.inductor_pass import CompressCollectives, places_of  # imports Inductor

        self.step = CompressCollectives(policy, strict, backward, places_of(gm))
        self.graphs: list[CollectiveRecords] = []
        self._remaining = 1 + training
        self._backward = backward
        self._is_running = False
        self._feedback = policy.feedback if training or backward else None  # inference has no gradients
        compile_id = CompileContext.current_compile_id()
        self._frame = compile_id.frame_id if compile_id is not None else object()  # recompilations share it
        self._compares = policy.join and _is_first(compile_id)
        self._to_compare: list[CollectiveRecords] = []

    def compiled(self, compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[..., Any]:
        """The result of ``compile(inner)``, where ``inner`` stands in for Inductor's ``compile_fx_inner``.

        Raises, when it is called:
            AgreementError: the ranks have decided differently; on every rank.
            ConfigError: it sends with error feedback, and is given other parameters than at first.
        """
        take()  # what a compilation that failed has left behind
        # AOTAutograd's cache would serve graphs without `_inner`, which binds them to the feedback.
        config = torch_private.functorch_config
        with config.patch(enable_autograd_cache=False) if self._feedback else contextlib.nullcontext():
            call = compile(self._inner)
        if not self._to_compare:  # nothing was compiled: AOTAutograd's cache had all graphs
            self._remaining = 0
            self._add(take() or [CollectiveRecords(self._backward)])
        self._is_running = True
        call = call if self._feedback is None else self._checked(call, self._feedback)
        return self._compared_first(call) if self._compares or debug() else call

    def _inner(self, gm: Any, example_inputs: Any, **options: Any) -> Any:
        take()
        self.step.backward = self._backward or options.get("is_backward", False)
        self.step.gradients = _static_inputs() if options.get("is_backward") else None
        result = torch_private.compile_fx_inner(gm, example_inputs, **options)
        if self._feedback is not None:
            self._bind(result, self._feedback)
        self._remaining = 0 if options.get("is_inference") else self._remaining - 1
        self._add(take() or [CollectiveRecords(self.step.backward)])
        if self._is_running:  # a backward, compiled when it is first needed
            self._compare(self._to_compare)
        return result

    def _bind(self, result: Any, feedback: Feedback) -> None:
        """Run the graph with the residuals of its frame. Its artifact is new at every hit of Inductor's cache, too."""
        run = getattr(result, "current_callable", None)
        if run is None:  # a graph that calls nothing has no artifact
            return

        def bound(inputs: Any) -> Any:
            with feedback.bound(self._frame):
                return run(inputs)

        result.current_callable = bound

    def _checked(self, call: Callable[..., Any], feedback: Feedback) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            feedback.serve(self._frame, parameters_of(arguments))
            return call(*arguments)

        return checked

    def _add(self, found: list[CollectiveRecords]) -> None:
        self.graphs += found
        self._to_compare += found
        missed = []
        for graph in found:
            for line, record in zip(graph.lines(), graph.records, strict=True):
                log.info(line)
                missed += [line] if record.is_missed else []
        if missed:
            warnings.warn("qpass left collectives uncompressed:\n  " + "\n  ".join(missed), QpassWarning, stacklevel=3)
        for note in conclusions([self]):
            warnings.warn(note, QpassWarning, stacklevel=3)

    @property
    def is_complete(self) -> bool:
        """Whether all graphs are known."""
        return self._remaining <= 0

    def _compared_first(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def compared(*arguments: Any) -> Any:
            if not self._to_compare:
                return call(*arguments)
            self._compare([each for each in self._to_compare if each.backward == self._backward])
            result = call(*arguments)
            if self._to_compare:  # a backward that is known already, where other ranks compile theirs when they need it
                found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
                register_multi_grad_hook(found, lambda _: self._compare(self._to_compare), mode="any")
            return result

        return compared

    def _compare(self, found: list[CollectiveRecords]) -> None:
        """One exchange for each group that the graphs ``found`` send on; what agrees is not compared again."""
        plans: dict[str, list[tuple[str, str]]] = {}
        for graph in found if self._compares or debug() else ():
            for name, entries in graph.plans().items():
                plans.setdefault(name, []).extend(entries)
        for name in sorted(plans):  # in one order on all ranks, for each waits for the others
            agree_on_plan(group_of(process_group(name)), plans[name])
        self._to_compare = [each for each in self._to_compare if each not in found]


def _is_first(compile_id: Any) -> bool:
    """Whether all ranks compile this when they first run it: later each does when its own inputs ask for it.

    Compiled autograd has a frame for each of its graphs, and a graph for each form of its inputs.
    """
    return compile_id is not None and compile_id.frame_compile_id == 0 and not compile_id.compiled_autograd_id


def conclusions(compiled: Sequence[CompiledCollectives]) -> list[str]:
    """The notes about several compilations together, once all their graphs are known."""
    if not compiled or not all(each.is_complete for each in compiled):
        return []
    graphs = [graph for each in compiled for graph in each.graphs]
    return unmatched(graphs) if any(graph.records for graph in graphs) else [NONE]


def parameters_of(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The parameters among a graph's arguments; compiled autograd gives its own in lists."""
    return [leaf for leaf in tree_leaves(list(arguments)) if isinstance(leaf, torch.nn.Parameter)]


def _static_inputs() -> tuple[int, ...] | None:
    """The inputs of the forward graph that are weights; a backward graph gives their gradients in the same places."""
    context = TracingContext.try_get()
    return tuple(context.fw_metadata.static_input_indices) if context and context.fw_metadata else None
