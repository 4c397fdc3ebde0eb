"""Error feedback in compiled programs, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ranks
from distributed import compiled_feedback
from on_ranks import on_ranks


def test_on_two_ranks_and_from_a_checkpoint(tmp_path: Path) -> None:
    """All programs on one pair of ranks, and on another what the first saved: it goes on bit for bit.

    Residuals of five steps are float32, and so err by some 1e-7 of the sums. A lost residual is 1e-2 of them, a cast
    to bfloat16 that is not fed back 1e-3.
    """
    whole = on_ranks(2, compiled_feedback.everything, str(tmp_path))
    again = on_ranks(2, compiled_feedback.resumed, str(tmp_path))
    for first, second in zip(whole, again, strict=True):
        assert first["names"] == ["0/output_3", "0/output_0"]
        assert torch.equal(second["weights"], first["weights"])
        assert not torch.equal(second["without"], first["weights"])
        assert max(first["missing"].values()) < 1e-6, first["missing"]
        assert second["cache"] == {"hit": 2, "miss": 0, "bypass": 0}


@pytest.mark.slow
def test_on_four_ranks() -> None:
    cases = ["ddp_under_compiled_autograd", "in_pieces"]
    found = ranks.run(str(Path(compiled_feedback.__file__)), 4, cases, timeout=120)
    assert found == {case: [ranks.OK] * 4 for case in cases}
