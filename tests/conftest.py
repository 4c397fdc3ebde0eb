"""What every test stands on: one Inductor cache, fixed threads, a fixed seed, and `slow` tests only on request."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

THREADS = 2  # summation order, and so the last bits of a float kernel, depend on it
SEED = 0

# Set before torch is imported: OpenMP and Inductor read them once, and the processes that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # compile here: a pool's processes would each import torch
OWN_CACHE = "TORCHINDUCTOR_CACHE_DIR" not in os.environ
if OWN_CACHE:  # one for the run, since a graph costs 5 to 25 s; not the last run's, which could serve its old code
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="qpass-inductor-")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


def pytest_unconfigure() -> None:
    if OWN_CACHE:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or in any order."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No test compiles into what another one left behind: Dynamo's guards, its recompile count, its cached graphs."""
    yield
    if "torch._dynamo" in sys.modules:  # a test that compiled nothing does not pay for importing it
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def own_targets() -> Iterator[None]:
    """No test knows a target that another one gave to `prepare`."""
    yield
    if "qpass.targets.registry" in sys.modules:
        sys.modules["qpass.targets.registry"]._given.clear()
