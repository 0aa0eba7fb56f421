"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation (Wu et al., ICLR 2026)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite, check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.orthogonal import cayley, skew
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class PSOFT(WeightMethod):
    r"""Rotates the principal part of :math:`W` in its own subspace: :math:`W' = W + B (R - I) A`, where :math:`B A` is that part.

    With the singular value decomposition :math:`W = U S V^\top`, cut after :math:`r` values, :math:`A = V_r^\top` and
    :math:`B = U_r S_r`, both frozen. :math:`R = \mathrm{diag}(b)\,(I + Q)(I - Q)^{-1}\,\mathrm{diag}(a)` with skew-symmetric :math:`Q`.
    While the scales are one, :math:`R` is orthogonal and the singular values of the principal part stay. PEFT's scale
    :math:`\alpha / r` cancels against the factors and has no field here.

    Args:
        rank: Rank :math:`r` of the principal part.
        orthogonal: Whether :math:`R` is orthogonal up to the scales; if not, it is a free matrix.
        scale_in: Whether the vector :math:`a` trains.
        scale_out: Whether the vector :math:`b` trains.
        start: ``"psoft"``: the factors above; ``"pissa"``: :math:`A = \sqrt{S_r} V_r^\top` and :math:`B = U_r \sqrt{S_r}`.
        neumann: Number of terms of the power series that replaces the inverse; 0: the exact inverse. PEFT's series doubles all
            terms but the first and the last, and takes four terms where three are asked for.
        neumann_eps: Bound on :math:`\lVert Q \rVert_F` in the series; 0: none.
        niter: Number of subspace iterations of the randomised decomposition; 0: the exact one. It is refused where a singular
            vector misses by more than 10% of the largest singular value.
        seed: Seed of the randomised decomposition.

    Parameters per site:
        ``Q`` (rank (rank - 1) / 2,), zeros, the entries above the diagonal, or ``R`` (rank, rank), the identity; ``a`` (rank,) and
        ``b`` (rank,), ones. Frozen and stored: ``A`` (rank, d_in), ``B`` (d_out, rank).

    References:
        Wu, Hu, Min, Wang, "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", ICLR 2026.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(40, 30), PSOFT(rank=4), where="all")
    >>> exapt.parameter_count(model).trainable
    14
    """

    key = "psoft"
    paper = "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation"
    equation = r"W' = W + U_{:r} S_{:r} (R - I) V_{:r}^\top,\ R = \mathrm{diag}(b)\,(I + Q)(I - Q)^{-1}\,\mathrm{diag}(a)"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    rank: int = 32
    orthogonal: bool = True
    scale_in: bool = True
    scale_out: bool = True
    start: Literal["psoft", "pissa"] = "psoft"
    neumann: int = 0
    neumann_eps: float = 0.0
    niter: int = 0
    seed: int = 0

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if self.orthogonal and self.rank == 1:
            raise InputError("psoft.rank is 1, and one direction has nothing to rotate into; take 2 or more, or orthogonal=False")

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, self.rank
        check_finite(self, site, w)
        u, s, vh = self._principal(w)
        missed = (w.to(s.dtype) @ vh.T - u * s, w.T.to(s.dtype) @ u - vh.T * s) if self.niter else ()
        if any(float(t.norm(dim=0).max()) > 0.1 * float(s[0]) for t in missed):
            raise InputError(f"{site.name or '(model)'}: {self.niter} iterations do not find its {r} largest components; raise psoft.niter or set it to 0")
        one = s.new_ones(r)
        own = {"Q": s.new_zeros(r * (r - 1) // 2)} if self.orthogonal else {"R": one.diag()}
        scales = {k: one.clone() for k, on in (("a", self.scale_in), ("b", self.scale_out)) if on}
        return {**own, **scales, **{k: frozen(t) for k, t in self._factors(u, s, vh).items()}}

    def factors(self, w: Tensor) -> Tensors:
        """The frozen factors ``A`` and ``B`` of a weight."""
        return self._factors(*self._principal(w))

    def _factors(self, u: Tensor, s: Tensor, vh: Tensor) -> Tensors:
        root = s.sqrt()
        return {"A": root[:, None] * vh, "B": u * root} if self.start == "pissa" else {"A": vh.contiguous(), "B": u * s}

    def _principal(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first ``rank`` singular values of ``w``, with their vectors on both sides."""
        w, r = w.to(torch.promote_types(w.dtype, torch.float32)), self.rank
        if not self.niter:
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
            return u[:, :r], s[:r], vh[:r]
        with torch.random.fork_rng([w.device] if w.is_cuda else []):
            torch.manual_seed(self.seed)
            u, s, v = torch.svd_lowrank(w, r, self.niter)
        return u, s, v.T

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["B"], self._turn(p) @ p["A"])

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self._turn(p) @ p["A"], p["B"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        # step by step only the r features between A and R are kept for backward; base.low_rank would keep x
        y = base(x)
        h = base.out(self._turn(p).to(y.dtype), base.apply(p["A"].to(y.dtype), x))
        return base.added(y, h, p["B"])

    def _turn(self, p: Tensors) -> Tensor:
        """:math:`R - I` (rank, rank)."""
        turn = p["R"] if "R" in p else self._series(skew(p["Q"])) if self.neumann else cayley(-p["Q"])
        turn = p["b"][:, None] * turn if "b" in p else turn
        turn = turn * p["a"] if "a" in p else turn
        return turn - torch.eye(self.rank, dtype=turn.dtype, device=turn.device)

    def _series(self, q: Tensor) -> Tensor:
        """The power series of the Cayley transform, cut as in PEFT."""
        if self.neumann_eps:
            norm = torch.linalg.matrix_norm(q)
            q = q * torch.where(norm > self.neumann_eps, self.neumann_eps / (norm + 1e-12), 1.0)
        total = torch.eye(self.rank, dtype=q.dtype, device=q.device)
        if self.neumann == 1:
            return total
        total, power = total + 2 * q, q
        for i in range(2, max(self.neumann, 4) if self.neumann > 2 else 2):
            power = power @ q
            total = total + (power if i == max(self.neumann, 4) - 1 else 2 * power)
        return total
