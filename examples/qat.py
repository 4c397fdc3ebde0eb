"""When rounding after training is too coarse, train with the rounding: int4 weights, in a minute on a laptop's CPU.

    python examples/qat.py

A small convolutional net learns the handwritten digits that come with scikit-learn (1,797 real images, nothing is
downloaded). Rounded to 4 bits afterwards it loses accuracy; trained five more epochs with the rounding in it, it gets
the accuracy back. Both are converted by the same call and have the same codes, scales and size.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import qpass
from qpass.fake_quantize import freeze_batch_norm_stats, freeze_observers

WEIGHT_BITS, ACTIVATION_BITS = 4, 4


def separable(inputs: int, outputs: int) -> list[nn.Module]:
    """A filter for each channel, then a mixture of channels: few weights, each of which counts."""
    return [
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    ]  # fmt: skip


class DigitNet(nn.Module):
    """[B, 1, 8, 8] grey images -> [B, 10] scores; 15 convolutions deep, so that errors of rounding add up."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        stem = [nn.Conv2d(1, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU()]
        layers = [*stem, *separable(width // 2, width), nn.MaxPool2d(2)]
        for _ in range(6):
            layers += separable(width, width)
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)))


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, frozen_epochs: int = 0
) -> nn.Module:
    """Plain PyTorch, for both models alike; the last epochs may train the weights alone."""
    optimizer = torch.optim.AdamW(model.train().parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(images.split(64)))
    for epoch in range(epochs):
        if epoch == epochs - frozen_epochs:
            freeze_observers(model)
            freeze_batch_norm_stats(model)
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent of the images that the model names rightly."""
    return 100 * (model(images).argmax(1) == labels).double().mean().item()


def main() -> dict[str, float]:
    """Train, round, train with the rounding, compare."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # the grey levels are 0 to 16
    split = train_test_split(images, torch.tensor(digits.target), test_size=512, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    model = train(DigitNet(), train_images, train_labels, epochs=10, rate=8e-3)

    config = qpass.presets.int8_qat(weight_bits=WEIGHT_BITS, activation_bits=ACTIVATION_BITS)
    prepared = qpass.prepare(model, (train_images[:64],), config=config)  # a copy: `model` keeps its own weights
    qpass.calibrate(prepared.train(), train_images.split(64))
    after = qpass.convert(prepared)  # convert takes a snapshot; the prepared model is trained on
    train(prepared, train_images, train_labels, epochs=5, rate=3e-3, frozen_epochs=1)
    with_rounding = qpass.convert(prepared)

    found = {"float32": model, "rounded after training": after, "trained with rounding": with_rounding}
    figures = {name: accuracy(net, test_images, test_labels) for name, net in found.items()}
    print(f"weights of {WEIGHT_BITS} bits, activations of {ACTIVATION_BITS}, {len(test_images)} test images")
    for name, right in figures.items():
        print(f"{name:24s} accuracy {right:6.2f} %")
    print(f"\n{qpass.report(with_rounding, test_images, reference=model)}")
    return figures


if __name__ == "__main__":
    main()
