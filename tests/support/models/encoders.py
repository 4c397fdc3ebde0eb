"""Transformer encoders: BERT and ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .build import Built, Size, initialise, whole_model


class SelfAttention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class BertLayer(nn.Module):
    """Post-norm: ``norm(x + f(x))``."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden, heads)
        self.attention_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.intermediate, self.output = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(self.attention(x) + x)
        return self.output_norm(self.output(F.gelu(self.intermediate(x))) + x)


class Bert(nn.Module):
    """Token ids ``[B, T]`` -> (hidden states ``[B, T, H]``, pooled ``[B, H]``)."""

    def __init__(self, vocab: int, positions: int, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(vocab, hidden), nn.Embedding(positions, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.layers = nn.ModuleList(BertLayer(hidden, heads) for _ in range(layers))
        self.pooler = nn.Linear(hidden, hidden)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.word(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)))
        for layer in self.layers:
            x = layer(x)
        return x, torch.tanh(self.pooler(x[:, 0]))


@whole_model
def bert(size: Size) -> Built:
    """BERT-base's shape with four layers, and 4 x 128 tokens."""
    vocab, tokens, hidden, heads, layers = (30522, 128, 768, 12, 4) if size == "full" else (100, 16, 32, 4, 2)
    model = Bert(vocab, 4 * tokens, hidden, heads, layers)
    initialise(model)
    return model, (torch.randint(vocab, (4, tokens)),)


class VitBlock(nn.Module):
    """Pre-norm, with one linear for query, key and value."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden, eps=1e-6), nn.LayerNorm(hidden, eps=1e-6)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, image: int, patch: int, hidden: int, heads: int, layers: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, hidden, patch, stride=patch)
        self.class_token = nn.Parameter(0.1 * torch.randn(1, 1, hidden))
        self.position = nn.Parameter(0.1 * torch.randn(1, (image // patch) ** 2 + 1, hidden))
        self.blocks = nn.Sequential(*(VitBlock(hidden, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(hidden, eps=1e-6), nn.Linear(hidden, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


@whole_model
def vit(size: Size) -> Built:
    """ViT-B/16's shape with four layers, and four images."""
    image, patch, hidden, heads, layers = (224, 16, 768, 12, 4) if size == "full" else (32, 8, 32, 4, 2)
    model = Vit(image, patch, hidden, heads, layers, classes=1000 if size == "full" else 10)
    initialise(model)
    return model, (torch.randn(4, 3, image, image),)
