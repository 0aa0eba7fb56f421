"""ScaLearn: task transfer by learning to scale frozen adapters' outputs (Frohmann et al., Findings of ACL 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from exapt.core.contract import ActivationMethod, Method, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import method, register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class ScaLearn(ActivationMethod):
    r"""Adds what trained adapters add, scaled: :math:`h' = h + \sum_t \omega_t \odot z_t`, :math:`z_t` the addition of source task t's adapter.

    The scales are free: no softmax, any sign. The adapters come from files and stay as they are
    (:func:`exapt.algebra.compose.experts.from_adapters`); attached by itself the method holds empty ones. As in the official code's residual
    configuration, ``h`` itself is not scaled.

    Args:
        expert: The adapters' method, which adds to a module's output.
        experts: Number :math:`T` of adapters.
        scales: One number for each adapter and feature (``"vector"``) or for each adapter (``"scalar"``, ScaLearnUniform).
        share: Whether all sites have the same scales (ScaLearn++ and ScaLearnUniform++).
        start: The scales start near ``start`` / T.

    Parameters per site:
        ``omega`` (experts, d) or (experts, 1), normal around start / T with deviation 0.001; once for all sites if they are shared. Not trained: the
        adapters' tensors, stacked, ``expert_W_down`` (experts, ...) and so on.

    References:
        Frohmann, Holtermann, Masoudian, Lauscher and Rekabsaz, "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale",
        Findings of ACL 2024.

    >>> import exapt
    >>> from torch import nn
    >>> exapt.parameter_count(exapt.attach(nn.Linear(4, 3), ScaLearn(experts=8, scales="scalar"), where="all")).trainable
    8
    """

    key = "scalearn"
    paper = "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale"
    equation = r"h' = h + \sum_t \omega_t \odot z_t"
    golden = "NumPy"
    where = ("attention.output", "mlp.down")
    exceptions: ClassVar = {"gradient": "it scales trained adapters, which come from files; until then there is nothing to scale"}

    expert: Method = field(default_factory=lambda: method("adapter", bottleneck=16))
    experts: int = 4
    scales: Literal["vector", "scalar"] = "vector"
    share: bool = False
    start: float = 1.0

    def __post_init__(self) -> None:
        a = self.expert
        if not isinstance(a, ActivationMethod) or a.carries or a.notes or a.reads or type(a).enter is not ActivationMethod.enter:
            raise InputError(f"scalearn.expert is {a.key}; it must add to a module's output and no more, as adapter does")

    def check(self, site: Site) -> None:
        if self.experts < 1:
            raise InputError(f"scalearn.experts is {self.experts}; it must be at least 1")
        self.expert.check(site)

    def _omega(self, site: Site) -> Tensor:
        width = site.features if self.scales == "vector" else 1
        return torch.normal(self.start / self.experts, 0.001, (self.experts, width), device=site.device)

    def shared(self, sites: Sequence[Site]) -> Tensors:
        common = {k: frozen(t) for k, t in self.expert.shared(sites).items()}
        if not self.share:
            return common
        widths = {s.features for s in sites}
        if len(widths) > 1 and self.scales == "vector":
            raise InputError(f"scalearn.share: the sites have widths {sorted(widths)}; choose sites of one width, or scales='scalar'")
        return {**common, "omega": self._omega(sites[0])}

    def init(self, site: Site) -> Tensors:
        made = [self.expert.init(site) for _ in range(self.experts)]
        p: Tensors = {f"expert_{k}": frozen(torch.stack([m[k].detach() for m in made])) for k in made[0]}
        return p if self.share else {**p, "omega": self._omega(site)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        own = {k: t for k, t in p.items() if not k.startswith("expert_") and k != "omega"}
        each = [{**own, **{k.removeprefix("expert_"): t[n] for k, t in p.items() if k.startswith("expert_")}} for n in range(self.experts)]
        change = cast(ActivationMethod, self.expert).apply
        return h + torch.stack([w * (change(one, x, h) - h) for w, one in zip(p["omega"].unbind(), each, strict=True)]).sum(0)
