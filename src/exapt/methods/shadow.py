"""ShadowPEFT (Li et al., 2026), as PEFT 0.21 has it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.contract import ActivationMethod, Tensors
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site

DECODER = ("norm_1", "q", "k", "v", "o", "norm_2", "gate", "wide", "narrow")


@register
@dataclass(frozen=True)
class Shadow(ActivationMethod):
    r"""A small decoder reads the same tokens, and its state :math:`s` runs beside the model's from block to block. What they differ by is added to
    each block's input, and the state follows each block's output:

    .. math:: h^{(l)} = h_{out}^{(l-1)} + \alpha\, W_{up} W_{down} (h_{out}^{(l-1)} - s^{(l-1)}), \quad
        s^{(l)} = (1 - g) \odot s^{(l-1)} + g \odot T(h_{out}^{(l)}), \quad g = \sigma(G(h_{out}^{(l)}))

    :math:`T` and :math:`G` are networks of two layers with GELU between. The small decoder is Llama's (RMS norms, rotary positions, SiLU gates, no biases),
    as PEFT makes it beside a Llama; it takes the model's own embeddings where it is as wide. So this is for decoders of which
    the token embedding goes straight into the first block. Two things of PEFT's training are left to the caller: dropout of the difference, and
    a share of the loss on the state :math:`s^{(0)}` itself. The state needs the whole sequence: generate with ``use_cache=False``.

    Args:
        rank: Rank of :math:`W_{up} W_{down}`.
        alpha: Scale :math:`\alpha`.
        update: Width of :math:`T` and :math:`G` inside; 0: the rank.
        layers: Blocks of the small decoder.
        hidden: Its width; 0: the model's.
        intermediate: Width of its feed-forward layers; 0: four times its width.
        heads: Its attention heads.
        kv_heads: Its heads of keys and values; 0: as many.
        head_dim: Dimensions of a head; 0: its width divided by the heads.
        theta: Base of the rotary positions.
        eps: Of its norms.
        embeds: Whether it has token embeddings of its own although it is as wide as the model.
        padded: Whether it heeds the call's ``input_ids`` and ``attention_mask``, as a transformers model is called; otherwise all
            tokens count.

    Parameters shared by all sites (L blocks, d wide; n = layers, w = hidden):
        ``down`` (L, rank, d), Kaiming uniform; ``up`` (L, d, rank), zeros; ``T_1``, ``G_1`` (L - 1, update, d), ``T_2``, ``G_2``
        (L - 1, d, update), with biases ``t_1`` and so on, as PyTorch starts linear layers; of the small decoder ``norm_1``, ``norm_2``
        (n, w), ``norm`` (w,), ones, and ``q``, ``k``, ``v``, ``o``, ``gate``, ``wide``, ``narrow`` (n, ...), normal with 0.02; ``embed``
        (V, w) and ``project`` (d, w) where it is not as wide.

    References:
        Li, Li, Lee, Li, Xie and Li, "ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning", 2026.
    """

    key = "shadow"
    paper = "ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning"
    equation = r"h \leftarrow h + \alpha W_{up} W_{down} (h - s),\; s \leftarrow (1 - g) s + g\, T(h)"
    golden = "PEFT"
    where = ("embedding*", "block")
    carries = True

    rank: int = 8
    alpha: float = 0.1
    update: int = 0
    layers: int = 1
    hidden: int = 0
    intermediate: int = 0
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    theta: float = 10000.0
    eps: float = 1e-6
    embeds: bool = False
    padded: bool = False

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The tokens and which are padding, of a transformers model."""
        return ("input_ids", "attention_mask") if self.padded else ()

    def check(self, site: Site) -> None:
        for field in ("rank", "layers", "heads"):
            if getattr(self, field) < 1:
                raise InputError(f"{site.name or '(model)'}: shadow.{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("update", "hidden", "intermediate", "kv_heads", "head_dim"):
            if getattr(self, field) < 0:
                raise InputError(f"{site.name or '(model)'}: shadow.{field} is {getattr(self, field)}; it must be 0 or more")
        if site.axis != -1:
            raise InputError(f"{site.name}: shadow needs features last")

    def shared(self, sites: Sequence[Site]) -> Tensors:
        first, *blocks = sites
        if first.role != "embedding" or not blocks or any(s.role != "block" for s in blocks) or len({s.features for s in sites}) > 1:
            raise InputError("shadow takes the token embedding of a decoder and its blocks, all of one width; name these in where=, no other embedding")
        d, n, w, u, device = first.features, self.layers, self.hidden or first.features, self.update or self.rank, first.device
        size, f = self.head_dim or w // self.heads, self.intermediate or 4 * w
        keys = self.kv_heads or self.heads
        if (w % self.heads and not self.head_dim) or self.heads % keys or size % 2:
            raise InputError(f"shadow: width {w}, heads={self.heads}, kv_heads={keys}; heads divide the width into even parts, kv_heads divide the heads")

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, device=device).normal_(0, 0.02)

        def uniform(inputs: int, *shape: int) -> Tensor:
            return torch.empty(shape, device=device).uniform_(-(inputs**-0.5), inputs**-0.5)

        count = len(blocks)
        p = {"down": uniform(d, count, self.rank, d), "up": torch.zeros(count, d, self.rank, device=device)}
        for k in "TG":
            p |= {f"{k}_1": uniform(d, count - 1, u, d), f"{k.lower()}_1": uniform(d, count - 1, u)}
            p |= {f"{k}_2": uniform(u, count - 1, d, u), f"{k.lower()}_2": uniform(u, count - 1, d)}
        ones = torch.ones(n, w, device=device)
        p |= {"norm_1": ones, "norm_2": ones.clone(), "norm": torch.ones(w, device=device)}
        p |= {"q": normal(n, self.heads * size, w), "k": normal(n, keys * size, w), "v": normal(n, keys * size, w), "o": normal(n, w, self.heads * size)}
        p |= {"gate": normal(n, f, w), "wide": normal(n, f, w), "narrow": normal(n, w, f)}
        if w != d:
            p["project"] = uniform(w, d, w)
        return {**p, "embed": normal(first.shape[1], w)} if w != d or self.embeds else p

    def init(self, site: Site) -> Tensors:
        return {}

    def apply(self, p: Any, x: Tensor, h: Tensor) -> Any:
        place, blocks = len(p["carried"]), p["down"].shape[0]
        if not place:
            state = self._decoder(p, x, h)
        elif place < blocks:
            t, g = (self._network(p, k, place - 1, h) for k in "TG")
            g = torch.sigmoid(g)
            state = (1 - g) * p["carried"][-1] + g * t
        else:
            return h, None
        return h + self.alpha * F.linear(F.linear(h - state, p["down"][place]), p["up"][place]), state

    def _network(self, p: Tensors, name: str, i: int, h: Tensor) -> Tensor:
        bias = name.lower()
        inner = F.gelu(F.linear(h, p[f"{name}_1"][i], p[f"{bias}_1"][i]))
        return F.linear(inner, p[f"{name}_2"][i], p[f"{bias}_2"][i])

    def _decoder(self, p: Tensors, ids: Tensor, h: Tensor) -> Tensor:
        """The small decoder's last hidden state (batch, length, d) for tokens ``ids``, whose embeddings are ``h``."""
        n, real = h.shape[1], p.get("call.attention_mask")
        if (real is not None and real.shape != ids.shape) or p.get("call.input_ids", ids).shape != ids.shape:
            raise InputError("shadow reads the whole sequence with one mask entry for each token; generate with use_cache=False")
        sees = torch.ones(n, n, dtype=torch.bool, device=h.device).tril()
        if real is not None:
            sees = (sees & real.bool()[:, None] | torch.eye(n, dtype=torch.bool, device=h.device))[:, None]
        s = F.embedding(ids, p["embed"]) if "embed" in p else h
        w = s.shape[-1]
        for parts in zip(*(p[k].unbind() for k in DECODER), strict=True):
            b = dict(zip(DECODER, parts, strict=True))
            x = F.rms_norm(s, (w,), b["norm_1"], self.eps)
            q, k, v = (F.linear(x, b[m]).unflatten(-1, (-1, b["q"].shape[0] // self.heads)).transpose(1, 2) for m in "qkv")
            mixed = F.scaled_dot_product_attention(*_turned(q, k, self.theta), v, sees, enable_gqa=True)
            s = s + F.linear(mixed.transpose(1, 2).flatten(2), b["o"])
            x = F.rms_norm(s, (w,), b["norm_2"], self.eps)
            s = s + F.linear(F.silu(F.linear(x, b["gate"])) * F.linear(x, b["wide"]), b["narrow"])
        s = F.rms_norm(s, (w,), p["norm"], self.eps)
        return F.linear(s, p["project"]) if "project" in p else s


def _turned(q: Tensor, k: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Queries and keys (batch, heads, length, dimensions), turned by their positions."""
    n, d = q.shape[-2:]
    frequency = theta ** (-torch.arange(0, d, 2, device=q.device, dtype=torch.float32) / d)
    angle = torch.arange(n, device=q.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = (f(torch.cat([angle, angle], -1)).to(q.dtype) for f in (torch.cos, torch.sin))

    def turn(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    return turn(q), turn(k)
