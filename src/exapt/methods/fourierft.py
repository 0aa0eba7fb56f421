"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform (Gao et al., ICML 2024)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod, drawn_places, frozen
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class FourierFT(WeightMethod):
    r"""Learns a few coefficients of the update's spectrum: :math:`W' = W + s\, \mathrm{Re}\,(\mathcal F^{-1}(F))`.

    :math:`F` is (d_out, d_in) with the :math:`n` learned real coefficients at random positions, the same at all sites of one
    shape; :math:`\mathcal F^{-1}` is the inverse discrete Fourier transform in both dimensions. For few input vectors the
    update is not formed: the input is transformed, :math:`F` applied entry by entry, and the result transformed back.

    Args:
        n_frequency: Number :math:`n` of coefficients per site.
        scaling: Scale :math:`s`.
        start: ``"normal"``: standard normal coefficients, as in the paper; ``"zeros"``: none, so that the model starts as
            it was.
        seed: Seed of the positions, which are drawn as PEFT draws them and made again when a file is loaded.

    Parameters per site:
        ``c`` (n,). Frozen: ``index`` (n,), positions in the flattened spectrum.

    References:
        Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", ICML 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(40, 30), FourierFT(n_frequency=50), where="all")
    >>> exapt.parameter_count(model).trainable
    50
    """

    key = "fourierft"
    paper = "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform"
    equation = r"W' = W + s\, \mathrm{Re}\,\mathcal{F}^{-1}(F),\quad F_{I} = c"
    golden = "PEFT"
    full_precision = True
    fast_kinds: ClassVar = ("linear", "conv1d_hf")
    exceptions: ClassVar = {"identity": "the paper starts from standard normal coefficients; start='zeros' starts from the base model"}

    n_frequency: int = 1000
    scaling: float = 150.0
    start: Literal["normal", "zeros"] = "normal"
    seed: int = 777

    def check(self, site: Site) -> None:
        check_rank(self, site, "n_frequency", most=site.shape[0] * site.shape[1])

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        index = drawn_places(d_out * d_in, self.n_frequency, self.seed)
        c = torch.randn(self.n_frequency) if self.start == "normal" else torch.zeros(self.n_frequency)
        return {"c": c, "index": frozen(index.clone(), saved=False)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        spectrum = p["c"].new_zeros(w.numel()).index_copy(0, p["index"], p["c"]).view(w.shape)
        return (w + self.scaling * torch.fft.ifft2(_whole(spectrum)).real).to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        d_out, d_in = base.shape
        if x.numel() * self.n_frequency > FEW * d_out * d_in**2:  # many inputs: one product with W' is cheaper
            return F.linear(x, self.weight(p, base.weight).to(x.dtype), base.bias)
        y = base(x)
        row, column = p["index"] // d_in, p["index"] % d_in
        z = torch.fft.ifft(_whole(x.to(p["c"].dtype)))
        h = z.new_zeros(*z.shape[:-1], d_out).index_add(-1, row, z.index_select(-1, column) * p["c"])
        return y + (self.scaling * torch.fft.ifft(h).real).to(y.dtype)


FEW = 0.5
"""The fast path gathers n numbers for each input vector; it is taken while they are fewer than this share of the entries of W."""


def _whole(t: Tensor) -> Tensor:
    """At least single precision: torch has no Fourier transform of half-precision numbers on every device."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
