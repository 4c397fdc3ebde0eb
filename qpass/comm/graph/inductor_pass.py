"""`compress` as a pass of Inductor. Importing this file imports Inductor, so only code that compiles does.

What a compiled graph depends on, beside what Inductor knows itself, is the text that the pass gives its cache as a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from qpass import torch_private
from qpass.comm.graph.collective_records import CollectiveRecords, keep
from qpass.comm.graph.compress import collectives, compress, left_to_inductor
from qpass.comm.graph.passes.insert_codecs import seen_in
from qpass.comm.policy.policy import Policy
from qpass.ir.source import module_stack


class CompressCollectives(torch_private.CustomGraphPass):
    """`compress` in Inductor, for each graph of a compilation; the decisions are kept with the compiled graph.

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
        gm = graph.owning_module
        assert gm is not None
        torch_private.stable_topological_sort(graph)  # Inductor's fusion of DDP's collectives leaves that to others
        seen = seen_in(gm, self.policy, self.backward)
        how: Any = {"backward": self.backward, "gradients": self.gradients}
        compress(gm, self.policy, strict=self.strict, inductor=True, seen=seen, **how)
        overrides = tuple(seen.looked_for(self.policy.overrides))
        records = tuple(collectives(gm))
        keep(CollectiveRecords(self.backward, records, overrides, left_to_inductor(self.policy, records)))

    def uuid(self) -> str:
        """What a cached graph depends on: policy, modules, the groups as they are now, torch, every source of qpass."""
        settings = (self.policy, self.strict, self.backward, self.gradients, self.places, groups(), torch.__version__)
        return repr((*settings, torch_private.get_hash_for_files(tuple(_sources()))))


def places_of(gm: fx.GraphModule) -> str:
    """A digest of the modules around each node of a graph: two programs may differ in nothing else."""
    paths = [[path for path, _ in module_stack(node)] for node in gm.graph.nodes]
    return hashlib.sha256(repr(paths).encode()).hexdigest()


def groups() -> dict[str, tuple[int, str]]:
    """Name -> ranks and description of every process group that this process is in."""
    if not dist.is_available() or not dist.is_initialized():
        return {}
    names = dist.distributed_c10d._world.pg_names
    found = sorted(names.items(), key=lambda item: item[1])
    return {name: (group.size(), group.group_desc) for group, name in found}


def _sources() -> Iterable[str]:
    catalogue = find_spec("qpass.patterns")  # it stands above this file, so it is looked up, not imported
    for folder in (Path(__file__).parents[2], Path(str(catalogue and catalogue.origin)).parent):
        yield from sorted(map(str, folder.rglob("*.py")))
