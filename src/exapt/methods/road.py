"""RoAd: 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability (Liao and Monz, NeurIPS 2024)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class RoAd(WeightMethod):
    r"""Turns and scales pairs of a layer's outputs: :math:`h' = R h`, so :math:`W' = R W` and :math:`b' = R b`.

    .. math:: h'_i = \alpha_i \cos\theta_i\, h_i - \alpha_i \sin\theta_i\, h_j, \qquad h'_j = \alpha_j \sin\theta_j\, h_i + \alpha_j \cos\theta_j\, h_j

    The outputs lie in groups of :math:`g`; the pairs are the outputs :math:`i` and :math:`j = i + g / 2` of a group.

    Args:
        variant: ``"road_1"``: one angle and scale for each pair; ``"road_2"``: for each output; ``"road_4"``: two for each
            output, one of the cosine and one of the sine.
        group_size: Size :math:`g` of the groups; the largest even divisor of d_out that is no larger is taken.

    Parameters per site:
        ``theta``, zeros, and ``alpha``, ones: (d_out / 2,), (d_out,) or (2 d_out,) by variant. Of road_4 every group has first the
        :math:`g` numbers of its cosines, then those of its sines.

    References:
        Liao and Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", NeurIPS 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(6, 4), RoAd(), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2,), (2,)]
    """

    key = "road"
    paper = "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability"
    equation = (
        r"W' = R W, \quad R = \mathrm{diag}\left(\alpha_i \begin{pmatrix} \cos\theta_i & -\sin\theta_i \\ \sin\theta_i & \cos\theta_i \end{pmatrix}\right)"
    )
    golden = "PEFT"
    full_precision = True
    fast_kinds = ("linear", "conv1d_hf", "embedding")

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64

    def check(self, site: Site) -> None:
        if self.group(site.shape[0]) is None:
            raise InputError(
                f"{site.name or '(model)'}: no even number up to road.group_size={self.group_size} divides the {site.shape[0]} outputs; "
                "raise it or leave the site out of where="
            )

    def group(self, d_out: int) -> int | None:
        """The size of the groups for ``d_out`` outputs: the largest even divisor up to ``group_size``, if there is one."""
        return next((g for g in range(min(self.group_size, d_out), 1, -1) if g % 2 == 0 and d_out % g == 0), None)

    def init(self, site: Site) -> Tensors:
        n = site.shape[0] * int(self.variant[-1]) // 2
        return {"theta": torch.zeros(n, device=site.device), "alpha": torch.ones(n, device=site.device)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return self._turn(p, w.T.to(p["theta"].dtype)).T.to(w.dtype)

    def bias(self, p: Tensors, b: Tensor) -> Tensor:
        return self._turn(p, b.to(p["theta"].dtype)).to(b.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return self._turn(p, base(x))

    def _turn(self, p: Tensors, h: Tensor) -> Tensor:
        """``R h`` on the last dimension of ``h``."""
        g = self.group(h.shape[-1])
        assert g is not None
        theta, alpha = (p[k].unflatten(-1, (-1, g * int(self.variant[-1]) // 2)) for k in ("theta", "alpha"))
        if self.variant == "road_1":
            theta, alpha = theta.repeat(1, 2), alpha.repeat(1, 2)
        if self.variant == "road_4":
            cosine, sine = alpha[:, :g] * theta[:, :g].cos(), alpha[:, g:] * theta[:, g:].sin()
        else:
            cosine, sine = alpha * theta.cos(), alpha * theta.sin()
        return _Turned.apply(h.unflatten(-1, (-1, g)), cosine.to(h.dtype), sine.to(h.dtype)).flatten(-2)  # type: ignore[no-untyped-call]


class _Turned(torch.autograd.Function):
    """The pairs of ``h`` (..., n, g) turned by ``cosine`` and ``sine`` (n, g), keeping ``h`` alone for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        (first, second), (c1, c2), (s1, s2) = (t.chunk(2, -1) for t in (h, cosine, sine))
        return torch.cat([torch.addcmul(first * c1, second, s1, value=-1), torch.addcmul(second * c2, first, s2)], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, cosine, sine = ctx.saved_tensors
        (d1, d2), (first, second), (s1, s2) = (t.chunk(2, -1) for t in (dy, h, sine))
        c1, c2 = cosine.chunk(2, -1)
        dh = torch.cat([torch.addcmul(d1 * c1, d2, s2), torch.addcmul(d2 * c2, d1, s1, value=-1)], -1) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dh, None, None
        dims = tuple(range(h.dim() - 2))
        dsine = torch.cat([-(d1 * second).sum(dims), (d2 * first).sum(dims)], -1) if dims else torch.cat([-d1 * second, d2 * first], -1)
        along = dy * h
        return dh, along.sum(dims) if dims else along, dsine
