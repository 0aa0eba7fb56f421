"""A side memory beside a layer's weight, taken where it reacts strongly: WISE (Wang et al., NeurIPS 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exapt.core.contract import ActivationMethod, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class SideMemory(ActivationMethod):
    r"""Copies of a layer's weight with edits in them; a row takes the copy that reacts most to it, or the layer's own weight if none does enough.

    .. math:: a_m(x) = \mathrm{mean}_t \|D_m x_t\|, \qquad h' = h + D_{m^*} x\ \text{if}\ a_{m^*}(x) \ge \epsilon_{m^*}, \quad h' = h\ \text{otherwise}

    :math:`D_m = W_m - W` is what a copy differs by; :math:`m^*` is the copy of the largest :math:`a_m` among those above their own threshold. The rule is
    the paper's; the official code passes both outputs through the model's activation function before it compares them. It decides for a row as a whole,
    so a cached generation, which shows one token at a time, decides anew at each.

    Args:
        memories: Number of copies.

    Parameters per site:
        ``D`` (memories, d_out, d_in), zeros. Not trained: ``eps`` (memories,), infinite, a memory that is never taken.

    References:
        Wang, Li, Zhang, Xu, Yao, Jiang, Xie, Huang and Chen, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models",
        NeurIPS 2024.

    >>> import exapt
    >>> model = exapt.attach(torch.nn.Sequential(torch.nn.Linear(3, 2)), SideMemory(), where="0")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(1, 2, 3)]
    """

    key = "side_memory"
    paper = "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models"
    equation = r"h' = h + D_{m^*} x \text{ if } \mathrm{mean}_t \|D_{m^*} x_t\| \ge \epsilon_{m^*}"
    golden = "NumPy"
    where = "mlp.down"
    full_precision = True
    exceptions: ClassVar = {"gradient": "no memory is taken before its threshold is set, so none takes part in the output"}

    memories: int = 1

    def check(self, site: Site) -> None:
        if self.memories < 1:
            raise InputError(f"side_memory.memories is {self.memories}; there is one at least")
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: side_memory copies the weight of a linear layer; choose such a site, as mlp.down")

    def init(self, site: Site) -> Tensors:
        eps = torch.full((self.memories,), torch.inf, device=site.device)
        return {"D": torch.zeros(self.memories, *site.shape, device=site.device), "eps": frozen(eps)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        change = torch.einsum("moi,...i->m...o", p["D"], x.to(p["D"].dtype))
        strength = change.norm(dim=-1)
        if x.dim() > 2:
            strength = strength.mean(-1, keepdim=True)
        strength = torch.where(strength >= p["eps"].view(-1, *[1] * (strength.dim() - 1)), strength, -1.0)
        best, m = strength.max(0)
        picked = torch.take_along_dim(change, m[None, ..., None].expand(1, *change.shape[1:]), 0)[0]
        return h + torch.where(best[..., None] >= 0, picked, 0.0).to(h.dtype)
