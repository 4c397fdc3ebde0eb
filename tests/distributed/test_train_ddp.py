"""The training example, started as its first lines say: it learns, sends less, and ends where the plain run ends."""

from __future__ import annotations

import re

import pytest

from torchrun import torchrun

ROW = re.compile(r"(\w+(?: \+ \w+)?) +([\d.]+) +([\d.]+) +([+-][\d.]+) % +([\d.]+) +([\d.]+)")


def trained(*options: str, **environment: str) -> dict[str, list[float]]:
    """What gradients travelled as -> loss before and after, change in %, MB a step, ms a step."""
    rows = ROW.findall(torchrun("train_ddp", *options, **environment))
    return {name: [float(figure) for figure in figures] for name, *figures in rows}


def test_a_few_steps() -> None:
    """Without a C++ compiler, which saves the test half a minute: codecs are eager then, and the figures the same."""
    found = trained("--steps", "3", CXX="no-such-compiler")
    assert list(found) == ["fp32", "int8", "int4 + feedback"]
    parameters = 254_000  # 4 bytes each, sent and received once, are 1.02 MB
    for (before, after, change, megabytes, _), bits in zip(found.values(), (32, 8.125, 4.5), strict=True):
        assert 4.8 < before < 5.1  # of 128 signs, nothing known: ln 128 = 4.85
        assert after < before - 0.5
        assert abs(change) < 2
        assert megabytes == pytest.approx(parameters * bits / 8e6, rel=0.02)


@pytest.mark.slow  # 900 steps
@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["DDP", "FSDP2"])
def test_300_steps_end_where_the_plain_run_ends(options: tuple[str, ...]) -> None:
    """int8 within 0.5 %, int4 with error feedback within 1 % of the plain run's loss on unseen text."""
    found = trained("--steps", "300", *options)
    assert found["fp32"][1] < 2.3  # it has learnt: a model of single letters ends near 3.2
    assert abs(found["int8"][2]) < 0.5
    if not options:
        assert abs(found["int4 + feedback"][2]) < 1.0
