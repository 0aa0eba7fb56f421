"""LT-SFT: Composable Sparse Fine-Tuning (Ansell et al., ACL 2022)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exapt.core.contract import Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.layers import dense
from exapt.core.registry import register
from exapt.core.sites import Site, sites
from exapt.core.slots import Slots
from exapt.core.state import state_of

PARTS = ("", "bias_")
"""Prefixes of the tensors for the matrix and for the bias."""


@register
@dataclass(frozen=True)
class LotteryTicketSFT(WeightMethod):
    r"""Trains the :math:`k` entries that full fine-tuning changes most, from their old values: :math:`W' = W + \phi` with a sparse
    difference :math:`\phi`.

    The entries are the largest :math:`|\theta_1 - \theta_0|` over all sites together. Differences are added, so adapters for a
    language and for a task act together: ``activate(model, "language", "task")``.

    Two ways. In one run: all differences train until step ``full * total``; then the largest are kept, set back to zero, and alone
    train on. In two runs: fine-tune everything (``FullTuning``), take :func:`difference`, detach, and attach with
    ``statistics=``; the second run then holds :math:`k` numbers only, and its optimiser starts anew as in the paper, whereas within one run an
    optimiser keeps its moments. Norms stay frozen, as in the paper's runs.

    Args:
        density: Share of all entries of the sites' matrices and biases that train in the second phase.
        full: Share of the steps that the first phase takes (in one run); the paper gives both the same number.
        l1: Factor :math:`\lambda` of the penalty :math:`\lambda \frac1N \sum |\phi_i|` in both phases, :math:`N` the number of all entries. The
            official scripts take 0.1 for languages and 0 for tasks.

    Parameters per site:
        In one run ``delta`` (d_out, d_in), zeros, with ``mask`` of the same shape, not trained; ``bias_delta``, ``bias_mask``. In two runs
        ``values`` (k,) with their places ``index`` (k,), not trained; ``bias_values``, ``bias_index``. Shared: ``count``, :math:`N`, not trained.

    References:
        Ansell, Ponti, Korhonen and Vulić, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Sequential(nn.Linear(10, 10)), exapt.FullTuning(), "all")
    >>> statistics = difference(model)
    >>> exapt.parameter_count(exapt.attach(exapt.detach(model), LotteryTicketSFT(density=0.1), "all", statistics=statistics)).trainable
    11
    """

    key = "lt_sft"
    paper = "Composable Sparse Fine-Tuning for Cross-Lingual Transfer"
    equation = r"W' = W + \phi, \quad \|\phi\|_0 \le k"
    golden = "NumPy"
    where = ("linear", "embedding*")
    full_precision = True

    density: float = 0.01
    full: float = 0.5
    l1: float = 0.0

    def check(self, site: Site) -> None:
        if not 0 < self.density <= 1 or not 0 < self.full < 1:
            raise InputError(f"lt_sft.density is {self.density} and lt_sft.full {self.full}; both are shares between 0 and 1")
        if site.layer is not None and site.layer.stacked and "difference" in site.statistics:
            raise InputError(f"{site.name}: lt_sft takes stacked experts in one run only; leave them out of where= or give no statistics")

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        scores = {(s.name, part): s.statistics[f"{part}difference"].abs() for s in sites for part in PARTS if f"{part}difference" in s.statistics}
        chosen: dict[str, Tensors] = {}
        for (name, part), mask in _largest(scores, self.density).items():
            chosen.setdefault(name, {})[f"{part}chosen"] = mask.flatten().nonzero().flatten()
        return chosen

    def init(self, site: Site) -> Tensors:
        tensors: Tensors = {}
        for part, old in (("", site.weight), ("bias_", site.bias)):
            if old is None:
                continue
            chosen = site.statistics.get(f"{part}chosen")
            if chosen is None and "chosen" not in site.statistics:
                tensors[f"{part}delta"] = torch.zeros_like(old)
                tensors[f"{part}mask"] = frozen(torch.ones_like(old, dtype=torch.bool))
            elif chosen is not None:
                tensors[f"{part}values"] = old.new_zeros(len(chosen))
                tensors[f"{part}index"] = frozen(_small(chosen, old).to(old.device))
        return tensors

    def shared(self, sites: Sequence[Site]) -> Tensors:
        count = sum(s.shape[0] * s.shape[1] * ((s.layer.stacked if s.layer else None) or 1) + (s.bias.numel() if s.bias is not None else 0) for s in sites)
        return {"count": frozen(torch.tensor([count], device=sites[0].device), saved=False)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return _changed(p, "", w)

    def bias(self, p: Tensors, b: Tensor) -> Tensor:
        return _changed(p, "bias_", b)

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        if not self.l1:
            return None
        size = sum(p[k].abs().sum() for k in p if k.endswith(("delta", "values")))
        return self.l1 * size / p["count"].squeeze()

    def on_step(self, tensors: Mapping[str, Tensors], step: int, total: int) -> None:
        switch = min(max(1, round(self.full * total)), total - 1)
        deltas = {(site, part): p[f"{part}delta"] for site, p in tensors.items() for part in PARTS if f"{part}delta" in p}
        if step < switch or not deltas:
            return
        if step == switch:
            for (site, part), mask in _largest({k: d.abs() for k, d in deltas.items()}, self.density).items():
                tensors[site][f"{part}mask"].copy_(mask)
                deltas[site, part].zero_()
        for (site, part), delta in deltas.items():
            delta.mul_(tensors[site][f"{part}mask"])

    def stored(self, p: Tensors) -> Tensors:
        """What a file needs of the tensors of one site: after the first phase the chosen entries and their places."""
        kept: Tensors = {}
        for part in PARTS:
            if f"{part}delta" in p and p[f"{part}delta"].dim() == 2 - bool(part) and not bool(p[f"{part}mask"].all()):  # stacked experts stay dense
                index = p[f"{part}mask"].flatten().nonzero().flatten()
                kept |= {f"{part}values": p[f"{part}delta"].flatten()[index], f"{part}index": frozen(_small(index, p[f"{part}delta"]))}
            else:
                kept |= {k: p[k] for k in (f"{part}{t}" for t in ("delta", "mask", "values", "index")) if k in p}
        return kept


def _changed(p: Tensors, part: str, old: Tensor) -> Tensor:
    if f"{part}delta" in p:
        return old + p[f"{part}mask"] * p[f"{part}delta"]
    if f"{part}index" not in p:
        return old
    values = p[f"{part}values"]
    return old.flatten().to(torch.promote_types(old.dtype, values.dtype)).index_add(0, p[f"{part}index"], values).view(old.shape)


def _small(index: Tensor, of: Tensor) -> Tensor:
    """Places in a tensor in the smaller type that can hold them."""
    return index.to(torch.int32 if of.numel() < 2**31 else torch.int64)


def _largest(scores: Mapping[tuple[str, str], Tensor], density: float) -> dict[tuple[str, str], Tensor]:
    """Masks of the largest entries of all tensors together."""
    if not scores:
        return {}
    flat = torch.cat([s.flatten() for s in scores.values()])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(max(1, round(density * len(flat)))).indices] = True
    parts = mask.split([s.numel() for s in scores.values()])
    return {k: m.view(s.shape) for (k, s), m in zip(scores.items(), parts, strict=True)}


@torch.no_grad()
def difference(model: nn.Module, name: str = "default") -> dict[str, Tensors]:
    """What an attached adapter changes in every matrix and bias, as statistics for ``attach``.

    Args:
        model: The model that carries it.
        name: The adapter, usually fine-tuning of everything by ``FullTuning``.

    Returns:
        ``{site: {"difference": (d_out, d_in), "bias_difference": (d_out,)}}`` for the sites that it changes.
    """
    if name not in state_of(model).adapters:
        raise InputError(f'no adapter "{name}" on this model to take the difference of (attached: {", ".join(state_of(model).adapters)})')
    found: dict[str, Tensors] = {}
    for site in sites(model):
        slots = site.module._modules.get("exapt")
        if site.layer is None or not isinstance(slots, Slots):
            continue
        for key, parameter in (("difference", site.layer.parameter), ("bias_difference", site.layer.bias)):
            stored = site.module._parameters.get(parameter) if parameter else None
            entries = [e for e in slots.entries if e.adapter == name and parameter in e.names()]
            if stored is None or not entries:
                continue
            old = new = dense(stored).detach().to(torch.promote_types(site.dtype, torch.float32))
            for e in entries:
                new = e.changed(str(parameter), new)
            found.setdefault(site.name, {})[key] = site.layer.to_matrix(new - old) if key == "difference" else new - old
    return found
