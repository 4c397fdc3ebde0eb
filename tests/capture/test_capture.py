from __future__ import annotations

import copy
import gc
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export

from qpass.capture.export import CAPTURE_KEY, FirstBatch, capture
from qpass.errors import CaptureError, InputError
from qpass.ir.record import graph_record
from qpass.ir.regions import regions
from qpass.ir.verify import verify

aten = torch.ops.aten


@dataclass
class Pair:
    left: Tensor
    right: Tensor


torch.export.register_dataclass(Pair)


class Net(nn.Module):
    """A conv, a norm, an in-place relu, dropout, a dead pooler, a tied weight, a constant and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.pooler = nn.Linear(4, 4)
        self.register_buffer("offset", torch.randn(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.relu(self.norm(self.conv(x)))).mean((2, 3))
        self.pooler(y).tanh()
        return self.tied(self.fc(y)) + self.offset + torch.tensor([1.0, 2.0, 3.0, 4.0])


def notes(gm: fx.GraphModule) -> list[str]:
    return gm.meta[CAPTURE_KEY]["notes"]


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


# ---- the graph


@pytest.mark.parametrize("example_batch", [4, 1])
def test_one_graph_serves_every_batch(example_batch: int) -> None:
    model = Net().eval()
    gm = capture(model, (images(example_batch),))
    verify(gm, "captured")
    assert graph_record(gm).stage == "captured"
    assert notes(gm) == []
    for batch in (1, 2, 4, 7):
        x = images(batch)
        assert torch.equal(gm(x), model(x))


def test_the_graph_is_plain_and_its_tensors_are_the_callers() -> None:
    model = Net().eval()
    gm = capture(model, (images(2),))
    targets = {node.target for node in gm.graph.nodes}
    assert aten.relu.default in targets
    assert not targets & {aten.relu_.default, aten.dropout.default, aten.tanh.default, aten.lift_fresh_copy.default}
    own = dict(model.named_parameters())
    unread = {"pooler.weight", "pooler.bias"}
    assert {id(parameter) for parameter in gm.parameters()} == {id(own[name]) for name in own.keys() - unread}
    assert gm.tied.weight is model.fc.weight  # export gives a tied weight one of its names
    assert gm.offset is model.offset
    unread |= {"fc.weight", "norm.num_batches_tracked"}
    assert gm.state_dict().keys() == model.state_dict().keys() - unread


def test_the_model_is_untouched() -> None:
    model = Net().eval()
    model.dropout.train()
    model.dropout.p = 0.0
    calls: list[int] = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, attributes = dict(model.named_modules()), set(vars(model))
    capture(model, (images(2),))
    assert dict(model.named_modules()) == modules
    assert set(vars(model)) == attributes
    assert [name for name, module in model.named_modules() if module.training] == ["dropout"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    count = len(calls)
    model(images(2))
    assert len(calls) == count + 1


def test_a_captured_graph_is_an_ordinary_module() -> None:
    gm = capture(Net().eval(), (images(2),))
    assert not gm.training
    assert type(gm).__name__ == "Net"
    assert gm.train().training
    assert gm.eval().to(torch.float32) is gm
    x = images(3)
    assert torch.equal(copy.deepcopy(gm)(x), gm(x))


# ---- inputs and outputs


class Structured(nn.Module):
    def forward(self, pair: Pair, *rest: Tensor, scale: dict[str, Tensor], flip: bool = False) -> dict[str, Any]:
        y = pair.left @ pair.right.transpose(1, 2) * scale["by"][0]
        return {"pair": Pair(y, -y), "list": [y.sum(1), sum(rest)], "flip": flip}


def test_structured_inputs_and_outputs_keep_their_form() -> None:
    def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = torch.randn(batch, 3, 4)
        return (Pair(x, x + 1), x, x * 2), {"scale": {"by": torch.randn(2)}, "flip": True}

    model = Structured()
    args, kwargs = inputs(4)
    gm = capture(model, args, kwargs=kwargs)
    for batch in (4, 2, 1):
        args, kwargs = inputs(batch)
        result, expected = gm(*args, **kwargs), model(*args, **kwargs)
        assert type(result["pair"]) is Pair
        assert torch.equal(result["pair"].right, expected["pair"].right)
        assert torch.equal(result["list"][1], expected["list"][1])
        assert result["flip"] is True


@pytest.mark.parametrize(
    "example", [torch.randn(2, 4), (torch.randn(2, 4),), [torch.randn(2, 4)], {"x": torch.randn(2, 4)}]
)
def test_example_inputs_come_in_every_handy_form(example: Any) -> None:
    class Plus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    gm = capture(Plus(), example)
    x = torch.randn(3, 4)
    assert torch.equal(gm(x=x) if isinstance(example, dict) else gm(x), x + 1)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Minus(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    x = torch.randn(2, 4)
    assert torch.equal(capture(Minus(), (x, x))(x, 2 * x), -x)


def test_example_inputs_are_not_marked_dynamic() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    before = set(vars(x))
    capture(nn.Linear(4, 4), (x,))
    assert set(vars(x)) == before


def test_a_value_that_the_graph_holds_is_checked() -> None:
    class Times(nn.Module):
        def forward(self, x: Tensor, times: int) -> Tensor:
            return x * times

    gm = capture(Times(), (torch.randn(2, 4), 3))
    with pytest.raises(InputError, match="input 'times' is 5, and was 3 when the model was captured"):
        gm(torch.randn(2, 4), 5)


# ---- the doors


def test_an_exported_program_is_taken_and_left_alone() -> None:
    class Guarded(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.cond(y.sum() > 0, lambda z: self.fc(z), lambda z: self.tied(z), (y,))

    model = Guarded().eval()
    program = export(model, (images(2),), dynamic_shapes=({0: Dim.AUTO},))
    before = [str(region.graph) for region in regions(program.graph_module)]
    gm = capture(program)
    assert [str(region.graph) for region in regions(program.graph_module)] == before
    x = images(3)
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))
        assert torch.equal(program.module()(x), model(x))
    assert gm.fc.bias is model.fc.bias


@pytest.mark.parametrize("check_guards", [True, False])
def test_a_graph_module_of_aten_is_taken_as_it_is(check_guards: bool) -> None:
    model = Net().eval()
    given = export(model, (images(2),), dynamic_shapes=({0: Dim.AUTO},)).module(check_guards=check_guards)
    before = str(given.graph)
    gm = capture(given)
    assert str(given.graph) == before
    assert not gm.graph.find_nodes(op="call_module")
    assert torch.equal(gm(images(5) * 0 + 1), model(images(5) * 0 + 1))
    again = capture(gm)
    assert [n.name for n in again.graph.nodes] == [n.name for n in gm.graph.nodes]


def test_a_symbolically_traced_module_is_exported() -> None:
    model = Net().eval()
    gm = capture(fx.symbolic_trace(model), (images(2),))
    verify(gm, "captured")
    x = images(3)
    assert torch.equal(gm(x), model(x))


def test_the_first_batch_builds_and_the_model_is_not_registered() -> None:
    model = Net().eval()
    lazy = FirstBatch(model, lambda model, args, kwargs: capture(model, args, kwargs=kwargs))
    lazy.train()
    assert not model.training
    assert not list(lazy.parameters())
    with pytest.raises(CaptureError) as raised:
        _ = lazy.captured
    assert str(raised.value) == (
        "the model was given without example inputs and has not seen a batch yet, so there is no graph\n"
        "  where: Net\n"
        "  to do: call it on a batch first, or pass example_inputs"
    )
    for batch in (4, 2, 1):
        x = images(batch)
        assert torch.equal(lazy(x), model(x))
    assert isinstance(lazy.captured, fx.GraphModule)
    assert lazy.captured.fc.bias is model.fc.bias


# ---- regions, threads, memory


class Regions(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))

        def body(i: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, self.fc(z)

        _, y = torch.while_loop(lambda i, z: i < 2, body, (torch.zeros((), dtype=torch.int64), y))
        return torch.cond(y.sum() > 0, lambda z: self.fc(z), lambda z: self.pooler(z), (y,))


def test_no_grad_cond_and_while_loop_all_read_their_weights_as_constants() -> None:
    model = Regions().eval()
    gm = capture(model, (images(2),))
    assert notes(gm) == []
    linears = [n for region in regions(gm) for n in region.graph.nodes if n.target is aten.linear.default]
    assert len(linears) == 3
    assert all(node.args[1].op == "get_attr" for node in linears)
    for batch in (3, 1):
        x = images(batch)
        assert torch.equal(gm(x), model(x))  # in grad mode


def test_six_threads_capture_at_once() -> None:
    models = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).eval() for _ in range(6)]
    x, results, errors = torch.randn(3, 4), {}, []

    def work(index: int) -> None:
        try:
            results[index] = capture(models[index], (torch.randn(2, 4),))(x)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors
    assert all(torch.equal(results[index], model(x)) for index, model in enumerate(models))


def test_nothing_keeps_a_captured_graph_alive() -> None:
    model = Net().eval()
    gone = [weakref.ref(capture(model, (images(2),))) for _ in range(3)]
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]


def test_a_fused_encoder_layer_is_noted() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    gm, x = capture(layer, (torch.randn(2, 3, 8),)), torch.randn(4, 3, 8)
    assert torch.equal(gm(x), layer(x)), "with gradients torch runs it as it was traced"
    (note,) = notes(gm)
    assert note.startswith("in evaluation without gradients torch runs nn.TransformerEncoderLayer by a fused kernel")
    assert notes(capture(nn.Linear(8, 8), (x,))) == []
