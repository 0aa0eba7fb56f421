"""PESC: a dense feed-forward network made a mixture of experts that differ by an adapter (Wu et al., EMNLP 2024)."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.contract import ActivationMethod, Tensors
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class PESC(ActivationMethod):
    r"""Upcycles a feed-forward network to experts that share its weights and differ by an adapter behind it:

    .. math:: h' = \sum_{i \in T(x)} g_i(x)\, A_i(h), \quad A_i(h) = h + s\, U_i\, \mathrm{gelu}(D_i h), \quad
        g(x) = \mathrm{softmax}_{T(x)}(R x)

    :math:`x` is the network's input, :math:`h` its output and :math:`T(x)` the ``top_k`` experts of the largest logits. The loss gets
    :math:`\alpha E \sum_i f_i P_i`, with the share :math:`f_i` of choices that fell on expert i and its mean probability :math:`P_i` under the softmax
    over all :math:`E` experts, as the paper has it (the official code's function differs and is switched off there). ``exapt.noted(model)`` shows
    ``load``, the :math:`f_i`. The rest of the model is tuned by LoRA beside it: ``{"linear": LoRA(64), "mlp": PESC()}``.

    Args:
        experts: Number :math:`E` of experts.
        top_k: How many of them a token uses.
        bottleneck: Width of an adapter; the official code's 64.
        scale: The scale :math:`s`.
        balance: The factor :math:`\alpha`; the paper's 0.01.

    Parameters per site:
        ``R`` (experts, d_in) and ``D`` (experts, bottleneck, d), Kaiming uniform; ``U`` (experts, d, bottleneck), zeros.

    References:
        Wu, Zheng, He and Yu, "Parameter-Efficient Sparsity Crafting from Dense to Mixture-of-Experts for Instruction Tuning on General Tasks",
        EMNLP 2024.

    >>> import exapt
    >>> layer = exapt.attach(nn.Linear(4, 3), PESC(experts=4, bottleneck=2), where="all")
    >>> _ = layer(torch.randn(5, 4))
    >>> float(exapt.noted(layer)[""]["load"].sum())
    1.0
    """

    key = "pesc"
    paper = "Parameter-Efficient Sparsity Crafting from Dense to Mixture-of-Experts for Instruction Tuning on General Tasks"
    equation = r"h' = \sum_i g_i(x)\, (h + s\, U_i\, \mathrm{gelu}(D_i h))"
    golden = "NumPy"
    where = "mlp"
    notes: ClassVar = True

    experts: int = 8
    top_k: int = 2
    bottleneck: int = 64
    scale: float = 1.0
    balance: float = 0.01

    def check(self, site: Site) -> None:
        if self.bottleneck < 1:
            raise InputError(f"{site.name or '(model)'}: pesc.bottleneck is {self.bottleneck}; it must be at least 1")
        if not 1 <= self.top_k <= self.experts:
            raise InputError(f"pesc: top_k={self.top_k} of {self.experts} experts; choose 1 to {self.experts}")
        if site.axis != -1 or (site.layer is not None and site.layer.kind == "embedding"):
            raise InputError(f"{site.name}: pesc needs features last, in input and output; choose an mlp or linear site")

    def init(self, site: Site) -> Tensors:
        d, e = site.features, self.experts
        d_in = site.layer.shape[1] if site.layer is not None else d
        made = [nn.init.kaiming_uniform_(torch.empty(self.bottleneck, d, device=site.device), a=5**0.5) for _ in range(e)]
        router = nn.init.kaiming_uniform_(torch.empty(e, d_in, device=site.device), a=5**0.5)
        return {"R": router, "D": torch.stack(made), "U": router.new_zeros(e, d, self.bottleneck)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        logits = F.linear(x.to(h.dtype), p["R"])
        best, index = logits.topk(self.top_k, -1)
        gates = torch.zeros_like(logits).scatter(-1, index, best.softmax(-1))
        chosen = torch.zeros_like(logits).scatter(-1, index, 1.0).flatten(0, -2)
        load = chosen.float().mean(0) / self.top_k
        cast(Tensors, p["notes"]).update({"load": load, "balance": self.experts * (load * logits.flatten(0, -2).float().softmax(-1).mean(0)).sum()})
        inner = F.gelu(F.linear(h, p["D"].flatten(0, 1))).unflatten(-1, (self.experts, -1)) * gates[..., None]
        return h + self.scale * F.linear(inner.flatten(-2), p["U"].transpose(0, 1).flatten(1))

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes = cast(Tensors, p["notes"])
        return self.balance * notes["balance"] if self.balance and "balance" in notes else None
