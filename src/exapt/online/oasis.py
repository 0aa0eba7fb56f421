"""OASIS's post-training (Kim, Joe and Kwon, CIKM 2025); its pre-training is ``exapt.objectives.oasis_pretraining``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.gaussians import class_gaussians, mahalanobis
from exapt.core.registry import method as method_of
from exapt.online.method import Batch, Host, Space, TestTime, entropy, stepped
from exapt.online.prototypes import passes


def pseudo_labels(logits: Tensor, distances: Tensor, sure: float, gap: float) -> Tensor:
    r"""The model's own answer where its entropy is below ``sure``; else the nearest class, if the second nearest is farther by ``gap`` at least.

    Args:
        logits: (n, classes).
        distances: :math:`D_c(h_i)` (n, classes); infinite for a class that is out of the question.
        sure: :math:`\phi_{pred}`, in nats.
        gap: :math:`\phi_{MD}`.

    Returns:
        (n,) int64; -1: none.

    >>> z, d = torch.tensor([[9.0, 0.0], [0.1, 0.0], [0.1, 0.0]]), torch.tensor([[5.0, 1.0], [5.0, 1.0], [1.1, 1.0]])
    >>> pseudo_labels(z, d, sure=0.3, gap=0.5)
    tensor([ 0,  1, -1])
    """
    two = distances.topk(2, largest=False)
    nearest = torch.where(two.values[:, 1] - two.values[:, 0] >= gap, two.indices[:, 0], -1)
    return torch.where(entropy(logits) < sure, logits.argmax(-1), nearest)


@component("oasis", kind="test-time", paper="OASIS: Open-world Adaptive Self-supervised and Imbalanced-aware System")
@dataclass(frozen=True)
class OASIS(TestTime):
    r"""Trains the last layer on reliable pseudo-labels of uncertain rows, whenever the label distribution has changed:

    .. math:: \frac{1}{|S|} \sum_{i \in S} \ell(f(h_i), \hat y_i), \quad
        S = \{i: H(p_i) \ge \phi_{ent},\ \cos(\bar p^t, \bar p^{t-1}) < \phi_{cos},\ \hat y_i \text{ exists}\}

    :math:`\bar p^t` is the batch's mean prediction, compared with that of the batch before (of the first batch: with the reference's). The
    pseudo-label :math:`\hat y_i` is the model's answer where :math:`H(p_i) < \phi_{pred}`. Otherwise it is the class of least distance
    :math:`D_c(h) = \sqrt{(h - \mu_c)^\top \Sigma_c^{-1} (h - \mu_c)}` to the source's features, provided that the second least is greater by
    :math:`\phi_{MD}`; else there is none. What trains is LoRA of the last layer alone, with :math:`A` Gaussian and :math:`B` zero. Where the
    structure does not tell which layer that is, give ``online`` its name: ``head=``, ``space=exapt.LoRA(2)`` and ``where=``. The answer is what
    the model said before the step.

    **What is the paper's.** Of the conference paper only the abstract could be read. The details follow the same authors' journal article, whose
    system has the same two phases and could be read in full. The treatment of unknown classes, which the abstract names, is ours: a row
    that is farther from every class than the share ``unknown`` of the source's own rows are from their nearest gets no pseudo-label, is not
    learned from, and is counted in the diagnostics (``unknown``).

    **What is ours besides.** The article steps row by row; here one step goes down the mean over the used rows of a batch (the same for batches of one),
    since any parameter space may train. Its thresholds stand in an appendix that could not be read: the defaults here were chosen on CIFAR-10
    images under Gaussian noise. The features are the input of the head; the article takes those of a layer before, at the end of what it
    calls feature extraction. Few rows in many dimensions lie nearer to a Gaussian made of them than new rows do, so distances are not
    held against the chi-squared distribution, nor against the reference's own as they are: with 500 reference rows of ResNet-20's 64 features the
    former takes 6 % of new source rows for unknown (98 % at the ridge of CAFA) and the latter 85 %, instead of 0.3 %. The limit is therefore
    the quantile of distances in which each row is left out of its own class, and takes 0.6 %. It finds noise unknown, and not handwritten digits,
    whose features are like those of some class.

    Args:
        lr: Learning rate of SGD.
        rank: Rank of the LoRA.
        least: :math:`\phi_{ent}` as a share of :math:`\ln C`: surer rows have nothing to teach.
        sure: :math:`\phi_{pred}` as a share of :math:`\ln C`.
        similar: :math:`\phi_{cos}`; above 1, every batch is learned from.
        gap: :math:`\phi_{MD}`.
        ridge: Share of the mean variance that is added to every covariance's diagonal, so that few rows still give one with an inverse.
        unknown: Share of the reference's rows that are known; 1: as far as the farthest of them.

    References:
        Kim, Joe and Kwon, "OASIS: Open-world Adaptive Self-supervised and Imbalanced-aware System", CIKM 2025 (abstract).
        Kim, Joe and Kwon, "Evolving Intelligent Network Attack Classifier Under Label Distribution Shift", IEEE Transactions on Network Science and
        Engineering 13, 2026.

    >>> OASIS(sure=0.5).least
    0.05
    """

    equation = r"\frac{1}{|S|} \sum_{i \in S} \ell(f(h_i), \hat y_i),\ S = \{i: H(p_i) \ge \phi_{ent}, \cos(\bar p^t, \bar p^{t-1}) < \phi_{cos}\}"
    needs = ("head", "labels")

    lr: float = 3e-2
    rank: int = 2
    least: float = 0.05
    sure: float = 0.4
    similar: float = 0.7
    gap: float = 0.5
    ridge: float = 0.1
    unknown: float = 0.9973

    def __post_init__(self) -> None:
        for name in ("least", "sure"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"OASIS: {name} is {getattr(self, name)}; it is a share of the largest entropy, from 0 to 1")
        if not 0 < self.unknown <= 1:
            raise InputError(f"OASIS: unknown is {self.unknown}; it is the share of the reference that is known, above 0 and at most 1")
        if not (self.ridge > 0 and self.gap >= 0 and self.rank >= 1):
            raise InputError(f"OASIS: ridge is {self.ridge}, gap {self.gap}, rank {self.rank}; ridge is above 0, gap at least 0, rank at least 1")

    def space(self) -> Space:
        return {"head": method_of("lora", rank=self.rank, alpha=float(self.rank), start="gaussian")}

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr)

    def start(self, host: Host) -> None:
        found = [(seen, y) for seen, y in passes(host) if y is not None]
        h, y = torch.cat([seen.h for seen, _ in found]).double(), torch.cat([y for _, y in found])
        host.memory["prediction"] = torch.cat([seen.p for seen, _ in found]).mean(0)
        h, y = h[y >= 0], y[y >= 0]
        g = class_gaussians(h, y, found[0][0].logits.shape[1], self.ridge, "OASIS needs a reference")
        squared = mahalanobis(h, g.mean, g.precision).masked_fill(~g.seen, float("inf"))
        rows = g.counts[y] > 1
        nearest = squared.scatter(1, y[:, None], g.left_out(h, y)[:, None])[rows].min(1).values.sqrt()
        host.keep("gaussians", {"mean": g.mean.float(), "precision": g.precision.float(), "seen": g.seen, "limit": nearest.quantile(self.unknown).float()})

    def step(self, host: Host, batch: Batch) -> Tensor:
        seen = host.run(batch, grad=True)
        host.notes |= {"pass": seen, "used": 0, "unknown": 0}
        if not len(seen.logits):
            return seen.logits
        with torch.no_grad():
            now, before = seen.p.mean(0), host.memory["prediction"]
            labels, unknown = self.labels(host.kept("gaussians"), seen.logits, seen.h.float())
            uncertain = entropy(seen.logits) >= self.least * math.log(seen.logits.shape[-1])
            similarity = float(F.cosine_similarity(now, before, dim=0))
        host.memory["prediction"] = now
        host.notes |= {"unknown": int(unknown.sum()), "similarity": similarity}
        rows = (uncertain & (labels >= 0)).nonzero()[:, 0]
        if len(rows) and similarity < self.similar:
            stepped(host, F.cross_entropy(seen.logits[rows], labels[rows]), len(rows))
        return seen.logits

    def labels(self, gaussians: Mapping[str, Tensor], logits: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels (n,), -1 where there is none, and which rows are of no known class (n,), booleans."""
        squared = mahalanobis(h, gaussians["mean"], gaussians["precision"]).clamp(min=0)
        distances = squared.sqrt().masked_fill(~gaussians["seen"], float("inf"))
        unknown = distances.min(1).values > gaussians["limit"]
        found = pseudo_labels(logits, distances, self.sure * math.log(logits.shape[-1]), self.gap)
        return found.masked_fill(unknown, -1), unknown
