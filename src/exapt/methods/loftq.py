"""LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models (Li et al., ICLR 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite, check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class LoftQ(WeightMethod):
    r"""Quantises :math:`W` and starts LoRA from what quantisation lost: :math:`W' = Q + s B A`, at the start close to :math:`W`.

    Alternately :math:`Q = q(W - s B A)` and :math:`s B A` the best rank-:math:`r` approximation of :math:`W - Q`. :math:`q` takes each
    block of entries to its largest magnitude times the nearest of :math:`2^b` levels between -1 and 1: quantiles of a normal
    distribution (NF4 for four bits) or even steps. ``Q`` takes the place of the layer's matrix, also of what adapters attached
    earlier made of it.

    A base that is quantised already stays as it is, and ``B A`` starts from what its quantisation lost. For that give the
    original weights: ``statistics={s.name: {"original": s.weight} for s in exapt.sites(model) if s.layer}``, made before quantising
    (PEFT's ``replace_lora_weights_loftq``). They may be given for a base in floating point too, to start from the difference to it.

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update; :math:`s = \alpha / r`.
        bits: Bits :math:`b` of an entry: 2, 4 or 8.
        levels: ``"normal"`` or ``"uniform"``.
        block_size: Entries that share a scale.
        iterations: How often to alternate.

    Parameters per site:
        ``A`` (rank, d_in) and ``B`` (d_out, rank). Frozen and stored, unless the original weight was given: ``codes``, packed into
        bytes, ``absmax`` of the blocks and the ``table`` of levels.

    References:
        Li, Yu, Liang, He, Karampatziakis, Chen, Zhao, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024.
        Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (NF4).

    >>> import exapt
    >>> from torch import nn
    >>> layer = nn.Linear(64, 32)
    >>> w = layer.weight.detach().clone()
    >>> w2 = exapt.merge(exapt.attach(layer, LoftQ(rank=8), where="all")).weight.detach()
    >>> 0 < float((w2 - w).norm() / w.norm()) < 0.1
    True
    """

    key = "loftq"
    paper = "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models"
    equation = r"W' = Q + s B A,\ \min_{Q, A, B} \lVert W - Q - s B A \rVert_F"
    golden = "NumPy"
    reads_weight = True
    full_precision = True
    exceptions: ClassVar = {
        "identity": "it starts at the quantised weight with its correction, which is near the base and not equal",
        "quantised": "on a quantised base it asks for the original weights, which only the user has",
    }

    rank: int = 8
    alpha: float = 8.0
    bits: int = 4
    levels: Literal["normal", "uniform"] = "normal"
    block_size: int = 64
    iterations: int = 1

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if not self.alpha > 0:
            raise InputError(f"{site.name or '(model)'}: loftq.alpha is {self.alpha}; its start divides by it, so it must be positive")
        if self.bits not in (2, 4, 8):
            raise InputError(f"loftq.bits is {self.bits}; choose 2, 4 or 8")
        if self.block_size < 1 or self.block_size * self.bits % 8:
            raise InputError(f"loftq.block_size is {self.block_size}; a block of {self.bits}-bit entries has to fill whole bytes")
        if self.iterations < 1:
            raise InputError(f"loftq.iterations is {self.iterations}; at least 1")
        if site.quantised and "original" not in site.statistics:
            raise InputError(f"{site.name}: its weight is quantised; give the original as statistics={{'{site.name}': {{'original': weight}}, ...}}")

    def init(self, site: Site) -> Tensors:
        w = site.weight
        check_finite(self, site, w)
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        if "original" in site.statistics:
            original = site.statistics["original"].to(w)
            check_finite(self, site, original, "original weight")
            return self._correction((original[getattr(site, "expert", 0)] if original.dim() == 3 else original) - w)
        levels = self._levels().to(w)
        q, p = w, self._correction(torch.zeros_like(w))
        for _ in range(self.iterations):
            codes, absmax = self._quantised(w - self.factor * p["B"] @ p["A"], levels)
            q = self._matrix(codes, absmax, self._table(levels), w.shape)
            p = self._correction(w - q)
        return {**p, "codes": frozen(codes), "absmax": frozen(absmax), "table": frozen(self._table(levels))}

    def _correction(self, lost: Tensor) -> Tensors:
        """The best product of rank ``r`` for what is lost."""
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        root = (s[: self.rank] / self.factor).sqrt()
        return {"A": root[:, None] * vh[: self.rank], "B": u[:, : self.rank] * root}

    def _levels(self) -> Tensor:
        """The levels, rising from -1 to 1; those of a normal distribution as QLoRA's and LoftQ's authors choose them."""
        n = 2**self.bits
        if self.levels == "uniform":
            return torch.linspace(-1, 1, n, dtype=torch.float64)
        top = 0.9677083
        above = torch.special.ndtri(torch.linspace(top, 0.5, n // 2 + 1, dtype=torch.float64)[:-1])
        below = -torch.special.ndtri(torch.linspace(top, 0.5, n // 2, dtype=torch.float64)[:-1])
        return torch.cat([below, above.new_zeros(1), above.flip(0)]) / above.max()

    def _quantised(self, w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, several to a byte, and the blocks' largest magnitudes."""
        blocks = F.pad(w.flatten(), (0, -w.numel() % self.block_size)).view(-1, self.block_size)
        absmax = blocks.abs().amax(1)
        shares = blocks / absmax.clamp(min=torch.finfo(w.dtype).tiny)[:, None]
        codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)
        return (codes.view(-1, 8 // self.bits) << self._shifts(w.device)).sum(1).to(torch.uint8), absmax

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.arange(0, 8, self.bits, device=device)

    def _table(self, levels: Tensor) -> Tensor:
        """The levels that each of the 256 bytes stands for."""
        return levels[(torch.arange(256, device=levels.device)[:, None] >> self._shifts(levels.device)) & (2**self.bits - 1)]

    def _matrix(self, codes: Tensor, absmax: Tensor, table: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``Q``, from its stored form."""
        entries = F.embedding(codes.int(), table).view(-1, self.block_size) * absmax[:, None]
        return entries.flatten()[: shape[0] * shape[1]].view(shape[0], shape[1])

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        q = self._matrix(p["codes"], p["absmax"], p["table"], w.shape) if "codes" in p else w
        return (q + self.factor * p["B"] @ p["A"]).to(w.dtype)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        return None if "codes" in p else (p["A"], self.factor * p["B"])

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        if "codes" not in p:
            return base.low_rank(x, p["A"], p["B"], self.factor)
        kind = base.weight.dtype
        y = base.apply(self._matrix(p["codes"], p["absmax"].to(kind), p["table"].to(kind), base.shape), x)
        y = base.added(y, base.apply(p["A"].to(y.dtype), x), p["B"], self.factor)
        return y if base.bias is None else y + base.scale(base.bias.to(y.dtype), y.new_ones(()))
