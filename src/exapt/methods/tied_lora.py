"""Tied-LoRA: one pair of low-rank factors for all layers, scaled by vectors of each (Renduchintala et al., NAACL 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site

Factor = Literal["tied", "frozen", "untied"]
Vector = Literal["trained", "frozen"]


@register
@dataclass(frozen=True)
class TiedLoRA(WeightMethod):
    r"""Shares the factors of LoRA between layers and scales them in each: :math:`W' = W + s\, \Lambda_v B \Lambda_u A`, :math:`s = \alpha / r`.

    Which of the four train, and whether the factors are tied, is the paper's table of configurations. Untied factors with
    frozen vectors are LoRA, frozen factors with trained vectors VeRA's form. Sites of different size cannot share: all that
    have d_in inputs share one ``A``, all that have d_out outputs one ``B``.

    The start is the base model's: the last trained one of ``u``, ``A``, ``v``, ``B`` is zero, frozen vectors are one.

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update.
        A: ``"tied"``: one for all sites, trained; ``"frozen"``: one for all, random; ``"untied"``: one for each site, trained.
        B: The same for ``B``.
        u: ``"trained"`` for each site, or ``"frozen"`` at one.
        v: The same for ``v``.
        seed: Seed of frozen factors; they are made again from it when a file is loaded.

    Parameters per site:
        ``u`` (rank,) and ``v`` (d_out,) if they train; untied ``A`` (rank, d_in), ``B`` (d_out, rank). Shared: ``A_n`` (rank, n)
        for each number n of inputs and ``B_n`` (n, rank) for each number n of outputs, Kaiming uniform where not zero.

    References:
        Renduchintala, Konuk and Kuchaiev, "Tied-LoRA: Enhancing parameter efficiency of LoRA with Weight Tying" (in its first
        version "Enhacing"), NAACL 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    >>> exapt.parameter_count(exapt.attach(model, TiedLoRA(rank=2), where="all")).trainable  # 2 (4 + 4) + 3 (2 + 4)
    34
    """

    key = "tied_lora"
    paper = "Tied-Lora: Enhacing parameter efficiency of LoRA with weight tying"
    equation = r"W' = W + \frac{\alpha}{r} \Lambda_v B \Lambda_u A"
    golden = "NumPy"
    full_precision = True

    rank: int = 8
    alpha: float = 16.0
    A: Factor = "tied"
    B: Factor = "tied"
    u: Vector = "trained"
    v: Vector = "trained"
    seed: int = 0

    @property
    def _zero(self) -> str:
        """What starts at zero: the trained one nearest to the output."""
        trained = [k for k, how in (("B", self.B), ("v", self.v), ("A", self.A), ("u", self.u)) if how != "frozen"]
        return trained[0] if trained else ""

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if not self._zero:
            raise InputError("tied_lora: A, B, u and v are all frozen; let one of them train")

    def shared(self, sites: Sequence[Site]) -> Tensors:
        made: Tensors = {}
        for side, how in ((1, self.A), (0, self.B)):
            if how != "untied":
                for n in sorted({s.shape[side] for s in sites}):
                    which = "BA"[side]
                    made[f"{which}_{n}"] = self._frozen(which, n) if how == "frozen" else self._random(which, n, None)
        return made

    def _frozen(self, which: str, n: int) -> Tensor:
        return frozen(self._random(which, n, seeded(self.seed, self.key, which, str(n))), saved=False)

    def _random(self, which: str, n: int, generator: torch.Generator | None) -> Tensor:
        """``A`` (rank, n) or ``B`` (n, rank), uniform within one over the root of its columns."""
        shape = (self.rank, n) if which == "A" else (n, self.rank)
        if self._zero == which:
            return torch.zeros(shape)
        return (2 * torch.rand(shape, generator=generator) - 1) * shape[1] ** -0.5

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        made: Tensors = {}
        if self.u == "trained":
            made["u"] = torch.full((self.rank,), float(self._zero != "u"))
        if self.v == "trained":
            made["v"] = torch.full((d_out,), float(self._zero != "v"))
        if self.A == "untied":
            made["A"] = self._random("A", d_in, None)
        if self.B == "untied":
            made["B"] = self._random("B", d_out, None)
        return made

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._factors(p, *w.shape)
        return torch.addmm(w, b.to(w.dtype), a.to(w.dtype), alpha=self.alpha / self.rank)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = self._factors(p, *shape)
        return a, self.alpha / self.rank * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *self._factors(p, *base.shape), self.alpha / self.rank)

    def _factors(self, p: Tensors, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
        """``diag(u) A`` (rank, d_in) and ``diag(v) B`` (d_out, rank)."""
        a = p["A"] if self.A == "untied" else p[f"A_{d_in}"]
        b = p["B"] if self.B == "untied" else p[f"B_{d_out}"]
        return p["u"][:, None] * a if "u" in p else a, p["v"][:, None] * b if "v" in p else b
