"""S'MoRE: structural mixture of residual experts (Zeng et al., NeurIPS 2025)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.contract import ActivationMethod, Tensors
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class SMoRE(ActivationMethod):
    r"""Low-rank residual experts in layers, of which each token goes through a tree: with :math:`y^0 = 0`, every node of the tree at layer l sums over the
    children c that it chose

    .. math:: y^{l+1} = \sum_c g_c\, \sigma\bigl(B^l_c (A^l_c x + a^l_c) + b^l_c + W^l y_c^l + w^l\bigr),\qquad h' = h + U y^L + u.

    The tree grows from the top: at each node the gate of its layer sees the token, projected down, and the keys of the experts chosen on the way there,
    :math:`g = \mathrm{softmax}\, K^l\, \mathrm{MLP}^l([P x; K^{L-1}_{c}; \dots])`; the ``fanout`` best become children, and their gates
    are renormalised (if there is more than one). Widths are :math:`d_{l+1} = d_l + s_l r_l` from :math:`d_0 = 0`, as in the official code, whose gate
    "switch" and start with a zero :math:`U` this is. Training adds a load-balancing loss for each layer; ``exapt.noted(model)`` shows ``load_l``.

    Args:
        experts: Numbers :math:`s_l` of experts, from the lowest layer (the leaves) to the top.
        ranks: Their ranks :math:`r_l`.
        fanout: How many children a node of layer l chooses.
        gate: Width of gates and keys.
        down: Width of the projected token that gates see.
        activation: The nonlinearity :math:`\sigma`.
        balance: Weight of the load-balancing loss.

    Parameters per site:
        ``A_l`` (s, r, d_in), ``B_l`` (s, d_{l+1}, r) and ``W_l`` (d_{l+1}, d_l) for l > 0, Kaiming uniform, with ``a_l``, ``b_l``, ``w_l``, zeros;
        ``U`` (d_out, d_L) and ``u``, zeros; gates ``P``, ``G_l``, ``H_l`` with ``p``, ``g_l``, ``e_l`` as linear layers; ``K_l`` (s, gate), uniform in [0, 1].

    References:
        Zeng, Xia, Zhao, Jiang, Zhang, Liu, Zhang, Zhang, Fan and Zhang, "S'MoRE: Structural Mixture of Residual Experts for Parameter-Efficient LLM
        Fine-tuning", NeurIPS 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), SMoRE(experts=(3, 2), ranks=(1, 2), fanout=(2, 1)), where="all")
    >>> model(torch.zeros(5, 4)).shape, exapt.noted(model)[""]["load_0"].sum().round().item()
    (torch.Size([5, 3]), 2.0)
    """

    key = "smore"
    paper = "S'MoRE: Structural Mixture of Residual Experts for LLM Fine-tuning"
    equation = r"h' = h + U y^L,\; y^{l+1} = \sum_c g_c\, \sigma(B^l_c A^l_c x + W^l y_c^l)"
    golden = "NumPy"
    where = "linear"
    full_precision = True
    notes: ClassVar[bool] = True

    experts: tuple[int, ...] = (4, 4)
    ranks: tuple[int, ...] = (4, 4)
    fanout: tuple[int, ...] = (2, 2)
    gate: int = 16
    down: int = 16
    activation: Literal["tanh", "relu", "identity"] = "tanh"
    balance: float = 0.01

    def check(self, site: Site) -> None:
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: smore acts on linear layers that are called with their input; leave it out of where=")
        shapes = list(zip(self.experts, self.ranks, self.fanout, strict=False))
        whole = len(self.experts) == len(self.ranks) == len(self.fanout) >= 1
        if not whole or any(r < 1 or not 1 <= f <= s for s, r, f in shapes) or min(self.gate, self.down) < 1 or self.balance < 0:
            raise InputError(
                f"smore: experts={self.experts}, ranks={self.ranks}, fanout={self.fanout}, gate={self.gate}, down={self.down}, balance={self.balance}; one "
                "number for each layer, all positive, fanout at most the layer's experts"
            )

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), layers = site.shape, len(self.experts)

        def uniform(*shape: int) -> Tensor:
            return torch.empty(*shape, device=site.device).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=site.device)

        p, d = {"P": uniform(self.down, d_in), "p": zeros(self.down)}, 0
        for i, (s, r) in enumerate(zip(self.experts, self.ranks, strict=True)):
            wide, seen = d + s * r, self.down + (layers - 1 - i) * self.gate
            p |= {f"A_{i}": uniform(s, r, d_in), f"a_{i}": zeros(s, r), f"B_{i}": uniform(s, wide, r), f"b_{i}": zeros(s, wide)}
            if i:
                p |= {f"W_{i}": uniform(wide, d), f"w_{i}": zeros(wide)}
            p |= {f"G_{i}": uniform(self.gate, seen), f"g_{i}": zeros(self.gate), f"H_{i}": uniform(self.gate, self.gate), f"e_{i}": zeros(self.gate)}
            p[f"K_{i}"] = torch.rand(s, self.gate, device=site.device)
            d = wide
        return {**p, "U": zeros(d_out, d), "u": zeros(d_out)}

    def _routes(self, p: Tensors, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The children and their gates, both (tokens, fanout of the top, ..., fanout of the layer), for each layer from the lowest."""
        seen = F.linear(x, p["P"], p["p"])
        notes: Tensors = {}
        routes: list[tuple[Tensor, Tensor]] = []
        for i in reversed(range(len(self.experts))):
            inner = F.linear(F.linear(seen, p[f"G_{i}"], p[f"g_{i}"]).relu(), p[f"H_{i}"], p[f"e_{i}"])
            shares = F.linear(inner, p[f"K_{i}"]).softmax(-1)
            gates, chosen = shares.topk(self.fanout[i], -1)
            if self.fanout[i] > 1:
                gates = gates / gates.sum(-1, keepdim=True)
            used = torch.zeros_like(shares).scatter(-1, chosen, 1.0)
            notes |= {f"load_{i}": used.flatten(0, -2).mean(0), f"importance_{i}": shares.flatten(0, -2).mean(0)}
            routes.append((chosen, gates))
            seen = torch.cat([seen[..., None, :].expand(*seen.shape[:-1], self.fanout[i], -1), p[f"K_{i}"][chosen]], -1)
        p["notes"].update(notes)  # type: ignore[attr-defined]
        return routes[::-1]

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).to(p["P"].dtype)
        act = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda t: t}[self.activation]
        y: Any = None
        for i, (chosen, gates) in enumerate(self._routes(p, tokens)):
            low = torch.einsum("sri,ni->nsr", p[f"A_{i}"], tokens) + p[f"a_{i}"]
            each = torch.einsum("sor,nsr->nso", p[f"B_{i}"], low) + p[f"b_{i}"]
            index = chosen.flatten(1)[..., None].expand(-1, -1, each.shape[-1])
            own = each.gather(1, index).view(*chosen.shape, -1)
            y = act(own if y is None else own + F.linear(y, p[f"W_{i}"], p[f"w_{i}"]))
            y = (gates[..., None] * y).sum(-2)
        return h + F.linear(y, p["U"], p["u"]).view(h.shape).to(h.dtype)

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes: Any = p.get("notes", {})
        if not self.balance or "load_0" not in notes:
            return None
        terms = [s * (notes[f"load_{i}"] * notes[f"importance_{i}"]).sum() for i, s in enumerate(self.experts)]
        return self.balance * torch.stack(terms).sum()
