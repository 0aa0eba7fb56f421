"""AdapterFusion: attention over frozen adapters (Pfeiffer et al., EACL 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.contract import ActivationMethod, Method, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import method, register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class AdapterFusion(ActivationMethod):
    r"""Fuses trained adapters by attention: :math:`h' = h + \sum_n s_n V z_n`, :math:`s = \mathrm{softmax}_n\, (Q h + b_Q)^\top (K z_n + b_K)`.

    :math:`z_n` is what adapter n adds to the sub-layer's output :math:`h`. The adapters come from files and stay as they are
    (:func:`exapt.algebra.compose.experts.from_adapters`); attached by itself the fusion holds empty ones. As in the library ``adapters``, ``V`` starts near
    the identity and training adds :math:`\rho \lVert I - V \rVert^2`; its optional temperature is not part of this.
    ``exapt.noted(model)`` shows the mean ``attention`` of the last call.

    Args:
        expert: The adapters' method, which adds to a module's output.
        experts: Number of adapters.
        regularisation: The weight :math:`\rho`.

    Parameters per site:
        ``Q``, ``K`` (d, d), normal with deviation 0.02, ``b_Q``, ``b_K`` (d,), zeros; ``V`` (d, d), the identity and 1e-6 elsewhere. Not trained: the
        adapters' tensors, stacked, ``expert_W_down`` (experts, ...) and so on.

    References:
        Pfeiffer, Kamath, Rücklé, Cho and Gurevych, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", EACL 2021.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), AdapterFusion(exapt.BottleneckAdapter(bottleneck=2)), where="all")
    >>> exapt.parameter_count(model).trainable
    33
    """

    key = "adapter_fusion"
    paper = "AdapterFusion: Non-Destructive Task Composition for Transfer Learning"
    equation = r"h' = h + \sum_n \mathrm{softmax}_n\left((Q h)^\top K z_n\right) V z_n"
    golden = "NumPy"
    where = ("attention.output", "mlp.down")
    notes: ClassVar[bool] = True
    exceptions: ClassVar = {"gradient": "it fuses trained adapters, which come from files; until then there is nothing to attend to"}

    expert: Method = field(default_factory=lambda: method("adapter", bottleneck=16))
    experts: int = 4
    regularisation: float = 0.01

    def __post_init__(self) -> None:
        a = self.expert
        if not isinstance(a, ActivationMethod) or a.carries or a.notes or a.reads or type(a).enter is not ActivationMethod.enter:
            raise InputError(f"adapter_fusion.expert is {a.key}; it must add to a module's output and no more, as adapter does")

    def check(self, site: Site) -> None:
        if self.experts < 1 or self.regularisation < 0:
            raise InputError(f"adapter_fusion: experts={self.experts}, regularisation={self.regularisation}; at least one, and not negative")
        self.expert.check(site)

    def shared(self, sites: Sequence[Site]) -> Tensors:
        return {k: frozen(t) for k, t in self.expert.shared(sites).items()}

    def init(self, site: Site) -> Tensors:
        made, d = [self.expert.init(site) for _ in range(self.experts)], site.features
        p: Tensors = {f"expert_{k}": frozen(torch.stack([m[k].detach() for m in made])) for k in made[0]}
        q, k = (0.02 * torch.randn(d, d, device=site.device) for _ in range(2))
        return {**p, "Q": q, "K": k, "V": torch.full_like(q, 1e-6).fill_diagonal_(1.0), "b_Q": q.new_zeros(d), "b_K": q.new_zeros(d)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        own = {k: t for k, t in p.items() if not k.startswith("expert_") and k not in ("Q", "K", "V", "b_Q", "b_K", "notes")}
        each = [{**own, **{k.removeprefix("expert_"): t[n] for k, t in p.items() if k.startswith("expert_")}} for n in range(self.experts)]
        z = torch.stack([cast(ActivationMethod, self.expert).apply(one, x, h) - h for one in each], -2)
        scores = torch.einsum("...d,...nd->...n", F.linear(h, p["Q"], p["b_Q"]), F.linear(z, p["K"], p["b_K"])).softmax(-1)
        p["notes"]["attention"] = scores.reshape(-1, self.experts).mean(0)  # type: ignore[index,call-overload]
        return h + torch.einsum("...n,...nd->...d", scores, F.linear(z, p["V"]))

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        v = p["V"]
        return self.regularisation * (torch.eye(len(v), dtype=v.dtype, device=v.device) - v).square().sum() if self.regularisation else None
