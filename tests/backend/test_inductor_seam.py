"""The seam between a lowered graph and Inductor: packed weights, caches, configuration, state, sizes, regions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from linear_backend import SCALE, ZERO_POINT, Backend, Net, assert_equal, assert_same, qlinear
from qpass.backend.inductor import compile_lowered

aten, onednn = torch.ops.aten, torch.ops.onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@torch.no_grad()
def test_batch_sizes_share_one_dynamic_graph() -> None:
    backend, net = Backend(), Net()
    compiled = torch.compile(net, backend=backend)
    for batch in (5, 7, 9, 64, 33):
        x = torch.randn(batch, 32)
        assert_same(compiled(x), net.expected(x))
    assert backend.compilations == 2  # the first size, then any size


PROCESS = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from linear_backend import Backend, qlinear
torch.manual_seed(int(sys.argv[1]))
layer = torch.nn.Linear(32, 16)
x = torch.randn(4, 32)
with torch.no_grad():
    assert torch.equal(torch.compile(layer, backend=Backend())(x), qlinear(x, layer))
"""


def test_a_warm_cache_does_not_serve_the_weights_of_another_process() -> None:
    support = str(Path(__file__).resolve().parents[1] / "support")
    for seed in ("1", "2"):
        run = subprocess.run([sys.executable, "-c", PROCESS, seed, support], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


@torch.no_grad()
def test_inductors_configuration_is_left_alone_and_the_users_passes_run() -> None:
    config = torch._inductor.config
    ran: list[fx.Graph] = []
    with config.patch(post_grad_custom_post_pass=ran.append, freezing=True):
        before = config.get_config_copy()
        layer = nn.Linear(32, 16)
        compiled = torch.compile(layer, backend=Backend())
        x = torch.randn(4, 32)
        assert_equal(compiled(x), qlinear(x, layer))
        layer.weight.mul_(2)
        assert_equal(compiled(x), qlinear(x, layer))
        assert config.get_config_copy() == before
    assert len(ran) == 1


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 16)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.calls.add_(1)
        y = self.linear(x)
        x.mul_(2)
        return y, y.t(), x[0], self.calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_writes_and_views_are_as_in_eager(mode: Callable[[], Any]) -> None:
    model = Stateful()
    compiled = torch.compile(model, backend=Backend())
    with mode():
        for count in (1, 2, 3):
            x = torch.randn(4, 32)
            given = x.clone()
            y, transposed, row, calls = compiled(x)
            assert_equal(y, qlinear(given, model.linear))
            assert not y.requires_grad
            assert_equal(x, given * 2)
            assert transposed.data_ptr() == y.data_ptr()
            assert row.data_ptr() == x.data_ptr()
            assert calls is model.calls
            assert calls.item() == count


@torch.no_grad()
def test_inputs_that_overlap_are_guarded() -> None:
    layer = nn.Linear(32, 16)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return layer(y)

    backend = Backend()
    compiled = torch.compile(forward, backend=backend, dynamic=True)
    for start in (4, 2, 1):  # two views of one tensor that share no row, then two rows, then three
        base = torch.randn(8, 32)
        expected = base.clone()
        expected[:4] *= 2
        assert_equal(compiled(base[:4], base[start : start + 4]), qlinear(expected[start : start + 4], layer))
    assert backend.compilations == 2  # one graph for views that overlap, one for views that do not


@torch.no_grad()
def test_batch_norm_in_training_updates_its_statistics() -> None:
    model, twin = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16)), nn.BatchNorm1d(16)
    compiled = torch.compile(model, backend=Backend())
    for _ in range(2):
        x = torch.randn(8, 32)
        # Inductor sums the 8 rows in another order: a few units in the last place of values near 1.
        torch.testing.assert_close(compiled(x), twin(qlinear(x, model[0])), rtol=0, atol=1e-5)
        torch.testing.assert_close(model[1].running_mean, twin.running_mean, rtol=0, atol=1e-6)
    assert model[1].num_batches_tracked == 2


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no, self.last = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cond(x.sum() > 0, lambda x: self.yes(x), lambda x: self.no(x).relu(), (x,)))

    def expected(self, x: Tensor) -> Tensor:
        return qlinear(qlinear(x, self.yes) if x.sum() > 0 else qlinear(x, self.no).relu(), self.last)


@torch.no_grad()
def test_packed_weights_inside_cond_are_constants_and_live() -> None:
    model, backend = Branches(), Backend()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for _ in range(2):
        for batch, sign in ((3, 1), (5, -1)):
            x = sign * torch.rand(batch, 32)
            assert_equal(compiled(x), model.expected(x))
        model.yes.weight.mul_(2)
        model.no.weight.data = torch.randn(16, 32)
        model.no.bias.add_(1)
    assert backend.compilations == 1


@torch.no_grad()
def test_floats_and_integers_stay_dynamic() -> None:
    layer, backend = nn.Linear(32, 16), Backend()
    compiled = torch.compile(lambda x, rows, factor: layer(x)[:rows] * factor, backend=backend, dynamic=True)
    x = torch.randn(8, 32)
    for rows, factor in ((2, 0.5), (3, 0.25), (4, 3.0)):
        assert_equal(compiled(x, rows, factor), qlinear(x, layer)[:rows] * factor)
    assert backend.compilations == 1


@torch.no_grad()
def test_a_kernel_that_writes_its_operand_spares_those_read_elsewhere() -> None:
    packed, scale, zero_points, bias = conv_constants()
    operands = (SCALE, ZERO_POINT, packed, scale, zero_points)

    def build(graph: fx.Graph, x: fx.Node, accumulator: fx.Node) -> fx.Node:
        constants = [graph.get_attr(name) for name in ("packed", "scale", "zero_points", "bias")]
        return graph.call_function(
            onednn.qconv2d_pointwise.binary,
            (x, SCALE, ZERO_POINT, *constants[:3], accumulator, constants[3], [1, 1], [1, 1], [1, 1], 1,
             1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "relu", [], ""),
        )  # fmt: skip

    graph = fx.Graph()
    x, residual = graph.placeholder("x"), graph.placeholder("residual")
    fresh = graph.call_function(aten.mul.Tensor, (residual, 2.0))
    first = build(graph, x, fresh)  # may be written in place: nobody reads it again
    second = build(graph, x, residual)  # must not: it is the caller's
    graph.output((first, second))
    root = nn.Module()
    for name, value in zip(("packed", "scale", "zero_points", "bias"), (*operands[2:], bias), strict=True):
        root.register_buffer(name, value)
    codes = torch.randint(0, 256, (1, 8, 6, 6), dtype=torch.uint8).to(memory_format=torch.channels_last)
    other = torch.randn(1, 16, 6, 6).to(memory_format=torch.channels_last)
    gm = with_fake_values(fx.GraphModule(root, graph), (codes, other))
    given = other.clone()
    got = compile_lowered(gm, (codes, other), decompositions={})(codes, other)
    assert_equal(other, given)
    for result, start in zip(got, (given * 2, given), strict=True):
        expected = onednn.qconv2d_pointwise.binary(
            codes, *operands, start.clone(memory_format=torch.preserve_format), bias, [1, 1], [1, 1], [1, 1], 1,
            1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "relu", [], "",
        )  # fmt: skip
        assert_equal(result, expected)


def conv_constants() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, scale = torch.randint(-127, 128, (16, 8, 3, 3), dtype=torch.int8), torch.rand(16) / 100
    packed = onednn.qconv_prepack(weight, scale, SCALE, ZERO_POINT, [1, 1], [1, 1], [1, 1], 1, [1, 8, 6, 6])
    return packed, scale, torch.zeros(16, dtype=torch.int64), torch.randn(16)


def with_fake_values(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    mode = torch._subclasses.FakeTensorMode()
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = mode.from_tensor(value)
    return gm
