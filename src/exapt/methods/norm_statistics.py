"""Statistics of batch normalisation as a parameter shift (Li et al., 2017; You et al., 2021)."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from exapt.core.contract import ActivationMethod, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class NormStatistics(ActivationMethod):
    r"""Gives batch norms other statistics: :math:`\mu = \alpha \mu_a + (1 - \alpha) \mu_B`, :math:`\sigma^2` likewise.

    :math:`\mu_a, \sigma_a^2` are the adapter's own, the base's running statistics at first; :math:`\mu_B, \sigma_B^2` those of the batch.
    The base's buffers stay what they are: the input becomes :math:`\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \sqrt{\sigma_s^2 + \epsilon} + \mu_s`,
    which the layer in evaluation mode then normalises with its own :math:`\mu_s, \sigma_s`. With ``alpha`` below 1 a row's output depends on
    the others of its batch; a batch with one value per channel has no variance, and there :math:`\alpha = 1`.

    Args:
        alpha: Share :math:`\alpha` of the adapter's own statistics: 1 uses them alone (AdaBN, once they are the target's), 0 the batch's alone.

    Parameters per site:
        ``mean`` and ``var`` (channels,), not trained.

    References:
        Li, Wang, Shi, Liu and Hou, "Revisiting Batch Normalization For Practical Domain Adaptation", ICLR Workshops 2017. You, Li and Zhao,
        "Test-time Batch Statistics Calibration for Covariate Shift", 2021.

    >>> import exapt
    >>> model = exapt.attach(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), NormStatistics(alpha=0.0))
    >>> x = torch.randn(8, 4) + 3
    >>> bool(model(x).mean(0).abs().max() < 1e-5)
    True
    """

    key = "norm_statistics"
    paper = "Revisiting Batch Normalization For Practical Domain Adaptation"
    equation = r"\mu = \alpha \mu_a + (1 - \alpha) \mu_B,\; \sigma^2 = \alpha \sigma_a^2 + (1 - \alpha) \sigma_B^2"
    golden = "NumPy"
    where = "norm"
    exceptions: ClassVar = {"gradient": "has nothing that trains: statistics are counted, not learned"}

    alpha: float = 1.0

    def check(self, site: Site) -> None:
        if not isinstance(site.module, nn.modules.batchnorm._BatchNorm) or site.module.running_mean is None:
            raise InputError(f"norm_statistics acts on batch norms with running statistics; {site.name} is {type(site.module).__name__}")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"norm_statistics.alpha is {self.alpha}; it must be from 0 to 1")

    def init(self, site: Site) -> Tensors:
        norm = cast(Any, site.module)
        own = {"mean": norm.running_mean, "var": norm.running_var}
        source = {f"source_{k}": frozen(v.detach().clone(), saved=False) for k, v in own.items()}
        eps = torch.full((1,), norm.eps, dtype=norm.running_var.dtype, device=norm.running_var.device)
        return {**{k: frozen(v.detach().clone()) for k, v in own.items()}, **source, "eps": frozen(eps, saved=False)}

    def enter(self, p: Tensors, x: Tensor) -> Tensor:
        mean, var = p["mean"], p["var"]
        if self.alpha < 1 and x.numel() > x.shape[-1]:
            others = tuple(range(x.dim() - 1))
            own = x.mean(others)
            mean = self.alpha * mean + (1 - self.alpha) * own
            var = self.alpha * var + (1 - self.alpha) * (x - own).square().mean(others)  # Tensor.var takes seven times as long on a CPU
        scale = ((p["source_var"] + p["eps"]) / (var + p["eps"])).sqrt()
        return (x - mean) * scale + p["source_mean"]

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        return h
