"""Context-PEFT: adapter groups by the modality of each token (Hadji-Kyriacou and Arandjelovic, 2023)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from exapt.core.contract import Method, Recipe
from exapt.core.errors import InputError
from exapt.core.registry import method, register


@register
@dataclass(frozen=True)
class ContextPEFT(Recipe):
    r"""Gives each token the adapter of its modality: :math:`h_t = F_{m(t)}(x_t)`, :math:`F_m` the layer with the shift of group m.

    The call says of which modality each token is, ``model(..., token_type_ids=ids)``: ids (batch, length), 0 to groups - 1; without them all tokens are of
    group 0. The same as ``Mixture(expert, experts=groups, router="modality")`` at all linear layers; a model that uses ``token_type_ids`` itself
    (BERT) sees them too.

    Args:
        groups: Number of modalities.
        expert: The shift that each has; the paper's are LoRA, IA3 and BitFit.

    Parameters per site:
        The expert's, stacked: ``expert_A`` (groups, rank, d_in), ``expert_B`` (groups, d_out, rank).

    References:
        Hadji-Kyriacou and Arandjelovic, "Context-PEFT: Efficient Multi-Modal, Multi-Task Fine-Tuning", 2023.

    >>> ContextPEFT(groups=3).rules()["linear"].experts
    3
    """

    key = "context_peft"
    paper = "Context-PEFT: Efficient Multi-Modal, Multi-Task Fine-Tuning"
    equation = r"h_t = W x_t + \frac{\alpha}{r} B_{m(t)} A_{m(t)} x_t"
    golden = "NumPy"

    groups: int = 2
    expert: Method = field(default_factory=lambda: method("lora"))

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise InputError(f"context_peft.groups is {self.groups}; it must be at least 1")

    def rules(self) -> Mapping[Any, Method]:
        return {"linear": method("mixture", expert=self.expert, experts=self.groups, router="modality")}
