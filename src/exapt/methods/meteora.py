"""MeteoRA: many off-the-shelf LoRAs behind trained gates (Xu, Lai and Huang, ICLR 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from exapt.core.contract import Method, Recipe
from exapt.core.registry import method, register


@register
@dataclass(frozen=True)
class MeteoRA(Recipe):
    r"""Embeds frozen LoRAs in every linear layer, each layer with a gate of its own that is all that trains:
    :math:`y = W x + s \sum_{e \in \mathrm{top}_k} g_e(x) B_e A_e x`, :math:`g` the softmax of the chosen logits :math:`R x`, for each token.

    The LoRAs come from files (:func:`exapt.algebra.compose.experts.from_adapters`); attached by itself it holds empty ones. The same as
    ``Mixture(LoRA(...), router="token", top_k=2, train_experts=False)`` at all linear layers. The authors' batched kernels are not here: the experts' factors
    are multiplied as one stacked matrix, or expert by expert with the tokens that chose it where the ranks are large.

    Args:
        experts: Number of LoRAs.
        rank: Their rank; smaller ones are filled up with zeros.
        alpha: Their scale; the factor is alpha / rank.
        top_k: How many act on a token.

    Parameters per site:
        ``router`` (experts, d_in), Kaiming uniform. Not trained: ``expert_A`` (experts, rank, d_in), ``expert_B`` (experts, d_out, rank).

    References:
        Xu, Lai and Huang, "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models", ICLR 2025. (The official code could not be
        read; the gates here have no bias and no loss of their own.)

    >>> MeteoRA(rank=4).rules()["linear"].router
    'token'
    """

    key = "meteora"
    paper = "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models"
    equation = r"y = W x + \frac{\alpha}{r} \sum_{e \in \mathrm{top}_k} g_e(x)\, B_e A_e x"
    golden = "NumPy"
    exceptions: ClassVar = {"gradient": "its experts are trained LoRAs from files; until they are there the gates have nothing to weigh"}

    experts: int = 8
    rank: int = 8
    alpha: float = 16.0
    top_k: int = 2

    def rules(self) -> Mapping[Any, Method]:
        expert = method("lora", rank=self.rank, alpha=self.alpha)
        return {"linear": method("mixture", expert=expert, experts=self.experts, router="token", top_k=self.top_k, train_experts=False)}
