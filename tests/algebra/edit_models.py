"""Small models to edit: a causal language model, and a classifier of vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, VOCABULARY, CLASSES = 32, 40, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (4, -1)).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.self_attn, self.norm2, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Token ids (n, length) to logits (n, length, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(self.norm(h))


def sequences(n: int, seed: int = 0) -> Tensor:
    """Token ids (n, 6); the first rows end, before their last token, in different ones."""
    ids = torch.randint(0, VOCABULARY, (n, 6), generator=torch.Generator().manual_seed(seed))
    ids[:VOCABULARY, 4] = torch.arange(VOCABULARY)[:n]
    return ids


def language_model() -> LanguageModel:
    """One with random weights, which answers something."""
    torch.manual_seed(0)
    model = LanguageModel()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
        for layer in model.layers:
            layer.mlp.down_proj.weight.mul_(10)  # else random layers hardly add anything to the stream
    return model.eval()


def classifier() -> nn.Module:
    """Vectors (n, 8) to logits of four classes, trained for a moment."""
    torch.manual_seed(0)
    x, y = vectors(200)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        adam.zero_grad()
        F.cross_entropy(model(x), y).backward()
        adam.step()
    return model.eval()


def vectors(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four clusters."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=g)
    return 2 * F.one_hot(y, 8).float() + 0.5 * torch.randn(n, 8, generator=g), y
