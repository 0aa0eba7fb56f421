"""NOLA: Networks as Linear Combination of Low Rank Random Basis (Koohpayegani et al., ICLR 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class NOLA(WeightMethod):
    r"""LoRA whose factors are combinations of frozen random matrices, of which only the coefficients train.

    .. math:: W' = W + s \Bigl(\sum_j \beta_j B_j\Bigr) \Bigl(A_0 + \sum_i \alpha_i A_i\Bigr), \qquad s = \alpha / r

    The number of parameters depends neither on the rank nor on the layer's width. Entries of :math:`A_i` and :math:`B_j`
    are uniform in :math:`(-1, 1)` over the square root of their number, as in the authors' code for language models; all
    sites share one set (as in the authors' code for vision, which restarts its generator at every layer) and use its first
    rows, so that the bases take memory once.

    Args:
        rank: Rank :math:`r` of the update.
        alpha: Scale of the update.
        num_basis: Number of matrices :math:`A_i`, and of :math:`B_j`.
        seed: Seed of the random matrices; they are made again from it when a file is loaded.

    Parameters per site:
        ``alpha`` and ``beta`` (num_basis,), zeros; ``A0`` (rank, d_in), Kaiming uniform, frozen and made again from the seed.
        Shared and frozen: ``basis_A`` (largest d_in, rank, num_basis), ``basis_B`` (largest d_out, rank, num_basis).

    References:
        Koohpayegani, Navaneet, Nooralinejad, Kolouri, Pirsiavash, "NOLA: Networks as Linear Combination of Low Rank Random
        Basis" (in print "NOLA: Compressing LoRA using Linear Combination of Random Basis"), ICLR 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(400, 300), NOLA(num_basis=64), where="all")
    >>> exapt.parameter_count(model).trainable
    128
    """

    key = "nola"
    paper = "NOLA: Networks as Linear Combination of Low Rank Random Basis"
    equation = r"W' = W + s \big(\sum_j \beta_j B_j\big) \big(A_0 + \sum_i \alpha_i A_i\big)"
    golden = "NumPy"
    full_precision = True

    rank: int = 8
    alpha: float = 16.0
    num_basis: int = 256
    seed: int = 0

    def check(self, site: Site) -> None:
        for field in ("rank", "num_basis"):
            if getattr(self, field) < 1:
                raise InputError(f"{site.name or '(model)'}: nola.{field} is {getattr(self, field)}; it must be at least 1")

    def shared(self, sites: Sequence[Site]) -> Tensors:
        d_out, d_in = (max(sizes) for sizes in zip(*(s.shape for s in sites), strict=True))
        scale = self.num_basis**-0.5
        return {
            "basis_A": frozen(scale * self._uniform((d_in, self.rank, self.num_basis), "A"), saved=False),
            "basis_B": frozen(scale * self._uniform((d_out, self.rank, self.num_basis), "B"), saved=False),
        }

    def _uniform(self, shape: tuple[int, ...], *names: str) -> Tensor:
        """Uniform in (-1, 1)."""
        return 2 * torch.rand(shape, generator=seeded(self.seed, "nola", *names)) - 1

    def init(self, site: Site) -> Tensors:
        _, d_in = site.shape
        a0 = self._uniform((self.rank, d_in), "A0", site.name) * d_in**-0.5
        return {"alpha": torch.zeros(self.num_basis), "beta": torch.zeros(self.num_basis), "A0": frozen(a0, saved=False)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._factors(p, w.shape[0])
        return plus_product(w, b, a, self.alpha / self.rank)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = self._factors(p, shape[0])
        return a, self.alpha / self.rank * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *self._factors(p, base.shape[0]), self.alpha / self.rank)

    def _factors(self, p: Tensors, d_out: int) -> tuple[Tensor, Tensor]:
        """``A`` (rank, d_in) and ``B`` (d_out, rank)."""
        return p["A0"] + (p["basis_A"][: p["A0"].shape[1]] @ p["alpha"]).T, p["basis_B"][:d_out] @ p["beta"]
