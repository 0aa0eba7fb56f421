"""Partial LoRA: an update for the tokens of one modality alone (Dutt et al., 2025)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class PartialLoRA(WeightMethod):
    r"""LoRA that acts on the tokens of a new modality and leaves all others as they are: :math:`y_t = W x_t + 1[m_t = m]\, s B A x_t`.

    ``model(x, token_type_ids=types)``, (rows, length), says which modality each token is of; what the model itself takes under that name it still gets. A
    call without it is of the new modality throughout. In a mixture of experts at ``where`` the experts' matrices: what they have to spare becomes the
    new modality's, and text is answered bit for bit as before. Embeddings of the new tokens start near those of text by
    :func:`exapt.algebra.hyper.alignment.aligned_start`.

    Args:
        rank: Rank :math:`r` of the update.
        alpha: Scale of the update, :math:`s = \alpha / r`.
        modality: The type :math:`m` of tokens that it acts on.

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``B`` (d_out, rank), zeros.

    References:
        Dutt, Hanspal, Xia, Tudosiu, Black, Yang, McDonagh and Parisot, "Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative
        Abilities", 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), PartialLoRA(rank=1), where="all")
    >>> model(torch.zeros(2, 5, 4), token_type_ids=torch.ones(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 3])
    """

    key = "partial_lora"
    paper = "Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities"
    equation = r"y_t = W x_t + 1[m_t = m]\, \frac{\alpha}{r} B A x_t"
    golden = "NumPy"
    reads = ("token_type_ids",)

    rank: int = 8
    alpha: float = 16.0
    modality: int = 1

    def needs_forward(self) -> bool:
        return True

    mergeable = False

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if site.layer and site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: partial_lora tells tokens apart in linear layers only; leave it out of where=")

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        a = torch.empty(self.rank, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        return {"A": a, "B": a.new_zeros(d_out, self.rank)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return torch.addmm(w, p["B"].to(w.dtype), p["A"].to(w.dtype), alpha=self.alpha / self.rank)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        types = p.get("call.token_type_ids")
        if types is None or types.shape != x.shape[:-1]:  # what follows the pooling has no tokens to tell apart
            return base.low_rank(x, p["A"], p["B"], self.alpha / self.rank)
        y = base(x)
        own = (types == self.modality)[..., None]
        update = torch.where(own, x.to(y.dtype), 0) @ p["A"].T @ p["B"].T
        return torch.where(own, y + self.alpha / self.rank * update, y)
