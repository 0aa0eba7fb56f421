"""A task vector as an adapter: the difference of two weights (Ilharco et al., ICLR 2023)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class Delta(WeightMethod):
    r"""Adds a matrix of full rank, and a vector to the bias: :math:`W' = W + D`, :math:`b' = b + d`.

    Trained, it is fine-tuning of whole layers as a difference from the base; what merging and arithmetic of adapters give where
    no low rank holds it is one too.

    Parameters per site:
        ``D`` (d_out, d_in), zeros; ``d`` (d_out,), zeros, where the layer has a bias.

    References:
        Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), Delta(), where="all")
    >>> exapt.parameter_count(model).trainable
    15
    """

    key = "delta"
    paper = "Editing Models with Task Arithmetic"
    equation = r"W' = W + D"
    golden = "NumPy"
    fast_kinds = ("linear",)

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        found = {"D": torch.zeros(d_out, d_in, device=site.device)}
        return {**found, "d": torch.zeros(d_out, device=site.device)} if site.bias is not None else found

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return w + p["D"]

    def bias(self, p: Tensors, b: Tensor) -> Tensor:
        return b + p["d"] if "d" in p else b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        return y + F.linear(x.to(y.dtype), p["D"], p.get("d"))
