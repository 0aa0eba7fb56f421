"""Running mean and deviation of features: the lifelong normalisation of UltraEdit and MALMEN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.errors import InputError


@dataclass
class Moments:
    """Mean and deviation of all rows seen so far, updated by Welford's rule.

    The official code weighs a batch's unbiased variance by its size, which overstates it slightly; this is the exact merge of the two.

    Attributes:
        n: Rows seen.
        mean: (d,).
        square: (d,), the sum of squared differences from the mean.

    >>> m = Moments()
    >>> m.update(torch.tensor([[1.0], [3.0]]))
    >>> m.update(torch.tensor([[5.0]]))
    >>> m.normalised(torch.tensor([[5.0]]))
    tensor([[1.]])
    """

    n: int = 0
    mean: Tensor | None = None
    square: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Takes in rows (n, d)."""
        mean = x.mean(0)
        square = (x - mean).square().sum(0)
        if self.mean is None or self.square is None:
            self.n, self.mean, self.square = len(x), mean, square
            return
        apart, total = mean - self.mean, self.n + len(x)
        self.mean = self.mean + apart * len(x) / total
        self.square = self.square + square + apart.square() * self.n * len(x) / total
        self.n = total

    def normalised(self, x: Tensor) -> Tensor:
        r""":math:`(x - \mu) / (\sigma + \epsilon)` with the unbiased deviation.

        Raises:
            InputError: before two rows were seen.
        """
        if self.mean is None or self.square is None or self.n < 2:
            raise InputError(f"normalisation has seen {self.n} rows and needs two at least; edit more at once, or let it observe other edits first")
        return (x - self.mean) / ((self.square / (self.n - 1)).sqrt() + torch.finfo(x.dtype).eps)
