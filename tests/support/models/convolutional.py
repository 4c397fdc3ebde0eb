"""Convolutional networks: ResNet-50, MobileNetV2, and one on raw audio."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .build import Built, Size, initialise, settle_batch_norm, whole_model


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Bottleneck(nn.Module):
    """ResNet v1.5: the stride is in the 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inputs, width, 1)
        self.conv2, self.bn2 = conv_norm(width, width, 3, stride)
        self.conv3, self.bn3 = conv_norm(width, 4 * width, 1)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inputs == 4 * width
        self.downsample = None if same else nn.Sequential(*conv_norm(inputs, 4 * width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += identity
        return self.relu(x)


class ResNet(nn.Module):
    """Images ``[B, 3, H, W]`` -> logits ``[B, classes]``."""

    def __init__(self, depths: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, width, 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        channels, stages = width, []
        for stage, depth in enumerate(depths):
            for block in range(depth):
                stages.append(Bottleneck(channels, width << stage, stride=2 if stage and block == 0 else 1))
                channels = 4 * (width << stage)
        self.stages, self.pool, self.fc = nn.Sequential(*stages), nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.stages(self.stem(image))), 1))


@whole_model
def resnet50(size: Size) -> Built:
    """ResNet-50 on eight images, channels last. Tiny: one block a stage."""
    if size == "full":
        model, batch, image = ResNet((3, 4, 6, 3), 64, 1000), 8, 224
    else:
        model, batch, image = ResNet((1, 1, 1, 1), 16, 10), 2, 64
    model, inputs = finish(model, torch.randn(batch, 3, image, image))
    for block in model.stages:
        nn.init.uniform_(block.bn3.weight, 0.1, 0.5)  # trained branches are smaller than what they are added to
    settle_batch_norm(model, inputs)
    return model, inputs


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; added to the input where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*conv_norm(inputs, hidden, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        depthwise = [*conv_norm(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*expand, *depthwise, *conv_norm(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Images ``[B, 3, H, W]`` -> logits ``[B, classes]``; ``plan``: (expansion, channels, repeats, first stride)."""

    def __init__(self, plan: tuple[tuple[int, int, int, int], ...], first: int, last: int, classes: int) -> None:
        super().__init__()
        features: list[nn.Module] = [*conv_norm(3, first, 3, stride=2), nn.ReLU6(inplace=True)]
        channels = first
        for expansion, outputs, repeats, stride in plan:
            for repeat in range(repeats):
                features.append(InvertedResidual(channels, outputs, stride if repeat == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*features, *conv_norm(channels, last, 1), nn.ReLU6(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(image)), 1))


MOBILENET_V2_PLAN = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


@whole_model
def mobilenet_v2(size: Size) -> Built:
    """MobileNetV2 on eight images, channels last."""
    if size == "full":
        return finish(MobileNetV2(MOBILENET_V2_PLAN, 32, 1280, 1000), torch.randn(8, 3, 224, 224))
    return finish(MobileNetV2(((1, 8, 1, 1), (4, 16, 2, 2)), 8, 32, 10), torch.randn(2, 3, 32, 32))


class AudioConv(nn.Module):
    """Waveform ``[B, 1, T]`` -> logits ``[B, classes]``: a strided stem, then residual depthwise-separable blocks."""

    def __init__(self, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(1, width, 10, stride=5, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Conv1d(width, 2 * width, 8, stride=4), nn.GELU(),
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(2 * width, 2 * width, 5, padding=2, groups=2 * width, bias=False),
                nn.BatchNorm1d(2 * width), nn.Hardswish(),
                nn.Conv1d(2 * width, 2 * width, 1, bias=False),
                nn.BatchNorm1d(2 * width),
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.pool, self.head = nn.AdaptiveAvgPool1d(1), nn.Linear(2 * width, classes)

    def forward(self, wave: Tensor) -> Tensor:
        x = self.stem(wave)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(self.pool(x).squeeze(-1))


@whole_model
def audio_conv(size: Size) -> Built:
    """A keyword-spotting network on one second at 16 kHz, batch 8."""
    if size == "full":
        return finish(AudioConv(128, 6, 35), torch.randn(8, 1, 16000))
    return finish(AudioConv(8, 2, 5), torch.randn(2, 1, 800))


def finish(model: nn.Module, x: Tensor) -> Built:
    """Initialise, settle the batch norms, and go channels last where there are images."""
    initialise(model)
    if x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    settle_batch_norm(model, (x,))
    return model, (x,)
