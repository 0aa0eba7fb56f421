"""QUAD: outlier directions of the activations in full precision, the rest in four bits (Hu et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError


@dataclass(frozen=True)
class Quad:
    """A linear map in two parts.

    Attributes:
        directions: :math:`P` (d_in, k), orthonormal.
        outlier: :math:`W P` (d_out, k), in full precision: what the paper then trains.
        rotation: :math:`H` (d_in, d_in), orthogonal, of the rest.
        codes, scales: The rest :math:`W (I - P P^\\top) H` as (d_out, d_in) whole numbers and (d_out, 1).
        activation_bits: Bits of the rest of the activations, quantised anew for each token; 0: not at all.
    """

    directions: Tensor
    outlier: Tensor
    rotation: Tensor
    codes: Tensor
    scales: Tensor
    activation_bits: int

    @property
    def rest(self) -> Tensor:
        """The rest of the weight as it is after quantisation, (d_out, d_in), in the rotated coordinates."""
        return self.codes.to(self.scales) * self.scales

    @property
    def weight(self) -> Tensor:
        """The matrix that both parts stand for, where activations are exact."""
        keeps = torch.eye(len(self.rotation)).to(self.rotation) - self.directions @ self.directions.T
        return self.outlier @ self.directions.T + self.rest @ self.rotation.T @ keeps

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs (..., d_out) of inputs (..., d_in)."""
        high = x @ self.directions
        low = (x - high @ self.directions.T) @ self.rotation
        if self.activation_bits:
            codes, scales = symmetric(low, self.activation_bits)
            low = codes.to(scales) * scales
        return high @ self.outlier.T + low @ self.rest.T


@component(
    "quad", kind="compression", oracle="NumPy",
    paper="QUAD: Quantization and Parameter-Efficient Tuning of LLM with Activation Decomposition",
)  # fmt: skip
def quad_decomposed(
    weight: Tensor, moment: Tensor, directions: int = 64, *, bits: int = 4, activation_bits: int = 4, rotate: bool = True, seed: int = 0
) -> Quad:
    r"""Takes the directions in which the inputs are largest out of a linear map, before both are quantised:

    .. math:: W x = (W P)(P^\top x) + \bigl(W (I - P P^\top) H\bigr) \bigl(H^\top (I - P P^\top) x\bigr)

    :math:`P` are the first singular vectors of the calibration inputs. The first product stays in full precision, and its weights are what is
    trained afterwards; in the second, weights are quantised by output and activations by token, symmetrically, after a random rotation
    :math:`H` that spreads what is left of the outliers. The identity is exact without quantisation.

    In the paper one :math:`P` serves the whole residual stream, weights are rounded by GPTQ and Hadamard matrices rotate by fast kernels; here it
    is one matrix, rounding to the nearest and a random orthogonal matrix, which the authors' code offers as well.

    Args:
        weight: (d_out, d_in).
        moment: :math:`X^\top X` of the calibration inputs (d_in, d_in).
        directions: Number :math:`k` of directions kept.
        bits: Bits of a weight, 2 to 8.
        activation_bits: Bits of an activation, 2 to 8; 0 leaves them as they are.
        rotate: Whether the rest is rotated.
        seed: Of the rotation.

    Raises:
        InputError: for shapes or numbers that do not fit.

    References:
        Hu, Xiong, et al., "QUAD: Quantization and Parameter-Efficient Tuning of LLM with Activation Decomposition", 2025.

    >>> w, x = torch.randn(3, 8), torch.randn(20, 8)
    >>> bool(((quad_decomposed(w, x.T @ x, 8)(x) - x @ w.T).abs() < 1e-4).all())
    True
    """
    if weight.dim() != 2 or tuple(moment.shape) != (weight.shape[1],) * 2:
        raise InputError(f"quad: a weight of shape {tuple(weight.shape)} and a moment of {tuple(moment.shape)}; the moment is (d_in, d_in)")
    if not (0 <= directions <= weight.shape[1] and 2 <= bits <= 8 and activation_bits in (0, *range(2, 9))):
        raise InputError(f"quad: directions={directions} (0 to {weight.shape[1]}), bits={bits} (2 to 8), activation_bits={activation_bits} (0 or 2 to 8)")
    w, d_in = weight.detach().double(), weight.shape[1]
    _, vectors = torch.linalg.eigh(moment.detach().double())
    p = vectors.flip(1)[:, :directions]
    rotation = torch.eye(d_in, dtype=torch.double)
    if rotate:
        q, r = torch.linalg.qr(torch.randn(d_in, d_in, generator=seeded(seed, "quad"), dtype=torch.double))
        rotation = q * r.diagonal().sign()
    codes, scales = symmetric((w - (w @ p) @ p.T) @ rotation, bits)
    kind = weight.dtype
    return Quad(p.to(kind), (w @ p).to(kind), rotation.to(kind), codes, scales.to(kind), activation_bits)


def symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers (..., n) int8 up to ``2**(bits - 1) - 1`` in size, and the scale (..., 1) of each row.

    >>> symmetric(torch.tensor([[1.0, -7.0, 3.4]]), 4)
    (tensor([[ 1, -7,  3]], dtype=torch.int8), tensor([[1.]]))
    """
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) / most
    return (x / scale.clamp_min(torch.finfo(x.dtype).tiny)).round().clamp(-most, most).to(torch.int8), scale
