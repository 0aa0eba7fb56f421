"""Whether a candidate is better than what serves: estimated accuracy, disagreement, collapse, and labels where there are some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest
from torch import Tensor

from exapt.core.errors import InputError
from exapt.loop.policy import Policy
from exapt.loop.runner import Answer, Array
from exapt.shift.accuracy.atc import ATC
from exapt.shift.accuracy.cot import COT, COTT
from exapt.shift.accuracy.doc import DoC
from exapt.shift.accuracy.ensemble import AccuracyEnsemble
from exapt.shift.results import Estimate

LEADING = "cott"


@dataclass
class Judged:
    """A candidate after its examination. ``twin``: logits on the reference, by the same remedy made for the reference;
    ``right``: which rows of the reference it answers right, times their weights, where these make the estimate; ``differs``: share of the rows on which
    it answers another class than what serves."""

    label: str
    names: tuple[str, ...]
    estimate: Estimate
    tests: dict[str, Any]
    failed: list[str]
    made: Mapping[str, Any]
    twin: Tensor | None = None
    right: Array | None = None
    differs: float = 0.0
    labelled: dict[str, Any] | None = None

    @property
    def value(self) -> float:
        """Accuracy on labels where there are enough, else estimated."""
        return self.labelled["accuracy"] if self.labelled and self.labelled["decides"] else self.estimate.value

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.label, "estimate": estimate_json(self.estimate), "tests": self.tests, "failed": self.failed, "made": self.made,
            "labelled": self.labelled, "adapters": list(self.names),
        }  # fmt: skip


def estimate_json(e: Estimate) -> dict[str, Any]:
    """An estimate as JSON, with each member's value."""
    members = e.evidence.get("members", {})
    return {
        "value": e.value, "low": e.low, "high": e.high, "level": e.level, "known": e.known,
        "members": {k: m.value for k, m in members.items()},
    }  # fmt: skip


class Estimator:
    """Accuracy of a model on rows without labels, fitted on its answers on labelled rows.

    The estimate is the median of several where they agree as on simulated shifts of these rows; else it is marked as not known, and is that of
    ``COTT``, the only one of them that is not fooled by a model that is sure and wrong on shifted inputs (it asks for the class frequencies too).

    Args:
        proba: What the model said of them (n, classes).
        labels: Their labels.
        policy: Level and replicates.
        seed: Of the bootstrap.

    Raises:
        InputError: for fewer than 20 rows.
    """

    def __init__(self, proba: Array, labels: Array, policy: Policy, seed: int) -> None:
        common: dict[str, Any] = {"level": 1 - policy.level, "unseen": "allow", "random_state": seed}
        self.ensemble = AccuracyEnsemble(
            {
                LEADING: COTT(batch_size=200, n_boot=policy.draws, **common), "cot": COT(batch_size=200, n_boot=0, **common),
                "atc": ATC(n_boot=policy.draws, **common), "doc": DoC(n_boot=policy.draws, **common),
            },
            n_shifts=10, level=1 - policy.level, random_state=seed,
        ).fit(proba, labels)  # fmt: skip

    def __call__(self, proba: Array) -> Estimate:
        found = self.ensemble.estimate(proba)
        if found.known:
            return found
        leading: Estimate = found.evidence["members"][LEADING]
        return Estimate(leading.value, leading.low, leading.high, leading.level, False, found.evidence)


def leading(estimate: Estimate) -> Estimate:
    """The leading estimator's own estimate, with the others as evidence."""
    own = estimate.evidence["members"][LEADING]
    return Estimate(own.value, own.low, own.high, own.level, estimate.known, estimate.evidence)


def weighted(right: Array, weights: Array, level: float, evidence: Mapping[str, Any]) -> Estimate:
    """Accuracy where only the class prior differs from the reference's: the share of its rows answered right, weighted to the prior.

    The interval is the exact binomial one for the effective number of rows; what the prior itself is uncertain by is not in it.
    """
    value = float(np.average(right, weights=weights))
    count = max(1, round(float(weights.sum() ** 2 / (weights**2).sum())))
    interval = binomtest(round(value * count), count).proportion_ci(level)
    return Estimate(value, min(value, float(interval.low)), max(value, float(interval.high)), level, True, evidence)


def resampled(labels: Array, prior: Array, seed: int) -> Array:
    """Rows of the reference, as many as it has, drawn so that classes are as frequent as ``prior`` says."""
    counts = np.bincount(labels, minlength=len(prior))
    weight = np.divide(prior, counts, out=np.zeros(len(prior)), where=counts > 0)[labels]
    if weight.sum() <= 0:
        raise InputError("the estimated prior is on classes that the reference lacks")
    return np.random.default_rng(seed).choice(len(labels), len(labels), p=weight / weight.sum())


def effective_classes(proba: Array) -> float:
    """Exponential of the entropy of the shares of predicted classes: K where all K are predicted alike, 1 where all rows are one class."""
    share = np.bincount(proba.argmax(1), minlength=proba.shape[1]) / len(proba)
    return float(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))))


def mean_entropy(proba: Array) -> float:
    """Mean entropy of the rows, in nats."""
    return float(-(proba * np.log(np.maximum(proba, 1e-300))).sum(1).mean())


def examined(
    label: str, names: tuple[str, ...], made: Mapping[str, Any], own: Answer, frozen: Answer, estimates: Sequence[Estimate],
    expected: Mapping[str, float], policy: Policy,
) -> Judged:  # fmt: skip
    """Tests one candidate.

    Args:
        label, names, made: What it is.
        own, frozen: Answers on the rows kept for verification, by the candidate and by the frozen model.
        estimates: The candidate's accuracy and the frozen model's.
        expected: ``classes`` (effective number) and ``entropy`` that rows like these should give.
        policy: The limits.
    """
    own_p, failed = own.proba, []
    apart = float((own_p.argmax(1) != frozen.proba.argmax(1)).mean())
    # where two models differ at least one is wrong, so their errors add up to no less
    most = sum(1 - e.low for e in estimates)
    tests = {
        "disagreement": apart, "most_disagreement": min(1.0, most), "classes": effective_classes(own_p), "expected_classes": expected["classes"],
        "entropy": mean_entropy(own_p), "expected_entropy": expected["entropy"],
    }  # fmt: skip
    if not np.isfinite(own_p).all():
        failed.append("logits are not finite")
    if apart > most and names:
        failed.append(f"differs from the frozen model on {apart:.0%} of the rows, more than both models' estimated errors allow ({most:.0%})")
    if tests["classes"] < policy.collapse * expected["classes"] and names:
        failed.append(f"predictions collapse to {tests['classes']:.1f} classes where {expected['classes']:.1f} are expected")
    if tests["entropy"] < policy.entropy * expected["entropy"] and names:
        failed.append(f"entropy collapses to {tests['entropy']:.2g} nats where {expected['entropy']:.2g} are expected")
    return Judged(label, names, estimates[0], tests, failed, made)


def with_labels(one: Judged, own: Array, serving: Array, truth: Mapping[int, int], policy: Policy) -> None:
    """Adds what labels of some of the rows say: accuracy with its exact interval, and the sign test against what serves.

    Args:
        one: The candidate.
        own, serving: Predicted classes of the rows, by the candidate and by what serves.
        truth: Labels by place among these rows.
        policy: From how many labels on they decide.
    """
    if not truth:
        return
    places = np.array(sorted(truth))
    labels = np.array([truth[i] for i in places])
    right, served = own[places] == labels, serving[places] == labels
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(1 - policy.level)
    better, worse = int((right & ~served).sum()), int((~right & served).sum())
    p = binomtest(worse, better + worse, alternative="greater").pvalue if better + worse else 1.0
    one.labelled = {
        "rows": len(right), "accuracy": float(right.mean()), "low": float(interval.low), "high": float(interval.high), "better": better, "worse": worse,
        "p_worse": float(p), "decides": len(right) >= policy.labels,
    }  # fmt: skip
    if p <= policy.level:
        one.failed.append(f"on {len(right)} labelled rows it is worse than what serves ({worse} rows lost, {better} won, p = {p:.2g})")


def clean(value: Any) -> Any:
    """The value as JSON holds it: NumPy's numbers as Python's, what is not finite as ``None``."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return clean(value.tolist())
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str) else str(value)
