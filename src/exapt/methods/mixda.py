"""Mixture-of-Domain-Adapters: gated domain adapters beside the feed-forward network (Diao et al., ACL 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.contract import ActivationMethod, Method, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import method, register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class MixDA(ActivationMethod):
    r"""Mixes the feed-forward network with domain adapters beside it: :math:`h' = g_0 h + \sum_k g_k A_k(x)`, :math:`g = \mathrm{softmax}\, \mathrm{MLP}(x)`.

    This is the second stage. In the first, each domain's adapter, ``ParallelAdapter(scale=1, activation="gelu")`` at ``"mlp.down"``, learns from the
    domain's text (the paper adds a loss that keeps the old knowledge); its files go into
    :func:`exapt.algebra.compose.experts.from_adapters`. Here they are frozen and the gate trains, with a task adapter beside it (another rule:
    ``{"mlp.down": MixDA(), "attention.output": BottleneckAdapter()}``). As in the official code, :math:`x` is the input of the network's second layer,
    the gate is one for a whole sequence, from its last position, and the network's own output is gated too, which the paper's
    equation leaves at 1 (its dropout of 0.2 in the gate is not part of this). ``exapt.noted(model)`` shows the mean ``gates`` of the last call.

    Args:
        expert: The adapters' method; it adds to the output something that its input makes.
        experts: Number of domains.
        width: Width of the gate's inner layers.
        depth: Number of its inner layers.
        pool: The gate sees the sequence's ``"last"`` position or the ``"mean"`` of all.

    Parameters per site:
        ``gate_W_i`` and ``gate_b_i`` of the gate's layers, Kaiming uniform and zeros, from d_in over ``width`` to experts + 1. Not trained: the adapters'
        tensors, stacked, ``expert_W_down`` (experts, ...) and so on.

    References:
        Diao, Xu, Xu, Wang and Zhang, "Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge to Pre-trained Language Models Memories",
        ACL 2023.
    """

    key = "mixda"
    paper = "Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge to Pre-trained Language Models Memories"
    equation = r"h' = g_0 h + \sum_k g_k A_k(x)"
    golden = "NumPy"
    where = "mlp.down"
    notes: ClassVar[bool] = True
    exceptions: ClassVar = {"identity": "the gate shares between the network and its adapters from the first step on"}

    expert: Method = field(default_factory=lambda: method("parallel_adapter", scale=1.0, activation="gelu"))
    experts: int = 2
    width: int = 64
    depth: int = 3
    pool: Literal["last", "mean"] = "last"

    def __post_init__(self) -> None:
        a = self.expert
        if not isinstance(a, ActivationMethod) or a.carries or a.notes or a.reads or type(a).enter is not ActivationMethod.enter:
            raise InputError(f"mixda.expert is {a.key}; it must add to a module's output and no more, as parallel_adapter does")

    def check(self, site: Site) -> None:
        if min(self.experts, self.width, self.depth) < 1:
            raise InputError(f"mixda: experts={self.experts}, width={self.width}, depth={self.depth}; all are at least 1")
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: mixda acts on the feed-forward network's second layer; choose linear sites such as mlp.down")
        self.expert.check(site)

    def shared(self, sites: Sequence[Site]) -> Tensors:
        return {k: frozen(t) for k, t in self.expert.shared(sites).items()}

    def init(self, site: Site) -> Tensors:
        made = [self.expert.init(site) for _ in range(self.experts)]
        p: Tensors = {f"expert_{k}": frozen(torch.stack([m[k].detach() for m in made])) for k in made[0]}
        sizes = [site.shape[1], *[self.width] * self.depth, self.experts + 1]
        for i in range(len(sizes) - 1):
            p[f"gate_W_{i}"] = torch.empty(sizes[i + 1], sizes[i], device=site.device).uniform_(-(sizes[i] ** -0.5), sizes[i] ** -0.5)
            p[f"gate_b_{i}"] = torch.zeros(sizes[i + 1], device=site.device)
        return p

    def _gate(self, p: Tensors, x: Tensor) -> Tensor:
        z = x if x.dim() < 3 else (x[:, -1:].contiguous() if self.pool == "last" else x.mean(1, keepdim=True))
        for i in range(self.depth + 1):
            z = F.linear(z.relu() if i else z, p[f"gate_W_{i}"], p[f"gate_b_{i}"])
        return z.softmax(-1)

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        g = self._gate(p, x.to(h.dtype))
        p["notes"]["gates"] = g.reshape(-1, self.experts + 1).mean(0)  # type: ignore[index,call-overload]
        own = {k: t for k, t in p.items() if not k.startswith(("expert_", "gate_")) and k != "notes"}
        each = [{**own, **{k.removeprefix("expert_"): t[n] for k, t in p.items() if k.startswith("expert_")}} for n in range(self.experts)]
        change = cast(ActivationMethod, self.expert).apply
        return g[..., :1] * h + torch.stack([g[..., n + 1, None] * (change(one, x, h) - h) for n, one in enumerate(each)]).sum(0)
