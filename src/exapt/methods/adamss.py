"""AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning (Zheng et al., NeurIPS 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
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
class AdaMSS(WeightMethod):
    r"""Low-rank updates of groups of outputs in the principal subspace: rows of group :math:`k` get :math:`W'_k = W_k + B_k A_k V^\top`.

    :math:`W \approx U S V^\top` to rank :math:`R` (of :math:`[W\ b]` where the layer has a bias, which is then changed too). The
    rows of :math:`U` are clustered by k-means into :math:`K` groups; :math:`A_k` starts from the leading right singular
    vectors of its group's rows of :math:`U`, :math:`B_k` from zero. Decomposition and clustering are those of PEFT, with
    scikit-learn's k-means.

    With ``allocate`` the groups compete in training (tell the adapter of its steps with ``exapt.after_step``; ``exapt.fit``
    does): importance is :math:`|\theta\, \partial\ell / \partial\theta|` smoothed, times its smoothed variation, averaged over the
    entries of :math:`A_k` and those of :math:`B_k` and summed; every ``interval`` steps the most important groups of the whole
    model go on, the others stop at what they have learned. Exactly the wanted number goes on; PEFT's code keeps one less.

    Args:
        rank: Rank :math:`R` of the subspace; where a matrix has fewer singular values, all of them.
        num_subspaces: Number :math:`K` of groups per site, at most d_out.
        subspace_rank: Rank of :math:`B_k A_k`, at most the size of the group.
        dynamic_rank: Lower it to the number of singular values of the group's rows whose square exceeds ``threshold`` times the
            largest square.
        threshold: See ``dynamic_rank``.
        allocate: Whether groups compete.
        target: Groups of the whole model that go on at the end.
        warmup: Steps before the first choice.
        final: Step of the last choice.
        interval: Steps from one choice to the next.
        beta_importance: Smoothing of the importance.
        beta_uncertainty: Smoothing of its variation.
        exponent: The number that goes on falls from all to ``target`` as the power ``exponent`` of the time left.
        seed: Seed of the randomised decomposition.

    Parameters per site:
        ``A`` (S, R), the :math:`A_k` below each other, S the sum of their ranks; ``B`` (entries,), the :math:`B_k` row by row of
        the matrix (d_out, S) that they form. Frozen and stored: ``V`` (R, d_in), ``v`` (R,) for a bias, ``index`` (entries,),
        the places of ``B``; with ``allocate`` also ``group`` (S,) and ``active`` (S,), and for ``A`` and ``B`` each the values at
        which they stopped (``kept_``), importance (``importance_``) and variation (``uncertainty_``).

    References:
        Zheng et al., "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", NeurIPS 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(10, 8), AdaMSS(rank=6, num_subspaces=3), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(3, 6), (8,)]
    """

    key = "adamss"
    paper = "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning"
    equation = r"W'_k = W_k + B_k A_k V^\top"
    golden = "PEFT"
    reads_weight = True
    full_precision = True
    fast_kinds: ClassVar = ("linear", "conv1d_hf")

    rank: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    dynamic_rank: bool = False
    threshold: float = 0.1
    allocate: bool = False
    target: int = 50
    warmup: int = 50
    final: int = 1000
    interval: int = 100
    beta_importance: float = 0.85
    beta_uncertainty: float = 0.85
    exponent: float = 3.0
    seed: int = 0

    def check(self, site: Site) -> None:
        for field in ("rank", "num_subspaces", "subspace_rank"):
            check_rank(self, site, field, most=max(getattr(self, field), 1))
        if self.allocate and not (self.target >= 1 and self.interval >= 1 and self.warmup < self.final and self.exponent > 0):
            raise InputError(f"{self.key}.allocate needs target and interval of at least 1, warmup below final and a positive exponent")
        if site.layer is not None and site.layer.stacked and (self.allocate or self.dynamic_rank or self.subspace_rank > 1):
            raise InputError(f"{site.name}: stacked experts need tensors of one size; {self.key} serves them with subspace_rank=1 and nothing adaptive")
        check_finite(self, site, site.weight)

    def init(self, site: Site) -> Tensors:
        bias = None if site.layer is not None and site.layer.stacked else site.bias
        u, v = decomposed(site.weight, bias, self.rank, self.seed)
        groups = clustered(u, self.num_subspaces)
        first = [self.leading(u[rows]) for rows in groups]
        index = places(groups, [len(a) for a in first], len(u))
        tensors = {"A": torch.cat(first), "B": torch.zeros(len(index)), "V": frozen(v[:, : site.shape[1]]), "index": frozen(index)}
        if bias is not None:
            tensors["v"] = frozen(v[:, -1])
        if self.allocate:
            group = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(a) for a in first]))
            tensors |= {"group": frozen(group), "active": frozen(torch.ones(len(group)))}
            for k in ("A", "B"):
                tensors |= {f"{name}_{k}": frozen(torch.zeros_like(tensors[k])) for name in ("kept", "importance", "uncertainty")}
        return tensors

    def leading(self, u: Tensor) -> Tensor:
        """``A_k`` (rank of the group, R) from the group's rows of ``U``."""
        _, s, vh = torch.linalg.svd(u, full_matrices=False)
        rank = min(self.subspace_rank, len(u))
        if self.dynamic_rank:
            rank = max(1, min(rank, int((s**2 > self.threshold * s[0] ** 2).sum())))
        return vh[:rank]

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._factors(p, w.shape[0])
        return plus_product(w, b, a @ p["V"])

    def bias(self, p: Tensors, b: Tensor) -> Tensor:
        if "v" not in p:
            return b
        left, right = self._factors(p, len(b))[::-1]
        return (b + left @ (right @ p["v"])).to(b.dtype)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        if "v" in p:
            return None
        a, b = self._factors(p, shape[0])
        return a @ p["V"], b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        a, b = self._factors(p, base.shape[0])
        y = base.low_rank(x, a @ p["V"], b)
        return y + (b @ (a @ p["v"])).to(y.dtype) if "v" in p else y

    def _factors(self, p: Tensors, d_out: int) -> tuple[Tensor, Tensor]:
        """``A`` (S, R) and the whole ``B`` (d_out, S); what has stopped gets no gradient."""
        a, ranks = p["A"], p["A"].shape[0]
        b = p["B"].new_zeros(d_out * ranks).index_copy(0, p["index"], p["B"]).view(d_out, ranks)
        if self.allocate:
            active = p["active"] > 0
            a, b = torch.where(active[:, None], a, a.detach()), torch.where(active, b, b.detach())
        return a, b

    def on_step(self, tensors: Mapping[str, Tensors], step: int, total: int) -> None:
        if not self.allocate:
            return
        now = step - 1  # PEFT counts from 0
        for p in tensors.values():
            for k, active in _active(p).items():
                p[k].copy_(torch.where(active, p[k], p[f"kept_{k}"]))
        if not self.warmup <= now <= self.final:
            return
        for p in tensors.values():
            self._observe(p)
        if now % self.interval == 0:
            left = 1 - (now - self.warmup) / (self.final - self.warmup)
            groups = sum(int(p["group"].max()) + 1 for p in tensors.values())
            self._choose(tensors, int(self.target + (groups - self.target) * left**self.exponent))

    def _observe(self, p: Tensors) -> None:
        """Takes one step's gradients into the smoothed importance and its variation."""
        for k, active in _active(p).items():
            gradient = p[k].grad
            if gradient is not None:
                seen, mean, variation = (p[k] * gradient).abs() * active, p[f"importance_{k}"], p[f"uncertainty_{k}"]
                variation.lerp_((seen - mean).abs(), 1 - self.beta_uncertainty)  # before the mean moves
                mean.lerp_(seen, 1 - self.beta_importance)

    def _choose(self, tensors: Mapping[str, Tensors], number: int) -> None:
        """Lets the ``number`` most important of the groups that still learn go on, and begins to observe anew."""
        scores = {name: _scores(p) for name, p in tensors.items()}
        best = torch.cat(list(scores.values())).sort(descending=True).values
        least = best[number - 1] if number < len(best) else best[-1]
        for name, p in tensors.items():
            goes_on = (scores[name] >= least) & (scores[name] >= 0)
            for k, active in _active(p).items():
                p[f"kept_{k}"].copy_(torch.where(active, p[k], p[f"kept_{k}"]))
            p["active"].mul_(goes_on[p["group"]])
            for k in ("A", "B"):
                p[f"importance_{k}"].zero_()
                p[f"uncertainty_{k}"].zero_()


def _active(p: Tensors) -> Mapping[str, Tensor]:
    """Which entries of ``A`` and of ``B`` still learn."""
    active = p["active"] > 0
    return {"A": active[:, None].expand_as(p["A"]), "B": active[p["index"] % len(active)]}


def _scores(p: Tensors) -> Tensor:
    """Importance of every group; -1 for those that have stopped."""
    number = int(p["group"].max()) + 1
    total = torch.zeros(number, device=p["group"].device)
    for k, group in (("A", p["group"][:, None].expand_as(p["A"])), ("B", p["group"][p["index"] % len(p["group"])])):
        value, group = (p[f"importance_{k}"] * p[f"uncertainty_{k}"]).flatten().float(), group.flatten()
        total += torch.zeros_like(total).index_add(0, group, value) / group.bincount(minlength=number)
    stopped = torch.zeros_like(total).index_add(0, p["group"], 1 - p["active"].float()) > 0
    return total.masked_fill(stopped, -1.0)


def decomposed(w: Tensor, bias: Tensor | None, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """``U`` (d_out, R) and ``V`` (R, d_in, or one more for a bias) of the weight, the same for the same seed."""
    whole = (w if bias is None else torch.cat([w, bias[:, None]], 1)).float()
    rank = min(rank, *whole.shape)
    with torch.random.fork_rng(devices=[] if w.device.type == "cpu" else [w.device], device_type="cuda" if w.device.type == "cpu" else w.device.type):
        torch.manual_seed(seed)
        u, _, v = torch.svd_lowrank(whole, q=rank, niter=2)
    return u, v.T


def clustered(u: Tensor, number: int) -> list[Tensor]:
    """The rows of each of ``number`` groups (fewer, if there are fewer rows), in ascending order."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as e:
        raise InputError("adamss clusters with scikit-learn, which is not installed: pip install scikit-learn") from e
    means: Any = KMeans(min(number, len(u)), init="random", n_init=1, max_iter=10, random_state=123456789)
    label = torch.from_numpy(means.fit_predict(u.cpu().numpy())).long()
    return [torch.nonzero(label == k).flatten() for k in range(int(label.max()) + 1)]


def places(groups: list[Tensor], ranks: list[int], d_out: int) -> Tensor:
    """Positions of the groups' entries, group by group and row by row, in the flattened (d_out, sum of ranks)."""
    whole, start, found = sum(ranks), 0, []
    for rows, rank in zip(groups, ranks, strict=True):
        found.append((rows[:, None] * whole + torch.arange(start, start + rank)).flatten())
        start += rank
    return torch.cat(found)
