"""``torch.compile(model, backend="qpass")``: what it makes of converted, float and training models."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import qpass
from bound import bounds
from qpass import presets
from qpass.backend.compilations import compiled_graphs
from qpass.errors import InputError, StrictError
from qpass.targets import X86

DYNAMIC = presets.int8_dynamic("token", compute_dtype=None)
STATIC = presets.int8_static(compute_dtype=None)


class Mlp(nn.Module):
    """[B, 32] -> [B, 8] through gelu and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(nn.functional.gelu(self.up(x))))


def converted(model: nn.Module, x: Tensor, config: Any = STATIC) -> torch.fx.GraphModule:
    prepared = qpass.prepare(model.eval(), (x,), config=config)
    with torch.no_grad():
        prepared(x)
    return qpass.convert(prepared)


def assert_obeys(compiled: Any, reference: torch.fx.GraphModule, x: Tensor) -> None:
    """Everywhere within the bound that the q/dq reference sets to an exact lowering (see `end_to_end.bound`)."""
    with torch.no_grad():
        result = compiled(x)
    (near,) = bounds(reference, (x,))
    assert near.within(result)
    assert near.radius.max() < 0.1 * near.wide.std()  # other weights, or a wrong scale, differ by the whole of it


def kernels(compiled: Any) -> Counter[str]:
    return Counter(row.kernel for row in qpass.report(compiled).rows if row.kernel)


@pytest.fixture(autouse=True)
def count_from_zero() -> None:
    counters.clear()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


# Converted models


@pytest.mark.parametrize("backend", ["qpass", qpass.backend(inductor={"epilogue_fusion": True})], ids=["name", "value"])
def test_a_converted_model_is_lowered(backend: Any) -> None:
    x, before = torch.randn(16, 32), torch._inductor.config.get_config_copy()
    quantized = converted(Mlp(), x)
    compiled = torch.compile(quantized, backend=backend)
    assert_obeys(compiled, quantized, torch.randn(16, 32))
    assert torch._inductor.config.get_config_copy() == before
    report = qpass.report(compiled)
    assert report.stage == "lowered"
    assert report.count("unaccounted") == 0
    if not X86.missing():
        assert kernels(compiled) == {"onednn.qlinear": 2}


def test_the_report_of_what_was_not_compiled_yet() -> None:
    with pytest.raises(InputError):
        qpass.report(torch.compile(Mlp().eval(), backend="qpass"))


def test_static_and_dynamic_activations_in_one_model() -> None:
    """torch describes the scales of a token wrongly; a static quantize behind them used to stumble over that."""
    x = torch.randn(16, 32)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    mixed = STATIC.override(module="0", activation=DYNAMIC.activation)
    quantized = converted(model, x, mixed)
    assert_obeys(torch.compile(quantized, backend="qpass"), quantized, torch.randn(16, 32))


def test_sizes_of_the_batch_share_a_compilation() -> None:
    x = torch.randn(4, 32)
    quantized = converted(Mlp(), x)
    compiled = torch.compile(quantized, backend="qpass")
    for size in (4, 7, 5, 9, 32):
        assert_obeys(compiled, quantized, torch.randn(size, 32))
    assert compilations() == 2  # Dynamo takes the first size for fixed, and learns from the second
    counters.clear()
    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="qpass", dynamic=True)
    for size in (3, 6):
        assert_obeys(compiled, quantized, torch.randn(size, 32))
    assert compilations() == 1


def test_other_codes_loaded_into_a_converted_model() -> None:
    x = torch.randn(16, 32)
    quantized, other = converted(Mlp(), x, DYNAMIC), converted(Mlp(), x, DYNAMIC)
    compiled = torch.compile(quantized, backend="qpass")
    assert_obeys(compiled, quantized, x)
    quantized.load_state_dict(other.state_dict())
    assert_obeys(compiled, other, x)
    assert compilations() == 1


# Float models


def test_a_float_model_is_quantized_dynamically_and_follows_its_weights() -> None:
    model, x = Mlp().eval(), torch.randn(16, 32)
    compiled = torch.compile(model, backend="qpass", options={"config": DYNAMIC})
    assert_obeys(compiled, converted(model, x, DYNAMIC), x)
    if not X86.missing():
        assert kernels(compiled) == {"onednn.qlinear (per token)": 2}

    model.load_state_dict(Mlp().state_dict())
    assert_obeys(compiled, converted(model, x, DYNAMIC), x)
    with torch.no_grad():
        model.up.weight.mul_(-1.5)
        model.down.bias.add_(1)
    assert_obeys(compiled, converted(model, x, DYNAMIC), x)
    torch.optim.SGD(model.parameters(), 1.0).step(lambda: model(x).square().sum().backward())
    assert_obeys(compiled, converted(model, x, DYNAMIC), x)
    assert compilations() == 1
    model.up.weight = nn.Parameter(torch.randn(64, 32))
    assert_obeys(compiled, converted(model, x, DYNAMIC), x)


def test_the_default_is_int8_dynamic() -> None:
    model, x = Mlp().eval(), torch.randn(16, 32)
    assert qpass.backend() == qpass.backend("int8_dynamic") == qpass.backend(presets.int8_dynamic())
    assert hash(qpass.backend()) == hash(qpass.backend("int8_dynamic"))
    with torch.inference_mode():
        result = torch.compile(model, backend="qpass")(x)
        reference = converted(model, x, "int8_dynamic")
    (near,) = bounds(reference, (x,))
    assert near.within(result.clone())


@torch.no_grad()
def test_tensors_that_forward_makes_are_constants_and_keep_up_with_weights() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(x) * torch.tensor([1.5, 2.5]).repeat(8)
            doubled = torch.nn.functional.linear(x, self.fc.weight * torch.tensor(2.0))
            branch = torch.cond(x.sum() > 0, lambda z: z * torch.tensor([3.0]).repeat(16), torch.neg, (y,))
            return doubled, branch

    model = Scaled().eval()
    compiled = torch.compile(model, backend=qpass.backend(DYNAMIC))
    for x in (torch.rand(8, 32), -torch.rand(8, 32)):
        for result, expected in zip(compiled(x), model(x), strict=True):
            assert 10 * torch.log10(expected.square().sum() / (result - expected).square().sum()) > 35
        model.fc.weight.mul_(-3)


def test_a_number_that_calls_bring_is_a_factor_and_no_operand() -> None:
    linear = nn.Linear(32, 32)

    def scaled(x: Tensor, factor: float) -> Tensor:
        return (linear(x * factor) + factor).relu() * factor

    x, fast = torch.randn(4, 32), torch.compile(scaled, backend="qpass")
    with torch.no_grad():
        for factor in (0.5, 1.5, 3.25):
            expected = scaled(x, factor)
            # int8 leaves 35 dB and more; the factor of another call leaves less than 10
            assert (expected - fast(x, factor)).norm() < 10 ** (-35 / 20) * expected.norm()


@pytest.mark.skipif(bool(X86.missing()), reason=X86.missing())
@torch.no_grad()
def test_what_a_range_and_its_codes_read_is_computed_once() -> None:
    model, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval(), torch.randn(16, 32)
    for inductor, count in (({}, 1), ({"realize_opcount_threshold": 1000}, 2)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=qpass.backend("int8_dynamic", inductor=inductor))
        _, (code,) = run_and_get_code(compiled, x)
        assert code.count(".erf()") == count


def test_parts_of_a_model_that_breaks_the_graph() -> None:
    class Broken(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x)
            torch._dynamo.graph_break()
            return self.down(x)

    model, x = Broken().eval(), torch.randn(16, 32)
    compiled = torch.compile(model, backend=qpass.backend(DYNAMIC.keep_float(module="down")))
    with torch.no_grad(), pytest.warns(UserWarning, match="qpass left a compiled graph in float: nothing in this"):
        result = compiled(x)
    up = converted(model.up, x, DYNAMIC)
    with torch.no_grad():
        # the int8 product and its float32 reference differ by the order of 32 sums, and `down` adds 64 such differences
        torch.testing.assert_close(result, model.down(up(x)), rtol=0, atol=1e-5)
    report = qpass.report(compiled)
    assert report.graphs == 2
    assert report.count("lowered" if not X86.missing() else "quantized") == 1
    assert report.count("float") == 1


def test_strict_refuses_a_graph_with_nothing_to_quantize() -> None:
    compiled = torch.compile(lambda x: torch.softmax(x, -1), backend=qpass.backend(strict=True))
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as raised:
        compiled(torch.randn(4, 8))
    assert type(raised.value.inner_exception) is StrictError
    assert str(raised.value.inner_exception).startswith("nothing in this model can be quantized")


@pytest.mark.parametrize("name", ["qpass", "object"])
def test_a_mode_is_options_of_inductor_and_options_of_ones_own_win(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def compile_lowered(lowered: Any, inputs: Any, *, config_patches: dict[str, Any], **_: Any) -> Any:
        asked.update(config_patches)
        return lambda *arguments: (torch.zeros(16, 32),)

    monkeypatch.setattr(sys.modules["qpass.backend.backend"], "compile_lowered", compile_lowered)
    given: Any = "qpass" if name == "qpass" else qpass.backend(inductor={"coordinate_descent_tuning": False})
    with torch.no_grad():
        torch.compile(Mlp().eval(), backend=given, mode="max-autotune-no-cudagraphs")(torch.randn(16, 32))
    assert asked["max_autotune"] is True
    assert asked["coordinate_descent_tuning"] is (name == "qpass")


# Training


def test_training_is_computed_as_inductor_computes_it() -> None:
    model, x = Mlp().train(), torch.randn(16, 32)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(model, backend="qpass")(x).square().sum().backward()
    assert compiled_graphs(model) == []  # nothing was quantized
    torch.compile(twin, backend="inductor")(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None, name
        assert torch.equal(ours.grad, theirs.grad), name
