"""LoRAMoE: LoRA experts with a localised balancing constraint (Dou et al., ACL 2024)."""

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


@register
@dataclass(frozen=True)
class LoRAMoE(ActivationMethod):
    r"""Mixes LoRAs softly, token by token, some of which are to guard the model's knowledge while the others learn tasks:
    :math:`h_t' = h_t + s \sum_e g_e(x_t) B_e A_e x_t`, :math:`g = \mathrm{softmax}(R x_t)`.

    Calls in training may say of what kind each row is, ``model(x, domain=ids)``: 0, world knowledge, or 1, another downstream task. With :math:`Q_{em}` the
    gates of expert e summed over the tokens of row m and :math:`I_{em} = 1 + \delta` where the row's kind is the expert's, else :math:`1 - \delta`, the loss
    gains the localised balancing constraint :math:`\beta\, \sigma^2(Z) / \mu(Z)`, :math:`Z = I \odot Q`. Without ``domain`` nothing is added.

    Args:
        experts: Number of experts.
        knowledge: How many of them, the first ones, are for world knowledge.
        rank: Rank :math:`r` of an expert.
        alpha: Scale of the update; :math:`s = \alpha / r`.
        delta: The degree :math:`\delta` of imbalance between the two kinds, in [0, 1].
        balance: Weight :math:`\beta` of the constraint.

    Parameters per site:
        ``A`` (experts, rank, d_in), Kaiming uniform; ``B`` (experts, d_out, rank), zeros; ``router`` (experts, d_in), Kaiming uniform.

    References:
        Dou, Zhou, Liu, Gao, Zhao, Shen, Zhou, Xi, Wang, Fan, Pu, Zhu, Zheng, Gui, Zhang and Huang, "LoRAMoE: Revolutionizing Mixture of Experts for
        Maintaining World Knowledge in Language Model Alignment", ACL 2024. (The constraint is the paper's; the official code could not be read.)

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), LoRAMoE(rank=2, experts=4, knowledge=2), where="all")
    >>> model(torch.zeros(2, 5, 4), domain=torch.tensor([0, 1])).shape
    torch.Size([2, 5, 3])
    """

    key = "loramoe"
    paper = "LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World Knowledge in Language Model Alignment"
    equation = r"h_t' = h_t + \frac{\alpha}{r} \sum_e g_e(x_t)\, B_e A_e x_t"
    golden = "NumPy"
    where = ("mlp.up", "mlp.gate", "mlp.down")
    reads = ("domain",)
    full_precision = True
    notes: ClassVar[bool] = True

    experts: int = 6
    knowledge: int = 3
    rank: int = 4
    alpha: float = 32.0
    delta: float = 0.1
    balance: float = 0.1

    def check(self, site: Site) -> None:
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: loramoe acts on linear layers that are called with their input; leave it out of where=")
        check_rank(self, site)
        if not 0 <= self.knowledge <= self.experts or self.experts < 2 or not 0 <= self.delta <= 1 or self.balance < 0:
            raise InputError(
                f"loramoe: experts={self.experts}, knowledge={self.knowledge}, delta={self.delta}, balance={self.balance}; two experts or more, "
                "knowledge 0 to their number, delta in [0, 1], balance not negative"
            )

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), e = site.shape, self.experts
        limit = d_in**-0.5
        a = torch.empty(e, self.rank, d_in, device=site.device).uniform_(-limit, limit)
        return {"A": a, "B": a.new_zeros(e, d_out, self.rank), "router": a.new_empty(e, d_in).uniform_(-limit, limit)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        gates = F.linear(x.to(p["router"].dtype), p["router"]).softmax(-1)
        notes: Any = p["notes"]
        notes["importance"] = gates.flatten(0, -2).mean(0)
        notes.pop("Z", None)
        if (kind := p.get("call.domain")) is not None:
            if kind.shape != h.shape[:1]:
                raise InputError(f"loramoe: domain holds {tuple(kind.shape)} numbers for {len(h)} rows; give one for each, 0 for world knowledge")
            q = gates.flatten(1, -2).sum(1) if gates.dim() > 2 else gates
            own = (kind != 0)[:, None] == (torch.arange(self.experts, device=q.device) >= self.knowledge)
            notes["Z"] = q * (1 - self.delta + 2 * self.delta * own.to(q.dtype))
        mixed = low_rank_experts(x.to(h.dtype), gates, p["A"].to(h.dtype), p["B"].to(h.dtype))
        return torch.add(h, mixed, alpha=self.alpha / self.rank)

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes: Any = p.get("notes", {})
        z = notes.get("Z")
        return None if z is None or not self.balance else self.balance * z.var(correction=0) / z.mean()
