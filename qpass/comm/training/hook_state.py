"""The state of a DDP hook between steps: residuals, their parameters, and what the ranks have agreed on."""

import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qpass.comm.eager.agreement import Header, agree_on_settings
from qpass.comm.eager.group import group_of
from qpass.comm.eager.statistics import Statistics
from qpass.comm.policy.cost import Link
from qpass.comm.training.owned_rows import OwnedRows
from qpass.comm.wire.codec import Codec
from qpass.comm.wire.rank_state import check_complete, own_state, state_of_rank
from qpass.errors import ConfigError

_NO_HOOK = "register the hook on all ranks: one without it waits in torch's own all_reduce for this rank"


@dataclass
class Layout:
    """How the parameters of a bucket lie in the tensor that is sent: each starts a row of its own."""

    sizes: list[int]
    padded: list[int]
    parameters: Sequence[Tensor] = ()
    residual: Tensor | None = None
    owned: OwnedRows | None = None
    before: Tensor | None = None  # the residual before the last step, where that may be skipped

    @property
    def is_dense(self) -> bool:
        return self.sizes == self.padded


class HookState:
    """The part of a DDP hook that is saved, compared between ranks, and follows the loss scale."""

    codec: Codec
    error_feedback: bool
    warm_up: int
    link: Link | None
    scaler: torch.amp.GradScaler | None
    statistics: Statistics
    _layouts: dict[int, Layout]
    _residuals: dict[int, Tensor]
    _owned: dict[int, Tensor]
    _unit: float
    _place: tuple[int, int] | None
    _agreed: list[weakref.ref[dist.ProcessGroup]]

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to continue bit for bit: steps, counts, residuals. Save it on every rank.

        The part of this rank lies under a key that names the rank, so that `torch.distributed.checkpoint` keeps the
        parts of all ranks. It loads into tensors that exist: there let a hook make a step before its state is loaded.

        Steps that are sent in full, in warm-up or where a `link` declines, are as repeatable as torch's all_reduce:
        from 3 ranks on its order of summation depends on the buckets, which start anew in a new process.
        """
        self._undo_skipped()
        group_rank, group_ranks = self._place or (-1, 0)
        mine = {
            "statistics": asdict(self.statistics), "group_rank": group_rank, "group_ranks": group_ranks,
            "parameters": len(self._residuals),
            "residuals": {number: residual.clone() for number, residual in self._residuals.items()},
            "owned": {number: residual.clone() for number, residual in self._owned.items()},
        }  # fmt: skip
        return {"codec": str(self.codec), **state_of_rank(mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, on the same rank of as many ranks, for the same model.

        Residuals belong to the ranks that rounded: another number of ranks starts with a new hook and without them.
        What is lost so is what rounding took from one step.

        Raises:
            ConfigError: it was saved with another codec, on another rank, on another number of ranks, or holds not all
                residuals.
        """
        mine = own_state(state, "a DDP hook", "a new hook")
        if state.get("codec") != str(self.codec):
            raise ConfigError(
                f"The state is of a hook that sends {state.get('codec')}, and this one sends {self.codec}",
                hint="make the hook with the options that it was saved with",
            )
        check_complete(len(mine["residuals"]), mine["parameters"])
        self.statistics = Statistics(**mine["statistics"])
        self._residuals = {number: residual.clone() for number, residual in mine["residuals"].items()}
        self._owned = {number: residual.clone() for number, residual in mine["owned"].items()}
        self._place = (mine["group_rank"], mine["group_ranks"]) if mine["group_ranks"] else None
        self._layouts.clear()
        self._agreed.clear()

    def _agree(self, group: dist.ProcessGroup) -> None:
        """Compare the hooks of all ranks, once for a group: from then on they decide alike."""
        if any(known() is group for known in self._agreed):
            return
        place = (group.rank(), group.size())
        if self._place not in (None, place):
            assert self._place is not None
            what = "The residuals of this hook are those of rank {} of a group of {}, and this is rank {} of {}."
            hint = "load the state on as many ranks, and give every model a hook of its own"
            raise ConfigError(what.format(*self._place, *place), hint=hint)
        if self.error_feedback:
            self._place = place
        if group.size() > 1:
            settings = {
                "error_feedback": self.error_feedback, "warm_up": self.warm_up, "steps": self.statistics.steps,
                "link": str(self.link), "scaler": self.scaler is not None,
            }  # fmt: skip
            said = ", ".join(f"{name}={value}" for name, value in settings.items())
            agree_on_settings(group_of(group), Header("ddp_hook", str(self.codec), 0, "", settings=said), _NO_HOOK)
        self._agreed.append(weakref.ref(group))

    def _start_step(self) -> None:
        self._undo_skipped()
        for layout in self._layouts.values():
            layout.before = None
        self._unit = self._scale()

    def _scale(self) -> float:
        return self.scaler.get_scale() if self.scaler is not None and self.error_feedback else 1.0

    def _undo_skipped(self) -> None:
        """Put back what the last step took from the residuals, if the scale fell: then the optimizer skipped it."""
        if self._scale() >= self._unit:
            return
        for layout in self._layouts.values():
            if layout.before is not None and layout.residual is not None:
                layout.residual.copy_(layout.before)
                layout.before = None
            if layout.owned is not None and layout.owned.before is not None:
                layout.owned.residual.copy_(layout.owned.before)
                layout.owned.before = None
