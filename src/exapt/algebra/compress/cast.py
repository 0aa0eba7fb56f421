"""Half precision: the plain way to half the bytes, and what the codecs are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exapt.algebra.compress.codec import Codec, Shapes, cut, flat
from exapt.core.components import component
from exapt.core.errors import InputError

SMALLEST = {"float16": 2.0**-25, "bfloat16": 2.0**-134, "float32": 0.0}
"""Half the distance of the smallest numbers of each type."""


@component("cast", kind="codec", oracle="NumPy")
@dataclass(frozen=True)
class Cast(Codec):
    r"""Rounds every value to a shorter floating type: :math:`|x - \hat x| \le u |x|`, :math:`u = 2^{-11}` (float16) or :math:`2^{-9}` (bfloat16).

    Args:
        dtype: ``"bfloat16"`` has float32's range, ``"float16"`` three bits more of precision; ``"float32"`` keeps values exact.

    References:
        IEEE Standard for Floating-Point Arithmetic, IEEE 754-2019.

    >>> codec, x = Cast("bfloat16"), {"A": torch.tensor([1.001])}
    >>> codec.decode(codec.encode(x), {"A": (1,)})["A"]
    tensor([1.])
    """

    key = "cast"

    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = flat(tensors).to(getattr(torch, self.dtype))
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"cast: values beyond the range of {self.dtype}; cast to bfloat16 or use another codec")
        return {"values": values}

    def decode(self, packed: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        return cut(packed["values"].float(), shapes)

    def bound(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Half a unit in the last place of each value, all at once."""
        unit = torch.finfo(getattr(torch, self.dtype)).eps / 2 if self.dtype != "float32" else 0.0
        return {k: float((t.double().abs() * unit + SMALLEST[self.dtype]).square().sum().sqrt()) for k, t in tensors.items()}
