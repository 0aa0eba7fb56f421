"""ETHER+: the relaxed form of ETHER (Bini et al., ICML 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exapt.core.base import Base
from exapt.core.checks import check_divides
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class ETHERPlus(WeightMethod):
    r"""Lets two hyperplanes interact on each side of a matrix: :math:`W' = \tilde H^+ W H^+` with blocks
    :math:`H^+_i = I - \hat u_i \hat u_i^\top + \hat v_i \hat v_i^\top`.

    The distance to the identity stays bounded, :math:`\lVert H^+ - I \rVert_F \le 2 \sqrt n` for :math:`n` blocks, and is 0 at the start. The
    blocks are those of section 3.4 of the paper (see :class:`~exapt.methods.ether.ETHER` about the official code).

    Args:
        blocks: Number :math:`n` of blocks on either side; it divides d_in and d_out.
        two_sided: Whether the outputs are transformed too, as in the paper; otherwise :math:`W' = W H^+`.

    Parameters per site:
        ``u`` (blocks, d_in / blocks), Kaiming uniform, and ``v``, which starts as ``-u``; of the outputs ``u_out`` and ``v_out``
        (blocks, d_out / blocks), likewise.

    References:
        Bini, Roth, Akata and Khoreva, "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections", ICML 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(6, 4), ETHERPlus(blocks=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 3), (2, 3), (2, 2), (2, 2)]
    """

    key = "ether_plus"
    paper = "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections"
    equation = r"W' = (I - \hat u' \hat u'^\top + \hat v' \hat v'^\top)\, W\, (I - \hat u \hat u^\top + \hat v \hat v^\top)"
    golden = "NumPy"
    full_precision = True

    blocks: int = 1
    two_sided: bool = True

    def check(self, site: Site) -> None:
        if site.layer is not None and site.layer.kind == "embedding":
            raise InputError(f"{site.name or '(model)'}: {self.key} transforms inputs, and an embedding's are token ids; leave it out of where=")
        check_divides(self, site, "blocks", site.shape[1], "input features")
        if self.two_sided:
            check_divides(self, site, "blocks", site.shape[0], "output features")

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        u = nn.init.kaiming_uniform_(torch.empty(self.blocks, d_in // self.blocks, device=site.device), a=5**0.5)
        if not self.two_sided:
            return {"u": u, "v": -u}
        out = nn.init.kaiming_uniform_(torch.empty(self.blocks, d_out // self.blocks, device=site.device), a=5**0.5)
        return {"u": u, "v": -u, "u_out": out, "v_out": -out}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        turned = _interact(w.to(p["u"].dtype), p["u"], p["v"])
        if self.two_sided:
            turned = _interact(turned.T, p["u_out"], p["v_out"]).T
        return turned.to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        if base.kind in ("linear", "conv1d_hf"):
            y = base(_interact(x, p["u"], p["v"]))
            if not self.two_sided:
                return y
            if base.bias is None:
                return _interact(y, p["u_out"], p["v_out"])
            b = base.bias.to(y.dtype)  # it is not transformed
            return _interact(y - b, p["u_out"], p["v_out"]) + b
        return self._convolved(p, x, base)

    def _convolved(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        """The same where inputs overlap: both sides are changes of rank 2 n."""
        down, up = _factors(p["u"], p["v"])
        y = base.low_rank(x, down, base.weight.to(up.dtype) @ up, biased=False)
        if self.two_sided:
            down, up = (t.to(y.dtype) for t in _factors(p["u_out"], p["v_out"]))
            y = y + base.out(up, base.out(down, y))
        return y if base.bias is None else y + base.scale(base.bias.to(y.dtype), y.new_ones(()))


def _factors(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``D`` (2 n, n b) and ``U`` (n b, 2 n) such that :func:`_interact` multiplies by ``I + U D``."""
    u, v = (torch.block_diag(*(t / t.norm(dim=1, keepdim=True))) for t in (u, v))
    return torch.cat([u, v]), torch.cat([-u, v]).T


def _interact(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``x`` (..., n b) times the symmetric block-diagonal matrix of the blocks ``I - u u^T + v v^T``, ``u`` and ``v`` (n, b) normalised."""
    u, v = ((t / t.norm(dim=1, keepdim=True)).to(x.dtype) for t in (u, v))
    parts = x.unflatten(-1, u.shape)
    return (parts - torch.linalg.vecdot(parts, u)[..., None] * u + torch.linalg.vecdot(parts, v)[..., None] * v).flatten(-2)
