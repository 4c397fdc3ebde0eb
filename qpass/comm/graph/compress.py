"""Compressed collectives in a graph that is ready for Inductor, or in any graph of functional collectives.

``compress(gm, "int8")`` edits any traced graph; `inductor_pass.CompressCollectives` is the same for
Inductor's post-grad graph, the only place where a backward's collectives exist. The decision (`passes.insert_codecs`)
and what follows from it (`passes.lower_collectives`) are passes of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import fx

from qpass import torch_private
from qpass.comm.graph.collective import KINDS, is_other_collective
from qpass.comm.graph.passes.expand_codecs import ExpandCodecs
from qpass.comm.graph.passes.insert_codecs import InsertCodecs, seen_in
from qpass.comm.graph.passes.join_transfers import JoinTransfers
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.comm.graph.passes.resolve_sizes import ResolveSizes
from qpass.comm.graph.passes.split_transfers import SplitTransfers
from qpass.comm.graph.pieces import SEND
from qpass.comm.graph.waits import wait_for_each
from qpass.comm.policy.collective_override import OverrideMatches
from qpass.comm.policy.policy import Policy, policy
from qpass.comm.wire.codec import Codec
from qpass.errors import ConfigError, StrictError
from qpass.ir.graph_pass import Pass
from qpass.ir.pipeline import Pipeline
from qpass.ir.record import NodeRecord, records_of
from qpass.ir.source import where


def compress(
    gm: fx.GraphModule, comm: str | Codec | Policy | Mapping[str, Any], *, backward: bool = False,
    strict: bool = False, inductor: bool = False, seen: OverrideMatches | None = None,
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
    wait_for_each(gm)
    compression_pipeline(wanted, backward, gradients, inductor).run(gm)
    missed = [(node, record) for node, record in _decided(gm) if record.is_missed]
    if strict and missed:
        places = "\n         ".join(f"{where(node)}: {record.op}: {record.reason}" for node, record in missed)
        hint = "name other kinds in the policy, or compile without strict=True"
        raise StrictError(f"collectives that are wanted compressed and are not: {len(missed)}", where=places, hint=hint)
    gm.recompile()
    return gm


def compression_pipeline(
    wanted: Policy, backward: bool = False, gradients: Collection[int] | None = None, inductor: bool = False
) -> Pipeline:
    """The passes of `compress`, whose arguments these are."""
    # What others rounded or cast is sent narrow first, so that nothing is rounded twice on its way.
    steps: list[Pass] = [LowerCollectives(), InsertCodecs(wanted, backward, gradients), LowerCollectives()]
    if inductor and not inductor_schedules():
        steps += [ResolveSizes(), SplitTransfers()]
        steps += [JoinTransfers()] if wanted.join else []
    if inductor and wanted.fuse:
        steps.append(ExpandCodecs())
    return Pipeline("lowered", tuple(steps), foreign=True)


def left_to_inductor(wanted: Policy, records: Iterable[NodeRecord]) -> tuple[str, ...]:
    """What is said of a compressed graph whose collectives Inductor was asked to move or to join."""
    options = inductor_schedules()
    if not options or not any(record.outcome == "lowered" for record in records):
        return ()
    joins = ", does not join small ones" if wanted.join else ""
    return (
        f"Inductor schedules the collectives ({', '.join(options)}), so qpass sends each payload whole: it does not "
        f"split large ones{joins}, and does not resolve symbolic sizes",
    )


def collectives(gm: fx.GraphModule) -> list[NodeRecord]:
    """The decision about each collective of a graph that `compress` has seen, in the graph's order."""
    return [record for _, record in _decided(gm)]


def refuse_unmatched(overrides: Iterable[tuple[str, bool, str]]) -> None:
    """Raise ConfigError for overrides that match no collective, with near names; the argument is of `looked_for`."""
    said = "; ".join(f"{override} matches no collective{hint}" for override, met, hint in overrides if not met)
    if said:
        raise ConfigError(f"{said[0].upper()}{said[1:]}", hint="correct the name, or remove the override")


def inductor_schedules() -> list[str]:
    """The options by which Inductor is asked to move or join collectives, which it can do with its own ones only."""
    config = torch_private.inductor_config
    buckets = ("bucket_all_gathers_fx", "bucket_all_reduces_fx", "bucket_reduce_scatters_fx")
    found = [f"{name}={getattr(config, name)!r}" for name in buckets if getattr(config, name) != "none"]
    if config.reorder_for_compute_comm_overlap:
        found.append("reorder_for_compute_comm_overlap")
    if config.aten_distributed_optimizations.enable_overlap_scheduling:
        found.append("aten_distributed_optimizations.enable_overlap_scheduling")
    return found


def _decided(gm: fx.GraphModule) -> Iterable[tuple[fx.Node, NodeRecord]]:
    for node in gm.graph.nodes:
        if node.target in KINDS or node.target is SEND or is_other_collective(node):
            yield from ((node, record) for record in records_of(node))
