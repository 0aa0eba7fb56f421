"""MoS: Mixture of Shards (Wang et al., ICLR 2025)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_divides, check_rank
from exapt.core.contract import Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class MoS(WeightMethod):
    r"""LoRA whose factors are put together from shards of pools that all layers share: :math:`W' = W + s\, [B_1 \dots B_r] [A_1 \dots A_r]^\top`.

    A layer's vector :math:`A_k` is :math:`l` shards side by side, each a row of the pool that the layer's index names
    (:math:`B_k` likewise). Four things keep layers different: each draws its own subset of the pool; :math:`A` and :math:`B` have
    pools and indices of their own, so that no pair stays together; vectors are cut into shards; and :math:`p` of the :math:`r`
    pairs are the layer's own. The pools hold as many parameters as LoRA of rank :math:`e` (``equivalent_rank``) would, own pairs
    included. Pools are shared by the sites of one shape and one name in their blocks (all query projections, say).

    Args:
        rank: Rank :math:`r` of a layer's update.
        alpha: Scale of the update; :math:`s = \alpha / r`.
        equivalent_rank: Rank :math:`e` of the LoRA that has as many parameters.
        private_rank: Number :math:`p` of pairs that a layer shares with no other.
        shards: Number :math:`l` of shards of a vector; it divides d_in and d_out.
        seed: Seed of the indices.

    Parameters per site:
        ``A_own`` (private_rank, d_in), Kaiming uniform; ``B_own`` (private_rank, d_out), zeros. ``index_A_g`` and ``index_B_g`` (rank -
        private_rank, shards), fixed, where g is the number of the pools. Shared by the L sites of pools g: ``pool_A_g`` (L (e - p)
        l, d_in / l) and ``pool_B_g`` (L (e - p) l, d_out / l), which start likewise.

    References:
        Wang, Chen, Chen et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards", ICLR 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 4)}) for _ in range(3))
    >>> exapt.parameter_count(exapt.attach(model, MoS(rank=3, shards=2), where="*.q")).trainable  # 3 layers of rank 2
    72
    """

    key = "mos"
    paper = "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards"
    equation = r"W' = W + \frac{\alpha}{r} B^{(I_B)} A^{(I_A)}"
    golden = "NumPy"
    full_precision = True

    rank: int = 16
    alpha: float = 16.0
    equivalent_rank: int = 2
    private_rank: int = 1
    shards: int = 4
    seed: int = 0

    def check(self, site: Site) -> None:
        check_rank(self, site)
        check_divides(self, site, "shards", site.shape[1], "inputs")
        check_divides(self, site, "shards", site.shape[0], "outputs")
        if not 0 <= self.private_rank < self.equivalent_rank <= self.rank:
            raise InputError(
                f"mos: private_rank={self.private_rank}, equivalent_rank={self.equivalent_rank}, rank={self.rank}; "
                "each must be more than the one before it, the last two may be equal, and none negative"
            )

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        layers: dict[tuple[str, tuple[int, int]], list[Site]] = {}
        for s in sites:
            layers.setdefault((s.name.rpartition(".")[2], s.shape), []).append(s)
        sizes = [sum(s.layer.stacked or 1 for s in group if s.layer) for group in layers.values()]  # stacked experts are as many layers
        return {s.name: {"pool": torch.tensor([g, sizes[g]])} for g, group in enumerate(layers.values()) for s in group}

    def _rows(self, site: Site) -> tuple[int, int]:
        """The number of the site's pools, and how many shards each of them holds."""
        number, layers = site.statistics["pool"].tolist()
        return number, layers * (self.equivalent_rank - self.private_rank) * self.shards

    def shared(self, sites: Sequence[Site]) -> Tensors:
        made: Tensors = {}
        for s in sites:
            g, rows = self._rows(s)
            if f"pool_A_{g}" not in made:
                d_out, d_in = s.shape
                made[f"pool_A_{g}"] = torch.empty(rows, d_in // self.shards, device=s.device).uniform_(-(d_in**-0.5), d_in**-0.5)
                made[f"pool_B_{g}"] = torch.zeros(rows, d_out // self.shards)
        return made

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        g, rows = self._rows(site)
        made: Tensors = {f"index_{k}_{g}": frozen(self._index(rows, k, site.name)) for k in "AB"}
        if self.private_rank:
            own = torch.empty(self.private_rank, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
            made |= {"A_own": own, "B_own": own.new_zeros(self.private_rank, d_out)}
        return made

    def _index(self, rows: int, *names: str) -> Tensor:
        """A random subset of the pool's rows; where it is smaller than what is asked for, every row before any comes again."""
        wanted = (self.rank - self.private_rank) * self.shards
        generator = seeded(self.seed, self.key, *names)
        order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(-(-wanted // rows))])
        return order[:wanted].view(-1, self.shards)

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._factors(p)
        return torch.addmm(w, b.to(w.dtype), a.to(w.dtype), alpha=self.alpha / self.rank)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = self._factors(p)
        return a, self.alpha / self.rank * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *self._factors(p), self.alpha / self.rank)

    def _factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """``A`` (rank, d_in) and ``B`` (d_out, rank)."""
        g = next(k for k in p if k.startswith("index_A_")).removeprefix("index_A_")
        a, b = (p[f"pool_{k}_{g}"][p[f"index_{k}_{g}"]].flatten(1) for k in "AB")
        if self.private_rank:
            a, b = torch.cat([a, p["A_own"]]), torch.cat([b, p["B_own"]])
        return a, b.T
