"""Transformer decoders: GPT-2 and Llama."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .build import Built, Size, initialise, whole_model


class Conv1D(nn.Module):
    """GPT-2's linear: a weight ``[in, out]`` and an explicit ``addmm``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.bias = nn.Parameter(0.05 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class GptBlock(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.hidden, self.heads = hidden, heads
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.c_attn, self.c_proj = Conv1D(hidden, 3 * hidden), Conv1D(hidden, hidden)
        self.c_fc, self.c_out = Conv1D(hidden, 4 * hidden), Conv1D(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.c_attn(self.ln_1(x)).split(self.hidden, dim=2)
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in qkv)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """Token ids ``[B, T]`` -> logits ``[B, T, vocab]``; the output layer shares the embedding's weight."""

    def __init__(self, vocab: int, positions: int, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, hidden), nn.Embedding(positions, hidden)
        self.blocks = nn.ModuleList(GptBlock(hidden, heads) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(hidden), nn.Linear(hidden, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


@whole_model
def gpt2(size: Size) -> Built:
    """GPT-2's shape with four layers, a vocabulary of 8192, and 4 x 128 tokens."""
    vocab, tokens, hidden, heads, layers = (8192, 128, 768, 12, 4) if size == "full" else (100, 16, 32, 4, 2)
    model = Gpt(vocab, 8 * tokens, hidden, heads, layers)
    initialise(model)
    return model, (torch.randint(vocab, (4, tokens)),)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.exp(0.3 * torch.randn(hidden))), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class LlamaLayer(nn.Module):
    """Rotary positions, ``heads`` query heads on ``kv_heads`` key/value heads, SwiGLU."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, intermediate: int) -> None:
        super().__init__()
        self.head_dim, self.groups = hidden // heads, heads // kv_heads
        self.input_norm, self.post_norm = RMSNorm(hidden), RMSNorm(hidden)
        self.q_proj, self.o_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(hidden, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.input_norm(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.post_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in halves: ``[B, heads, T, D]``, ``cos`` and ``sin`` ``[T, D]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Llama(nn.Module):
    """Token ids ``[B, T]`` -> logits ``[B, T, vocab]``."""

    def __init__(
        self, vocab: int, positions: int, hidden: int, heads: int, kv_heads: int, intermediate: int, layers: int
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(LlamaLayer(hidden, heads, kv_heads, intermediate) for _ in range(layers))
        self.norm, self.lm_head = RMSNorm(hidden), nn.Linear(hidden, vocab, bias=False)
        dim = hidden // heads
        frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        angle = torch.outer(torch.arange(positions), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, cos, sin = self.embed_tokens(ids), self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


@whole_model
def llama(size: Size) -> Built:
    """A small Llama: hidden 512, 8 heads on 2 key/value heads, four layers, and 4 x 128 tokens."""
    vocab, tokens, hidden, heads, kv_heads, intermediate, layers = (
        (8192, 128, 512, 8, 2, 1408, 4) if size == "full" else (100, 16, 32, 4, 2, 88, 2)
    )
    model = Llama(vocab, 4 * tokens, hidden, heads, kv_heads, intermediate, layers)
    initialise(model)
    return model, (torch.randint(vocab, (4, tokens)),)
