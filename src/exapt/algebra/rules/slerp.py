"""SLERP: interpolation of two models along the arc between them."""

from __future__ import annotations

from torch import Tensor

from exapt.algebra.rule import rule
from exapt.algebra.sphere import along_arc
from exapt.core.errors import InputError


def two(models: Tensor, key: str) -> tuple[Tensor, Tensor]:
    """The two models of a rule that interpolates.

    Raises:
        InputError: for another number.
    """
    if len(models) != 2:
        raise InputError(f"{key} interpolates 2 models, and got {len(models)}; multislerp and karcher take any number")
    return models[0], models[1]


@rule("slerp", oracle="mergekit")
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

    >>> import torch
    >>> slerped(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), t=1 / 3)
    tensor([1.7321, 1.0000])
    """
    return along_arc(*two(models, "slerp"), t, None, 0.9995)
