"""PVeRA: Probabilistic Vector-Based Random Matrix Adaptation (Fillioux et al., WACV 2026)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class PVeRA(WeightMethod):
    r"""VeRA whose inner activations are drawn from a normal distribution that the input determines.

    .. math:: y = W x + \Lambda_b B z, \qquad z \sim \mathcal N(\mu, \mathrm{diag}(e^{v})), \qquad (\mu, v) = \Lambda_d A x

    The definition, which is also the merged form, is the mean: :math:`W' = W + \Lambda_b B \Lambda_\mu A_\mu`. The paper also adds a
    Kullback-Leibler term on :math:`(\mu, v)` to the loss, which PEFT leaves out; so does this.

    Args:
        rank: Rank :math:`r` of the update.
        d_initial: Start of every entry of :math:`\Lambda_d`.
        sample: When :math:`z` is drawn: in ``"training"``, with the mean otherwise; ``"always"``, for a spread of predictions;
            or ``"never"``.
        dropout: Probability of dropping an input feature of the update in training.
        seed: Seed of ``A`` and ``B``; they are made again from it when a file is loaded.

    Parameters per site:
        ``lambda_d`` (2 rank,), first for the means, then for the log-variances; ``lambda_b`` (d_out,), zeros. Shared and
        frozen: ``A`` (2 rank, largest d_in) and ``B`` (largest d_out, rank), Kaiming uniform; a site uses their first
        columns and rows.

    References:
        Fillioux, Ferrante, Cournède, Vakalopoulou, Christodoulidis, "PVeRA: Probabilistic Vector-Based Random Matrix
        Adaptation", WACV 2026.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), PVeRA(rank=5), where="all")
    >>> exapt.parameter_count(model).trainable
    13
    """

    key = "pvera"
    paper = "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation"
    equation = r"y = W x + \Lambda_b B z,\quad z \sim \mathcal{N}(\mu, e^{v}),\quad (\mu, v) = \Lambda_d A x"
    golden = "PEFT"
    full_precision = True

    rank: int = 256
    d_initial: float = 0.1
    sample: Literal["training", "always", "never"] = "training"
    dropout: float = 0.0
    seed: int = 0

    def check(self, site: Site) -> None:
        if self.rank < 1:
            raise InputError(f"{self.key}.rank is {self.rank}; it must be at least 1")

    def shared(self, sites: Sequence[Site]) -> Tensors:
        d_out, d_in = (max(sizes) for sizes in zip(*(s.shape for s in sites), strict=True))
        return {"A": self._kaiming("A", 2 * self.rank, d_in), "B": self._kaiming("B", d_out, self.rank)}

    def _kaiming(self, name: str, rows: int, columns: int) -> Tensor:
        uniform = torch.rand(rows, columns, generator=seeded(self.seed, "pvera", name))
        return frozen((2 * uniform - 1) * (6 / columns) ** 0.5, saved=False)

    def init(self, site: Site) -> Tensors:
        return {"lambda_d": torch.full((2 * self.rank,), self.d_initial), "lambda_b": torch.zeros(site.shape[0])}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        d_out, d_in = w.shape
        left = p["lambda_b"][:, None] * p["B"][:d_out] * p["lambda_d"][: self.rank]
        return plus_product(w, left, p["A"][: self.rank, :d_in])

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        d_out, d_in = base.shape
        inner = F.dropout(x, self.dropout, base.training) if self.dropout and x.is_floating_point() else x
        dtype = x.dtype if x.is_floating_point() else p["lambda_b"].dtype
        A, size = p["A"][:, :d_in].to(dtype), p["lambda_d"].to(dtype)
        z = base.scale(size[: self.rank], base.apply(A[: self.rank], inner))
        if self.sample == "always" or (self.sample == "training" and base.training):
            log_variance = base.scale(size[self.rank :], base.apply(A[self.rank :], inner))
            z = z + torch.randn_like(z) * (0.5 * log_variance).exp()
        return base.plus(x, z, p["B"][:d_out], p["lambda_b"])

    def needs_forward(self) -> bool:
        return self.sample != "never" or self.dropout > 0
