from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest
from torch import fx

from qpass.ir.graph_pass import Pass


@dataclass(frozen=True)
class FoldDeepThings(Pass):
    depth: int = 1


def test_a_pass_is_a_value_named_in_snake_case() -> None:
    assert FoldDeepThings() == FoldDeepThings(depth=1)
    assert hash(FoldDeepThings()) != hash(FoldDeepThings(depth=2))
    assert FoldDeepThings().name == "fold_deep_things"
    with pytest.raises(FrozenInstanceError):
        FoldDeepThings().depth = 2  # type: ignore[misc]


def test_a_pass_asks_and_promises_nothing_by_default_and_must_say_what_it_does() -> None:
    gm = fx.symbolic_trace(lambda x: x)
    assert FoldDeepThings().requires(gm) is None
    assert FoldDeepThings().ensures(gm) is None
    with pytest.raises(NotImplementedError):
        FoldDeepThings().run(gm)
