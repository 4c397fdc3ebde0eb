"""Compressed collectives in a graph that is ready for Inductor, or in any graph of functional collectives.

``compress(gm, "int8")`` edits a graph that somebody traced; :class:`CompressCollectives` is the same for Inductor's
post-grad graph, the only place where a backward's collectives exist. The decision (:mod:`qpass.passes.insert_codecs`)
and what follows from it (:mod:`qpass.passes.lower_collectives`) are passes of their own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import qpass.patterns
from qpass.comm.codec import Codec
from qpass.comm.policy import Policy, policy
from qpass.errors import StrictError
from qpass.graph.record import NodeRecord, record_of
from qpass.graph.source import where
from qpass.passes.expand_codecs import ExpandCodecs
from qpass.passes.frame import Pass
from qpass.passes.insert_codecs import InsertCodecs
from qpass.passes.lower_collectives import LowerCollectives
from qpass.rewrite.collective import KINDS, is_other_collective

log = logging.getLogger(__name__)

NONE = """comm was asked for, and a compiled graph has no collective
  where: default DDP and FSDP2 communicate beside the graph, from hooks
  to do: give DDP qpass.comm.ddp_hook("int8") by register_comm_hook, and FSDP2 to qpass.comm.compress_fsdp"""


def compress(
    gm: fx.GraphModule, comm: str | Codec | Policy, *, strict: bool = False, expand: bool = False
) -> fx.GraphModule:
    """Compress the functional collectives of ``gm``, in place, and return it; `collectives` tells what became of each.

    Nodes need ``meta["val"]``, as ``make_fx`` and ``torch.export`` leave it. ``expand`` writes the codecs out in ATen,
    for a compiler to fuse; without it the graph calls ``qpass::encode``, ``decode`` and ``decode_reduce``.

    Raises:
        StrictError: ``strict``, and a collective that the policy wants compressed cannot be.
    """
    # What others rounded or cast is sent narrow first, so that nothing is rounded twice on its way.
    steps: list[Pass] = [LowerCollectives(), InsertCodecs(policy(comm)), LowerCollectives()]
    for step in [*steps, *([ExpandCodecs()] if expand else [])]:
        if step.run(gm):
            gm.graph.eliminate_dead_code()
    gm.graph.lint()
    missed = [(node, record) for node, record in _decided(gm) if record.is_missed]
    if strict and missed:
        places = "\n         ".join(f"{where(node)}: {record.op}: {record.reason}" for node, record in missed)
        hint = "name other kinds in the policy, or compile without strict=True"
        raise StrictError(f"collectives that are wanted compressed and are not: {len(missed)}", where=places, hint=hint)
    gm.recompile()
    return gm


def collectives(gm: fx.GraphModule) -> list[NodeRecord]:
    """The decision about each collective of a graph that `compress` has seen, in the graph's order."""
    return [record for _, record in _decided(gm)]


class CompressCollectives(CustomGraphPass):
    """:func:`compress` in Inductor, once for each graph of a compilation: ``graphs`` of them, 2 in training.

    Warns of what the policy wants and the rules decline, and after the last graph where none had a collective. Every
    decision is a line of the log, and of ``notes``, if given. A graph that Inductor's cache serves is not seen again.
    """

    def __init__(self, comm: Policy, strict: bool = False, graphs: int = 1, notes: list[str] | None = None) -> None:
        self.policy = comm
        self.strict = strict
        self.remaining = graphs
        self.notes = [] if notes is None else notes
        self.seen = 0

    def __call__(self, graph: fx.Graph) -> None:
        from torch._inductor.pattern_matcher import stable_topological_sort  # takes a second to import

        gm = graph.owning_module
        assert gm is not None
        stable_topological_sort(graph)  # Inductor's fusion of DDP's collectives leaves that to what comes after
        found = collectives(compress(gm, self.policy, strict=self.strict, expand=True))
        said = [f"{r.op} of {r.module or r.line}: {r.kernel or 'sent plain'}: {r.reason}" for r in found]
        for line in said:
            log.info(line)
        self.notes += said
        missed = [line for line, record in zip(said, found, strict=True) if record.is_missed]
        if missed:
            warnings.warn("qpass left collectives uncompressed:\n  " + "\n  ".join(missed), stacklevel=2)
        self.seen += len(found)
        self.remaining -= 1
        if self.remaining == 0 and not self.seen:
            warnings.warn(NONE, stacklevel=2)

    def uuid(self) -> str:
        """What a cached graph depends on: this policy, the groups as they are now, torch, and every source of qpass."""
        return repr((self.policy, self.strict, group_sizes(), torch.__version__, get_hash_for_files(tuple(_sources()))))


def group_sizes() -> dict[str, int]:
    """Name -> ranks of every process group that this process is in."""
    if not dist.is_available() or not dist.is_initialized():
        return {}
    names = dist.distributed_c10d._world.pg_names
    return {name: group.size() for group, name in sorted(names.items(), key=lambda item: item[1])}


def _decided(gm: fx.GraphModule) -> Iterable[tuple[fx.Node, NodeRecord]]:
    for node in gm.graph.nodes:
        record = record_of(node)
        if record is not None and (node.target in KINDS or is_other_collective(node)):
            yield node, record


def _sources() -> Iterable[str]:
    for folder in (Path(__file__).parent, Path(qpass.patterns.__file__).parent):
        yield from sorted(map(str, folder.rglob("*.py")))
