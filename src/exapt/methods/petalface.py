"""PETALface: two LoRAs blended by the quality of the input (Narayan et al., WACV 2025)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.checks import check_rank
from exapt.core.contract import ActivationMethod, Tensors
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class PETALface(ActivationMethod):
    r"""Blends two LoRAs by how good each row's image is: :math:`h' = h + s\,(a\, B_2 A_2 x + (1 - a)\, B_1 A_1 x)`.

    A call may give the blend, ``model(x, domain=d)``: d (rows,), 0 where the image is as in pretraining (high quality, :math:`a = 1`) and 1 where it is of
    the target's low quality (:math:`a = 0`); :math:`a = 1 - d`. The paper takes :math:`a = 0.5 + (q - \theta)` from a quality score :math:`q` in [0, 1] of
    an off-the-shelf assessment and a threshold, which :func:`blend` computes. Without ``domain`` both have the weight 0.5. Where a layer sees several
    windows of each row (Swin), each has its row's blend.

    Args:
        rank: Rank :math:`r` of each LoRA.
        scale: The scale :math:`s`.

    Parameters per site:
        ``A`` (2, rank, d_in), normal with deviation 1 / rank; ``B`` (2, d_out, rank), zeros; low quality first.

    References:
        Narayan, Nair, Xu, Chellappa and Patel, "PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition", WACV 2025. (The
        official code drops out 0.1 of what the LoRAs add in training; that is not part of this.)

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), PETALface(rank=2), where="all")
    >>> model(torch.zeros(2, 4), domain=1 - blend(torch.tensor([0.9, 0.3]))).shape
    torch.Size([2, 3])
    """

    key = "petalface"
    paper = "PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition"
    equation = r"h' = h + s\,(a\, B_2 A_2 x + (1 - a)\, B_1 A_1 x)"
    golden = "NumPy"
    where = "linear"
    reads = ("domain",)

    rank: int = 8
    scale: float = 1.0

    def check(self, site: Site) -> None:
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: petalface acts on linear layers that are called with their input; leave it out of where=")
        check_rank(self, site)

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        a = torch.empty(2, self.rank, d_in, device=site.device).normal_(0, 1 / self.rank)
        return {"A": a, "B": a.new_zeros(2, d_out, self.rank)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        low = F.linear(x.to(h.dtype), p["A"].flatten(0, 1)).unflatten(-1, (2, self.rank))
        given = p.get("call.domain")
        if given is None:
            return h + self.scale * F.linear(0.5 * low.flatten(-2), p["B"].transpose(0, 1).flatten(1))
        if given.dim() != 1 or not len(given) or len(h) % len(given):
            raise InputError(f"petalface: domain has shape {tuple(given.shape)} for {len(h)} rows; give one number for each, 0 for high quality to 1 for low")
        d = given.to(h.dtype).repeat_interleave(len(h) // len(given))
        share = torch.stack([d, 1 - d], -1).view(len(h), *[1] * (h.dim() - 2), 2, 1)
        return h + self.scale * F.linear((share * low).flatten(-2), p["B"].transpose(0, 1).flatten(1))


def blend(score: Tensor, threshold: float = 0.5) -> Tensor:
    r"""The paper's weight of the high-quality LoRA, :math:`a = 0.5 + (q - \theta)`.

    Args:
        score: Quality scores :math:`q` (rows,), in [0, 1].
        threshold: The threshold :math:`\theta`.

    >>> blend(torch.tensor([0.75, 0.5]))
    tensor([0.7500, 0.5000])
    """
    return 0.5 + (score - threshold)
