"""MiSS: matrix shard sharing (Kang and Yin, 2024; earlier versions of the paper call it Bone and DiSHA)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_divides, check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class MiSS(WeightMethod):
    r"""Adds one shard to all groups of :math:`r` inputs: :math:`W' = W + [D^\top\, D^\top \cdots D^\top]`, so that :math:`y = W x + D^\top \sum_i x_i`.

    :math:`x_i` are the groups of :math:`r` neighbouring inputs (the last one may be shorter). The sum is :math:`r` numbers
    a token, and all that the update keeps for the backward pass.

    Args:
        rank: Number :math:`r` of inputs in a group.
        mode: ``"miss"``; ``"mini"``: ``D`` has only ``mini_rank`` columns, repeated over the outputs; ``"bat"`` (Bone's): with
            :math:`r \times r` blocks :math:`W_{oi}` of the weight, :math:`W'_{oi} = W_{oi} + W_{oi} D_o + D_o`, an update of
            full rank (``rank`` then divides d_in and d_out).
        mini_rank: Columns of ``D`` in mode ``"mini"``; it divides d_out.

    Parameters per site:
        ``D``, zeros: (rank, d_out); in mode ``"mini"`` (rank, mini_rank), in mode ``"bat"`` (d_out / rank, rank, rank).

    References:
        Kang and Yin, "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(8, 6), MiSS(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 6)]
    """

    key = "miss"
    paper = "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing"
    equation = r"W' = W + [D^\top \cdots D^\top]"
    golden = "PEFT"
    variants: ClassVar = {"Bone: Block-Affine Adaptation of Large Language Models": "MiSS(mode='bat')"}

    rank: int = 64
    mode: Literal["miss", "mini", "bat"] = "miss"
    mini_rank: int = 1

    @property
    def fast_kinds(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """None in mode "bat", where forming the weight costs less than passing the inputs through it once more."""
        return () if self.mode == "bat" else None

    def check(self, site: Site) -> None:
        check_rank(self, site, most=site.shape[1])
        if self.mode == "mini":
            check_divides(self, site, "mini_rank", site.shape[0], "outputs")
        if self.mode == "bat":
            check_divides(self, site, "rank", site.shape[0], "outputs")
            check_divides(self, site, "rank", site.shape[1], "inputs")

    def init(self, site: Site) -> Tensors:
        d_out, r = site.shape[0], self.rank
        shape = {"miss": (r, d_out), "mini": (r, self.mini_rank), "bat": (d_out // r, r, r)}[self.mode]
        return {"D": torch.zeros(shape)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        (d_out, d_in), r, d = w.shape, self.rank, p["D"]
        if self.mode == "bat":
            blocks = w.reshape(d_out // r, r, d_in // r, r)
            return w + (torch.einsum("oaib,obc->oaic", blocks, d) + d[:, :, None]).reshape(w.shape)
        rows = _rows(d, d_out)
        if d_in % r == 0:
            return (w.unflatten(1, (-1, r)) + rows[:, None]).flatten(1)
        return w + rows.tile(1, -(-d_in // r))[:, :d_in]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        (d_out, d_in), r, d = base.shape, self.rank, p["D"]
        if base.kind in ("linear", "conv1d_hf"):
            whole = F.pad(x, (0, -d_in % r)) if d_in % r else x
            sums = whole.unflatten(-1, (-1, r)).sum(-2)
        else:
            sums = base.apply(torch.eye(r, dtype=d.dtype, device=d.device).tile(1, -(-d_in // r))[:, :d_in], x)
        return base.plus(x, sums, _rows(d, d_out))


def _rows(d: Tensor, d_out: int) -> Tensor:
    """What every row of the matrix repeats (d_out, rank)."""
    return (d if d.shape[1] == d_out else d.tile(1, d_out // d.shape[1])).T
