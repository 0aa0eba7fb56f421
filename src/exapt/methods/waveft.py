"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets (Bilican et al., 2025)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod, drawn_places, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class WaveFT(WeightMethod):
    r"""Learns a few wavelet coefficients of the update: :math:`W' = W + s\, S_o C S_i^\top`.

    :math:`C` holds the :math:`n` learned coefficients at random positions, the same at all sites of one shape; :math:`S_o` and
    :math:`S_i` synthesise one level of a wavelet transform along outputs and inputs. As in PEFT, longer filters get a spectrum
    with a border, the block right of the averages belongs to differences along the outputs and the block below to differences
    along the inputs. For few input vectors the update is not formed: the input is transformed, :math:`C` applied entry
    by entry, and the result transformed back.

    Args:
        n_frequency: Number :math:`n` of coefficients per site.
        scaling: Scale :math:`s`.
        wavelet: ``"db1"`` (also ``"haar"``) to ``"db10"``, or ``"sym2"`` to ``"sym10"``.
        transform: Whether to transform at all; without, :math:`W' = W + s\, C` is a random sparse update (SHiRA's).
        proportional: Share the coefficients of all sites out by the sizes of their matrices.
        seed: Seed of the positions, which are drawn as PEFT draws them and made again when a file is loaded.

    Parameters per site:
        ``c`` (n,), zeros. Frozen: ``index`` (n,), positions in the flattened spectrum, averages first; shared, ``filters``
        (2, length), low and high pass.

    References:
        Bilican, Yılmaz, Tekalp, Cinbiş, "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(40, 30), WaveFT(n_frequency=50), where="all")
    >>> exapt.parameter_count(model).trainable
    50
    """

    key = "waveft"
    paper = "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets"
    equation = r"W' = W + s\, S_o C S_i^\top,\quad C_{I} = c"
    golden = "PEFT"
    full_precision = True
    fast_kinds: ClassVar = ("linear", "conv1d_hf")

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet: str = "db1"
    transform: bool = True
    proportional: bool = False
    seed: int = 777

    def check(self, site: Site) -> None:
        if not self.proportional:
            check_rank(self, site, "n_frequency", most=site.shape[0] * site.shape[1])
        if self.wavelet not in WAVELETS:
            raise InputError(f"{self.key}.wavelet is {self.wavelet!r}; it must be one of {', '.join(WAVELETS)}")

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        sizes = {s.name: s.shape[0] * s.shape[1] for s in sites} if self.proportional else {}
        found: dict[str, Tensors] = {}
        for name, size in sizes.items():
            n = max(1, round(size / sum(sizes.values()) * self.n_frequency * len(sizes)))
            if n > size:
                raise InputError(f"{name}: its share of {self.key}.n_frequency={self.n_frequency} is {n}, more than its {size} entries; lower it")
            found[name] = {"n": torch.tensor([n])}
        return found

    def shared(self, sites: Sequence[Site]) -> Tensors:
        return {"filters": frozen(filters(self.wavelet).float())} if self.transform else {}

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), n = site.shape, int(site.statistics["n"]) if self.proportional else self.n_frequency
        index = drawn_places(d_out * d_in, n, self.seed)
        if self.transform:
            index = self.places(index // d_in, index % d_in, d_out, d_in)
        return {"c": torch.zeros(n), "index": frozen(index.clone(), saved=self.proportional)}

    def places(self, row: Tensor, column: Tensor, d_out: int, d_in: int) -> Tensor:
        """Positions in the flattened spectrum of what PEFT has at ``row`` and ``column`` of the matrix."""
        length = 2 * WAVELETS[self.wavelet][0]
        rows, columns = padded(d_out, length), padded(d_in, length)
        row, column = row + (rows - d_out) // 2, column + (columns - d_in) // 2
        low, right = row >= rows // 2, column >= columns // 2
        row = row + rows // 2 * (right.long() - low.long())  # the two mixed blocks change places
        column = column + columns // 2 * (low.long() - right.long())
        return row * columns + column

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        rows, columns = self._sizes(p, w.shape[0], w.shape[1])
        c = p["c"].new_zeros(rows * columns).index_copy(0, p["index"], p["c"]).view(rows, columns)
        if self.transform:
            c = _synthesis(_synthesis(c, p["filters"], w.shape[1]).T, p["filters"], w.shape[0]).T
        return (w + self.scaling * c).to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        d_out, d_in = base.shape
        if x.numel() * len(p["c"]) > FEW * d_out * d_in**2:  # many inputs: one product with W' is cheaper
            return F.linear(x, self.weight(p, base.weight).to(x.dtype), base.bias)
        y = base(x)
        rows, columns = self._sizes(p, d_out, d_in)
        z = x.to(p["c"].dtype)
        z = _analysis(z, p["filters"], columns) if self.transform else z
        terms = z.index_select(-1, p["index"] % columns) * p["c"]
        h = z.new_zeros(*z.shape[:-1], rows).index_add(-1, p["index"] // columns, terms)
        h = _synthesis(h, p["filters"], d_out) if self.transform else h
        return y + (self.scaling * h).to(y.dtype)

    def _sizes(self, p: Tensors, d_out: int, d_in: int) -> tuple[int, int]:
        """Rows and columns of the spectrum."""
        if not self.transform:
            return d_out, d_in
        length = p["filters"].shape[1]
        return padded(d_out, length), padded(d_in, length)


FEW = 1.0
"""The fast path gathers n numbers for each input vector; it is taken while they are fewer than this multiple of the entries of W."""

# Vanishing moments; and of the roots (or pairs of conjugate roots) of Daubechies' polynomial, by size, those taken outside the unit
# circle: none for Daubechies' own wavelets; for symlets the choice of nearly linear phase, in the direction that PyWavelets stores.
_SYMLETS = ((0,), (0,), (0, 1), (1, 0), (1, 0, 1), (1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0, 1))
WAVELETS: dict[str, tuple[int, tuple[int, ...]]] = {
    "haar": (1, ()),
    **{f"db{n}": (n, (0,) * (n // 2)) for n in range(1, 11)},
    **{f"sym{n}": (n, outside) for n, outside in enumerate(_SYMLETS, 2)},
}


def padded(size: int, length: int) -> int:
    """Size of the spectrum of ``size`` numbers under filters of ``length``: even, with a border for what a longer filter loses."""
    return size + length - 2 + size % 2


def _synthesis(c: Tensor, filters: Tensor, size: int) -> Tensor:
    """Numbers (..., size) from averages and differences (..., spectrum)."""
    taps = filters.shape[1] // 2
    number = c.shape[-1] // 2 - taps + 1
    phases = []
    for phase in (0, 1):  # even and odd numbers apart, tap by tap: torch's transposed convolution of one channel is many times slower
        terms = [
            half[..., taps - 1 - j : taps - 1 - j + number] * taken[2 * j + phase]
            for half, taken in zip(c.chunk(2, -1), filters.to(c.dtype), strict=True)
            for j in range(taps)
        ]
        phases.append(sum(terms[1:], terms[0]))
    return torch.stack(phases, -1).flatten(-2)[..., :size]


def _analysis(x: Tensor, filters: Tensor, spectrum: int) -> Tensor:
    """The transpose of the synthesis: (..., spectrum) from (..., size)."""
    length = filters.shape[1]
    start = length - 2
    whole = F.pad(x, (start, spectrum + length - 2 - start - x.shape[-1]))
    halves = F.conv1d(whole.reshape(-1, 1, whole.shape[-1]), filters[:, None].to(x.dtype), stride=2)
    return halves.reshape(*x.shape[:-1], spectrum)


def filters(wavelet: str) -> Tensor:
    r"""Low and high pass synthesis filters (2, 2 N) of an orthogonal wavelet with :math:`N` vanishing moments, in double precision.

    The low pass filter is :math:`(1 + z)^N \prod_i (1 - z_i z)`, scaled to sum :math:`\sqrt 2`; of each pair :math:`z_i, 1 / z_i` of
    roots of Daubechies' half-band polynomial :math:`\sum_{k<N} \binom{N - 1 + k}{k} y^k`, :math:`y = (2 - z - 1/z) / 4`, it takes one.

    >>> filters("db1").mul(2**0.5).round().tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    n, outside = WAVELETS[wavelet]
    low = torch.ones(1, dtype=torch.float64)
    for _ in range(n):
        low = _times(low, [1.0, 1.0])
    for z, out in zip(_roots(n), outside, strict=True):
        z = 1 / z if out else z
        low = _times(low, [1.0, -z.real] if abs(z.imag) < 1e-9 else [1.0, -2 * z.real, abs(z) ** 2])
    low = low * (2**0.5 / low.sum())
    return torch.stack([low, low.flip(0) * torch.tensor([1.0, -1.0]).repeat(n)])


def _times(a: Tensor, b: list[float]) -> Tensor:
    """The product of two polynomials."""
    terms = [F.pad(a * c, (k, len(b) - 1 - k)) for k, c in enumerate(b)]
    return torch.stack(terms).sum(0)


def _roots(n: int) -> list[complex]:
    """Roots inside the unit circle, smallest first, one of each conjugate pair."""
    if n == 1:
        return []
    half = torch.tensor([float(math.comb(n - 1 + k, k)) for k in range(n)], dtype=torch.float64)
    companion = torch.diag(torch.ones(n - 2, dtype=torch.float64), -1)
    companion[:, -1] = -half[:-1] / half[-1]
    b = 1 - 2 * torch.linalg.eigvals(companion)
    z = b + (b * b - 1).sqrt()
    inside = [complex(r) for r in torch.where(z.abs() < 1, z, 1 / z)]
    return sorted((r for r in inside if r.imag > -1e-9), key=abs)
