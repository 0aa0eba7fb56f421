"""ComPEFT: sparse, ternary, Golomb-coded updates (Yadav, Choshen, Raffel and Bansal, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exapt.algebra.compress.bits import golomb, pack, positions_of, unpack
from exapt.algebra.compress.codec import Codec, Shapes, cut, flat, owners, shapes_of
from exapt.core.components import component
from exapt.core.errors import InputError


@component(
    "compeft", kind="codec", oracle="NumPy",
    paper="ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization",
)  # fmt: skip
@dataclass(frozen=True)
class ComPEFT(Codec):
    r"""Keeps the signs of the largest entries of the update and one magnitude: :math:`\tilde\tau = \alpha\, \sigma(\tau)\, \mathrm{sgn}(\mathrm{top}_k(\tau))`.

    :math:`\sigma` is the standard deviation of all of :math:`\tau`. Positions are Golomb-coded and each sign takes a bit, so that a density
    of 5 % takes about 0.34 bits for each value of the adapter. As in the authors' code the update of a factor that starts at 1 (IA3's) is
    taken from 1, of any other from 0: the factors of a LoRA are coded as they are.

    Args:
        density: Share :math:`k` of the entries that are kept.
        alpha: The factor :math:`\alpha`; ``None``: the mean size of the kept entries over :math:`\sigma`, which has the least squared error
            (sparse ternary compression). The paper tunes it on validation data: :func:`exapt.algebra.compress.search.smallest`.
        per: Whether :math:`k` and :math:`\sigma` are of the whole ``"adapter"``, as in the paper, or of each ``"tensor"``.

    References:
        Yadav, Choshen, Raffel and Bansal, "ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and
        Quantization", 2023.
        Sattler, Wiedemann, Müller and Samek, "Robust and Communication-Efficient Federated Learning from Non-IID Data", IEEE Transactions on
        Neural Networks and Learning Systems 2020.

    >>> codec, x = ComPEFT(density=0.5), {"A": torch.tensor([3.0, -0.1, 0.2, -5.0])}
    >>> codec.decode(codec.encode(x), {"A": (4,)})["A"]
    tensor([ 4.,  0.,  0., -4.])
    """

    key = "compeft"
    tunable: ClassVar = {"alpha": (None, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)}

    density: float = 0.05
    alpha: float | None = None
    per: Literal["adapter", "tensor"] = "adapter"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(f"compeft.density is {self.density}; it is the share of entries kept, above 0 and at most 1")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise InputError(f"compeft.alpha is {self.alpha}; it must be a positive number, or null for the mean size of what is kept")

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        starts = torch.tensor([float(t.numel() > 0 and t.float().mean() > 0.5) for t in tensors.values()])
        tau = flat(tensors) - starts[owners(shapes_of(tensors))]
        kept, scales = self._kept(tau, shapes_of(tensors))
        return {**golomb(kept), "signs": pack((tau[kept] > 0).long(), 1), "scale": scales, "starts": pack(starts.long(), 1)}

    def _kept(self, tau: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Places of what is kept, in order, and the magnitudes (1,) or (tensors,)."""
        parts = [tau] if self.per == "adapter" else [t.reshape(-1) for t in cut(tau, shapes).values()]
        places, scales, start = [], [], 0
        for part in parts:
            k = min(max(int(self.density * len(part)), 1), len(part))
            largest = part.abs().sort(descending=True, stable=True).indices[:k]
            sigma = part.double().std() if len(part) > 1 else part.double().abs().sum()
            scales.append(part[largest].double().abs().mean() if self.alpha is None else self.alpha * sigma)
            places.append(largest + start)
            start += len(part)
        return torch.cat(places or [torch.zeros(0, dtype=torch.int64)]).sort().values, torch.stack(scales).nan_to_num(0.0).float()

    def decode(self, packed: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        kept, owner = positions_of(dict(packed)), owners(shapes)
        tau = unpack(packed["starts"], 1, len(shapes)).float()[owner]
        scale = packed["scale"].float()
        signs = 2 * unpack(packed["signs"], 1, len(kept)).float() - 1
        return cut(tau.index_add(0, kept, signs * (scale if len(scale) == 1 else scale[owner[kept]])), shapes)

    def bound(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        r"""The error itself: :math:`\sum_{dropped} \tau_i^2 + \sum_{kept} (|\tau_i| - \alpha \sigma)^2`, squared. With ``alpha=None`` it is at
        most :math:`\lVert \tau \rVert`."""
        starts = {k: float(t.numel() > 0 and t.float().mean() > 0.5) for k, t in tensors.items()}
        shapes, owner = shapes_of(tensors), owners(shapes_of(tensors))
        tau = flat({k: t.float() - starts[k] for k, t in tensors.items()})
        kept, scale = self._kept(tau, shapes)
        square = tau.double().square()
        square[kept] = (tau[kept].double().abs() - (scale if len(scale) == 1 else scale[owner[kept]])).square()
        return {k: float(v.sum().sqrt()) for k, v in cut(square, shapes).items()}
