"""Classes as Gaussians of their features: what test-time methods and objectives measure distances to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.errors import InputError


@dataclass(frozen=True)
class Gaussians:
    """A Gaussian for each class.

    Attributes:
        mean: (classes, d); zeros for a class without rows.
        precision: Inverse covariances (classes, d, d).
        counts: Rows of each class (classes,), int64.
        added: Variance added to each covariance's diagonal (classes,).
    """

    mean: Tensor
    precision: Tensor
    counts: Tensor
    added: Tensor

    @property
    def seen(self) -> Tensor:
        """Which classes have rows (classes,), booleans."""
        return self.counts > 0

    def left_out(self, h: Tensor, y: Tensor) -> Tensor:
        r"""Squared distances of the rows that the Gaussians were made of to their own class as it is without them.

        Without row :math:`i` the mean of :math:`n` rows moves by :math:`u / (n - 1)`, :math:`u = h_i - \mu`, and their scatter loses
        :math:`\frac{n}{n-1} u u^\top`, so that a single inverse for each class serves all of its rows (Sherman and Morrison). Few rows in many
        dimensions are near to a Gaussian that is made of them, and new rows are not; these distances are those of new rows.

        Args:
            h: The features (n, d).
            y: Their labels (n,).

        Returns:
            (n,); NaN for the only row of its class.
        """
        found = torch.full_like(h[:, 0], float("nan"))
        unit = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
        for c in (self.counts > 1).nonzero()[:, 0].tolist():
            rows, n = y == c, int(self.counts[c])
            u = h[rows] - self.mean[c]
            with_all = u.T @ u / (n - 1) + self.added[c] * unit
            q = torch.einsum("nd,dn->n", u, torch.linalg.solve(with_all, u.T))
            found[rows] = (n / (n - 1)) ** 2 * q / (1 - n / (n - 1) ** 2 * q).clamp(min=1e-12)
        return found


def class_gaussians(h: Tensor, y: Tensor, classes: int, ridge: float, name: str) -> Gaussians:
    """The Gaussian of each class. A class with one row takes the mean covariance of those with more.

    Args:
        h: Features (n, d), in double precision.
        y: Labels (n,), int64, from 0.
        classes: Number of classes.
        ridge: Share of the mean variance that is added to every covariance's diagonal, so that few rows still give one with an inverse.
        name: Who asks, for what is said of rows that cannot be used.

    Raises:
        InputError: where fewer than two classes have a row, or none has two.

    >>> h = torch.tensor([[0.0], [2.0], [5.0], [7.0]], dtype=torch.float64)
    >>> class_gaussians(h, torch.tensor([0, 0, 1, 1]), 2, 0.0, "it").mean.flatten()
    tensor([1., 6.], dtype=torch.float64)
    """
    d = h.shape[1]
    counts = torch.bincount(y, minlength=classes)
    if int((counts > 1).sum()) == 0 or int((counts > 0).sum()) < 2:
        raise InputError(f"{name} of two classes at least, one of them with two rows")
    mean, cov = torch.zeros(classes, d, dtype=h.dtype, device=h.device), torch.zeros(classes, d, d, dtype=h.dtype, device=h.device)
    for c in range(classes):
        if counts[c]:
            mean[c] = h[y == c].mean(0)
            cov[c] = torch.cov(h[y == c].T, correction=0).view(d, d)
    cov[counts < 2] = cov[counts > 1].mean(0)
    added = ridge * cov.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    cov = cov + added[:, None, None] * torch.eye(d, dtype=h.dtype, device=h.device)
    return Gaussians(mean, torch.linalg.inv(cov), counts, added)


def mahalanobis(h: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    r"""Squared distances :math:`(h - \mu_c)^\top \Sigma_c^{-1} (h - \mu_c)` of rows (n, d) to classes, (n, classes).

    >>> mahalanobis(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[[0.25]]]))
    tensor([[1.]])
    """
    away = h[:, None] - mean
    return torch.einsum("ncd,cde,nce->nc", away, precision, away)


def inside(squared: Tensor, d: int) -> Tensor:
    r"""Share of a Gaussian of :math:`d` dimensions that is nearer to its mean than this squared distance: :math:`P(d/2, D^2/2)`, the
    chi-squared distribution.

    >>> round(float(inside(torch.tensor(9.0), 1)), 4)
    0.9973
    """
    half = squared.double() / 2
    return torch.special.gammainc(torch.full_like(half, d / 2), half)
