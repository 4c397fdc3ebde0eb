"""A Hugging Face encoder in int8, with activation ranges found at run time or from calibration.

    pip install transformers && python examples/transformer.py

The encoder is built from a config with random weights, so nothing is downloaded; a trained one goes the same way. It
is called by keyword and returns a dataclass, and stays that way after quantization.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qpass

Batch = dict[str, Tensor]


def encoder() -> nn.Module:
    """BERT with 4 layers of width 512 and PyTorch's fused attention."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        sys.exit("this example needs the package transformers: pip install 'transformers>=5'")
    config = BertConfig(
        vocab_size=8192, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048,
        attn_implementation="sdpa",
    )  # fmt: skip
    return BertModel(config).eval()


def batch(size: int = 4, length: int = 128) -> Batch:
    """Random tokens; every second text is padded by a quarter."""
    mask = torch.ones(size, length, dtype=torch.long)
    mask[1::2, -length // 4 :] = 0
    return {"input_ids": torch.randint(8192, (size, length)), "attention_mask": mask}


def dynamic(model: nn.Module) -> torch.fx.GraphModule:
    """Ranges of activations are found at run time, one for each token: no data is needed to convert."""
    return qpass.convert(qpass.prepare(model, kwargs=batch(), config="int8_dynamic"))


def static(model: nn.Module) -> torch.fx.GraphModule:
    """Ranges of activations come from calibration; without example inputs the model is captured at its first batch."""
    prepared = qpass.prepare(model, config="int8_static")
    qpass.calibrate(prepared, [batch() for _ in range(4)])
    return qpass.convert(prepared)


def latency(models: dict[str, Callable[..., Any]], inputs: Batch, rounds: int = 7) -> dict[str, float]:
    """Median milliseconds a call, the models taking turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            model(**inputs)  # untimed: fills the caches that the other models have used
            start = time.perf_counter()
            model(**inputs)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def main() -> dict[str, dict[str, float]]:
    """Quantize both ways, compare with Inductor's float32, and show what became of each operation."""
    torch.manual_seed(0)
    model, unseen = encoder(), batch()
    quantized = {"int8_dynamic": dynamic(model), "int8_static": static(model)}
    compiled: dict[str, Callable[..., Any]] = {"float32": torch.compile(model)}
    compiled |= {name: torch.compile(graph, backend="qpass") for name, graph in quantized.items()}
    ms = latency(compiled, unseen)
    decibels = {name: qpass.sqnr(model, compiled[name], unseen) for name in quantized}
    for name, value in ms.items():
        quality = f"   SQNR {decibels[name]:5.1f} dB" if name in decibels else ""
        print(f"{name:12s}  {value:7.2f} ms   {ms['float32'] / value:4.2f} times as fast{quality}")
    for name, graph in quantized.items():
        print(f"\n{name}\n{qpass.report(qpass.lower(graph))}")
    return {"ms": ms, "sqnr": decibels}


if __name__ == "__main__":
    main()
