"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence (Wan et al., AAAI 2026)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_finite
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class FRoD(WeightMethod):
    r"""Trains singular values and a sparse rotation in a basis that layers of one kind share: :math:`W' = U (\Lambda + S) V^\top`.

    The weights of the layers of one kind (those whose names end alike, with the same number of inputs) are decomposed
    together: :math:`W_l = U_l \Lambda_l V^\top` with columns of :math:`U_l` of length 1 and one :math:`V` for all.
    :math:`\Lambda` (diagonal) and the entries of :math:`S` at random places off the diagonal train. The base keeps its weight:
    computed is :math:`W' = W + U (\Lambda - \Lambda_0 + S) V^\top`, exactly :math:`W` at the start. :math:`V` is found as in
    PEFT: with :math:`Q R` the stacked weights' decomposition, :math:`V = R^\top E`, :math:`E` the eigenvectors of the mean of
    :math:`(Q_l^\top Q_l + a I)^{-1}`; where the stacked rows are fewer than the columns, their right singular vectors.

    Args:
        sparse_rate: Fraction of the entries of :math:`S` that train.
        ridge: The :math:`a` above, which keeps the inverse stable.
        seed: Seed of the places in :math:`S`.

    Parameters per site:
        ``lambda`` (d_in,), from :math:`\Lambda_0`; ``s`` (k,), zeros. Frozen and stored: ``lambda0`` (d_in,), ``U_<kind>`` (d_out,
        d_in) and, shared, ``V_<kind>`` (d_in, d_in) and ``index_<kind>`` (k,), the places. ``U`` makes the file as large as the
        adapted weights: it cannot be made again bit for bit on another machine.

    References:
        Wan, Chen, Feng, Zhou, Xu, "FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence",
        AAAI 2026.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(10, 6), FRoD(sparse_rate=0.05), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(10,), (5,)]
    """

    key = "frod"
    paper = "FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence"
    equation = r"W' = U (\Lambda + S) V^\top,\quad W = U \Lambda_0 V^\top"
    golden = "PEFT"
    reads_weight = True
    full_precision = True
    fast_kinds: ClassVar = ("linear", "conv1d_hf")

    sparse_rate: float = 0.01
    ridge: float = 1e-3
    seed: int = 0

    def check(self, site: Site) -> None:
        if not 0 < self.sparse_rate <= 1:
            raise InputError(f"{self.key}.sparse_rate is {self.sparse_rate}; it must lie in (0, 1]")
        check_finite(self, site, site.weight)

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        kinds: dict[str, list[Site]] = {}
        for site in sites:
            kinds.setdefault(_kind(site), []).append(site)
        found: dict[str, Tensors] = {}
        for alike in kinds.values():
            stacked = [s.weight.float().cpu() for s in alike]
            v = joint_basis([m for w in stacked for m in (w.unbind() if w.dim() == 3 else [w])], self.ridge)
            found.update({s.name: {"V": v} for s in alike})
        return found

    def shared(self, sites: Sequence[Site]) -> Tensors:
        found: Tensors = {}
        for site in sites:
            kind, d = _kind(site), site.shape[1]
            if f"V_{kind}" not in found:
                found[f"V_{kind}"] = frozen(site.statistics["V"])
                places = torch.randperm(d * (d - 1), generator=seeded(self.seed, "frod", kind))[: self._number(d)]
                found[f"index_{kind}"] = frozen(off_diagonal(places, d))
        return found

    def init(self, site: Site) -> Tensors:
        u, size = basis_of(site.weight, site.statistics["V"])
        s = torch.zeros(self._number(site.shape[1]))
        return {"lambda": size, "s": s, "lambda0": frozen(size.clone()), f"U_{_kind(site)}": frozen(u)}

    def _number(self, d: int) -> int:
        """How many entries of ``S`` train."""
        return max(1, min(int(d * d * self.sparse_rate), d * (d - 1)))

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        u, v, change, index = _factors(p)
        return plus_product(w, u, _middle(v.T, change, p["s"], index))

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        (d_out, d_in), rows = base.shape, x.numel() // x.shape[-1]
        if rows * (3 * d_in + d_out) > d_in * (d_in + 2 * d_out):  # many inputs: one product with W' is cheaper
            return F.linear(x, self.weight(p, base.weight).to(x.dtype), base.bias)
        u, v, change, index = _factors(p)
        turned = v.T @ x.reshape(rows, d_in).to(v.dtype).T
        return base.plus(x, _middle(turned, change, p["s"], index).T.reshape(x.shape).to(x.dtype), u)


def _factors(p: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U``, ``V``, the change of the diagonal, and the places of ``S``."""
    kind = next(k for k in p if k.startswith("U_")).removeprefix("U_")
    return p[f"U_{kind}"], p[f"V_{kind}"], p["lambda"] - p["lambda0"], p[f"index_{kind}"]


def _middle(t: Tensor, change: Tensor, s: Tensor, index: Tensor) -> Tensor:
    """``(diag(change) + S) t`` for ``t`` (d, n), with ``S`` never laid out but in the gradient."""
    return _Middle.apply(t, change, s, index)  # type: ignore[no-untyped-call,no-any-return]


class _Middle(torch.autograd.Function):
    """``diag(change) t + S t``; ``S`` (d, d) has the entries ``s`` at the flat places ``index``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, change: Tensor, s: Tensor, index: Tensor) -> Tensor:
        d = len(t)
        return torch.addcmul(_sparse(index // d, index % d, s, t), change[:, None], t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        t, change, s, index = ctx.saved_tensors
        d = len(t)
        dt = torch.addcmul(_sparse(index % d, index // d, s, dy), change[:, None], dy)
        return dt, (dy * t).sum(1), (dy @ t.T).flatten().index_select(0, index), None


def _sparse(row: Tensor, column: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """``S t`` without laying ``S`` out, where torch's sparse product can be had."""
    d = len(t)
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return s.new_zeros(d * d).index_copy(0, row * d + column, s).view(d, d) @ t
    return torch.sparse.mm(torch.sparse_coo_tensor(torch.stack([row, column]), s, (d, d), check_invariants=False), t.contiguous())


def _kind(site: Site) -> str:
    """Layers of one kind share a basis: those whose last two parts of the name agree (of ``layers.0.fc``, the last), and whose
    inputs are as many. BERT's ``attention.output.dense`` stays apart from its ``output.dense``. These are PEFT's rules."""
    parts = site.name.split(".")
    if site.layer is not None and site.layer.stacked and parts[-1].isdigit():
        del parts[-1]  # an expert's number
    kind = parts[-1] if len(parts) == 1 or parts[-2].isdigit() else "_".join(parts[-2:])
    kind = "attention_output" if parts[-3:] == ["attention", "output", "dense"] else kind
    return f"{kind}_{site.shape[1]}"


def off_diagonal(places: Tensor, d: int) -> Tensor:
    """Positions in a flattened (d, d) matrix of entries numbered row by row without the diagonal."""
    row, column = places // (d - 1), places % (d - 1)
    return row * d + column + (column >= row)


def joint_basis(matrices: Sequence[Tensor], ridge: float) -> Tensor:
    """``V`` (d_in, d_in) for matrices (d_out, d_in)."""
    stacked = torch.cat(list(matrices))
    rows, d = stacked.shape
    if rows < d:
        full: Tensor = torch.linalg.svd(stacked, full_matrices=True)[2]
        return full.T
    q, r = torch.linalg.qr(stacked)
    one = ridge * torch.eye(d, dtype=q.dtype)
    inverses = [torch.linalg.inv(part.T @ part + one) for part in q.split([len(m) for m in matrices])]
    vectors: Tensor = torch.linalg.eigh(sum(inverses[1:], inverses[0]) / len(inverses))[1]
    return r.T @ vectors


def basis_of(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``U`` (d_out, d_in) with columns of length 1 and ``lambda`` (d_in,) such that :math:`W = U Lambda V^T`."""
    w, v = w.detach().double().cpu(), v.double().cpu()
    try:
        b = torch.linalg.solve(v, w.T).T
    except RuntimeError:  # singular: weights that do not span all inputs
        b = w @ torch.linalg.pinv(v, rtol=1e-6).T
    size = b.norm(dim=0)
    u = torch.where(size > 1e-12, b / size.clamp(min=1e-12), 0.0)
    return u.float(), size.float()
