"""From a float model to a faster int8 one, on real images, in about a minute on a laptop's CPU.

    python examples/quickstart.py

A small convolutional net learns the handwritten digits that come with scikit-learn (1,797 real images, nothing is
downloaded). It is prepared, calibrated, converted and compiled; then both nets are compared on images neither has seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import qpass


class Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))): batch norms, an activation and an addition for the int8 kernels to absorb."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class DigitNet(nn.Module):
    """[B, 1, 8, 8] grey images -> [B, 10] scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.fine = Residual(64)
        self.widen = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.coarse = Residual(128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.fine(self.stem(x)), 2)
        x = self.coarse(self.widen(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 3) -> None:
    """Plain PyTorch; qpass takes the model as it is afterwards, and never edits it."""
    optimizer = torch.optim.AdamW(model.train().parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(images.split(64)))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Per cent of the images that the model names rightly, seen in batches of one size: one compilation is enough."""
    named = torch.cat([model(batch).argmax(1) for batch in images.split(256)])
    return 100 * (named == labels).double().mean().item()


def latency(models: Sequence[Callable[[Tensor], Tensor]], x: Tensor, rounds: int = 15) -> list[float]:
    """Median milliseconds a call; the models take turns, so that a busy moment of the machine hits all alike."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, taken in zip(models, times, strict=True):
            model(x)  # untimed: fills the caches that the other model has used
            start = time.perf_counter()
            model(x)
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


@torch.no_grad()
def quantize(model: nn.Module, calibration: Tensor) -> torch.fx.GraphModule:
    """The whole of it: observe, then round."""
    prepared = qpass.prepare(model)  # observers in; computes exactly what the model computes
    qpass.calibrate(prepared, calibration.split(64))  # or call it on your own batches
    return qpass.convert(prepared)  # int8 weights and q/dq pairs; runs anywhere


@torch.no_grad()
def compare(model: nn.Module, quantized: torch.fx.GraphModule, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Compile both models and print what int8 costs and what it brings."""
    compiled = {"float32, Inductor": torch.compile(model), "int8, qpass": torch.compile(quantized, backend="qpass")}
    right = [accuracy(run, images, labels) for run in compiled.values()]
    ms = latency(list(compiled.values()), images[:256])
    report = qpass.report(qpass.lower(quantized), images, reference=model)
    for row in zip(compiled, right, (report.bytes_before, report.bytes_after), ms, strict=True):
        print("{:18s}  accuracy {:6.2f} %   constants {:9,d} bytes   batch of 256 in {:6.2f} ms".format(*row))
    print(f"int8 is {ms[0] / ms[1]:.2f} times as fast\n\n{report}")
    return {"points_lost": right[0] - right[1], "accuracy": right[1], "speedup": ms[0] / ms[1], "sqnr": report.sqnr}


def main() -> dict[str, float]:
    """Train, quantize, compare."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # the grey levels are 0 to 16
    split = train_test_split(images, torch.tensor(digits.target), test_size=512, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    model = DigitNet()
    train(model, train_images, train_labels)
    return compare(model, quantize(model, train_images[:256]), test_images, test_labels)


if __name__ == "__main__":
    main()
