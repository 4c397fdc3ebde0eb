from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from interpret import assert_true_vals, operators
from pipeline_run import Do
from qpass.capture.export import capture
from qpass.ir.attributes import free_name, get_constant, owner_of, set_constant
from qpass.ir.editor import INHERITED, Editor, erase_dead
from qpass.ir.fake import fake_call, fake_mode_of, recompute_val
from qpass.ir.module import Draft, copy_graph_module, rebuild

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4))
        self.unused = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x)) * self.mask


def captured() -> fx.GraphModule:
    return capture(Net().eval(), (torch.randn(3, 4),))


def node_of(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name == name)


def test_a_new_node_has_a_true_val_and_the_provenance_of_another() -> None:
    gm = captured()
    edit, relu = Editor(gm, "a_pass"), node_of(gm, "relu")
    new = edit.call(aten.unsqueeze.default, relu, 0, like=relu, before=relu.next)
    double = edit.call(torch.ops.aten.mul.Scalar, new, 2.0, like=relu, after=new)
    gm.graph.lint()
    for node in (new, double):
        assert isinstance(node.meta["val"], FakeTensor)
        assert all(node.meta[key] == relu.meta[key] for key in INHERITED if key in relu.meta)
        assert {"stack_trace", "nn_module_stack"} <= node.meta.keys()
        (source,) = node.meta["from_node"]
        assert (source.name, source.pass_name) == ("relu", "a_pass")
    gm.graph.output_node().args = ((double,),)
    gm.recompile()
    assert_true_vals(gm, torch.randn(3, 4))
    batch = relu.meta["val"].shape[0]
    assert double.meta["val"].shape[1] is batch or double.meta["val"].shape[1] == batch  # still symbolic


def test_vals_of_several_results() -> None:
    gm = captured()
    edit, relu = Editor(gm), node_of(gm, "relu")
    pair = edit.call(aten.max.dim, relu, 1, like=relu, before=relu.next)
    index = edit.call(operator.getitem, pair, 1, like=relu, after=pair)
    assert [leaf.dtype for leaf in pair.meta["val"]] == [torch.float32, torch.int64]
    assert index.meta["val"].dtype == torch.int64


def test_a_node_on_values_that_nobody_knows_has_none() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(x)
    assert fake_mode_of(graph) is None
    assert fake_call(x, call=aten.relu.default) is None
    new = Editor(fx.GraphModule({}, graph)).call(aten.relu.default, x, like=x, after=x)
    assert "val" not in new.meta


def test_a_val_is_computed_again_when_an_input_changed() -> None:
    gm = captured()
    edit, relu = Editor(gm), node_of(gm, "relu")
    low = edit.call(aten.to.dtype, relu.args[0], torch.bfloat16, like=relu, before=relu)
    relu.args = (low,)
    assert relu.meta["val"].dtype == torch.float32
    recompute_val(relu)
    assert relu.meta["val"].dtype == torch.bfloat16


def test_calls_of_one_form_share_a_result_and_no_others_do() -> None:
    gm = captured()
    relu = node_of(gm, "relu")
    linear: fx.Node = relu.args[0]  # type: ignore[assignment]
    assert fake_call(relu, 1, call=aten.mul.Tensor) is fake_call(linear, 1, call=aten.mul.Tensor)
    codes = Editor(gm).call(aten.to.dtype, relu, torch.int8, like=relu, after=relu)
    dtypes = [fake_call(codes, factor, call=aten.mul.Tensor).dtype for factor in (1, 1.0, True)]
    assert dtypes == [torch.int8, torch.float32, torch.int8]
    assert fake_call(relu, 0, 1, call=aten.transpose.int).shape != fake_call(relu, 0, 0, call=aten.transpose.int).shape
    counts = [fake_call(x, call=aten.nonzero.default).shape[0] for x in (relu, linear)]
    assert counts[0].node.expr != counts[1].node.expr  # as many as the values say, which nobody knows to be equal
    assert fake_call(relu, call=aten.relu_.default) is relu.meta["val"]


def test_a_copy_that_is_still_changed_has_no_code_until_it_is_rebuilt() -> None:
    gm, x = captured(), torch.randn(3, 4)
    draft = copy_graph_module(gm, Draft)
    with pytest.raises(NotImplementedError):
        draft(x)
    assert torch.equal(rebuild(draft)(x), gm(x))


def test_constants_are_buffers_at_dotted_names() -> None:
    gm = captured()
    edit, relu = Editor(gm), node_of(gm, "relu")
    value = torch.arange(3)
    first = edit.constant("body.0.weight", value, like=relu, before=relu)
    second = edit.constant("new.place", value, like=relu, before=relu)
    assert [node.target for node in (first, second)] == ["body.0.weight_1", "new.place"]
    assert get_constant(gm, "body.0.weight_1") is value
    assert gm.get_buffer("new.place") is value
    assert (first.meta["val"].dtype, first.meta["val"].shape) == (torch.int64, (3,))
    assert first.meta["val"].fake_mode is fake_mode_of(gm.graph)


def test_free_names() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    set_constant(module, "0.weight_1", torch.ones(1))
    assert [free_name(module, name) for name in ("0.weight", "0.new", "other.weight")] == [
        "0.weight_2", "0.new", "other.weight",
    ]  # fmt: skip
    assert owner_of(module, "0.weight") == (module[0], "weight")


def test_a_free_name_goes_through_no_attribute_that_modules_have() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    for name, free in (("heads.train.weight", "heads_train_weight"), ("0.__dict__.folded", "0___dict___folded")):
        assert free_name(module, name) == free
        set_constant(module, free, torch.ones(1))
        assert free_name(module, name) == f"{free}_1"


def test_a_copy_shares_every_tensor_and_no_structure() -> None:
    gm = captured()
    copy = copy_graph_module(gm)
    for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
        assert get_constant(copy, name) is tensor
    assert "mask" not in copy.state_dict()
    set_constant(copy, "body.0.extra", torch.ones(1))
    assert not hasattr(gm.get_submodule("body.0"), "extra")
    copy.graph.erase_node(copy.graph.output_node())
    assert operators(gm).endswith("return [mul]")


def test_a_copy_is_the_same_graph() -> None:
    gm, x = captured(), torch.randn(3, 4)
    gm.meta["note"] = ["kept"]
    copy = copy_graph_module(gm)
    assert operators(copy) == operators(gm)
    assert [node.name for node in copy.graph.nodes] == [node.name for node in gm.graph.nodes]
    assert all(
        new.meta.get("val") is old.meta.get("val") for new, old in zip(copy.graph.nodes, gm.graph.nodes, strict=True)
    )
    assert copy.meta == gm.meta
    assert copy.meta["note"] is not gm.meta["note"]
    assert (copy.training, type(copy).__name__) == (gm.training, type(gm).__name__)
    assert torch.equal(copy(x), gm(x))


def test_what_the_graph_no_longer_reads_is_left_behind() -> None:
    gm, x = captured(), torch.randn(3, 4)
    mul = node_of(gm, "mul")
    mul.replace_all_uses_with(mul.args[0])
    gm.graph.erase_node(mul)
    gm.graph.eliminate_dead_code()
    small = rebuild(gm)
    assert {name for name, _ in [*small.named_parameters(), *small.named_buffers()]} == {"body.0.weight", "body.0.bias"}
    assert small(x).shape == (3, 4)


def test_a_copy_of_a_region_is_a_region_of_its_own() -> None:
    model = Do(lambda m, x: torch.cond(x.sum() > 0, lambda y: m.fc(y), lambda y: y.relu(), (x,)), fc=nn.Linear(4, 4))
    gm = capture(model.eval(), (torch.randn(3, 4),))
    copy = copy_graph_module(gm)
    region, twin = gm.true_graph_0, copy.true_graph_0
    assert region is not twin
    assert twin.graph is not region.graph
    assert [a is b for a, b in zip(region.parameters(), twin.parameters(), strict=True)] == [True, True]


@pytest.mark.parametrize("twice", [False, True])
def test_dead_nodes_are_erased_users_first(twice: bool) -> None:
    gm = captured()
    mul = node_of(gm, "mul")
    relu, mask = mul.args
    gm.graph.output_node().args = ((relu,),)
    nodes = [mul, mask, relu, *([mul] if twice else [])]
    erase_dead(gm.graph, nodes)
    assert not {"mul", "mask"} & {node.name for node in gm.graph.nodes}
    assert "relu" in {node.name for node in gm.graph.nodes}
    erase_dead(gm.graph, [node_of(gm, "x"), gm.graph.output_node()])  # the graph's own interface is never dead
    gm.graph.lint()
