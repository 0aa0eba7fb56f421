"""Uniform quantisation by groups: k bits between each group's smallest and largest value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.algebra.compress.bits import pack, unpack
from exapt.algebra.compress.codec import Codec, Shapes, cut, shapes_of
from exapt.core.components import component
from exapt.core.errors import InputError


@component("uniform_groups", kind="codec", oracle="NumPy")
@dataclass(frozen=True)
class UniformGroups(Codec):
    r"""Rounds to :math:`2^b` even steps between a group's ends: :math:`\hat x = l + s \lfloor (x - l) / s \rceil`, so :math:`|x - \hat x| \le s / 2`.

    A group is a run of values of one flattened tensor. :math:`l` and :math:`s` are kept in bfloat16, rounded outwards so that the group's
    ends stay inside: 32 bits for each group beside :math:`b` for each value.

    Args:
        bits: Bits :math:`b` of a value, 1 to 8.
        group: Values of a group.

    References:
        Dettmers and Zettlemoyer, "The case for 4-bit precision: k-bit Inference Scaling Laws", ICML 2023.

    >>> codec, x = UniformGroups(bits=2), {"A": torch.tensor([0.0, 0.9, 3.0])}
    >>> codec.decode(codec.encode(x), {"A": (3,)})["A"]
    tensor([0., 1., 3.])
    """

    key = "uniform_groups"

    bits: int = 4
    group: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"uniform_groups.bits is {self.bits}; it must be from 1 to 8")
        if self.group < 2:
            raise InputError(f"uniform_groups.group is {self.group}; it must be at least 2")

    def _groups(self, values: Tensor) -> Tensor:
        """(groups, group); what fills up the last one repeats its last value."""
        v = values.detach().float().reshape(1, -1)
        return F.pad(v, (0, -v.shape[1] % self.group), "replicate").view(-1, self.group) if v.numel() else v.view(0, self.group)

    def _ends(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Lower end and step of each group (groups,), bfloat16."""
        low = groups.amin(1).bfloat16()
        low = torch.where(low.float() > groups.amin(1), torch.nextafter(low, low.new_tensor(-torch.inf)), low)
        exact = (groups.amax(1).double() - low.double()) / (2**self.bits - 1)
        step = exact.bfloat16()
        return low, torch.where(step.double() < exact, torch.nextafter(step, step.new_tensor(torch.inf)), step)

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        lows, steps, codes = [], [], []
        for t in tensors.values():
            groups = self._groups(t)
            low, step = self._ends(groups)
            at = (groups.double() - low.double()[:, None]) / step.double().clamp_min(2.0**-140)[:, None]
            codes.append(at.round().clamp(0, 2**self.bits - 1).long().view(-1)[: t.numel()])
            lows.append(low)
            steps.append(step)
        empty = [torch.zeros(0)]
        return {
            "codes": pack(torch.cat(codes or empty).long(), self.bits),
            "low": torch.cat(lows or empty).bfloat16(),
            "step": torch.cat(steps or empty).bfloat16(),
        }

    def decode(self, packed: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        sizes = [int(torch.Size(s).numel()) for s in shapes.values()]
        each = torch.cat([torch.arange(n) // self.group + start for n, start in zip(sizes, self._starts(sizes), strict=True)] or [torch.zeros(0).long()])
        codes = unpack(packed["codes"], self.bits, sum(sizes)).double()
        return cut((packed["low"].double()[each] + codes * packed["step"].double()[each]).float(), shapes)

    def _starts(self, sizes: list[int]) -> list[int]:
        """The number of each tensor's first group."""
        starts = [0]
        for n in sizes:
            starts.append(starts[-1] - (-n // self.group))
        return starts[:-1]

    def bound(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        r"""Half a step for each value: :math:`\frac12 (\sum_g n_g s_g^2)^{1/2}`."""
        found = {}
        for k, shape in shapes_of(tensors).items():
            n = int(torch.Size(shape).numel())
            step = self._ends(self._groups(tensors[k]))[1].double().repeat_interleave(self.group)[:n]
            found[k] = 0.5 * float(step.square().sum().sqrt())
        return found
