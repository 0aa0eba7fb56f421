"""The loop's alarm: bounded scores of every row, and an anytime-valid test that their means are still the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.decomposition import PCA

from exapt.loop.runner import Answer, Array
from exapt.shift.detect.combine import CombinedAlarm
from exapt.shift.detect.conformal_martingale import ConformalMartingale

SMALLEST = 60
_GRID = 256  # scores are rounded, so that the alarm's state is a count for each value and does not grow with the stream


class Scores:
    """Scores of a row, all in [0, 1]: confidence, probabilities of classes (or of groups of them), and how far it is from the nearest class.

    The last is the rank, among a third of the reference, of the Mahalanobis distance of the features' principal components to the nearest
    class mean; the other rows of the reference are for the alarm. It is left out where the reference has fewer than 60 rows.
    """

    def __init__(self, answer: Answer, labels: Array, bins: int, seed: int) -> None:
        n, classes = answer.logits.shape
        self.group = np.arange(classes) % bins if classes > bins else np.arange(classes)
        self.columns = [k for k in range(self.group.max() + 1) if classes > 2 or k == 0]
        order = np.random.default_rng(seed).permutation(n)
        cut = n // 3 if n >= SMALLEST else 0
        self.own, self.rest = order[:cut], order[cut:]
        self.known: Array | None = None
        if cut:
            x, y = answer.features[self.own], labels[self.own]
            self.pca = PCA(max(1, min(16, x.shape[1], cut // 8)), random_state=0).fit(x)
            z = self.pca.transform(x)
            kinds = [c for c in np.unique(y) if (y == c).sum() >= 3] or [-1]
            self.means = np.stack([z[y == c].mean(0) if c >= 0 else z.mean(0) for c in kinds])
            within = z - self.means[((z[:, None] - self.means) ** 2).sum(-1).argmin(1)]
            cov = within.T @ within / cut
            value, vector = np.linalg.eigh(cov + (0.05 * np.trace(cov) / len(cov) + 1e-12) * np.eye(len(cov)))
            self.sphere = vector / np.sqrt(value)
            self.known = np.sort(self.distance(answer.features[self.own]))

    def distance(self, features: Array) -> Array:
        """Distance of every row to the nearest class mean."""
        z = (self.pca.transform(features)[:, None] - self.means) @ self.sphere
        return np.asarray(np.sqrt((z**2).sum(-1)).min(1))

    def __call__(self, answer: Answer) -> Array:
        p = answer.proba
        parts = [p.max(1), *(p[:, self.group == k].sum(1) for k in self.columns)]
        if self.known is not None:
            parts.append(np.searchsorted(self.known, self.distance(answer.features)) / len(self.known))
        return np.round(np.clip(np.column_stack(parts), 0.0, 1.0) * _GRID) / _GRID


class Watch:
    """An alarm over the scores of the *frozen* model, so that it is about the data and not about what was adapted.

    Conformal martingales, one a score, with a Bonferroni correction: the probability of ever a false alarm since it was started is at most
    ``alpha``. They compare rows with rows; betting e-processes must first bound the reference's means, and of some hundred rows that bound hid
    changes of the class prior for a thousand rows (see the log of experiments).
    """

    kind = "conformal martingale"

    def __init__(self, answer: Answer, labels: Array, alpha: float, bins: int, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self.scores = Scores(answer, labels, bins, seed)
        self.reference = self.scores(answer.rows(self.scores.rest))
        self.start(None)

    def _made(self) -> CombinedAlarm:
        return CombinedAlarm([ConformalMartingale(random_state=self.seed)] * self.reference.shape[1], alpha=self.alpha)

    def start(self, answer: Answer | None) -> None:
        """Begins anew against these rows; ``None``: against the reference."""
        self.alarm = self._made().fit(self.reference if answer is None else self.scores(answer))
        self.since = 0

    def update(self, answer: Answer, number: int) -> bool:
        """Takes a batch's rows and says whether the alarm has gone off; ``since`` is the last batch after which no evidence was left, a wealth of 1."""
        rang = self.alarm.update(self.scores(answer))
        if self.alarm.log_wealth_ <= 0:
            self.since = number
        return bool(rang)

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {"alarm": self.alarm.state(), "since": self.since}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a :meth:`state`."""
        self.since = int(state["since"])
        self.alarm = self._made().restore(state["alarm"])

    def shown(self) -> dict[str, Any]:
        """What a report shows: the logarithm of the wealth, where it rings, rows seen, and by what."""
        return {
            "log_wealth": float(self.alarm.log_wealth_), "threshold": float(self.alarm.threshold_), "p_value": float(self.alarm.p_value_),
            "rows": int(self.alarm.t_), "by": self.kind,
        }  # fmt: skip
