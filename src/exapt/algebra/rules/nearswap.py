"""NearSwap: take the other model over where it is near, and go no further than a bound where it is not."""

from __future__ import annotations

from torch import Tensor

from exapt.algebra.rule import rule
from exapt.core.errors import InputError


@rule("nearswap", oracle="mergekit", entrywise=True)
def near_swapped(deltas: Tensor, *, t: float = 1e-4) -> Tensor:
    r"""Interpolates each entry with weight :math:`\min(1, t / |\tau|)`, which is the difference clipped to :math:`[-t, t]`.

    Args:
        deltas: One task vector (1, ...).
        t: The bound :math:`t`, in units of the parameters.

    Returns:
        (...).

    Raises:
        InputError: for another number of models, or a negative bound.

    References:
        alchemonaut, "QuartetAnemoi-70B-t0.0001", huggingface.co 2024 (there is no paper).

    >>> import torch
    >>> near_swapped(torch.tensor([[0.3, -0.01]]), t=0.1)
    tensor([ 0.1000, -0.0100])
    """
    if len(deltas) != 1:
        raise InputError(f"nearswap merges one model into the base, and got {len(deltas)}")
    if not t >= 0:
        raise InputError(f"nearswap: t={t} is a bound on differences; give one of at least 0")
    return deltas[0].clamp(-t, t)
