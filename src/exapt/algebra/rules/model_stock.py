"""Model Stock: how far to go from the base to the average, told from the angle between models (Jang et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sphere import lengths
from exapt.algebra.streamed import Parts, gram, in_parts, spanned
from exapt.core.errors import InputError


def _streamed(parts: Parts, *, filter_wise: bool) -> Iterator[Tensor]:
    _check(parts)
    if filter_wise and len(parts.shape) > 1:
        yield from (model_stock_merged(deltas, filter_wise=True) for deltas in parts.rows(parts.shape[-1]))
    else:
        yield from spanned(parts, _coefficients(gram(parts)))


@rule("model_stock", paper="Model Stock: All we need is just a few fine-tuned models", oracle="mergekit", streamed=_streamed)
def model_stock_merged(deltas: Tensor, *, filter_wise: bool = False) -> Tensor:
    r"""Goes the share :math:`t` of the way to the average, more the better the task vectors agree.

    .. math:: \tau = t\, \frac{1}{m} \sum_i \tau_i, \qquad t = \frac{m \cos\theta}{1 + (m - 1) \cos\theta}

    with the mean cosine of all pairs; where it makes the denominator zero, the base stays.

    Args:
        deltas: Task vectors (m, ...).
        filter_wise: Whether every row has an angle of its own (along the last dimension), or every tensor.

    Returns:
        (...).

    Raises:
        InputError: for fewer than two models.

    References:
        Jang, Yun and Han, "Model Stock: All we need is just a few fine-tuned models", ECCV 2024.

    >>> model_stock_merged(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([0.8284, 0.4142])
    """
    _check(deltas)
    if not filter_wise or deltas.ndim < 3:
        return torch.tensordot(_coefficients(gram(in_parts(deltas))).to(deltas), deltas, 1)
    norms = lengths(deltas)
    # All pairs at once: the square of a sum of unit vectors is their number plus twice the cosines.
    pairs = (deltas / norms.clamp(min=torch.finfo(deltas.dtype).tiny)).sum(0).square().sum(-1, keepdim=True) - (norms > 0).sum(0)
    return _share(pairs, len(deltas)) * deltas.mean(0)


def _check(models: Sized) -> None:
    if len(models) < 2:
        raise InputError(f"model_stock needs at least 2 models for an angle, and got {len(models)}")


def _coefficients(products: Tensor) -> Tensor:
    norms = products.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    pairs = (scale[:, None] * products * scale).sum() - (norms > 0).sum()
    return (_share(pairs, len(norms)) / len(norms)).expand(len(norms))


def _share(pairs: Tensor, m: int) -> Tensor:
    """t, from the sum of the cosines of all ordered pairs."""
    cosine = pairs / (m * (m - 1))
    below = 1 + (m - 1) * cosine
    return torch.where(below.abs() < 1e-6, 0.0, m * cosine / below)
