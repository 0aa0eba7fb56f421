"""LoHa: low-rank Hadamard products (FedPara, Hyeon-Woo et al., ICLR 2022; LyCORIS, Yeh et al., ICLR 2024)."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class LoHa(WeightMethod):
    r"""Adds the entrywise product of two low-rank matrices, of rank up to :math:`r^2`: :math:`W' = W + s\,(B_1 A_1) \odot (B_2 A_2)`.

    :math:`s = \alpha / r`. Entry by entry the product is a sum over pairs of ranks, so it is itself a product of rank
    :math:`r^2`, with the rows :math:`A_{1,k} \odot A_{2,l}` and the columns :math:`B_{1,k} \odot B_{2,l}`. Where that costs less
    than forming the update, the fast path uses it and forms nothing of the size of :math:`W`.

    Args:
        rank: Rank :math:`r` of both matrices.
        alpha: Scale of the update.
        use_effective_conv2d: For convolutions with a kernel of more than one element, both matrices are Tucker products
            :math:`T \times_1 B \times_2 A` (FedPara's proposition 3), which share the kernel's elements; otherwise the kernel
            is flattened into the inputs.

    Parameters per site:
        ``w1_a`` (d_out, rank) and ``w1_b`` (rank, d_in), Kaiming uniform; ``w2_a`` likewise; ``w2_b`` zeros. As Tucker products:
        ``w1_a``, ``w2_a`` (rank, d_out), ``w1_b``, ``w2_b`` (rank, channels), ``t1``, ``t2`` (rank, rank, \*kernel).

    References:
        Hyeon-Woo, Ye-Bin, Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", ICLR 2022.
        Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), LoHa(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(3, 2), (2, 4), (3, 2), (2, 4)]
    """

    key = "loha"
    paper = "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning"
    equation = r"W' = W + s\,(B_1 A_1) \odot (B_2 A_2)"
    golden = "PEFT"
    reads_weight = True
    full_precision = True

    rank: int = 8
    alpha: float = 8.0
    use_effective_conv2d: bool = False

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        check_rank(self, site, most=prod(site.shape))

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), r = site.shape, self.rank
        kernel = site.layer.stored[2:] if site.layer is not None and site.layer.kind in ("conv", "conv_transposed") else ()
        tucker = self.use_effective_conv2d and prod(kernel) > 1
        left, right = ((r, d_out), (r, d_in // prod(kernel))) if tucker else ((d_out, r), (r, d_in))
        shapes: dict[str, tuple[int, ...]] = {"w1_a": left, "w1_b": right, "w2_a": left, "w2_b": right}
        if tucker:
            shapes |= {"t1": (r, r, *kernel), "t2": (r, r, *kernel)}
        p = {k: nn.init.kaiming_uniform_(torch.empty(shape, device=site.device), a=5**0.5) for k, shape in shapes.items()}
        return {**p, "w2_b": torch.zeros_like(p["w2_b"])}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        first, second = _product(p["w1_a"], p["w1_b"], p.get("t1")), _product(p["w2_a"], p["w2_b"], p.get("t2"))
        return torch.addcmul(w, first, second, value=self.factor).to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        d_out, d_in = base.shape
        if "t1" not in p and 3 * self.rank**2 * (d_out + d_in) < d_out * d_in:  # 3: forward and two products backward, against one
            rows = (p["w1_b"][:, None] * p["w2_b"]).flatten(0, 1)
            columns = (p["w1_a"][:, :, None] * p["w2_a"][:, None]).flatten(1)
            return base.low_rank(x, rows, columns, self.factor)
        y, bias = base.apply(self.weight(p, base.weight), x), base.bias
        return y if bias is None else y + base.scale(bias.to(y.dtype), y.new_ones(()))


def _product(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """One of the two low-rank matrices (d_out, d_in), from two factors or, with ``t``, from a Tucker product."""
    return a @ b if t is None else torch.einsum("ij...,ip,jq->pq...", t, a, b).flatten(1)
