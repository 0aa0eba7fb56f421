"""TinyLoRA: Learning to Reason in 13 Parameters (Morris et al., 2026)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
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
class TinyLoRA(WeightMethod):
    r"""LoRA-XS whose small matrix is a combination of random ones: :math:`W' = W + B \bigl(\sum_i v_i P_i\bigr) A`.

    With the singular value decomposition :math:`W = U S V^\top`, cut after :math:`r` values, :math:`A = \sqrt{S_r}\,V_r^\top` and
    :math:`B = U_r \sqrt{S_r}`. Only the vector :math:`v` trains; sites can share it. The paper leaves the distribution of the
    :math:`P_i` open; they are normal with variance :math:`1 / r`, as in PEFT.

    Args:
        rank: Rank :math:`r` of the frozen factors (all singular values, where there are fewer).
        u: Length of :math:`v`.
        weight_tying: How far sites share :math:`v`: 0: each has its own; 1: one for all. Between, :math:`n` sites make
            :math:`n (1 - \mathrm{weight\_tying})` groups of neighbours.
        seed: Seed of the matrices :math:`P_i`; each site draws its own.

    Parameters per site:
        ``v`` (u,), zeros; with weight tying shared: ``v`` (groups, u), and per site ``group`` (1,), its row. Frozen and stored:
        ``A`` (rank, d_in), ``B`` (d_out, rank), ``P`` (u, rank, rank).

    References:
        Morris, Mireshghallah, Ibrahim, Mahloujifar, "Learning to Reason in 13 Parameters", 2026, arXiv:2602.04118.

    >>> import exapt
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    >>> exapt.parameter_count(exapt.attach(model, TinyLoRA(u=13, weight_tying=1.0), where="all")).trainable
    13
    """

    key = "tinylora"
    paper = "Learning to Reason in 13 Parameters"
    equation = r"W' = W + U_{:r} S_{:r}^{1/2} \bigl(\sum_i v_i P_i\bigr) S_{:r}^{1/2} V_{:r}^\top"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    rank: int = 2
    u: int = 64
    weight_tying: float = 0.0
    seed: int = 42

    def check(self, site: Site) -> None:
        if min(self.rank, self.u) < 1 or not 0 <= self.weight_tying <= 1:
            raise InputError(
                f"tinylora has rank {self.rank}, u {self.u} and weight_tying {self.weight_tying}; the first two start at 1, the last lies in 0 to 1"
            )

    def groups(self, sites: int) -> list[int]:
        """The group of each of a number of sites, in model order."""
        number = max(1, round(sites * (1 - self.weight_tying)))
        size = max(1, sites // number)
        return [min(i // size, number - 1) for i in range(sites)]

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        groups = self.groups(len(sites))
        return {s.name: {"group": torch.tensor([g])} for s, g in zip(sites, groups, strict=True)} if self.weight_tying else {}

    def shared(self, sites: Sequence[Site]) -> Tensors:
        return {"v": torch.zeros(max(self.groups(len(sites))) + 1, self.u)} if self.weight_tying else {}

    def init(self, site: Site) -> Tensors:
        w, r = site.weight, min(self.rank, *site.shape)
        check_finite(self, site, w)
        u, s, vh = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
        root = s[:r].sqrt()
        P = torch.randn(self.u, r, r, generator=seeded(self.seed, "tinylora", site.name)) / r**0.5
        own = {"group": frozen(site.statistics["group"])} if self.weight_tying else {"v": torch.zeros(self.u)}
        return {**own, "A": frozen(root[:, None] * vh[:r]), "B": frozen(u[:, :r] * root), "P": frozen(P)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return plus_product(w, p["B"], _combined(p) @ p["A"])

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return _combined(p) @ p["A"], p["B"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        # step by step only the r features between A and R are kept for backward; base.low_rank would keep x
        y = base(x)
        h = base.out(_combined(p).to(y.dtype), base.apply(p["A"].to(y.dtype), x))
        return base.added(y, h, p["B"])


def _combined(p: Tensors) -> Tensor:
    """The matrix between the factors (rank, rank)."""
    v = p["v"].index_select(0, p["group"]).squeeze(0) if "group" in p else p["v"]
    return (v @ p["P"].flatten(1)).view(p["P"].shape[1:])
