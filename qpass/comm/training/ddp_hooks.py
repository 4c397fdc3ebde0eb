"""A DDP bucket -> its average over the ranks, sent as codes: `model.register_comm_hook(None, ddp_hook(bits=8))`.

Annotations are not postponed in this file: DDP compares those of a hook with the classes themselves.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # exported, but not said to be

from qpass import torch_private
from qpass.comm.eager import collectives
from qpass.comm.eager.schedule import two_shot_bytes
from qpass.comm.eager.statistics import Statistics, plain_bytes, sent_bytes
from qpass.comm.eager.work import Work
from qpass.comm.policy.cost import Link, decide
from qpass.comm.training.hook_state import HookState, Layout
from qpass.comm.training.ledger import DECLINED_BY_LINK, SPARSE, WARM_UP, Declined, Entry, Ledger
from qpass.comm.training.owned_rows import OwnedRows
from qpass.comm.training.python_bucket import PythonReducer
from qpass.comm.wire.codec import Codec, codec
from qpass.comm.wire.partition import whole_rows
from qpass.errors import AgreementError, ConfigError

Future = torch.futures.Future[torch.Tensor]
_NO_GROUP = (
    "a hook registered with None averages over the default group, of {} ranks; where the model has a group of its own, "
    "call model.register_comm_hook(model.process_group, hook)"
)
FORMATS = {8: "int8", 6: "int6", 4: "int4"}


def ddp_hook(
    bits: int = 8,
    block: int = 128,
    error_feedback: bool = False,
    hadamard: bool = False,
    *,
    format: str | Codec | None = None,
    warm_up: int = 0,
    link: Link | None = None,
    measure_error: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> "DDPHook":
    """A hook with a state of its own: ``model.register_comm_hook(process_group_or_None, ddp_hook(bits=4, ...))``.

    Args:
        bits: of a code: 8, 6 or 4.
        block: elements that share a scale.
        error_feedback: add what rounding took from a gradient to the next step's gradient. It costs a float32 copy of
            the gradients and a second coding. From 3 ranks on the rounding of the sums is fed back as well, by the
            ranks that own them (`qpass.comm.training.owned_rows`).
        hadamard: rotate blocks of 128 before coding, which spreads outliers.
        format: a codec instead of `bits`, `block` and `hadamard`: ``"bf16"`` and ``"fp16"`` are torch's compress hooks.
        warm_up: so many first steps are sent in full.
        link: constants of `calibrate_link`; buckets that would not be faster compressed are then sent in full.
        measure_error: keep `statistics.error_norm` also without error feedback, for a second coding.
        scaler: the GradScaler of the training, for error feedback: residuals then follow the loss scale, and what a
            step took from them that the optimizer skipped is put back. It costs another float32 copy of the gradients,
            and the scale is read once a step. Without it a residual counts in units of the scale of its own step.

    At the first step the ranks compare these options. Where a rank says nothing the hook warns after 10 s and raises
    after 5 minutes, or the group's timeout if that is shorter: that rank may have no hook.

    Raises:
        ConfigError: no such codec.
    """
    if format is not None:
        return DDPHook(codec(format), error_feedback, warm_up, link, measure_error, scaler)
    if bits not in FORMATS:
        raise ConfigError(f"ddp_hook has no codes of {bits!r} bits", hint=f"use one of {', '.join(map(str, FORMATS))}")
    chosen = codec(FORMATS[bits], block=block, hadamard=hadamard)
    return DDPHook(chosen, error_feedback, warm_up, link, measure_error, scaler)


class DDPHook(HookState):
    """What `ddp_hook` makes: callable as a DDP communication hook.

    Each parameter starts a row of blocks, so codes, and the residuals of error feedback, do not depend on how DDP
    groups parameters into buckets, which it changes after the first step. Parameters are numbered in the order of the
    buckets of the first step that the hook sees: register it before the first backward pass, then the numbers, and so
    `state_dict`, mean the same in every run of a model. A hook with error feedback serves one model.
    """

    def __init__(
        self,
        codec: Codec,
        error_feedback: bool = False,
        warm_up: int = 0,
        link: Link | None = None,
        measure_error: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.codec, self.error_feedback, self.warm_up, self.link = codec, error_feedback, warm_up, link
        self.measure_error, self.scaler = measure_error, scaler
        self.statistics, self.ledger, self._python = Statistics(), Ledger(), PythonReducer()
        self._layouts: dict[int, Layout] = {}
        self._numbers: dict[int, int] = {}  # id of a parameter -> its number
        # number -> float32, flat, whole rows: rotation spreads errors to the end
        self._residuals: dict[int, Tensor] = {}
        self._owned: dict[int, Tensor] = {}  # number -> float32 [rows that this rank sums, row]
        self._unit = 1.0  # the loss scale of the running step
        self._place: tuple[int, int] | None = None  # rank and size of the group that the residuals are of
        self._agreed: list[weakref.ref[dist.ProcessGroup]] = []  # the groups whose ranks have the same hook
        self.__name__ = self.__qualname__ = "qpass_ddp_hook"  # DDP logs it

    def __call__(
        self, process_group: dist.ProcessGroup | None, bucket: GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """The future of the bucket's average over the group, in the bucket's own dtype."""
        if isinstance(bucket, tuple):  # of DDP's reducer in Python
            return self._python.average(self, process_group, *bucket)
        group = process_group if process_group is not None else dist.group.WORLD
        assert group is not None
        buffer, world, warm = bucket.buffer(), group.size(), self.statistics.steps < self.warm_up
        with _hinting(process_group, world):
            self._agree(group)
        if bucket.index() == 0:
            self._start_step()
        self.statistics.steps += bucket.is_last()
        if world == 1:
            done: Future = torch.futures.Future()
            done.set_result(buffer)
            return done
        why = SPARSE if buffer.is_sparse else WARM_UP if warm else self._declined(buffer, world)
        layout = None if buffer.is_sparse else self._layout(bucket, group)  # numbers the parameters in every step
        if layout is None or why is not None:
            return self._sent_plain(bucket, group, why)
        plain = plain_bytes(buffer, world)
        values = self._packed(buffer, layout)
        with _hinting(process_group, world):
            sent, work = self._started(values, layout, group)
        self._count(bucket, sent_bytes("all_reduce", sent, world, 1), plain)

        def unpack(future: torch.futures.Future[Any]) -> Tensor:
            future.value()  # raises what went wrong
            return self._unpacked(values, buffer, layout)

        return work.get_future().then(unpack)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or a file: all but what belongs to the model copied from. A copy of a DDP model has no hook yet:
        torch forms its buckets anew, so register one."""
        kept = {"_residuals": self._residuals, "_owned": self._owned}
        cloned = {name: {number: part.clone() for number, part in parts.items()} for name, parts in kept.items()}
        return self.__dict__ | cloned | {"_layouts": {}, "_numbers": {}, "_agreed": []}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What this rank has sent for each bucket since the hook was made, and why if not as codes."""
        return self.ledger.entries

    def _started(self, values: Tensor, layout: Layout, group: dist.ProcessGroup) -> tuple[int, Work]:
        """The bytes of this rank's payloads, and the work that replaces `values` by their average."""
        world = group.size()
        if layout.owned is None:
            shots = "one_shot" if world == 2 else "two_shot"  # never by size, which depends on the buckets
            op = dist.ReduceOp.AVG
            work = collectives.all_reduce(values, op, group, self.codec, async_op=True, schedule=shots)
            payload = self.codec.payload_bytes(values.numel())
            return payload if world == 2 else two_shot_bytes(values.numel(), self.codec, world), work
        sent = world * self.codec.payload_bytes(layout.owned.residual.numel())
        return sent, layout.owned.average(values, group, self._unit, self.scaler is not None)

    def _declined(self, buffer: Tensor, world: int) -> Declined | None:
        pays = self.link is None or decide("all_reduce", buffer.numel(), buffer.dtype, world, self.codec, self.link)
        return None if pays else DECLINED_BY_LINK

    def _sent_plain(self, bucket: GradBucket, group: dist.ProcessGroup, why: Declined | None) -> Future:
        """The average as torch's own hook takes it, sparse gradients too."""
        buffer, world = bucket.buffer(), group.size()
        plain = plain_bytes(buffer, world)
        self._count(bucket, plain, plain, why)
        work = dist.all_reduce(buffer.div_(world), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def _count(self, bucket: GradBucket, sent: int, plain: int, why: Declined | None = None) -> None:
        parameters = bucket.parameters()
        numel = sum(parameter.numel() for parameter in parameters)
        place = f"bucket {bucket.index()}: {numel} elements of {len(parameters)} parameters"
        self.statistics.add(sent, plain)
        self.ledger.add(place, "all_reduce", sent, plain, "" if why else str(self.codec), why)

    def _layout(self, bucket: GradBucket, group: dist.ProcessGroup) -> Layout:
        parameters, row = bucket.parameters(), self.codec.row
        # complex parameters lie in a bucket as pairs of real numbers
        sizes = [parameter.numel() * (1 + parameter.is_complex()) for parameter in parameters]
        if not self.error_feedback:
            return _layout_of(tuple(sizes), row)
        found = self._layouts.get(bucket.index())
        if found is not None and _same(found.parameters, parameters):
            return found
        for parameter in parameters:
            self._numbers.setdefault(id(parameter), len(self._numbers))
        padded = [whole_rows(size, row) for size in sizes]
        layout = Layout(sizes, padded, parameters)
        self._layouts = {index: kept for index, kept in self._layouts.items() if index < bucket.index()}
        self._layouts[bucket.index()] = layout  # keeps the parameters alive, and so their ids
        numbers = [self._numbers[id(parameter)] for parameter in parameters]
        layout.residual = bucket.buffer().new_zeros(sum(padded), dtype=torch.float32)
        _take_over(self._residuals, numbers, list(layout.residual.split(padded)))
        if group.size() > 2 and not self.codec.is_cast:
            rows = [size // row for size in padded]
            layout.owned = OwnedRows(rows, numbers, group, self.codec, bucket.buffer().device)
            _take_over(self._owned, numbers, [layout.owned.residual[part] for part in layout.owned.parts])
        return layout

    def _packed(self, buffer: Tensor, layout: Layout) -> Tensor:
        """The values to send: the buffer itself, or a copy with every parameter padded to whole rows."""
        values = buffer
        if not layout.is_dense:
            dtype = torch.float32 if self.error_feedback else buffer.dtype
            values = buffer.new_zeros(sum(layout.padded), dtype=dtype)
            parts = [part[:size] for part, size in zip(values.split(layout.padded), layout.sizes, strict=True)]
            torch_private.foreach_copy_(parts, list(buffer.split(layout.sizes)))
        if layout.residual is not None:
            return self._fed(values.float(), layout, layout.residual)
        if self.measure_error:
            self.statistics.add_error(values.float(), self._decoded(values))
        return values

    def _fed(self, values: Tensor, layout: Layout, residual: Tensor) -> Tensor:
        """The values plus the residual of earlier ones. What rounding takes from them is the new residual.

        A row without a gradient is sent as zeros and its residual waits, as DDP discards the average of a parameter
        that no rank has used. What is not finite was not sent, so its residual waits, too.
        """
        layout.before = residual.clone() if self.scaler is not None else None
        is_fed = values.view(-1, self.codec.row).any(1, keepdim=True).expand(-1, self.codec.row).reshape(-1)
        fed = values + torch.where(is_fed, residual * self._unit, 0.0)
        decoded = self._decoded(fed)
        self.statistics.add_error(fed, decoded)
        torch.where(decoded.isfinite() & is_fed, (fed - decoded) / self._unit, residual, out=residual)
        return fed

    def _decoded(self, values: Tensor) -> Tensor:
        return self.codec.decode(self.codec.encode(values), values.numel(), torch.float32)

    def _unpacked(self, values: Tensor, buffer: Tensor, layout: Layout) -> Tensor:
        if values is buffer:
            return buffer
        with torch.no_grad():
            parts = [part[:size] for part, size in zip(values.split(layout.padded), layout.sizes, strict=True)]
            torch_private.foreach_copy_(list(buffer.split(layout.sizes)), parts)
            if layout.residual is not None and buffer.element_size() < 4:
                # the cast rounds, too, on all ranks alike: each keeps what it took, and the mean of them is that
                kept = layout.residual.split(layout.padded)
                for residual, value, rounded in zip(kept, parts, buffer.split(layout.sizes), strict=True):
                    lost = (value - rounded) / self._unit
                    residual[: len(lost)] += torch.where(lost.isfinite(), lost, 0.0)
        return buffer


@contextmanager
def _hinting(process_group: dist.ProcessGroup | None, world: int) -> Iterator[None]:
    """Add to a disagreement what a hook that was given no group may mean."""
    try:
        yield
    except AgreementError as error:
        if process_group is None:
            error.hint = "; ".join(filter(None, (error.hint, _NO_GROUP.format(world))))
        raise


@lru_cache(maxsize=1 << 10)
def _layout_of(sizes: tuple[int, ...], row: int) -> Layout:
    """Of parameters without residuals; one alone needs no padding, for nothing follows it."""
    padded = [whole_rows(size, row) for size in sizes]
    return Layout(list(sizes), padded if len(sizes) > 1 else list(sizes))


def _take_over(kept: dict[int, Tensor], numbers: list[int], parts: list[Tensor]) -> None:
    """Let `parts`, by the parameters' numbers, hold what is kept, and be what is kept from now on."""
    for number, part in zip(numbers, parts, strict=True):
        if number in kept:
            part.copy_(kept[number])
        kept[number] = part


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
