"""Parameter-Efficient Transfer Learning with Diff Pruning (Guo, Rush and Kim, ACL 2021)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site

PARTS = ("", "bias_")
LOW, HIGH = -1.5, 1.5
"""The interval that the concrete distribution is stretched to before it is cut to [0, 1]."""


@register
@dataclass(frozen=True)
class DiffPruning(WeightMethod):
    r"""Adds a difference that a relaxed L0 penalty makes sparse: :math:`W' = W + z \odot w`, with hard-concrete gates

    .. math:: z = \mathrm{clip}\bigl(\sigma(\log\tfrac{u}{1-u} + \alpha)\,(r - l) + l,\ 0,\ 1\bigr), \qquad u \sim U(0, 1),

    and one more gate for each matrix and each bias, multiplied onto its entries' gates. The penalty is :math:`\lambda` times the expected
    number of open gates, :math:`\sum \sigma(\alpha - \log\frac{-l}{r})\, \sigma(\alpha_g - \log\frac{-l}{r})` as in the paper (its code adds the two).

    At step ``relaxed * total`` the difference with the gates' values at the median :math:`u` is projected: the ``density`` largest entries over
    all sites stay, the others become zero for good, and from there the survivors train without gates. The noise :math:`u` is drawn anew
    after each step and is a tensor of the adapter, so a forward pass draws nothing and training and evaluation mean the same.

    Args:
        density: Share of all entries of the sites' matrices and biases that survive; the paper's 0.005.
        relaxed: Share of the steps trained with gates. The official scripts give the second phase a run of its own.
        l0: Factor :math:`\lambda`; 1.25e-7 in the official scripts (BERT large).
        structured: Whether each matrix and bias has its own gate besides.
        alpha: Start of :math:`\alpha`.
        alpha_rate: Factor on the learning rate of :math:`\alpha`. The official code trains it with 0.1 where the difference has 1e-5.
        seed: Seed of the noise.

    Parameters per site:
        ``w`` and ``alpha`` (d_out, d_in), ``group`` (1,); not trained ``u`` and ``mask`` (d_out, d_in), ``u_group`` (1,), ``fixed`` (1,); for the
        bias the same with ``bias_`` in front. A pruned adapter read from a file has ``values`` (k,) and ``index`` (k,) instead.

    References:
        Guo, Rush and Kim, "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021.

    >>> import exapt
    >>> from torch import nn
    >>> layer = exapt.attach(nn.Linear(4, 3, bias=False), DiffPruning(), where="all")
    >>> exapt.parameter_count(layer).trainable
    25
    """

    key = "diff_pruning"
    paper = "Parameter-Efficient Transfer Learning with Diff Pruning"
    equation = r"W' = W + z \odot w, \quad z \sim \mathrm{HardConcrete}(\alpha)"
    golden = "NumPy"
    where = ("linear", "embedding*")
    full_precision = True
    exceptions: ClassVar = {"gradient": "a gate that its noise opens fully has no gradient; at the start nearly all of them are open"}

    density: float = 0.005
    relaxed: float = 0.5
    l0: float = 1.25e-7
    structured: bool = True
    alpha: float = 5.0
    alpha_rate: float = 1000.0
    seed: int = 0

    def check(self, site: Site) -> None:
        if not 0 < self.density <= 1 or not 0 < self.relaxed < 1:
            raise InputError(f"diff_pruning.density is {self.density} and diff_pruning.relaxed {self.relaxed}; both are shares between 0 and 1")

    def init(self, site: Site) -> Tensors:
        tensors: Tensors = {}
        for part, old in (("", site.weight), ("bias_", site.bias)):
            if old is None:
                continue
            tensors |= {f"{part}w": torch.zeros_like(old), f"{part}alpha": torch.full_like(old, self.alpha)}
            tensors |= {f"{part}u": frozen(torch.empty_like(old)), f"{part}mask": frozen(torch.ones_like(old, dtype=torch.bool))}
            if self.structured:
                tensors |= {f"{part}group": old.new_full((1,), self.alpha), f"{part}u_group": frozen(old.new_empty(1))}
        self._draw(tensors, site.name, 0)
        return tensors | {"fixed": frozen(torch.zeros(1, dtype=torch.bool, device=site.device))}

    def _draw(self, p: Tensors, name: str, step: int) -> None:
        seed = int(torch.randint(2**62, (1,), generator=seeded(self.seed, self.key, name, str(step))))
        for k in sorted(k for k in p if k.endswith(("u", "u_group"))):
            p[k].uniform_(generator=torch.Generator(p[k].device).manual_seed(seed)).clamp_(1e-4, 1 - 1e-4)  # as the official code cuts it
            seed += 1

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return self._changed(p, "", w)

    def bias(self, p: Tensors, b: Tensor) -> Tensor:
        return self._changed(p, "bias_", b)

    def _changed(self, p: Tensors, part: str, old: Tensor) -> Tensor:
        if f"{part}w" in p:
            z = self._gates(p, part, p[f"{part}u"], p.get(f"{part}u_group"))
            return old + torch.where(p["fixed"], p[f"{part}mask"].to(z.dtype), z) * p[f"{part}w"]
        if f"{part}index" not in p:
            return old
        values = p[f"{part}values"]
        return old.flatten().to(torch.promote_types(old.dtype, values.dtype)).index_add(0, p[f"{part}index"], values).view(old.shape)

    def _gates(self, p: Tensors, part: str, u: Tensor, u_group: Tensor | None) -> Tensor:
        z = _hard_concrete(p[f"{part}alpha"], u)
        if u_group is None:
            return z
        group = _hard_concrete(p[f"{part}group"], u_group)
        return z * group.view(group.shape[:-1] + (1,) * (z.dim() - group.dim() + 1))  # (experts, 1) where all experts are seen at once

    def rates(self) -> Mapping[str, float]:
        return {f"{part}{k}": self.alpha_rate for part in PARTS for k in ("alpha", "group")}

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        open_gates: list[Tensor] = []
        for part in PARTS:
            if f"{part}alpha" in p:
                expected = torch.sigmoid(p[f"{part}alpha"] - math.log(-LOW / HIGH)).sum(-1 if part else (-2, -1))
                group = p.get(f"{part}group")
                open_gates.append(expected.sum() if group is None else (expected * torch.sigmoid(group - math.log(-LOW / HIGH)).squeeze(-1)).sum())
        return self.l0 * torch.stack(open_gates).sum() * ~p["fixed"].any() if open_gates else None

    def on_step(self, tensors: Mapping[str, Tensors], step: int, total: int) -> None:
        dense = {site: p for site, p in tensors.items() if "fixed" in p and "w" in p}
        switch = min(max(1, round(self.relaxed * total)), total - 1)
        if step < switch:
            for site, p in dense.items():
                self._draw(p, site, step)
        elif step == switch:
            self._project(dense)
        for p in dense.values() if step > switch else ():
            for part in PARTS:
                if f"{part}w" in p:
                    p[f"{part}w"].mul_(p[f"{part}mask"])

    def _project(self, dense: Mapping[str, Tensors]) -> None:
        """Keeps the largest entries of all differences together."""
        found = [(p, part) for p in dense.values() for part in PARTS if f"{part}w" in p]
        if not found:
            return
        for p, part in found:
            half = torch.full_like(p[f"{part}u"], 0.5)
            group = torch.full_like(p[f"{part}u_group"], 0.5) if f"{part}group" in p else None
            p[f"{part}w"].mul_(self._gates(p, part, half, group))
        sizes = torch.cat([p[f"{part}w"].abs().flatten() for p, part in found])
        mask = torch.zeros_like(sizes, dtype=torch.bool)
        mask[sizes.topk(max(1, round(self.density * len(sizes)))).indices] = True
        for (p, part), own in zip(found, mask.split([p[f"{part}w"].numel() for p, part in found]), strict=True):
            p[f"{part}mask"].copy_(own.view(p[f"{part}mask"].shape))
            p[f"{part}w"].mul_(p[f"{part}mask"])
            p["fixed"].fill_(True)

    def stored(self, p: Tensors) -> Tensors:
        """What a file needs of the tensors of one site: once pruned, the survivors and their places."""
        if "fixed" not in p or p["w"].dim() > 2 or not bool(p["fixed"]):  # stacked experts stay dense
            return p
        kept: Tensors = {}
        for part in PARTS:
            if f"{part}w" in p:
                index = p[f"{part}mask"].flatten().nonzero().flatten()
                small = index.to(torch.int32 if p[f"{part}w"].numel() < 2**31 else torch.int64)
                kept |= {f"{part}values": p[f"{part}w"].flatten()[index], f"{part}index": frozen(small)}
        return kept


def _hard_concrete(alpha: Tensor, u: Tensor) -> Tensor:
    return (torch.sigmoid(torch.log(u) - torch.log1p(-u) + alpha) * (HIGH - LOW) + LOW).clamp(0, 1)
