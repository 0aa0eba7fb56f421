"""MoLA: Higher Layers Need More LoRA Experts (Gao et al., 2024)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.checks import check_rank
from exapt.core.contract import ActivationMethod, Tensors
from exapt.core.dispatch import low_rank_experts
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


def depth(name: str) -> int:
    """The number of the block that a site is in, -1 outside of them.

    >>> depth("model.layers.11.mlp.up_proj")
    11
    """
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else -1


@register
@dataclass(frozen=True)
class MoLA(ActivationMethod):
    r"""Top-k mixtures of LoRAs with another number of experts in each part of the depth:
    :math:`h_t' = h_t + s \sum_{e \in \mathrm{top}_k} g_e(x_t) B_e A_e x_t`, :math:`g = \mathrm{softmax}(R x_t)` over those chosen.

    The blocks that hold sites are cut into as many groups of consecutive ones as ``groups`` has numbers, from the input on, each group with that many
    experts for each layer: ``(2, 4, 6, 8)`` is the paper's inverted triangle (MoLA-∇), ``(8, 6, 4, 2)`` its triangle, ``(5,)`` its rectangle. Training adds
    :math:`\beta E \sum_e f_e P_e`, :math:`f_e` the share of tokens that use expert e and :math:`P_e` its mean probability. ``exapt.noted(model)`` shows both
    (``load``, ``importance``). Each expert computes the tokens that chose it alone where that is cheaper, from a rank of 32 with two of eight.

    Args:
        groups: Numbers of experts, from the lowest blocks to the highest.
        rank: Rank :math:`r` of an expert.
        alpha: Scale of the update; :math:`s = \alpha / r`.
        top_k: How many experts act on a token.
        balance: Weight :math:`\beta` of the load-balancing loss.

    Parameters per site:
        ``A`` (experts, rank, d_in), Kaiming uniform; ``B`` (experts, d_out, rank), zeros; ``router`` (experts, d_in), Kaiming uniform.

    References:
        Gao, Chen, Rao, Sun, Liu, Peng, Zhang, Guo, Yang and Subrahmanian, "Higher Layers Need More LoRA Experts", 2024. (The
        official code could not be read; the balancing loss is that of Switch Transformers, which the paper names.)

    >>> import exapt
    >>> from torch import nn
    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(4)))
    >>> model = exapt.attach(model, MoLA(groups=(2, 3), rank=1), where="*.0")
    >>> [p.shape[0] for n, p in exapt.trainable(model).items() if n.endswith("router")]
    [2, 2, 3, 3]
    """

    key = "mola"
    paper = "Higher Layers Need More LoRA Experts"
    equation = r"h_t' = h_t + \frac{\alpha}{r} \sum_{e \in \mathrm{top}_k} g_e(x_t)\, B_e A_e x_t"
    golden = "NumPy"
    where = "linear"
    full_precision = True
    notes: ClassVar[bool] = True

    groups: tuple[int, ...] = (2, 4, 6, 8)
    rank: int = 8
    alpha: float = 16.0
    top_k: int = 2
    balance: float = 0.001

    def check(self, site: Site) -> None:
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: mola acts on linear layers that are called with their input; leave it out of where=")
        check_rank(self, site)
        if not self.groups or min(self.groups) < self.top_k or self.top_k < 2 or self.balance < 0:
            raise InputError(
                f"mola: groups={self.groups}, top_k={self.top_k}, balance={self.balance}; top_k is at least 2 (the one gate of a lone expert is always 1), "
                "each group has that many experts or more, and balance is not negative"
            )

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        blocks = {d: i for i, d in enumerate(sorted({depth(s.name) for s in sites}))}
        return {s.name: {"experts": torch.tensor(self.groups[blocks[depth(s.name)] * len(self.groups) // len(blocks)])} for s in sites}

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), e = site.shape, int(site.statistics["experts"])
        limit = d_in**-0.5
        a = torch.empty(e, self.rank, d_in, device=site.device).uniform_(-limit, limit)
        return {"A": a, "B": a.new_zeros(e, d_out, self.rank), "router": a.new_empty(e, d_in).uniform_(-limit, limit)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        logits = F.linear(x.to(p["router"].dtype), p["router"])
        chosen = logits.topk(self.top_k, -1).indices
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
        gates = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        p["notes"].update(load=kept.to(logits.dtype).flatten(0, -2).mean(0), importance=logits.softmax(-1).flatten(0, -2).mean(0))  # type: ignore[attr-defined]
        mixed = low_rank_experts(x.to(h.dtype), gates, p["A"].to(h.dtype), p["B"].to(h.dtype), self.top_k)
        return torch.add(h, mixed, alpha=self.alpha / self.rank)

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes: Any = p.get("notes", {})
        if not self.balance or "load" not in notes:
            return None
        return self.balance * len(notes["load"]) * (notes["load"] * notes["importance"]).sum()
