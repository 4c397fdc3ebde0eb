"""Files of models whose inputs are not all tensors: Python values are constants of the graph, in the file as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from road import STATIC, same

X = torch.randn(4, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, gain: float = 1.0, flag: bool = False, kind: str = "plain",
        power: int = 1, pair: tuple[Tensor, float] | None = None,
    ) -> Tensor:  # fmt: skip
        y = self.fc(x) * gain**power
        y = y.abs() if flag else y
        y = y if mask is None else y * mask
        y = y if pair is None else y + pair[0] * pair[1]
        return y if kind == "plain" else -y


@pytest.mark.parametrize(
    ("kwargs", "other"),
    [
        ({"gain": 2.0}, {"gain": 3.0}),
        ({"flag": True}, {"flag": False}),
        ({"mask": None}, {"mask": torch.ones(8)}),
        ({"kind": "negated"}, {"kind": "plain"}),
        ({"power": 2, "gain": 2.0}, {"power": 3, "gain": 2.0}),
        ({"mask": torch.rand(8), "gain": 0.5, "flag": True}, {"mask": torch.rand(8), "gain": 0.5, "flag": False}),
        ({"pair": (torch.rand(8), 0.5)}, {"pair": (torch.rand(8), 0.25)}),
    ],
)
@torch.no_grad()
def test_python_inputs_are_saved_as_the_constants_that_they_are(
    kwargs: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    prepared = qpass.prepare(Model().eval(), (X,), kwargs=kwargs, config=STATIC)
    prepared(X, **kwargs)
    quantized = qpass.convert(prepared)
    qpass.save(quantized, tmp_path / "model.pt2")
    loaded = qpass.load(tmp_path / "model.pt2")
    for x in (X, X[:1], torch.randn(9, 8)):
        assert same(loaded(x, **kwargs), quantized(x, **kwargs))
    for model in (quantized, loaded):
        with pytest.raises((RuntimeError, ValueError, TypeError, AssertionError)):
            model(X, **other)
