"""MELoRA: Mini-Ensemble Low-Rank Adapters (Ren et al., ACL 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_divides, check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class MELoRA(WeightMethod):
    r"""Runs :math:`n` small low-rank updates side by side, each from one part of the inputs to one part of the outputs:
    :math:`W' = W + s\,\mathrm{diag}(B_1 A_1, \dots, B_n A_n)` with :math:`s = \alpha / r`.

    The update has rank :math:`n r` with the parameters of one LoRA of rank :math:`r`.

    Args:
        rank: Rank :math:`r` of each small update.
        n: Number of small updates; it divides the input and the output features.
        alpha: Scale of the update.

    Parameters per site:
        ``A`` (n, rank, d_in / n), Kaiming uniform; ``B`` (n, d_out / n, rank), zeros.

    References:
        Ren, Shi, Wu, Zhang, Ren, de Rijke, Chen, Pei, "Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning" (in
        print "MELoRA: ..."), ACL 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(8, 4), MELoRA(rank=1, n=4), where="all")
    >>> exapt.parameter_count(model).trainable
    12
    """

    key = "melora"
    paper = "Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning"
    equation = r"W' = W + s\,\mathrm{diag}(B_1 A_1, \dots, B_n A_n)"
    golden = "NumPy"
    full_precision = True

    rank: int = 1
    n: int = 8
    alpha: float = 16.0

    def check(self, site: Site) -> None:
        check_divides(self, site, "n", site.shape[0], "output features")
        check_divides(self, site, "n", site.shape[1], "input features")
        check_rank(self, site, most=min(site.shape) // self.n)

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), n = site.shape, self.n
        limit = (n / d_in) ** 0.5  # Kaiming uniform, slope sqrt(5), of a layer with d_in / n inputs
        a = torch.empty(n, self.rank, d_in // n, device=site.device).uniform_(-limit, limit)
        return {"A": a, "B": a.new_zeros(n, d_out // n, self.rank)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        update = torch.block_diag(*(p["B"] @ p["A"]))
        return (w + self.alpha / self.rank * update).to(w.dtype)

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return torch.block_diag(*p["A"]), self.alpha / self.rank * torch.block_diag(*p["B"])

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, torch.block_diag(*p["A"]), torch.block_diag(*p["B"]), self.alpha / self.rank)
