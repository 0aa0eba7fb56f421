"""NuSLERP: SLERP with weights, of the models or of their differences from a base, of whole tensors or of their rows."""

from __future__ import annotations

from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.rules.slerp import two
from exapt.algebra.sphere import along_arc
from exapt.core.errors import InputError

STRAIGHT = 1 - 1e-6


@rule("nuslerp", oracle="mergekit")
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

    >>> import torch
    >>> nuslerped(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([2.0, 1.0]))
    tensor([1.7321, 1.0000])
    """
    a, b = two(models, "nuslerp")
    t = 0.5
    if weights is not None:
        total = float(weights.sum())
        if abs(total) < 1e-8:
            raise InputError(f"nuslerp: the weights {weights.tolist()} add up to zero; give others")
        t = float(weights[1]) / total
    if dim is not None and a.ndim < 2:
        dim = None
    if dim is not None and not -a.ndim <= dim < a.ndim:
        raise InputError(f"nuslerp: dim={dim}, and a tensor has {a.ndim} dimensions; give one of them, or none")
    if base is None:
        return along_arc(a, b, t, dim, STRAIGHT)
    return base + along_arc(a - base, b - base, t, dim, STRAIGHT)
