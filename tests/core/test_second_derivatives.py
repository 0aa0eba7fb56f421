"""The autograd functions of fast paths have right first and second derivatives: objectives that look ahead (MLDG, UDIM) use both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from exapt.core.orthogonal import rotate
from exapt.core.products import LinearLowRank, LinearPlus, LinearScaled, LowRank
from exapt.methods.c3a import _Correlated
from exapt.methods.frod import _middle
from exapt.methods.randlora import _Scaled
from exapt.methods.road import _Turned

W, BIAS = torch.randn(5, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0)), torch.ones(5, dtype=torch.double)
PLACES = torch.tensor([1, 5, 11])
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "low rank": (lambda y, x, a, b: LowRank.apply(y, x, a, b, 0.7), [(3, 5), (3, 6), (2, 6), (5, 2)]),
    "linear low rank": (lambda x, a, b: LinearLowRank.apply(x, W, BIAS, a, b, 0.7), [(3, 6), (2, 6), (5, 2)]),
    "linear plus": (lambda x, h, b: LinearPlus.apply(x, W, BIAS, h, b, 0.7), [(2, 3, 6), (2, 3, 2), (5, 2)]),
    "linear scaled": (lambda x, u, s: LinearScaled.apply(x, W, BIAS, u, s), [(2, 3, 6), (2, 3, 5), (5,)]),
    "linear scaled, one": (lambda x, u, s: LinearScaled.apply(x, W, BIAS, u, s), [(6,), (5,), (5,)]),
    "rotated": (rotate, [(2, 3, 6), (2, 3, 3)]),
    "turned": (_Turned.apply, [(3, 2, 4), (2, 4), (2, 4)]),
    "turned, one": (_Turned.apply, [(2, 4), (2, 4), (2, 4)]),
    "scaled bases": (lambda size, gamma: _Scaled.apply(size, torch.ones(3, 1, 4, dtype=torch.double) / 3, gamma), [(3, 2), (2, 4)]),
    "correlated": (_Correlated.apply, [(3, 2, 4), (3, 2, 4)]),
    "diagonal and sparse": (lambda t, change, s: _middle(t, change, s, PLACES), [(4, 3), (4,), (3,)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_their_gradients(name: str) -> None:
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, dtype=torch.double, generator=generator).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
