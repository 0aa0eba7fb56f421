"""Adapters trained in few bits: Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy (ICCV 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from exapt.core.contract import ActivationMethod, Method, Tensors, WeightMethod, frozen
from exapt.core.errors import InputError
from exapt.core.registry import method, register
from exapt.core.sites import Site

EPSILON = 1e-5  # beside the deviation, as in the authors' code


def normal_medians(bits: int) -> Tensor:
    r"""The k-medians of the standard normal distribution: :math:`2^b` codes :math:`c_i` with the least :math:`E \min_i |z - c_i|`, increasing.

    Each is the median of its cell, and the cells' ends are half-way between codes: :math:`2 \Phi(c_i) = \Phi(m_{i-1}) + \Phi(m_i)`, solved by
    Newton's method.

    >>> normal_medians(1).round(decimals=4)
    tensor([-0.6745,  0.6745], dtype=torch.float64)
    """
    z = torch.zeros(1, dtype=torch.float64)
    codes = 2**0.5 * torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)  # their density for many codes
    for _ in range(50):
        ends, gaps = (codes[1:] + codes[:-1]) / 2, codes.diff()
        below, above = torch.cat([z, torch.special.ndtr(ends)]), torch.cat([torch.special.ndtr(ends), z + 1])
        slopes = _density(ends) / 2
        jacobian = torch.diag(2 * _density(codes) - torch.cat([z, slopes]) - torch.cat([slopes, z])) - torch.diag(slopes, 1) - torch.diag(slopes, -1)
        step = torch.linalg.solve(jacobian, 2 * torch.special.ndtr(codes) - below - above)
        room = torch.minimum(torch.cat([gaps, gaps[-1:]]), torch.cat([gaps[:1], gaps]))
        codes = codes - step * min(1.0, 0.5 / max(float((step.abs() / room).max()), 1e-30))  # codes stay in their order
        if float(step.abs().max()) < 1e-10:
            break
    return (codes - codes.flip(0)) / 2  # exactly symmetric


def _density(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5


_CODES: dict[int, tuple[float, ...]] = {}


def _codes(bits: int) -> tuple[float, ...]:
    """The codes as numbers: constants to a compiler, on any device. Making a method makes them."""
    if bits not in _CODES:
        _CODES[bits] = tuple(normal_medians(bits).tolist())
    return _CODES[bits]


def _nearest(z: Tensor, bits: int) -> Tensor:
    """Numbers of the nearest codes, uint8."""
    codes = z.new_tensor(_codes(bits))
    return torch.bucketize(z, (codes[1:] + codes[:-1]) / 2).to(torch.uint8)


def _statistics(w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each matrix (the last two dimensions)."""
    return w.mean((-2, -1), keepdim=True), w.std((-2, -1), keepdim=True)


def rounded(w: Tensor, bits: int) -> Tensor:
    r""":math:`\sigma q((w - \mu) / \sigma) + \mu`; the gradient passes through :math:`q` as if it were not there, and through both statistics.

    >>> rounded(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), 1).round(decimals=3)
    tensor([[ 0.7790, -0.7790],
            [ 0.7790, -0.7790]])
    """
    mean, deviation = _statistics(w)
    z = (w - mean) / (deviation + EPSILON)
    q = z.new_tensor(_codes(bits))[_nearest(z.detach(), bits).long()]
    return (z + (q - z).detach()) * deviation + mean


class _Rounding:
    """What both kinds of quantised method share: names, starts, files. ``A_latent`` trains; ``A_codes`` and ``A_scale`` are what a file holds."""

    inner: Any
    bits: int
    paper = "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy"
    equation = r"\hat w = \mu + \sigma\, q((w - \mu) / \sigma)"
    golden = "NumPy"
    exceptions: ClassVar[Mapping[str, str]] = {
        "identity": "a matrix of zeros has no distribution to standardise, so it begins at small random values, as in the authors' code"
    }
    full_precision: ClassVar[bool] = True  # the codes are those of the float32 values; what they stand for is cast after

    def _refuse(self, kind: type[Method]) -> None:
        a, own = self.inner, type(self.inner)
        if not 1 <= self.bits <= 8:
            raise InputError(f"{self.key}.bits is {self.bits}; it must be from 1 to 8")  # type: ignore[attr-defined]
        _codes(self.bits)
        if not isinstance(a, kind) or isinstance(a, _Rounding):
            raise InputError(f"{self.key}.inner is {a.key}; it must be of the contract {kind.contract}, such as {self.example}")  # type: ignore[attr-defined]
        changes = own.on_step is not Method.on_step or own.stored is not Method.stored or own.plan is not Method.plan or a.reads or a.needs or a.notes
        if changes or getattr(a, "carries", False) or (kind is WeightMethod and not a.mergeable):
            raise InputError(f"{self.key}.inner is {a.key}, which changes its tensors in training or sees more than its site; name another")  # type: ignore[attr-defined]

    def check(self, site: Site) -> None:
        self.inner.check(site)

    def _named(self, tensors: Tensors) -> Tensors:
        named = {}
        for k, t in tensors.items():
            if isinstance(t, torch.nn.Buffer) or t.dim() < 2 or not t.is_floating_point() or t.shape[-1] * t.shape[-2] < 2:
                named[k] = t
                continue
            start = t.detach()
            if bool((start == start.flatten()[0]).all()):  # nothing to standardise in a constant
                start = start + torch.nn.init.trunc_normal_(torch.empty_like(start), std=0.001, a=-0.002, b=0.002)
            named[f"{k}_latent"] = start
        return named

    def init(self, site: Site) -> Tensors:
        return self._named(self.inner.init(site))

    def shared(self, sites: Sequence[Site]) -> Tensors:
        return self._named(self.inner.shared(sites))

    def rates(self) -> Mapping[str, float]:
        return {n: f for k, f in self.inner.rates().items() for n in (k, f"{k}_latent")}

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        return self.inner.penalty(self._inside(p, w.dtype), w)  # type: ignore[no-any-return]

    def stored(self, p: Tensors) -> Tensors:
        """The codes, a byte each (``exapt compress`` packs them tighter), and mean and deviation of each matrix."""
        held = {}
        for k, t in p.items():
            if k.endswith("_latent"):
                name, (mean, deviation) = k.removesuffix("_latent"), _statistics(t.float())
                held[f"{name}_codes"] = frozen(_nearest((t.float() - mean) / (deviation + EPSILON), self.bits))
                held[f"{name}_scale"] = frozen(torch.cat([mean, deviation], -1))
            else:
                held[k] = t
        return held

    def _inside(self, p: Tensors, dtype: torch.dtype) -> Tensors:
        """The tensors as ``inner`` knows them."""
        made = {}
        for k, t in p.items():
            if k.endswith("_codes"):
                scale = p[f"{k.removesuffix('_codes')}_scale"]
                made[k.removesuffix("_codes")] = scale.new_tensor(_codes(self.bits))[t.long()] * scale[..., 1:] + scale[..., :1]
            elif k.endswith("_latent"):
                made[k.removesuffix("_latent")] = rounded(t, self.bits)
            elif not (k.endswith("_scale") and f"{k.removesuffix('_scale')}_codes" in p):
                made[k] = t
        if self.inner.full_precision:
            return made
        return {k: t.to(dtype) if t.is_floating_point() else t for k, t in made.items()}


@register
@dataclass(frozen=True)
class Quantised(_Rounding, WeightMethod):
    r"""Trains another method's matrices in :math:`b` bits each entry: :math:`\hat w = \mu + \sigma\, q((w - \mu) / \sigma)`, with :math:`q` the
    nearest of :math:`2^b` codes.

    Mean and deviation are of each matrix; the codes are the k-medians of the normal distribution. Values are rounded in every forward, and the
    gradient passes straight through the rounding; a file holds the codes. Such a file serves, and is not trained on. Vectors and what ``inner``
    freezes stay as they are.

    Args:
        inner: The method, one of matrices.
        bits: Bits :math:`b` of an entry, 1 to 8.

    Parameters per site:
        Those of ``inner``, matrices under ``<name>_latent``; what begins constant begins at random in :math:`\pm 0.002` instead, as in the
        authors' code. In files ``<name>_codes``, uint8, and ``<name>_scale`` (1, 2), mean and deviation.

    References:
        Jie, Wang and Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy", ICCV 2023.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), Quantised(exapt.LoRA(rank=2)), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 4), (3, 2)]
    """

    key = "quantised"
    example: ClassVar = "LoRA()"

    inner: Method = field(default_factory=lambda: method("lora"))
    bits: int = 1

    def __post_init__(self) -> None:
        self._refuse(WeightMethod)
        if self.inner.needs_forward():  # type: ignore[attr-defined]
            raise InputError(f"quantised.inner is {self.inner.key} with dropout or noise; it acts on the matrix alone here, so set these to 0")
        if type(self.inner).bias is not WeightMethod.bias:  # type: ignore[attr-defined]
            raise InputError(f"quantised.inner is {self.inner.key}, which changes biases too; name another")

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return self.inner.weight(self._inside(p, w.dtype), w)  # type: ignore[attr-defined,no-any-return]


@register
@dataclass(frozen=True)
class QuantisedAdapter(_Rounding, ActivationMethod):
    r"""Trains an adapter's matrices in :math:`b` bits each entry, as :class:`Quantised` does a weight method's.

    Args:
        inner: The adapter, such as :class:`BottleneckAdapter`; the authors' has no biases.
        bits: Bits of an entry, 1 to 8.

    Parameters per site:
        Those of ``inner``, matrices under ``<name>_latent`` (in files ``<name>_codes`` and ``<name>_scale``).

    References:
        Jie, Wang and Deng, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy", ICCV 2023.
    """

    key = "quantised_adapter"
    example: ClassVar = "BottleneckAdapter()"

    inner: Method = field(default_factory=lambda: method("adapter"))
    bits: int = 1

    def __post_init__(self) -> None:
        self._refuse(ActivationMethod)

    @property
    def where(self) -> str | tuple[str, ...]:  # type: ignore[override]
        """The adapter's own places."""
        return self.inner.where

    def enter(self, p: Tensors, x: Tensor) -> Tensor:
        return self.inner.enter(self._inside(p, x.dtype), x)  # type: ignore[attr-defined,no-any-return]

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        return self.inner.apply(self._inside(p, h.dtype), x, h)  # type: ignore[attr-defined,no-any-return]
