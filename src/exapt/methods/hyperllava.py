"""HyperLLaVA's experts: adapters whose weights a hypernetwork makes from what the model sees (Zhang et al., 2024)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.contract import ActivationMethod, Tensors
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class HyperLLaVA(ActivationMethod):
    r"""Puts a bottleneck behind a layer whose two matrices depend on the row, through a guidance vector :math:`g`:

    .. math:: h' = h + U(g)\, \mathrm{SwiGLU}(D(g)\, h), \qquad D(g) = H_D e, \; U(g) = H_U e, \; e = W_g\, g + b_g

    :math:`\mathrm{SwiGLU}([a; b]) = \mathrm{silu}(a) \odot b`. Visual expert: at a projector's linear layers, guided by the visual features that come
    into each. Language expert: behind a language model's blocks, ``HyperLLaVA(guide="first", tokens=n)``, guided by the hidden states that
    come into the first of the chosen blocks. The guidance is a mean over tokens; where attention is causal let it be over the first ``tokens`` only, those of
    image and instruction, so that no token sees a later one.

    The paper's code was not to be had; sizes and the mean are this library's choice, and :math:`H_U` starts at zero.

    Args:
        bottleneck: Width of the inner layer.
        embedding: Size of :math:`e`.
        guide: Whether the site's ``"own"`` input guides, or that of the ``"first"`` site in the call.
        tokens: How many leading tokens guide; 0: all.

    Parameters per site (bottleneck m):
        ``W_g`` (embedding, d_g) and ``b_g``, as PyTorch starts linear layers; ``H_D`` (2 m d, embedding), normal with variance 1 / (d embedding),
        ``c_D`` (2 m d), uniform as a linear layer's weight; ``H_U`` (d m, embedding) and ``c_U`` (d m), zeros.

    References:
        Zhang, Lin, Liu, Shu, Li, Zhang, He, Zhou, Lv, Jiang, Li, Tang and Zhuang, "HyperLLaVA: Dynamic Visual and Language Expert Tuning for
        Multimodal Large Language Models", 2024.

    >>> import exapt
    >>> layer = exapt.attach(nn.Linear(4, 3), HyperLLaVA(bottleneck=2, embedding=2), where="all")
    >>> layer(torch.zeros(2, 5, 4)).shape
    torch.Size([2, 5, 3])
    """

    key = "hyperllava"
    paper = "HyperLLaVA: Dynamic Visual and Language Expert Tuning for Multimodal Large Language Models"
    equation = r"h' = h + U(g)\, \mathrm{SwiGLU}(D(g)\, h)"
    golden = "NumPy"
    carries: ClassVar = True

    bottleneck: int = 8
    embedding: int = 8
    guide: Literal["own", "first"] = "own"
    tokens: int = 0

    def check(self, site: Site) -> None:
        for field, least in (("bottleneck", 1), ("embedding", 1), ("tokens", 0)):
            if getattr(self, field) < least:
                raise InputError(f"hyperllava.{field} is {getattr(self, field)}; it must be at least {least}")
        if site.axis != -1 or (site.layer is not None and site.layer.kind == "embedding"):
            raise InputError(f"{site.name or '(model)'}: hyperllava needs features last, in input and output; choose a block, mlp or linear site")

    def init(self, site: Site) -> Tensors:
        d, m, e = site.features, self.bottleneck, self.embedding
        d_in = site.layer.shape[1] if site.layer is not None else d
        guide = nn.Linear(d_in, e, device=site.device)
        down = torch.randn(2 * m * d, e, device=site.device) / (d * e) ** 0.5
        constant = torch.empty(2 * m * d, device=site.device).uniform_(-(d**-0.5), d**-0.5)
        return {"W_g": guide.weight, "b_g": guide.bias, "H_D": down, "c_D": constant, "H_U": down.new_zeros(d * m, e), "c_U": down.new_zeros(d * m)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Any:
        carried = p["carried"]
        guidance = carried[0] if self.guide == "first" and len(carried) else self._guidance(x.to(h.dtype))
        if guidance.shape[-1] != p["W_g"].shape[1]:
            raise InputError(
                f"hyperllava: the first site's input has {guidance.shape[-1]} features, this site's {p['W_g'].shape[1]}; choose sites of one width"
            )
        e, d, m = F.linear(guidance, p["W_g"], p["b_g"]), h.shape[-1], self.bottleneck
        down, up = (F.linear(e, p[f"H_{k}"], p[f"c_{k}"]) for k in ("D", "U"))
        a, b = torch.bmm(h.reshape(len(h), -1, d), down.view(len(h), 2 * m, d).mT).chunk(2, -1)
        return h + torch.bmm(F.silu(a) * b, up.view(len(h), d, m).mT).view(h.shape), guidance

    def _guidance(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1, x.shape[-1])
        return (x[:, : self.tokens] if self.tokens else x).mean(1)
