"""calibrate_link measures once and tells all ranks the same."""

from __future__ import annotations

from distributed.two_ranks import two_ranks
from qpass.comm import Link


def test_all_ranks_have_the_link_of_rank_0() -> None:
    (link, said), (other, said_there) = (rank["calibrated"] for rank in two_ranks())
    assert isinstance(link, Link)
    assert link == other
    assert said == said_there
    assert said.startswith("all_gather of 1,048,576 float32 over 2 ranks is sent ")


def test_the_figures_are_those_of_a_machine() -> None:
    """Bytes and seconds in their places: any machine of this century lies within."""
    link, _ = two_ranks()[0]["calibrated"]
    assert 1e6 < link.bandwidth < 1e12
    assert 1e-7 < link.latency < 1.0
    assert 1e6 < link.encode < 1e12
    assert 1e6 < link.decode < 1e12
    assert 0 <= link.overhead < 1.0
