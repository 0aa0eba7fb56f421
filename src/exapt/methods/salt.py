"""SALT: Singular Value Adaptation with Low-Rank Transformation (Elsayed et al., 2025)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite, check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class SALT(WeightMethod):
    r"""Scales and shifts the largest singular values and adds a low-rank matrix to the rest:
    :math:`W' = U\, \mathrm{ReLU}(S')\, V^\top`.

    .. math:: S' = \begin{pmatrix} \mathrm{diag}(\alpha s_{:r} + \beta) & 0 \\ 0 & \mathrm{diag}(s_{r:}) + X Y \end{pmatrix}

    The official code passes all of :math:`S'` through the ReLU, entries beside the diagonal too, which then can only be positive.

    Args:
        rank: Number :math:`r` of singular values that are scaled and shifted; at least one is left.
        lora_rank: Rank of :math:`X Y`.
        relu: Whether negative entries of :math:`S'` become zero. Without it the change is of rank ``rank + lora_rank`` and cheaper.
        gamma: Weight of the official code's regulariser
            :math:`\lVert \mathrm{diag}(\alpha s_{:r} + \beta - s_{:r}) \rVert_F + \lVert X Y \rVert_F`, per site; its configuration has 0.

    Parameters per site:
        ``alpha`` (rank,), ones; ``beta`` (rank,), zeros; with :math:`k` singular values ``X`` (k - rank, lora_rank), Kaiming uniform,
        and ``Y`` (lora_rank, k - rank), zeros (so does the code for SAM 2; that for SAM draws both, small). Frozen and stored:
        ``U`` (d_out, k), ``s`` (k,), ``V`` (k, d_in); a decomposition may come out differently on another machine.

    References:
        Elsayed, Hashmi, Elseiagy, Wang, Yaqub, Almakky, "SALT: Parameter-Efficient Fine-Tuning via Singular Value Adaptation with
        Low-Rank Transformation" (first "SALT: Singular Value Adaptation with Low-Rank Transformation"), BMVC 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(40, 30), SALT(rank=10, lora_rank=2), where="all")
    >>> exapt.parameter_count(model).trainable
    100
    """

    key = "salt"
    paper = "SALT: Singular Value Adaptation with Low-Rank Transformation"
    equation = r"W' = U\, \mathrm{ReLU}\bigl(\mathrm{diag}(\alpha s_{:r} + \beta) \oplus (\mathrm{diag}(s_{r:}) + X Y)\bigr) V^\top"
    golden = "NumPy"
    reads_weight = True
    full_precision = True

    rank: int = 8
    lora_rank: int = 4
    relu: bool = True
    gamma: float = 0.0

    def check(self, site: Site) -> None:
        check_rank(self, site, most=min(site.shape) - 1)
        if self.lora_rank < 1:
            raise InputError(f"salt.lora_rank is {self.lora_rank}; it starts at 1")

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, self.rank
        check_finite(self, site, w)
        u, s, vh = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
        bound = (6 / self.lora_rank) ** 0.5
        x = s.new_empty(len(s) - r, self.lora_rank).uniform_(-bound, bound)
        fixed = {"U": frozen(u), "s": frozen(s), "V": frozen(vh.contiguous())}
        return {"alpha": s.new_ones(r), "beta": s.new_zeros(r), "X": x, "Y": x.new_zeros(self.lora_rank, len(s) - r), **fixed}

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        if not self.gamma:
            return None
        diagonal, rest = self._top(p), p["X"] @ p["Y"]
        return self.gamma * (torch.linalg.vector_norm(diagonal, dim=-1) + torch.linalg.matrix_norm(rest)).sum()

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        s = p["s"].diag()
        return plus_product(w, p["U"] @ (self._values(p) - s), p["V"])

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        r = self.rank
        if self.relu:
            return base.low_rank(x, p["V"], p["U"] @ (self._values(p) - p["s"].diag()))
        a = torch.cat([p["V"][:r], p["Y"] @ p["V"][r:]])
        return base.low_rank(x, a, torch.cat([p["U"][:, :r] * self._top(p), p["U"][:, r:] @ p["X"]], 1))

    def _top(self, p: Tensors) -> Tensor:
        """The change of the largest singular values (rank,)."""
        return (p["alpha"] - 1) * p["s"][..., : self.rank] + p["beta"]

    def _values(self, p: Tensors) -> Tensor:
        """The changed matrix of singular values (k, k)."""
        r = self.rank
        values = (p["s"] + F.pad(self._top(p), (0, len(p["s"]) - r))).diag() + F.pad(p["X"] @ p["Y"], (r, 0, r, 0))
        return values.relu() if self.relu else values
