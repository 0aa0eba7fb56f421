"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester, Al-Rfou and Constant, EMNLP 2021)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from exapt.core.contract import Tensors, TokenMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class PromptTuning(TokenMethod):
    r"""Puts :math:`n` learned vectors before the embedded tokens: :math:`[P; X]`. Outputs keep the caller's length.

    Args:
        length: Number :math:`n` of prompt tokens.
        init_from: ``"vocab"``: embeddings of tokens drawn uniformly from the vocabulary (the paper draws from the 5,000 most common
            ones); ``"random"``: uniform in [-0.5, 0.5].

    Parameters per site:
        ``prompt`` (length, d).

    References:
        Lester, Al-Rfou and Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021.
    """

    key = "prompt_tuning"
    paper = "The Power of Scale for Parameter-Efficient Prompt Tuning"
    where = "model"
    level = "input"
    exceptions: ClassVar = {"identity": "the tokens attend to the prompt from the first step on"}

    length: int = 20
    init_from: Literal["vocab", "random"] = "vocab"

    def check(self, site: Site) -> None:
        find = getattr(site.module, "get_input_embeddings", None)
        if not callable(find) or not hasattr(find(), "num_embeddings"):
            raise InputError(f"{type(site.module).__name__} has no token embedding that get_input_embeddings() returns; use a transformers model of text")

    def init(self, site: Site) -> Tensors:
        embedding = cast(Any, site.module).get_input_embeddings()
        ids = torch.randint(embedding.num_embeddings, (self.length,)).to(embedding.weight.device)
        with torch.no_grad():
            words = embedding(ids)
        return {"prompt": words if self.init_from == "vocab" else torch.rand_like(words) - 0.5}

    def extend(self, p: Tensors, *streams: Tensor) -> tuple[Tensor, ...]:
        (x,) = streams
        return (torch.cat([p["prompt"].expand(x.shape[0], -1, -1), x], 1),)
