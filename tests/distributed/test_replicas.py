"""What several ranks hold alike stays equal bit for bit, however it is trained: 40 steps each, in real processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.distributed.device_mesh import init_device_mesh

import qpass.comm
import ranks
from distributed import replicated
from distributed.replicated import differing


def of(run: Callable[[], replicated.Held]) -> Callable[[int, int], None]:
    def case(rank: int, world: int) -> None:
        wrong = differing(run())
        assert not wrong, wrong

    return case


def _two_dimensional(how: dict[str, str | None]) -> replicated.Held:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    data, model = mesh["data"], mesh["model"]
    return replicated.fsdp(data, model, part=data.get_local_rank(), **how)


def _hybrid(**how: str | None) -> replicated.Held:
    return replicated.fsdp(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")), **how)


def _hybrid_and_tensor_parallel() -> replicated.Held:
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicas", "shards", "model"))
    part = mesh["replicas"].get_local_rank()
    return replicated.fsdp(mesh["replicas", "shards"], mesh["model"], part=part, reduce_scatter="int4")


ddp_int8 = of(lambda: replicated.ddp(qpass.comm.ddp_hook()))
ddp_int4_with_feedback = of(lambda: replicated.ddp(qpass.comm.ddp_hook(4, error_feedback=True)))
fsdp_int8 = of(lambda: replicated.fsdp(init_device_mesh("cpu", (4,))))
hsdp_int8 = of(lambda: _hybrid())
hsdp_int4 = of(lambda: _hybrid(reduce_scatter="int4"))
two_dimensional_int8 = of(lambda: _two_dimensional({}))
two_dimensional_gather_only = of(lambda: _two_dimensional({"reduce_scatter": None}))
two_dimensional_int4 = of(lambda: _two_dimensional({"reduce_scatter": "int4"}))
two_dimensional_rotated = of(lambda: _two_dimensional({"reduce_scatter": "int4:32:bf16:hadamard"}))
hybrid_and_tensor_parallel = of(_hybrid_and_tensor_parallel)
tensor_parallel = of(replicated.tensor_parallel)
simple_fsdp = of(replicated.simple_fsdp)

EAGER = [
    "ddp_int8", "ddp_int4_with_feedback", "fsdp_int8", "hsdp_int8", "hsdp_int4", "two_dimensional_int8",
    "two_dimensional_gather_only", "two_dimensional_int4", "two_dimensional_rotated", "hybrid_and_tensor_parallel",
]  # fmt: skip
COMPILED = ["tensor_parallel", "simple_fsdp"]


@pytest.fixture(scope="module")
def eager() -> dict[str, list[str]]:
    return ranks.run(__file__, 4, EAGER)


@pytest.mark.parametrize("case", EAGER)
def test_replicas_stay_equal(eager: dict[str, list[str]], case: str) -> None:
    assert eager[case] == [ranks.OK] * 4


@pytest.mark.slow
def test_replicas_of_compiled_models_stay_equal() -> None:
    assert ranks.run(__file__, 4, COMPILED, 60) == {case: [ranks.OK] * 4 for case in COMPILED}
