"""HRA: Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation (Yuan, Liu and Xu, NeurIPS 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class HRA(WeightMethod):
    r"""Multiplies a matrix by a chain of Householder reflections of its inputs: :math:`W' = W \prod_{i=1}^r (I - 2 \hat u_i \hat u_i^\top)`
    with :math:`\hat u = u / \lVert u \rVert`.

    The fast path needs no d_in x d_in matrix: the chain equals :math:`I - \hat U T \hat U^\top`, where the inverse of the
    triangular :math:`T` (rank, rank) is the upper triangle of :math:`\hat U^\top \hat U` with 1/2 on the diagonal (compact WY form).

    Args:
        rank: Number :math:`r` of reflections. If even, they start in pairs that cancel; if odd, the start is no identity.
        apply_GS: Orthonormalises the :math:`u_i` (Gram-Schmidt; here by a QR decomposition, the same subspaces):
            :math:`W' = W (I - 2 Q Q^\top)`. No choice of :math:`Q` gives the identity, so all :math:`u_i` start independently. (PEFT
            starts from equal pairs here too, of which Gram-Schmidt leaves rounding errors.)
        orthogonality: Weight :math:`\lambda` of the penalty :math:`\lVert I - \hat U^\top \hat U \rVert_F^2` of each site.

    Parameters per site:
        ``u`` (d_in, rank), Kaiming uniform.

    References:
        Yuan, Liu and Xu, "Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
        NeurIPS 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(6, 4), HRA(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(6, 2)]
    """

    key = "hra"
    paper = "Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation"
    equation = r"W' = W \prod_{i=1}^r (I - 2 \hat u_i \hat u_i^\top)"
    golden = "PEFT"
    full_precision = True

    rank: int = 8
    apply_GS: bool = False
    orthogonality: float = 0.0

    def check(self, site: Site) -> None:
        if site.layer is not None and site.layer.kind == "embedding":
            raise InputError(f"{site.name or '(model)'}: {self.key} reflects inputs, and an embedding's are token ids; leave it out of where=")
        check_rank(self, site, most=site.shape[1])

    def init(self, site: Site) -> Tensors:
        d_in, paired = site.shape[1], self.rank % 2 == 0 and not self.apply_GS
        u = nn.init.kaiming_uniform_(torch.empty(d_in, self.rank // 2 if paired else self.rank, device=site.device), a=5**0.5)
        return {"u": u.repeat_interleave(2, dim=1) if paired else u}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        u = _orthonormal(p["u"]) if self.apply_GS else p["u"] / p["u"].norm(dim=0)
        turned = w.to(u.dtype)
        for i in range(u.shape[1]):
            turned = turned - 2 * torch.outer(turned @ u[:, i], u[:, i])
        return turned.to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        u = _orthonormal(p["u"]) if self.apply_GS else p["u"] / p["u"].norm(dim=0)
        if base.kind in ("linear", "conv1d_hf"):  # the base multiplies by W' = W (I - U T U^T), so the row x becomes x (I - U T^T U^T)
            return base(x - (x @ self._turned(u, transposed=True).to(x.dtype)) @ u.T.to(x.dtype))
        return base.low_rank(x, u.T, base.weight.to(u.dtype) @ self._turned(u), scale=-1.0)  # a convolution's inputs overlap

    def _turned(self, u: Tensor, transposed: bool = False) -> Tensor:
        """``U T``, or with T's transpose."""
        if self.apply_GS:
            return 2 * u
        inverse = (u.T @ u).triu(1) + torch.diag(torch.full((u.shape[1],), 0.5, dtype=u.dtype, device=u.device))
        return torch.linalg.solve_triangular(inverse if transposed else inverse.T, u.T, upper=transposed).T

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        if self.orthogonality == 0 or self.apply_GS:
            return None
        u = p["u"] / p["u"].norm(dim=-2, keepdim=True)
        return self.orthogonality * (torch.eye(u.shape[-1], dtype=u.dtype, device=u.device) - u.mT @ u).square().sum()


def _orthonormal(u: Tensor) -> Tensor:
    """Orthonormal columns that span what the columns of ``u`` do, one after the other."""
    return torch.linalg.qr(u.float() if u.dtype.itemsize < 4 else u)[0]
