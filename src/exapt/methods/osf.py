"""OSF: Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning (Nayak et al., ICLR 2026)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite, check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


class Projected(torch.autograd.Function):
    """Returns its first input; its gradient loses the part in the frozen subspace.

    ``basis`` (n, k) is orthonormal: of the frozen subspace (``inside`` false), or of all that is not frozen.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, basis: Tensor, inside: bool) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.inside = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (basis,) = ctx.saved_tensors
        part = basis @ (basis.mT @ gradient)
        return part if ctx.inside else gradient - part, None, None


@register
@dataclass(frozen=True)
class OSF(WeightMethod):
    r"""Trains the small singular components and keeps the large ones: :math:`W' = W - U_0 S_0 V_0^\top + U S V^\top`.

    :math:`U_0 S_0 V_0^\top` holds the singular components of :math:`W` after the first :math:`k`, which are preserved. Gradients of
    :math:`U` lose their part in the span of the preserved left vectors, those of :math:`V` in that of the right ones, before the
    optimiser sees them (as in PEFT). So under plain gradient descent the trained directions stay orthogonal to the preserved
    ones; under Adam, which scales each entry, they do so nearly.

    Args:
        preserved: Fraction of the singular components that are preserved.
        effective_rank: Their number :math:`k`, in place of the fraction.

    Parameters per site:
        With :math:`r` components left: ``U`` (d_out, r), ``S`` (r,), ``V`` (r, d_in), which train from ``U0``, ``S0``, ``V0``, frozen
        and stored. Where d_out > d_in ``U_high`` (d_out, k), where d_out < d_in ``V_high`` (k, d_in), frozen and stored; for the
        square factor ``U0`` or ``V0`` says the same.

    References:
        Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", ICLR 2026.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(6, 4), OSF(effective_rank=3), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(4, 1), (1,), (1, 6)]
    """

    key = "osf"
    paper = "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning"
    equation = r"W' = U_{:k} S_{:k} V_{:k}^\top + U S V^\top,\ dU \perp U_{:k},\ dV \perp V_{:k}"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    preserved: float = 0.5
    effective_rank: int | None = None

    def check(self, site: Site) -> None:
        if self.effective_rank is not None:
            check_rank(self, site, "effective_rank", min(site.shape) - 1)
        elif not 1 <= self._preserved(site) < min(site.shape):
            raise InputError(
                f"{site.name or '(model)'}: osf.preserved is {self.preserved}, that is {self._preserved(site)} of {min(site.shape)} components; "
                "choose a fraction that preserves one and leaves one to train"
            )

    def _preserved(self, site: Site) -> int:
        return int(min(site.shape) * self.preserved) if self.effective_rank is None else self.effective_rank

    def init(self, site: Site) -> Tensors:
        w, k = site.weight, self._preserved(site)
        check_finite(self, site, w)
        u, s, vh = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
        low = {"U": u[:, k:].contiguous(), "S": s[k:].contiguous(), "V": vh[k:].contiguous()}
        d_out, d_in = site.shape
        high = {"U_high": u[:, :k].contiguous()} if d_out > d_in else {"V_high": vh[:k].contiguous()} if d_out < d_in else {}
        return {**low, **{f"{n}0": frozen(t.clone()) for n, t in low.items()}, **{n: frozen(t) for n, t in high.items()}}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        u, v = _projected(p)
        return plus_product(plus_product(w, p["U0"] * p["S0"], p["V0"], -1.0), u * p["S"], v)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        u, v = _projected(p)
        p = {k: t.to(y.dtype) for k, t in {**p, "U": u, "V": v}.items()}
        # two products of the rank r in place of one of 2 r; equal, bit for bit, while nothing has moved
        new, old = (base.out(p["U" + n], base.scale(p["S" + n], base.apply(p["V" + n], x))) for n in ("", "0"))
        return y + (new - old)


def _projected(p: Tensors) -> tuple[Tensor, Tensor]:
    """``U`` and ``V``, whose gradients lose their part in the span of what is preserved."""
    u = Projected.apply(p["U"], p.get("U_high", p["U0"]), "U_high" not in p)  # type: ignore[no-untyped-call]
    v = Projected.apply(p["V"].mT, p.get("V_high", p["V0"]).mT, "V_high" not in p).mT  # type: ignore[no-untyped-call]
    return u, v
