"""Compressed collectives in a graph that is ready for Inductor, or in any graph of functional collectives.

``compress(gm, "int8")`` edits a graph that somebody traced; :class:`CompressCollectives` is the same for Inductor's
post-grad graph, the only place where a backward's collectives exist. The decision (`passes.insert_codecs`) and what
follows from it (`passes.lower_collectives`) are passes of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from qpass.comm.graph.collective import KINDS, is_other_collective
from qpass.comm.graph.decisions import GraphDecisions, keep
from qpass.comm.graph.passes.expand_codecs import ExpandCodecs
from qpass.comm.graph.passes.insert_codecs import InsertCodecs, seen_in
from qpass.comm.graph.passes.join_transfers import JoinTransfers
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.comm.graph.passes.resolve_sizes import ResolveSizes
from qpass.comm.graph.passes.split_transfers import SplitTransfers
from qpass.comm.graph.pieces import SEND
from qpass.comm.policy.override import Seen
from qpass.comm.policy.policy import Policy, policy
from qpass.comm.wire.codec import Codec
from qpass.errors import ConfigError, StrictError
from qpass.ir.frame import Pass
from qpass.ir.pipeline import run_pass, watch
from qpass.ir.record import NodeRecord, records_of
from qpass.ir.source import module_stack, where
from qpass.torch_private import CustomGraphPass, get_hash_for_files
from qpass.torch_private import inductor_config as config


def compress(
    gm: fx.GraphModule, comm: str | Codec | Policy | Mapping[str, Any], *, backward: bool = False,
    strict: bool = False, inductor: bool = False, seen: Seen | None = None,
    gradients: Collection[int] | None = None,
) -> fx.GraphModule:  # fmt: skip
    """Compress the functional collectives of ``gm``, in place, and return it; `collectives` tells what became of each.

    Nodes need ``meta["val"]``, as ``make_fx`` and ``torch.export`` leave it. ``backward`` says which of the two graphs
    of a training step this is. ``inductor`` makes the graph ready for Inductor: large transfers go in pieces, small
    ones are joined, and where the policy says ``fuse``, all other codecs are written out in ATen; without it the graph
    calls ``qpass::encode``, ``decode`` and ``decode_reduce``. For a policy that is meant for other graphs, too,
    ``seen`` is what `seen_in` found in this one: then an override may match nothing. ``gradients`` are the outputs of a
    backward graph that are gradients of parameters, None for all; a graph that sends with feedback is run ``with
    feedback.bound()``.

    Raises:
        ConfigError: an override of the policy matches no collective; ``gm`` is as it was.
        StrictError: ``strict``, and a collective that the policy wants compressed cannot be.
    """
    wanted = policy(comm)
    if seen is None:
        refuse_unmatched(seen_in(gm, wanted, backward).looked_for(wanted.overrides))
    # What others rounded or cast is sent narrow first, so that nothing is rounded twice on its way.
    steps: list[Pass] = [LowerCollectives(), InsertCodecs(wanted, backward, gradients), LowerCollectives()]
    watching = watch(gm, "lowered")
    if inductor and not _inductor_schedules():
        steps += [ResolveSizes(), SplitTransfers()]
        steps += [JoinTransfers()] if wanted.join else []
    if inductor and wanted.fuse:
        steps.append(ExpandCodecs())
    for step in steps:
        run_pass(step, gm, (gm,), watching)
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
    """:func:`compress` in Inductor, for each graph of a compilation; the decisions are kept with the compiled graph.

    ``backward`` and ``gradients`` are set to what the next graph is, as for `compress`. ``places`` stands for the
    modules of the program (`places_of`), which a policy may name and Inductor's key leaves out.
    """

    def __init__(self, comm: Policy, strict: bool = False, backward: bool = False, places: str = "") -> None:
        self.policy = comm
        self.strict = strict
        self.backward = backward
        self.gradients: tuple[int, ...] | None = None
        self.places = places

    def __call__(self, graph: fx.Graph) -> None:
        from qpass.torch_private import stable_topological_sort  # takes a second to import

        gm = graph.owning_module
        assert gm is not None
        stable_topological_sort(graph)  # Inductor's fusion of DDP's collectives leaves that to what comes after
        seen = seen_in(gm, self.policy, self.backward)
        how: Any = {"backward": self.backward, "gradients": self.gradients}
        compress(gm, self.policy, strict=self.strict, inductor=True, seen=seen, **how)
        overrides = tuple(seen.looked_for(self.policy.overrides))
        keep(GraphDecisions(self.backward, tuple(collectives(gm)), overrides))

    def uuid(self) -> str:
        """What a cached graph depends on: policy, modules, the groups as they are now, torch, every source of qpass."""
        settings = (self.policy, self.strict, self.backward, self.gradients, self.places, groups(), torch.__version__)
        return repr((*settings, get_hash_for_files(tuple(_sources()))))


def places_of(gm: fx.GraphModule) -> str:
    """A digest of the modules around each node of a graph: two programs may differ in nothing else."""
    paths = [[path for path, _ in module_stack(node)] for node in gm.graph.nodes]
    return hashlib.sha256(repr(paths).encode()).hexdigest()


def refuse_unmatched(overrides: Iterable[tuple[str, bool, str]]) -> None:
    """Raise for overrides that met no collective, with the names near to them; the argument is as of `looked_for`."""
    said = "; ".join(f"{override} matches no collective{hint}" for override, met, hint in overrides if not met)
    if said:
        raise ConfigError(f"{said[0].upper()}{said[1:]}.", hint="correct the name, or remove the override")


def groups() -> dict[str, tuple[int, str]]:
    """Name -> ranks and description of every process group that this process is in."""
    if not dist.is_available() or not dist.is_initialized():
        return {}
    names = dist.distributed_c10d._world.pg_names
    found = sorted(names.items(), key=lambda item: item[1])
    return {name: (group.size(), group.group_desc) for group, name in found}


def _inductor_schedules() -> bool:
    """Whether Inductor is asked to move or join collectives, which it can do with its own ones only."""
    buckets = (config.bucket_all_gathers_fx, config.bucket_all_reduces_fx, config.bucket_reduce_scatters_fx)
    moves = config.reorder_for_compute_comm_overlap or config.aten_distributed_optimizations.enable_overlap_scheduling
    return moves or any(bucket != "none" for bucket in buckets)


def _decided(gm: fx.GraphModule) -> Iterable[tuple[fx.Node, NodeRecord]]:
    for node in gm.graph.nodes:
        if node.target in KINDS or node.target is SEND or is_other_collective(node):
            yield from ((node, record) for record in records_of(node))


def _sources() -> Iterable[str]:
    catalogue = find_spec("qpass.patterns")  # it stands above this file, so it is looked up, not imported
    for folder in (Path(__file__).parents[2], Path(str(catalogue and catalogue.origin)).parent):
        yield from sorted(map(str, folder.rglob("*.py")))
