"""X-LoRA's layers: LoRAs mixed by scalings for each token and layer (Buehler and Buehler, APL Machine Learning 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.contract import ActivationMethod, Tensors, frozen
from exapt.core.dispatch import low_rank_experts
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class XLoRA(ActivationMethod):
    r"""Mixes LoRAs by scalings that come with the call, one for each token, layer and expert:
    :math:`h_t' = h_t + g\, s \sum_e \lambda_{t l e} B_e A_e x_t`, :math:`s = \alpha / r`.

    ``model(x, scalings=lambdas)``: (batch, length, layers, experts), the layers those of ``where`` in the model's order. They are what
    a router makes of the hidden states of a first pass on the base model; it belongs to composition and is not here. Experts start as LoRAs do and
    train, unless the adapter is attached with ``trainable=False``. With one expert nothing is asked for.

    Args:
        experts: Number of experts.
        rank: Rank :math:`r` of each.
        alpha: Scale of each.
        top_k: How many experts act on a token, the others' scalings set to zero; 0: all.
        softmax: Whether the scalings that are not zero go through a softmax, after ``top_k``.
        weight: The factor :math:`g` on the whole mixture.

    Parameters per site:
        ``A`` (experts, rank, d_in), Kaiming uniform; ``B`` (experts, d_out, rank), zeros. Not trained: ``place`` (1,), which of the layers it is.

    References:
        Buehler and Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with Applications in
        Protein Mechanics and Design", APL Machine Learning 2024.
    """

    key = "xlora"
    paper = "X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with Applications in Protein Mechanics and Design"
    equation = r"h_t' = h_t + g \frac{\alpha}{r} \sum_e \lambda_{t l e} B_e A_e x_t"
    golden = "PEFT"
    where = "linear"

    experts: int = 1
    rank: int = 8
    alpha: float = 16.0
    top_k: int = 0
    softmax: bool = False
    weight: float = 1.0

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The scalings, if there is something to mix."""
        return ("scalings",) if self.experts > 1 else ()

    def check(self, site: Site) -> None:
        if self.rank < 1:
            raise InputError(f"{site.name or '(model)'}: xlora.rank is {self.rank}; it must be at least 1")
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: xlora acts on linear layers that are called with their input; leave it out of where=")
        if self.experts < 1 or not 0 <= self.top_k <= self.experts:
            raise InputError(f"xlora: {self.experts} experts, top_k={self.top_k}; at least one, and of them 0 (all) to {self.experts}")

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        return {s.name: {"place": torch.tensor([i])} for i, s in enumerate(sites)}

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        a = torch.empty(self.experts, self.rank, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        return {"A": a, "B": a.new_zeros(self.experts, d_out, self.rank), "place": frozen(site.statistics["place"].clone())}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        gates = self._scalings(p, h) if self.experts > 1 else h.new_ones(1)
        return h + self.weight * self.alpha / self.rank * low_rank_experts(x.to(h.dtype), gates, p["A"], p["B"], self.top_k)

    def _scalings(self, p: Tensors, h: Tensor) -> Tensor:
        given = p["call.scalings"]
        if given.shape[:-2] != h.shape[:-1] or given.shape[-1] != self.experts:
            raise InputError(
                f"xlora was given scalings of shape {tuple(given.shape)}; this layer's {tuple(h.shape[:-1])} tokens need (..., layers, {self.experts})"
            )
        share = given.to(h.dtype).index_select(-2, p["place"]).squeeze(-2)
        if self.top_k:
            kept = torch.zeros_like(share).scatter(-1, share.topk(self.top_k, -1).indices, 1.0)
            share = share * kept
        if self.softmax:
            share = share.masked_fill(share == 0, -torch.inf).softmax(-1).nan_to_num(0.0)
        return share
