from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpass.capture.export import capture
from qpass.errors import CaptureError, InputError
from qpass.ir.record import graph_record


@dataclass
class Unregistered:
    value: Tensor


def line_of(function: Callable[..., Any], offset: int) -> str:
    number = function.__code__.co_firstlineno + offset
    return f"test_capture_errors.py:{number}: {linecache.getline(__file__, number).strip()}"


def refusal(model: Any, *args: Any, **options: Any) -> str:
    with pytest.raises((CaptureError, InputError)) as raised:
        capture(model, *args, **options)
    return str(raised.value)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_an_export_failure_names_the_users_line() -> None:
    message = refusal(DataDependent(), (torch.randn(2, 4),)).splitlines()
    assert message[0].startswith(
        "torch.export cannot capture DataDependent: Could not guard on data-dependent expression Eq(u0, 1)"
    )
    assert message[1:] == [
        f"  where: {line_of(DataDependent.forward, 1)}",
        "  to do: the model decides on the value of a tensor; use torch.cond for a branch, torch.where for a choice of "
        "values, torch._check to bound a size",
    ]


def test_a_wrong_call_says_how_to_pass_example_inputs() -> None:
    assert refusal(nn.Linear(4, 4), (torch.randn(2, 4), 1)) == (
        "torch.export cannot capture Linear: too many positional arguments\n"
        "  where: Linear\n"
        "  to do: pass example_inputs (and kwargs) just as the model's forward takes them"
    )


def test_an_unknown_container_says_how_to_register_it() -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> Unregistered:
            return Unregistered(x)

    message = refusal(Returns(), (torch.randn(2, 4),))
    assert "Unregistered" in message
    assert message.endswith("register the class once, before this call: torch.export.register_dataclass(TheClass)")


def test_a_cache_in_the_output_says_how_to_go_without() -> None:
    class DynamicCache:
        pass

    class Decoder(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.sin(), DynamicCache()

    assert refusal(Decoder(), (torch.randn(2, 4),)).endswith(
        "to do: call a transformers model without its cache: use_cache=False among the kwargs, or in its config"
    )


def test_an_array_says_how_to_make_it_a_tensor() -> None:
    assert refusal(nn.Linear(4, 4), (torch.randn(2, 4).numpy(),)).endswith(
        "to do: pass tensors: torch.from_numpy(array)"
    )


@pytest.mark.parametrize(
    ("model", "operator", "place"),
    [(nn.Sequential(nn.Dropout(0.5)), "dropout", "0 (dropout)"), (nn.BatchNorm1d(4), "batch_norm", "batch_norm")],
)
def test_a_model_in_training_mode_is_refused(model: nn.Module, operator: str, place: str) -> None:
    assert refusal(model.train(), (torch.randn(2, 4),)) == (
        f"the model is in training mode: {operator} behaves as in training\n"
        f"  where: {place}\n"
        "  to do: call model.eval() first; a functional call needs training=self.training"
    )
    assert capture(model.eval(), (torch.randn(2, 4),))(torch.zeros(3, 4)).shape == (3, 4)


def test_a_norm_without_statistics_is_not_training() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.InstanceNorm1d(4)).eval()
    x = torch.randn(5, 4, 6)
    assert torch.equal(capture(model, (torch.randn(2, 4, 6),))(x), model(x))


def test_an_integer_model_is_refused() -> None:
    class Count(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(0) * 2

    assert refusal(Count(), (torch.arange(4),)) == (
        "Count computes with integers alone, so there is nothing to quantize\n"
        "  where: Count\n"
        "  to do: pass the float model; a quantized one is not quantized again"
    )


def test_a_model_on_the_meta_device_is_refused_before_any_work() -> None:
    assert refusal(nn.Sequential(nn.Linear(4, 4, device="meta")), (torch.randn(2, 4),)) == (
        "the model is on the meta device: 2 of its tensors hold no data\n"
        "  where: 0.weight\n"
        "  to do: load the weights first, for example model.to_empty(device='cpu') and load_state_dict"
    )


def test_wrong_arguments_are_refused() -> None:
    assert refusal(lambda x: x) == (
        "a model is an nn.Module, an ExportedProgram or a GraphModule, not function\n  to do: pass the model itself"
    )
    assert refusal(nn.Linear(4, 4)) == (
        "Linear can be captured only with example inputs\n"
        "  to do: pass example_inputs=(x,), the positional inputs of one call"
    )
    assert refusal(nn.Linear(4, 4), 3) == (
        "example_inputs is a tuple of positional inputs, one tensor or a dict, not int\n"
        "  to do: pass example_inputs=(x,); x is one batch, as next(iter(loader)) gives it"
    )
    prepared = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    graph_record(prepared).stage = "prepared"
    assert refusal(prepared) == "the model is prepared already\n  to do: start again from the float model"
