"""Adapters in few bits: a codebook for the weights' distribution (Jie, Wang and Deng, ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.algebra.compress.bits import pack, unpack
from exapt.algebra.compress.codec import Codec, Shapes, cut, owners
from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.methods.precision_adapter import normal_medians


@component("precision_codebook", kind="codec", oracle="NumPy")
@dataclass(frozen=True)
class PrecisionCodebook(Codec):
    r"""Standardises each tensor and takes the nearest of :math:`2^b` codes: :math:`\hat w = \mu + \sigma\, q((w - \mu) / \sigma)`.

    The codes are the k-medians of the normal distribution, which trained adapters follow closely (for one bit :math:`\pm 0.674`), so that the
    absolute error is least. Rounding a trained adapter so is the paper's post-training form; trained for it, with :class:`exapt.Quantised`,
    one bit is enough.

    Args:
        bits: Bits :math:`b` of a value, 1 to 8.

    References:
        Jie, Wang and Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy", ICCV 2023.

    >>> codec, x = PrecisionCodebook(bits=1), {"A": torch.tensor([1.0, -1.0, 1.0, -1.0])}
    >>> codec.decode(codec.encode(x), {"A": (4,)})["A"].round(decimals=3)
    tensor([ 0.7790, -0.7790,  0.7790, -0.7790])
    """

    key = "precision_codebook"

    bits: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"precision_codebook.bits is {self.bits}; it must be from 1 to 8")

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        means, deviations, codes = [], [], []
        for t in tensors.values():
            mean, deviation = _statistics(t)
            z = (t.detach().float().reshape(-1) - mean) / deviation if deviation > 0 else torch.zeros(t.numel())
            middles = normal_medians(self.bits).unfold(0, 2, 1).mean(1)
            codes.append(torch.bucketize(z.double(), middles))
            means.append(mean)
            deviations.append(deviation)
        none = torch.zeros(0)
        return {
            "codes": pack(torch.cat(codes) if codes else none.long(), self.bits),
            "mean": torch.stack(means) if means else none,
            "deviation": torch.stack(deviations) if deviations else none,
        }

    def decode(self, packed: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        owner = owners(shapes)
        z = normal_medians(self.bits).float()[unpack(packed["codes"], self.bits, len(owner))]
        return cut(packed["mean"].float()[owner] + packed["deviation"].float()[owner] * z, shapes)

    def bound(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        r"""For each value the larger of half the widest gap of the codes and the distance of the outermost value from the last code."""
        codes, found = normal_medians(self.bits), {}
        for k, t in tensors.items():
            mean, deviation = (float(s) for s in _statistics(t))
            furthest = float((t.double() - mean).abs().max()) if t.numel() else 0.0
            each = max(float(codes.diff().max()) / 2 * deviation, furthest - float(codes[-1]) * deviation)
            found[k] = each * t.numel() ** 0.5
        return found


def _statistics(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32; 0 for the deviation of fewer than two values."""
    v = t.detach().double()
    mean = v.mean() if t.numel() else v.new_zeros(())
    return mean.float(), (v.std() if t.numel() > 1 else v.new_zeros(())).float()
