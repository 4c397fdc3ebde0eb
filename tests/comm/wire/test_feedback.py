"""qpass::encode_fed, and the Feedback that holds its residuals."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from qpass.comm import Feedback, codec
from qpass.comm.wire import operators as comm
from qpass.comm.wire.operators import FORMULAS
from qpass.errors import ConfigError, InputError

ops = torch.ops.qpass
FORMS = ["int4:32:bf16", "int8:128:bf16:hadamard", "fp8_e4m3", "bf16"]


def sent(feedback: Feedback, x: Tensor, form: str, state: str = "output_0") -> Tensor:
    """What a receiver decodes, in the shape of ``x``."""
    with feedback.bound():
        payload = ops.encode_fed(x, form, state)
    return ops.decode(payload, x.numel(), torch.float32, form).view(x.shape)


def kept(feedback: Feedback) -> dict[str, Tensor]:
    return feedback.state_dict()["rank 0"]["residuals"]


def state_of(residuals: dict[str, Any]) -> dict[str, Any]:
    return {"ranks": 1, "rank 0": {"count": len(residuals), "residuals": residuals}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_takes_is_added_to_what_is_sent_next(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the definition, on two rows and a part of a third, of a tensor that is transposed; two rows at a time."""
    monkeypatch.setattr(comm, "AT_ONCE", 256)
    feedback, how, residual = Feedback(), codec(form), torch.zeros(300)
    for step in range(4):
        x = torch.randn(30, 10, generator=torch.Generator().manual_seed(step)).to(dtype).t()
        value = x.float().reshape(-1) + residual
        decoded = how.decode(how.encode(value), 300)
        residual = value - decoded
        assert torch.equal(sent(feedback, x, str(how)).view(-1), decoded)
        assert torch.equal(kept(feedback)["0/output_0"], residual)
    assert bool(residual.any()) == (codec(form).is_cast is False or dtype != torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
def test_the_error_of_a_sum_over_steps_is_that_of_one(form: str) -> None:
    """Without feedback rounding to nearest errs the same way at every step."""
    x, steps, feedback, form = torch.randn(1000), 32, Feedback(), str(codec(form))
    fed = torch.stack([sent(feedback, x, form) for _ in range(steps)]).mean(0)
    plain = torch.stack([once(x, form) for _ in range(steps)]).mean(0)
    error = float((once(x, form) - x).norm())
    assert float((plain - x).norm()) == pytest.approx(error, rel=1e-4)  # float32 sums
    assert (fed - x).norm() < 2 * error / steps + 1e-6 * x.norm()


def once(x: Tensor, form: str) -> Tensor:
    return ops.decode(ops.encode(x, form), x.numel(), torch.float32, form)


def test_what_is_not_finite_was_not_sent_and_its_residual_waits() -> None:
    feedback, form, x = Feedback(), "int4:32:bf16", torch.randn(256)
    sent(feedback, x, form)
    before = kept(feedback)["0/output_0"]
    broken = x.clone()
    broken[40] = math.inf
    assert sent(feedback, broken, form).isfinite().logical_not().nonzero().flatten().tolist() == list(range(32, 64))
    after = kept(feedback)["0/output_0"]
    assert torch.equal(after[32:64], before[32:64])
    assert not torch.equal(after[:32], before[:32])
    assert after.isfinite().all()


def test_each_state_and_each_frame_has_a_residual_of_its_own() -> None:
    feedback = Feedback()
    for frame in ("late", "early"):  # numbered as they send
        with feedback.bound(frame):
            ops.encode_fed(torch.randn(10), "int8", "output_1")
            ops.encode_fed(torch.randn(20), "int8", "output_0")
    assert {name: len(residual) for name, residual in kept(feedback).items()} == {
        "0/output_1": 10, "0/output_0": 20, "1/output_1": 10, "1/output_0": 20,
    }  # fmt: skip
    outer, inner = Feedback(), Feedback()
    with outer.bound():
        sent(inner, torch.randn(10), "int8")
        ops.encode_fed(torch.randn(20), "int8", "output_0")
    assert [len(kept(one)["0/output_0"]) for one in (outer, inner)] == [20, 10]


def test_a_state_that_was_saved_goes_on_bit_for_bit() -> None:
    form, xs, feedback = "int4:32:bf16", torch.randn(6, 200), Feedback()
    whole = [sent(feedback, x, form) for x in xs]
    first, second, file = Feedback(), Feedback(), io.BytesIO()
    halves = [sent(first, x, form) for x in xs[:3]]
    torch.save(first.state_dict(), file)
    sent(first, xs[0], form)  # what was saved is a copy
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second.load_state_dict(state)
    state["rank 0"]["residuals"]["0/output_0"].zero_()  # and so is what was loaded
    halves += [sent(second, x, form) for x in xs[3:]]
    assert all(torch.equal(a, b) for a, b in zip(halves, whole, strict=True))
    second.reset()
    assert kept(second) == {}
    assert torch.equal(sent(second, xs[0], form), whole[0])


def test_a_residual_of_another_size_is_refused() -> None:
    feedback = Feedback()
    feedback.load_state_dict(state_of({"0/output_0": torch.zeros(1999)}))
    with pytest.raises(ConfigError) as raised:
        sent(feedback, torch.ones(2000), "int8")
    assert str(raised.value) == (
        "The residual 0/output_0 has 1,999 elements, and 2,000 are sent in its place.\n"
        "  to do: load the state of this program on as many ranks, give every program a Feedback, or reset() this one"
    )
    feedback.reset()
    sent(feedback, torch.ones(2000), "int8")


def test_a_residual_that_was_not_saved_starts_from_zero_with_a_warning() -> None:
    feedback = Feedback()
    feedback.load_state_dict(state_of({"0/output_1": torch.ones(8)}))
    with pytest.warns(UserWarning, match="the loaded state of error feedback has no residual 0/output_0"):
        assert torch.equal(sent(feedback, torch.ones(8), "fp32"), torch.ones(8))


@pytest.mark.parametrize(
    "state",
    [nn.Linear(2, 2).state_dict(), {"0/output_0": torch.zeros(3, dtype=torch.float64)}, {"0/output_0": [0.0]}, {0: 1}],
)
def test_what_is_no_residual_is_refused(state: dict[str, Tensor]) -> None:
    feedback = Feedback()
    with pytest.raises(InputError, match=r"is not a residual of error feedback\n  to do: load what state_dict\(\) of"):
        feedback.load_state_dict(state_of(state))
    assert kept(feedback) == {}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"0/output_0": torch.zeros(3)}, "this is not a state of a qpass.comm.Feedback"),
        ({"ranks": 4, "rank 0": {}}, "The state is of 4 ranks, and this run has 1"),
        ({"ranks": 1, "rank 3": {}}, "The state is of rank 3, and this is rank 0"),
        ({"ranks": 1, "rank 0": {"count": 2, "residuals": {}}}, "The state is of 2 residuals, and holds 0"),
    ],
)
def test_a_state_of_another_run_is_refused(state: dict[str, Any], said: str) -> None:
    feedback = Feedback()
    sent(feedback, torch.ones(3) / 3, "int4:32:bf16")
    before = kept(feedback)
    with pytest.raises(ConfigError, match=said):
        feedback.load_state_dict(state)
    assert torch.equal(kept(feedback)["0/output_0"], before["0/output_0"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_with_feedback(dtype: torch.dtype) -> None:
    """By the definition; what overflows was not sent, so its residual waits."""
    feedback, residual = Feedback(), torch.zeros(300)
    for step in range(3):
        x = torch.randn(10, 30, generator=torch.Generator().manual_seed(step)).t()
        value = x.reshape(-1) + residual
        with feedback.bound():
            found = ops.cast_fed(x, dtype, "output_0_cast")
        assert torch.equal(found.view(-1), value.to(dtype))
        assert found.shape == x.shape
        assert found.is_contiguous()
        residual = value - value.to(dtype)
        assert residual.any()
        assert torch.equal(kept(feedback)["0/output_0_cast"], residual)
    x = x.clone()
    x[0, 0] = torch.finfo(torch.float32).max
    with feedback.bound():
        assert ops.cast_fed(x, dtype, "output_0_cast")[0, 0] == math.inf
    assert kept(feedback)["0/output_0_cast"][0] == residual[0]
    with feedback.bound():
        checks = ("test_schema", "test_faketensor")  # others hold one call against a second one
        torch.library.opcheck(ops.cast_fed.default, (x, dtype, "output_5"), test_utils=checks)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_residuals_follow_the_loss_scale(accumulated: int) -> None:
    """Residuals count in units of the loss: those of a scale of powers of two are those without a scale, bit for bit.

    What a step took that the scaler skipped is put back, all of several backward passes.
    """
    form, parameter = "int4:32:bf16", nn.Parameter(torch.zeros(1))
    factors = {"growth_factor": 4.0, "backoff_factor": 2.0**-7, "growth_interval": 2}
    scaler = torch.amp.GradScaler("cpu", 2.0**10, **factors)
    optimizer = torch.optim.SGD([parameter], 0.0)
    scaled, plain = Feedback(scaler), Feedback()
    scales = set()
    for step in range(9):
        scale, is_skipped = scaler.get_scale(), step in (3, 6)
        scales.add(scale)
        for part in range(accumulated):
            x = torch.randn(100, generator=torch.Generator().manual_seed(10 * step + part))
            found = sent(scaled, x * scale, form) / scale
            if not is_skipped:
                assert torch.equal(found, sent(plain, x, form))
        scaler.scale(parameter.sum() * (math.inf if is_skipped else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(kept(scaled)["0/output_0"], kept(plain)["0/output_0"])
    assert len(scales) > 4
    assert Feedback(torch.amp.GradScaler("cpu", enabled=False))._scaler is None


def test_without_a_feedback_it_says_what_to_do() -> None:
    with pytest.raises(InputError) as raised:
        ops.encode_fed(torch.ones(3), "int8", "output_3")
    assert str(raised.value) == (
        "A graph is run without a Feedback, and output_3 is to be sent with error feedback.\n"
        "  to do: run the graph `with feedback.bound():`, with the feedback of its policy"
    )
    with pytest.raises(InputError, match="cannot be encoded"), Feedback().bound():
        ops.encode_fed(torch.ones(3, dtype=torch.int64), "int8", "output_3")


def test_one_frame_serves_one_set_of_parameters() -> None:
    feedback, one, two = Feedback(), nn.Linear(2, 2), nn.Linear(2, 2)
    for _ in range(2):
        feedback.serve(0, one.parameters())
    feedback.serve(1, two.parameters())
    for parameters in (two.parameters(), [one.weight], [one.bias, one.weight]):
        with pytest.raises(ConfigError, match="is run for other parameters than those it was first run for"):
            feedback.serve(0, parameters)


def test_compilers_do_not_merge_calls_and_tracing_sends_nothing() -> None:
    feedback, x, form = Feedback(), torch.randn(100), "int4:32:bf16"

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.encode_fed(x, form, "output_0"), ops.encode_fed(x, form, "output_0")

    with feedback.bound():
        with torch._subclasses.FakeTensorMode() as mode:
            graph = make_fx(function, FORMULAS)(mode.from_tensor(x)).graph
        assert len(graph.find_nodes(op="call_function", target=ops.encode_fed.default)) == 2
        assert kept(feedback) == {}
        first, second = torch.compile(function, fullgraph=True)(x)
    again = Feedback()
    with again.bound():
        assert torch.equal(first, ops.encode_fed(x, form, "output_0"))
        assert torch.equal(second, ops.encode_fed(x, form, "output_0"))
        checks = ("test_schema", "test_faketensor")  # others hold one call against a second one
        torch.library.opcheck(ops.encode_fed.default, (x, form, "output_5"), test_utils=checks)
    assert not torch.equal(first, second)
