"""C3A: Circular Convolution Adaptation (Chen et al., ACL Findings 2025)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_divides
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class C3A(WeightMethod):
    r"""Adds a matrix of circulant blocks: :math:`W' = W + \frac{1}{d_{in}} [\mathcal{C}(w_{ij})]_{ij}`.

    A block :math:`\mathcal{C}(w)` of size :math:`b` has :math:`w` as its first row and each further row shifted by one, so it
    has :math:`b` parameters whatever its rank, which may be full. Its product with a vector is a circular convolution, taken
    through fast Fourier transforms: the update is never formed.

    Args:
        block_size: Size :math:`b` of the blocks; it divides d_in and d_out. Larger blocks mean fewer parameters.
        start: ``"zeros"``, which starts exactly at the base model; ``"xavier_uniform"`` (PEFT's default), ``"kaiming_uniform"``
            or ``"gaussian"``, with the bounds that they have for a d_out x d_in matrix.

    Parameters per site:
        ``kernel`` (d_out / b, d_in / b, b), the first rows of the blocks.

    References:
        Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", ACL Findings 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(8, 4), C3A(block_size=4), where="all")
    >>> exapt.parameter_count(model).trainable
    8
    """

    key = "c3a"
    paper = "Parameter-Efficient Fine-Tuning via Circular Convolution"
    equation = r"W' = W + \frac{1}{d_{in}} [\mathcal{C}(w_{ij})]_{ij}"
    golden = "PEFT"
    full_precision = True  # Fourier transforms have no half precision on every device
    fast_kinds = ("linear", "conv1d_hf")

    block_size: int = 256
    start: Literal["zeros", "xavier_uniform", "kaiming_uniform", "gaussian"] = "zeros"

    def check(self, site: Site) -> None:
        check_divides(self, site, "block_size", site.shape[1], "inputs")
        check_divides(self, site, "block_size", site.shape[0], "outputs")

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), b = site.shape, self.block_size
        kernel = torch.zeros(d_out // b, d_in // b, b, device=site.device)
        if self.start == "gaussian":
            kernel.normal_()
        elif self.start != "zeros":
            limit = (6 / (d_in + d_out) if self.start == "xavier_uniform" else 1 / d_in) ** 0.5
            kernel.uniform_(-limit, limit)
        return {"kernel": kernel}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        place = torch.arange(self.block_size, device=w.device)
        blocks = p["kernel"][:, :, (place - place[:, None]) % self.block_size]  # (output block, input block, row, column)
        return (w + blocks.transpose(1, 2).reshape(w.shape) / w.shape[1]).to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        update = _Correlated.apply(x.to(y.dtype).unflatten(-1, (-1, self.block_size)), p["kernel"])  # type: ignore[no-untyped-call]
        return torch.add(y, update.flatten(-2).to(y.dtype), alpha=1 / base.shape[1])


class _Correlated(torch.autograd.Function):
    """Every block of ``x`` (..., i, b) correlated with ``kernel`` (o, i, b) and summed over i: (..., o, b). The spectra, twice the size
    of ``x``, are made again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel: Tensor) -> Tensor:
        return torch.fft.irfft(torch.einsum("...if,oif->...of", _spectrum(x), _spectrum(kernel).conj()), n=x.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        n, dz, dx, dk = x.shape[-1], _spectrum(dy), None, None
        if ctx.needs_input_grad[0]:  # a correlation's transpose is a convolution
            dx = torch.fft.irfft(torch.einsum("...of,oif->...if", dz, _spectrum(kernel)), n=n).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dk = torch.fft.irfft(torch.einsum("aof,aif->oif", dz.flatten(0, -3).conj(), _spectrum(x).flatten(0, -3)), n=n).to(kernel.dtype)
        return dx, dk


def _spectrum(t: Tensor) -> Tensor:
    """Along the last dimension, in at least single precision: torch has no Fourier transform of half-precision numbers on every device."""
    return torch.fft.rfft(t.to(torch.promote_types(t.dtype, torch.float32)))
