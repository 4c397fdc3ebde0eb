"""Statistics over a process group: real gloo processes with different data against one process on the union."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qpass.errors import ConfigError
from qpass.fake_quantize import FakeQuantize, LearnableFakeQuantize
from qpass.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from qpass.spec.fake_quantize import synchronize

ROWS, STEPS = 8, 4


def model() -> nn.ModuleDict:
    parts = {
        "min_max": FakeQuantize(MinMaxObserver),
        "average": FakeQuantize(MovingAverageMinMaxObserver, averaging_constant=0.3),
        "channels": FakeQuantize(MovingAveragePerChannelMinMaxObserver, ch_axis=1, averaging_constant=0.3),
        "histogram": FakeQuantize(HistogramObserver),
        "learned": LearnableFakeQuantize(MinMaxObserver),
    }
    return nn.ModuleDict(parts)


def batches() -> list[Tensor]:
    """One batch a step, of all ranks together; at one step half of the ranks have nothing but NaN."""
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(ROWS, 6, generator=generator) * 3.0**step for step in range(STEPS)]
    drawn[1][: ROWS // 2] = torch.nan
    drawn[2][0, 0] = torch.inf
    return drawn


def observed(modules: nn.ModuleDict, parts: list[Tensor]) -> dict[str, Tensor]:
    for part in parts:
        for module in modules.values():
            module(part)
    return {key: value.clone() for key, value in modules.state_dict().items()}


def rank_main(rank: int, folder: str) -> None:
    """All four ranks together, and then ranks 0 and 1 as a group of their own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    pair = torch.distributed.new_group([0, 1])
    for world in (4, 2) if rank < 2 else (4,):
        modules = synchronize(model(), None if world == 4 else pair)
        torch.save(observed(modules, [split(batch, step, world)[rank] for step, batch in enumerate(batches())]), (
            f"{folder}/{world}_{rank}.pt"))  # fmt: skip
    torch.distributed.destroy_process_group()


def split(batch: Tensor, step: int, world: int) -> list[Tensor]:
    """The parts of the ranks; in the last step all but the first are empty."""
    return list(batch.chunk(world)) if step < STEPS - 1 else [batch, *[batch[:0]] * (world - 1)]


def fork_ranks(folder: str) -> None:
    """Four processes that share what is imported here; safe, since nothing was computed yet."""
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank, folder)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * 4


def test_ranks_agree_with_one_process_on_the_union(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    script = "import sys, test_ranks; test_ranks.fork_ranks(sys.argv[1])"
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, timeout=300, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    expected = observed(model(), batches())
    for world in (4, 2):
        for rank in range(world):
            found = torch.load(tmp_path / f"{world}_{rank}.pt")
            assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], (world, rank)
        alone = observed(model(), [split(batch, step, world)[0] for step, batch in enumerate(batches())])
        assert not torch.equal(alone["average.scale"], expected["average.scale"])  # the ranks' data does differ


def test_without_a_process_group_synchronize_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="synchronize needs a process group") as error:
        synchronize(model())
    assert "init_process_group" in str(error.value)


def test_a_synchronized_module_can_be_copied_and_pickled(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        modules = synchronize(model())
        copied = pickle.loads(pickle.dumps(copy.deepcopy(modules)))
        assert copied["average"].activation_post_process.process_group is not None
        assert observed(modules, batches())["average.scale"] == observed(model(), batches())["average.scale"]
    finally:
        torch.distributed.destroy_process_group()
