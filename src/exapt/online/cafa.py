"""CAFA (Jung et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.gaussians import class_gaussians, mahalanobis
from exapt.online.method import Batch, Host, Space, TestTime, norms, stepped


@component("cafa", kind="test-time", paper="CAFA: Class-Aware Feature Alignment for Test-Time Adaptation")
@dataclass(frozen=True)
class CAFA(TestTime):
    r"""Draws features to the source's Gaussian of their predicted class and away from those of the others.

    .. math:: \frac{1}{n} \sum_i \log \frac{D_{\hat y_i}(h_i)}{\sum_{c \ne \hat y_i} D_c(h_i)}, \quad
        D_c(h) = (h - \mu_c)^\top \Sigma_c^{-1} (h - \mu_c)

    The Gaussians are the source model's, of a labelled reference. A class with fewer than two rows takes the mean covariance of the others; one
    with none is left out, and so are rows predicted to be it. The answer is what the model said before the step. No official code was found;
    the ratio's form follows notes on the paper, as its full text could not be read.

    Args:
        lr: Learning rate of Adam.
        ridge: Share of the mean variance that is added to every covariance's diagonal, so that few rows still give one with an inverse.

    References:
        Jung, Lee, Kim, Shaban, Boots and Choo, "CAFA: Class-Aware Feature Alignment for Test-Time Adaptation", ICCV 2023.
    """

    equation = r"\frac{1}{n} \sum_i \log \frac{D_{\hat y_i}(h_i)}{\sum_{c \ne \hat y_i} D_c(h_i)}"
    statistics = 0.0
    needs = ("norm", "head", "labels")

    lr: float = 1e-3
    ridge: float = 1e-2

    def space(self) -> Space:
        return norms()

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr)

    def start(self, host: Host) -> None:
        passes = [(host.run_frozen(b), y) for b, y in host.reference]
        h = torch.cat([seen.h for seen, _ in passes]).double()
        y = torch.cat([y.flatten() for _, y in passes if y is not None]).to(h.device)
        if len(h) != len(y):
            raise InputError(f"CAFA needs one label for every prediction of the reference; there are {len(y)} for {len(h)}")
        g = class_gaussians(h, y, passes[0][0].logits.shape[1], self.ridge, "CAFA needs a reference")
        host.keep("gaussians", {"mean": g.mean.float(), "precision": g.precision.float(), "seen": g.seen})

    def step(self, host: Host, batch: Batch) -> Tensor:
        seen = host.run(batch, grad=True)
        g = host.kept("gaussians")
        distances = mahalanobis(seen.h.float(), g["mean"], g["precision"]).clamp(min=1e-12)
        label = seen.logits.argmax(-1)
        rows = g["seen"][label].nonzero()[:, 0]
        host.notes |= {"pass": seen, "used": 0}
        if len(rows):
            others = g["seen"] & (torch.arange(distances.shape[1], device=label.device) != label[:, None])
            ratio = distances.gather(1, label[:, None])[:, 0].log() - (distances * others).sum(1).log()
            stepped(host, ratio[rows].mean(), len(rows))
        return seen.logits
