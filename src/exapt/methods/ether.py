"""ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections (Bini et al., ICML 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from exapt.core.base import Base
from exapt.core.checks import check_divides
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class ETHER(WeightMethod):
    r"""Reflects a layer's inputs at one hyperplane for each block of them: :math:`W' = W H`, :math:`H_i = I - 2 \hat u_i \hat u_i^\top`.

    :math:`H` is orthogonal and its distance to the identity is constant, :math:`\lVert H - I \rVert_F = 2 \sqrt n`. The number of
    parameters does not depend on the number of blocks. The blocks are those of section 3.4 of the paper; the official code
    reshapes the matrix such that every block reflects all parts of the inputs, of some of the outputs, which agrees for one block only.

    Args:
        blocks: Number :math:`n` of blocks; it divides d_in.

    Parameters per site:
        ``u`` (blocks, d_in / blocks), Kaiming uniform; its length has no effect.

    References:
        Bini, Roth, Akata and Khoreva, "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections", ICML 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(6, 4), ETHER(blocks=3), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(3, 2)]
    """

    key = "ether"
    paper = "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections"
    equation = r"W' = W\,(I - 2 \hat u \hat u^\top)"
    golden = "NumPy"
    full_precision = True
    exceptions: ClassVar = {"identity": "a reflection is at a constant distance from the identity; ETHER+ starts at the base model"}

    blocks: int = 1

    def check(self, site: Site) -> None:
        if site.layer is not None and site.layer.kind == "embedding":
            raise InputError(f"{site.name or '(model)'}: {self.key} reflects inputs, and an embedding's are token ids; leave it out of where=")
        check_divides(self, site, "blocks", site.shape[1], "input features")

    def init(self, site: Site) -> Tensors:
        d_in = site.shape[1]
        return {"u": nn.init.kaiming_uniform_(torch.empty(self.blocks, d_in // self.blocks, device=site.device), a=5**0.5)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        u = p["u"] / p["u"].norm(dim=1, keepdim=True)
        return _reflected(w.to(u.dtype), u).to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        u = p["u"] / p["u"].norm(dim=1, keepdim=True)
        if base.kind in ("linear", "conv1d_hf"):
            return base(_reflected(x, u.to(x.dtype)))
        along = torch.linalg.vecdot(base.weight.to(u.dtype).unflatten(-1, u.shape), u)  # a convolution's inputs overlap: its matrix changes by rank n
        return base.low_rank(x, torch.block_diag(*u), along, scale=-2.0)


def _reflected(x: Tensor, u: Tensor) -> Tensor:
    """The rows of ``x`` (..., n b) reflected block by block at ``u`` (n, b)."""
    parts = x.unflatten(-1, u.shape)
    return (parts - 2 * torch.linalg.vecdot(parts, u)[..., None] * u).flatten(-2)
