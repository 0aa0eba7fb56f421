"""SLERP: interpolation of two models along the arc between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized

import torch
from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.streamed import Parts, gram, in_parts, spanned
from exapt.core.errors import InputError

STRAIGHT = 0.9995


def check_two(models: Sized, key: str) -> None:
    """Refuses another number of models than the two that a rule interpolates.

    Raises:
        InputError: for another number.
    """
    if len(models) != 2:
        raise InputError(f"{key} interpolates 2 models, and got {len(models)}; multislerp and karcher take any number")


def arc(products: Tensor, t: float, straight: float) -> Tensor:
    """Coefficients of two vectors in their spherical interpolation (2,), from their inner products (2, 2).

    >>> arc(torch.eye(2), 0.5, 0.9995)
    tensor([0.7071, 0.7071])
    """
    square = float(products[0, 0]) * float(products[1, 1])
    cosine = min(1.0, max(-1.0, float(products[0, 1]) / math.sqrt(square))) if square else 0.0
    theta = math.acos(cosine)
    far = (1 - t, t) if abs(cosine) >= straight else (math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta))
    return torch.tensor(far, dtype=products.dtype)


def _streamed(parts: Parts, *, t: float) -> Iterator[Tensor]:
    check_two(parts, "slerp")
    yield from spanned(parts, arc(gram(parts), t, STRAIGHT))


@rule("slerp", oracle="mergekit", streamed=_streamed)
def slerped(models: Tensor, *, t: float = 0.5) -> Tensor:
    r"""Spherical linear interpolation of two models, each tensor one vector; linear where the cosine is 0.9995 or more in size.

    .. math:: \theta = \frac{\sin((1 - t)\omega)}{\sin\omega}\, \theta_1 + \frac{\sin(t\, \omega)}{\sin\omega}\, \theta_2, \qquad
        \cos\omega = \frac{\langle \theta_1, \theta_2 \rangle}{\lVert \theta_1 \rVert \lVert \theta_2 \rVert}

    Args:
        models: (2, ...); mergekit's base model is the first.
        t: How far to go from the first to the second.

    Returns:
        (...).

    Raises:
        InputError: for another number of models.

    References:
        Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985.

    >>> slerped(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), t=1 / 3)
    tensor([1.7321, 1.0000])
    """
    check_two(models, "slerp")
    return torch.tensordot(arc(gram(in_parts(models)), t, STRAIGHT).to(models), models, 1)
