"""COLA: Chain of LoRA (Xia, Qin and Hazan, 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Restarts, Tensors, WeightMethod, frozen, seeded
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class COLA(WeightMethod):
    r"""A chain of LoRAs, each trained on what the ones before it left over: :math:`W' = W + s \sum_{m=1}^{M} B_m A_m`, :math:`s = \alpha / r`.

    Training is cut into :math:`M` equal parts. At the end of each but the last the present update is tied to the chain: it joins the
    finished ones, which no longer train, and a new one starts from zero, its optimiser's moments forgotten (with
    ``after_step(..., optimizer)``, as ``exapt.fit`` does). The paper adds finished updates to :math:`W` itself; here they stay apart
    (``A_done``, ``B_done``), so that the base is what it was and the file holds the whole sum. The paper restarts the learning rate
    with each link, too; that is the schedule's part and left to the caller.

    Args:
        rank: Rank :math:`r` of each update.
        alpha: Scale of the updates.
        chain: Number :math:`M` of updates.
        seed: Seed of the factors ``A`` of all but the first.

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``B`` (d_out, rank), zeros. Not trained: ``A_done`` (m rank, d_in) and ``B_done``
        (d_out, m rank), those of the m finished updates, empty at the start.

    References:
        Xia, Qin and Hazan, "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), COLA(rank=2, chain=2), where="all")
    >>> for step in range(1, 5):
    ...     exapt.after_step(model, step, total=4)
    >>> sorted((n[-6:], tuple(t.shape)) for n, t in model.state_dict().items() if "done" in n)
    [('A_done', (2, 4)), ('B_done', (3, 2))]
    """

    key = "cola"
    paper = "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning"
    equation = r"W' = W + \frac{\alpha}{r} \sum_{m=1}^M B_m A_m"
    golden = "NumPy"
    full_precision = True

    rank: int = 8
    alpha: float = 16.0
    chain: int = 3
    seed: int = 0

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if self.chain < 1:
            raise InputError(f"cola.chain is {self.chain}; a chain has at least 1 update")

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), r = site.shape, self.rank
        a = torch.empty(r, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        return {"A": a, "B": a.new_zeros(d_out, r), "A_done": frozen(a.new_zeros(0, d_in)), "B_done": frozen(a.new_zeros(d_out, 0))}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self._links(p)
        return plus_product(w, b, a, self.factor)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        a, b = self._links(p)
        return a, self.factor * b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *self._links(p), self.factor)

    def _links(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """The finished updates and the present one as one product."""
        if not p["A_done"].numel():
            return p["A"], p["B"]
        return torch.cat([p["A_done"], p["A"]], -2), torch.cat([p["B_done"], p["B"]], -1)

    def on_step(self, tensors: Mapping[str, Tensors], step: int, total: int) -> Restarts | None:
        if step not in {round(total * m / self.chain) for m in range(1, self.chain)}:
            return None
        restarted: list[tuple[Tensor, None]] = []
        for site, p in tensors.items():
            p["A_done"].data, p["B_done"].data = (t.detach().clone() for t in self._links(p))
            generator, limit = seeded(self.seed, self.key, site, str(p["A_done"].shape[-2])), p["A"].shape[-1] ** -0.5
            p["A"].copy_(torch.empty(p["A"].shape).uniform_(-limit, limit, generator=generator))
            p["B"].zero_()
            restarted += [(p["A"], None), (p["B"], None)]
        return restarted
