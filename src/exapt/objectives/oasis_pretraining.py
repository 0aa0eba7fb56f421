"""OASIS's pre-training on imbalanced source data (Kim, Joe and Kwon, CIKM 2025); its post-training is ``exapt.online.oasis``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.gaussians import class_gaussians, inside, mahalanobis
from exapt.core.objective import Objective, Seen, Step


def rare_first(frequency: Tensor) -> Tensor:
    r"""Probability of each class as a partner's: :math:`\Psi_c = (1 - \Omega_c) / \sum_k (1 - \Omega_k)`, :math:`\Omega` the shares (classes,).

    >>> rare_first(torch.tensor([0.8, 0.2]))
    tensor([0.2000, 0.8000])
    """
    return (1 - frequency) / (1 - frequency).sum()


def partners(labels: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    r"""A partner in the batch for every row: first a class by its probability among those that have another row there, then one of its rows.

    Args:
        labels: (n,).
        classes: Probability of each class (classes,).
        generator: For the draws.

    Returns:
        Places in the batch (n,), int64; the only row of a batch is its own.
    """
    if len(labels) == 1:
        return torch.zeros_like(labels)
    same = labels[:, None] == labels
    others = torch.bincount(labels, minlength=len(classes))[labels] - same.long()  # rows of j's class that are not i
    weights = (classes[labels] / others.clamp(min=1)).fill_diagonal_(0)
    return torch.multinomial(weights.cpu(), 1, generator=generator)[:, 0].to(labels.device)


def contrast(a: Tensor, b: Tensor, same: Tensor, margin: float) -> Tensor:
    r"""Distances of pairs of one class, and what those of two classes lack of a margin: :math:`\|a - b\|` or :math:`\max(0, \epsilon - \|a - b\|)`.

    Args:
        a, b: Features (n, d).
        same: Which pairs are of one class (n,), booleans.
        margin: :math:`\epsilon`.

    Returns:
        (n,).

    >>> contrast(torch.tensor([[3.0], [3.0]]), torch.tensor([[1.0], [1.0]]), torch.tensor([True, False]), margin=5.0)
    tensor([2., 3.])
    """
    distance = (a - b).square().sum(1).clamp_min(1e-12).sqrt()  # the root has no gradient at zero
    return torch.where(same, distance, (margin - distance).clamp_min(0))


def borderline(h: Tensor, y: Tensor, classes: int, border: float, ridge: float) -> tuple[Tensor, Tensor]:
    r"""Which rows lie at the border of their own class, and each class's anchor, its row of least distance.

    Args:
        h: Features (n, d).
        y: Labels (n,).
        classes: Number of classes.
        border: Distance in deviations that leaves out as much of a Gaussian in one dimension as the border does in ``d``.
        ridge: Share of the mean variance that is added to every covariance's diagonal.

    Returns:
        Booleans (n,), and the place of each class's anchor (classes,), -1 for a class without rows.
    """
    h = h.double()
    g = class_gaussians(h, y, classes, ridge, "OASISPretraining needs labelled rows")
    own = torch.zeros_like(h[:, 0])
    anchors = torch.full((classes,), -1, dtype=torch.int64, device=h.device)
    for c in g.seen.nonzero()[:, 0].tolist():
        rows = (y == c).nonzero()[:, 0]
        own[rows] = mahalanobis(h[rows], g.mean[c : c + 1], g.precision[c : c + 1])[:, 0].clamp(min=0)
        anchors[c] = rows[own[rows].argmin()]
    limit = inside(torch.tensor(float(border) ** 2, device=h.device), 1)
    return inside(own, h.shape[1]) > limit, anchors


@component("oasis_pretraining", kind="objective", paper="OASIS: Open-world Adaptive Self-supervised and Imbalanced-aware System")
@dataclass(frozen=True)
class OASISPretraining(Objective):
    r"""Trains on imbalanced classes with pairs: every row with a partner of a rare class, then rows at the border of their class with its anchor.

    .. math:: \lambda\,(\ell(x_i) + \ell(x_j)) + (1 - \lambda)\,\big([y_i = y_j]\,\|z_i - z_j\| + [y_i \ne y_j]\max(0, \epsilon - \|z_i - z_j\|)\big)

    The first pass over the data and every second after it are of the first kind: the partner :math:`j` of row :math:`i` is drawn with class
    probability :math:`\Psi_c = (1 - \Omega_c) / \sum_k (1 - \Omega_k)`, where :math:`\Omega` are the classes' shares of the source. The passes between
    are of the second: a row is at the border if it lies farther from the Gaussian of its class, in the present features of the whole source,
    than ``border`` allows. It is paired with the row of its class that lies nearest to the mean, the anchor; a batch without such rows
    teaches nothing.

    **What is the paper's.** Of the conference paper only the abstract could be read. The details follow the same authors' journal article, whose
    system has the same two phases and could be read in full. It takes 3 for the border, arguing by the 99.7 % of a Gaussian, which
    holds in one dimension; here it is the distance that holds as much in the features' own number of dimensions, by the chi-squared distribution
    (in one dimension it is 3). A class of fewer rows than about that distance squared has no row beyond it, since its covariance is made
    of them.

    **What is ours.** A partner is another row of the batch, as an objective sees gradients of no other: probabilities are shared out among the
    classes there. An anchor's features are held from the start of the pass, so that its part of the loss trains the head alone.
    The margin's default was chosen on digits.

    **What was measured.** On scikit-learn's digits, of which five classes kept 6 rows each (small network, 8 seeds), the rare classes' recall after 20
    passes of which 10 are at the border was 0.47, against 0.55 of cross-entropy in 20 passes (0.07 in 10); in 40 passes 0.68 against 0.71. With
    ``weight=1``, which leaves the distances out, it was 0.52 and 0.75. So compare the two on your own rows.

    Args:
        weight: :math:`\lambda`; the article finds about 0.4 best.
        margin: :math:`\epsilon`, in the features' own unit.
        border: In deviations of one dimension.
        ridge: Share of the mean variance that is added to every covariance's diagonal.

    Memory:
        ``passes`` (), those begun; ``frequency`` (classes,); ``border`` (source rows,), booleans; ``anchors`` (classes, d).

    References:
        Kim, Joe and Kwon, "OASIS: Open-world Adaptive Self-supervised and Imbalanced-aware System", CIKM 2025 (abstract).
        Kim, Joe and Kwon, "Evolving Intelligent Network Attack Classifier Under Label Distribution Shift", IEEE Transactions on Network Science and
        Engineering 13, 2026.

    >>> OASISPretraining().setting
    'source'
    """

    equation = r"\lambda(\ell(x_i) + \ell(x_j)) + (1 - \lambda)([y_i = y_j]\|z_i - z_j\| + [y_i \ne y_j]\max(0, \epsilon - \|z_i - z_j\|))"
    setting = "source"
    needs_features = True

    weight: float = 0.4
    margin: float = 10.0
    border: float = 3.0
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"OASISPretraining: weight is {self.weight}; it lies in [0, 1]")
        if not (self.margin >= 0 and self.border > 0 and self.ridge > 0):
            raise InputError(f"OASISPretraining: margin is {self.margin}, border {self.border}, ridge {self.ridge}; margin is at least 0, the others above")

    def before_epoch(self, s: Step) -> None:
        m = s.memory
        m["passes"] = m.get("passes", torch.zeros((), dtype=torch.int64)) + 1
        if "frequency" in m and not self._refining(s):
            return
        seen = [(x.h.float(), x.labels, x.index, x.logits.shape[1]) for x in s.sources()]
        h, y, index = torch.cat([x[0] for x in seen]), torch.cat([x[1] for x in seen if x[1] is not None]), torch.cat([x[2] for x in seen])
        classes = seen[0][3]
        if len(index.unique()) != len(index):
            raise InputError("OASISPretraining pairs rows: it needs one prediction for each row, and this task makes several")
        m["frequency"] = torch.bincount(y, minlength=classes) / len(y)
        if self._refining(s):
            at_border, anchors = borderline(h, y, classes, self.border, self.ridge)
            m["border"] = torch.zeros_like(at_border).index_copy(0, index, at_border)
            m["anchors"] = h[anchors.clamp(min=0)]  # a class without rows has no row at its border either
        elif int((m["frequency"] > 0).sum()) < 2:
            raise InputError("OASISPretraining needs labelled rows of two classes at least")

    def loss(self, s: Step) -> Tensor:
        return self._refined(s, s.s) if self._refining(s) else self._balanced(s, s.s)

    @staticmethod
    def _refining(s: Step) -> bool:
        return int(s.memory["passes"]) % 2 == 0

    def _balanced(self, s: Step, seen: Seen) -> Tensor:
        y = seen.labels
        assert y is not None
        j = partners(y, rare_first(s.memory["frequency"]), s.generator)
        each, z = F.cross_entropy(seen.logits, y, reduction="none"), seen.h.float()
        return self._pairs(each, each[j], contrast(z, z[j], y == y[j], self.margin))

    def _refined(self, s: Step, seen: Seen) -> Tensor:
        assert seen.labels is not None
        rows = s.memory["border"][seen.index].nonzero()[:, 0]
        if not len(rows):
            return 0 * seen.logits.sum()
        y, z, anchor = seen.labels[rows], seen.h[rows], s.memory["anchors"][seen.labels[rows]]
        of_anchor = F.cross_entropy(s.head(anchor.to(z.dtype)).float(), y, reduction="none")
        of_row = F.cross_entropy(seen.logits[rows], y, reduction="none")
        return self._pairs(of_anchor, of_row, contrast(anchor, z.float(), torch.ones_like(y, dtype=torch.bool), self.margin))

    def _pairs(self, first: Tensor, second: Tensor, apart: Tensor) -> Tensor:
        return (self.weight * (first + second) + (1 - self.weight) * apart).mean()
