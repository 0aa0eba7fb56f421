"""BitDelta: one bit for each entry of a fine-tune's difference (Liu et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.algebra.compress.bits import pack, unpack
from exapt.algebra.compress.codec import Codec, Shapes, cut, flat, owners, shapes_of
from exapt.core.components import component
from exapt.core.errors import InputError


@component("bitdelta", kind="codec", paper="BitDelta: Your Fine-Tune May Only Be Worth One Bit", oracle="NumPy")
@dataclass(frozen=True)
class BitDelta(Codec):
    r"""Keeps of each tensor the signs and one scale: :math:`\hat\Delta = \alpha\, \mathrm{sgn}(\Delta)`, :math:`\alpha = \frac1n \sum_{ij} |\Delta_{ij}|`.

    That scale has the least squared error, :math:`\lVert \Delta \rVert_F^2 - n \alpha^2`. The authors then distil the scales: :func:`distil`.
    Zeros count as positive, as in their code. The difference of a whole fine-tuned model (:math:`W_{tuned} - W_{base}`) is what the paper
    codes; the tensors of an adapter are coded as they are.

    References:
        Liu, Xiao, Li, Lee, Tian, Dao, Cai, "BitDelta: Your Fine-Tune May Only Be Worth One Bit", NeurIPS 2024.

    >>> codec, x = BitDelta(), {"W": torch.tensor([3.0, -1.0])}
    >>> codec.decode(codec.encode(x), {"W": (2,)})["W"]
    tensor([ 2., -2.])
    """

    key = "bitdelta"

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scales = [t.double().abs().mean() if t.numel() else t.new_zeros((), dtype=torch.double) for t in tensors.values()]
        return {"signs": pack((flat(tensors) >= 0).long(), 1), "scale": torch.stack(scales).float() if scales else torch.zeros(0)}

    def decode(self, packed: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        owner = owners(shapes)
        return cut((2 * unpack(packed["signs"], 1, len(owner)).float() - 1) * packed["scale"].float()[owner], shapes)

    def bound(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        r"""The error itself: :math:`\sqrt{\lVert \Delta \rVert_F^2 - \lVert \Delta \rVert_1^2 / n}`."""
        wide = {k: t.double() for k, t in tensors.items()}
        return {k: float((t.square().sum() - t.abs().sum().square() / max(t.numel(), 1)).clamp_min(0).sqrt()) for k, t in wide.items()}


def distil(
    tensors: Mapping[str, Tensor], loss: Callable[[dict[str, Tensor]], Tensor], steps: int = 200, lr: float = 1e-4
) -> dict[str, Tensor]:  # fmt: skip
    r"""Scale distillation: fits the scales of :class:`BitDelta` alone, so that the outputs are those of the fine-tuned model.

    .. math:: \alpha^* = \arg\min_\alpha \sum_x \lVert Z_{tuned}(x) - Z(x; \alpha) \rVert^2

    Args:
        tensors: The differences :math:`\Delta`, by name.
        loss: From the coded differences, with graph, to a scalar; called once a step, it may take another batch each time. The paper's is the
            mean squared difference of the logits.
        steps: Steps of Adam; the authors take 200.
        lr: Learning rate.

    Returns:
        What :meth:`BitDelta.encode` returns, with the fitted scales.

    Raises:
        InputError: where the loss is not finite.

    >>> target = {"W": torch.tensor([4.0, -2.0])}
    >>> distil(target, lambda d: (d["W"] - torch.tensor([5.0, -5.0])).square().mean(), steps=300, lr=0.05)["scale"].round()
    tensor([5.])
    """
    codec, shapes = BitDelta(), shapes_of(tensors)
    packed = codec.encode(tensors)
    scale = packed["scale"].clone().requires_grad_(True)
    optimiser = torch.optim.Adam([scale], lr=lr)
    for step in range(steps):
        value = loss(codec.decode({**packed, "scale": scale}, shapes))
        if not bool(torch.isfinite(value)):
            raise InputError(f"distil: the loss is {float(value.detach())} at step {step}; lower lr or look at the batch")
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {**packed, "scale": scale.detach()}
