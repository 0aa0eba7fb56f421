"""NuSLERP: SLERP with weights, of the models or of their differences from a base, of whole tensors or of their rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.rules.slerp import arc, check_two
from exapt.algebra.sphere import along_arc
from exapt.algebra.streamed import Parts, gram, in_parts, spanned
from exapt.core.errors import InputError

STRAIGHT = 1 - 1e-6


def _streamed(parts: Parts, weights: Tensor | None = None, *, dim: int | None) -> Iterator[Tensor] | None:
    check_two(parts, "nuslerp")
    t, dim = _share(weights), _dim(dim, len(parts.shape))
    if dim is None:
        return spanned(parts, arc(gram(parts, origin=True), t, STRAIGHT), origin=True)
    if dim % len(parts.shape) != len(parts.shape) - 1:
        return None  # vectors that do not lie in one piece
    size = parts.shape[-1]
    pairs = ((p.unflatten(1, (-1, size)), None if b is None else b.reshape(-1, size)) for p, b in parts.pairs(size))
    return (nuslerped(part, weights, base, dim=-1) for part, base in pairs)


@rule("nuslerp", oracle="mergekit", streamed=_streamed)
def nuslerped(models: Tensor, weights: Tensor | None = None, base: Tensor | None = None, *, dim: int | None = None) -> Tensor:
    r"""Spherical interpolation of two models at :math:`t = w_2 / (w_1 + w_2)`; with a base, of their differences from it.

    Straight where the two are parallel or opposite to single precision (mergekit: exactly).

    Args:
        models: (2, ...).
        weights: (2,); by default the middle.
        base: (...); origin of the sphere, by default zero.
        dim: Vectors lie along this dimension (mergekit: -1, or 0 with ``nuslerp_row_wise``); by default each tensor is one.

    Returns:
        (...).

    Raises:
        InputError: for another number of models, weights that add up to zero, or a dimension that a tensor of two or more does not have.

    References:
        Goddard et al., "Arcee's MergeKit: A Toolkit for Merging Large Language Models", EMNLP 2024 (its method ``nuslerp``; there is no paper).

    >>> nuslerped(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([2.0, 1.0]))
    tensor([1.7321, 1.0000])
    """
    check_two(models, "nuslerp")
    t, dim = _share(weights), _dim(dim, models.ndim - 1)
    vectors = models if base is None else models - base
    if dim is None:
        merged = torch.tensordot(arc(gram(in_parts(vectors)), t, STRAIGHT).to(models), vectors, 1)
    else:
        merged = along_arc(vectors[0], vectors[1], t, dim, STRAIGHT)
    return merged if base is None else base + merged


def _share(weights: Tensor | None) -> float:
    total = 2.0 if weights is None else float(weights.sum())
    if weights is not None and abs(total) < 1e-8:
        raise InputError(f"nuslerp: the weights {weights.tolist()} add up to zero; give others")
    return 0.5 if weights is None else float(weights[1]) / total


def _dim(dim: int | None, dimensions: int) -> int | None:
    if dim is None or dimensions < 2:
        return None
    if not -dimensions <= dim < dimensions:
        raise InputError(f"nuslerp: dim={dim}, and a tensor has {dimensions} dimensions; give one of them, or none")
    return dim
