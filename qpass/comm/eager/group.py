"""Group: what qpass keeps for a process group, such as its number of calls, its agreements and its thread.

Collectives of one group must be started in the same order on all ranks. Synchronous calls run where they are called,
on the caller's own group. Asynchronous ones run one after the other on a thread, and their later stages start when
the earlier ones have arrived. They would mix with whatever the caller starts meanwhile. So they have a second group of
the same ranks, the twin.

Nothing here keeps a process group alive. Once the user's group is destroyed or collected, its twin and its thread go.
"""

from __future__ import annotations

import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from qpass.errors import InputError
from qpass.torch_private import PrefixStore
from qpass.torch_private import resolve_process_group as _resolve_process_group


class Group:
    """A process group and what qpass knows about it. Made by `group_of`, never directly."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._process_group = weakref.ref(group)
        self.world: int = group.size()
        self.rank: int = group.rank()
        self.name: str = group.group_name
        self.calls = 0
        self.agreements = 0
        self.agreed: set[Any] = set()
        _born[self.name] += 1  # a name may be used again after the process group is destroyed
        prefix = f"qpass/{self.name}/{_born[self.name]}"
        self.store = PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        self._own = _Own()
        weakref.finalize(group, self._own.free)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The user's group, which whoever makes a call of it holds."""
        group = self._process_group()
        if group is None:
            raise InputError(f"The process group {self.name!r} is gone", hint="keep a group as long as it is used")
        return group

    def free_if_destroyed(self) -> None:
        """Free what qpass made for a group that the user has destroyed and still holds."""
        group = self._process_group()
        if group is None or group not in dist.distributed_c10d._world.pg_map:
            self._own.free()

    @property
    def timeout(self) -> timedelta:
        """How long a collective of this group may take."""
        group = self.process_group
        for device in group._device_types:
            options = getattr(group._get_backend(device), "options", None)
            if options is not None:
                return options._timeout
        return dist.constants.default_pg_timeout

    def twin(self) -> dist.ProcessGroup:
        """A group of the same ranks for asynchronous calls. The first call makes it, on all ranks together.

        ``dist.new_group`` would either wait for ranks that are not in the group, or name it by how many groups a rank
        has, which is not the same on all. This is what it does otherwise, with a name that is.
        """
        if self._own.twin is None:
            world, ranks = dist.distributed_c10d._world, dist.get_process_group_ranks(self.process_group)
            default = dist.group.WORLD
            assert default is not None  # there is a group, so there is a default one
            _, store = world.pg_map[default]
            self._own.twin, _ = dist.distributed_c10d._new_process_group_helper(
                self.world,
                self.rank,
                ranks,
                dist.Backend(dist.get_backend(self.process_group)),
                store.clone(),  # type: ignore[attr-defined]  # a client serves one thread at a time; this one waits
                dist.distributed_c10d.GroupName(f"qpass-twin-{self.name}-{_born[self.name]}"),
                timeout=self.timeout,
            )
            world.pg_group_ranks[self._own.twin] = {rank: index for index, rank in enumerate(ranks)}
        return self._own.twin

    def line(self) -> ThreadPoolExecutor:
        """The thread that asynchronous calls of this group run on, one after the other."""
        if self._own.line is None:
            self._own.line = ThreadPoolExecutor(1, thread_name_prefix=f"qpass-{self.name}")
        return self._own.line


class _Own:
    """What qpass made for a group. It does not refer to the group, so it can be freed when the group is collected."""

    def __init__(self) -> None:
        self.twin: dist.ProcessGroup | None = None
        self.line: ThreadPoolExecutor | None = None

    def free(self) -> None:
        """Let the thread end after the jobs that it has, and destroy the twin; a second call does nothing."""
        twin, line, self.twin, self.line = self.twin, self.line, None, None
        if line is not None:
            line.shutdown(wait=False)
        if twin is not None and twin in dist.distributed_c10d._world.pg_map:  # else it went with the default group
            dist.destroy_process_group(twin)


def process_group(name: str) -> dist.ProcessGroup | None:
    """The process group of that name, or None where this process is in none such."""
    try:
        return _resolve_process_group(dist.distributed_c10d.GroupName(name))
    except RuntimeError:
        return None


_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, Group] = weakref.WeakKeyDictionary()
_born: Counter[str] = Counter()


def group_of(group: dist.ProcessGroup | None) -> Group:
    """The `Group` of a process group, or of the default one."""
    if not dist.is_initialized():
        raise InputError("There is no process group", hint="call torch.distributed.init_process_group first")
    process_group = dist.group.WORLD if group is None else group
    if not isinstance(process_group, dist.ProcessGroup):
        raise InputError("This rank is not a member of the group", hint="call only on the group's own ranks")
    found = _groups.get(process_group)
    if found is None:
        for known in list(_groups.values()):
            known.free_if_destroyed()
        found = _groups[process_group] = Group(process_group)
    return found
