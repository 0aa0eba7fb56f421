"""One decision: diagnose the recent rows, make the remedies as shadows, verify them on rows they have not seen, choose."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exapt.core.errors import InputError
from exapt.loop.policy import Policy
from exapt.loop.remedies import Bench, Plan, estimated_prior, made, picked, plans, split, to_bytes
from exapt.loop.runner import Answer, Array, Names, Reference, Runner
from exapt.loop.verify import Estimator, Judged, clean, effective_classes, examined, leading, mean_entropy, resampled, weighted, with_labels
from exapt.loop.watch import Scores
from exapt.online.method import Batch
from exapt.shift.diagnose.diagnosis import ShiftDiagnosis
from exapt.shift.results import Estimate

Truth = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class Held:
    """Rows of one batch that are kept: which batch, and which rows of it."""

    number: int
    key: str
    ids: tuple[int, ...]
    batch: Batch


@dataclass
class Verdict:
    """What was found and done. ``names`` serve from now on; ``files`` holds those of them that are new, ``twin`` their logits on the reference."""

    action: str
    reason: str
    names: Names
    kind: str = "unknown"
    p_values: Mapping[str, float] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    ask: list[list[Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    twin: Tensor | None = None
    prior: list[float] | None = None


class Lab:
    """What every decision needs: the model, the reference, the policy, and what was learned of the reference."""

    def __init__(self, runner: Runner, reference: Reference, policy: Policy, seed: int) -> None:
        self.runner, self.reference, self.policy, self.seed = runner, reference, policy, seed
        self.diagnosis: ShiftDiagnosis | None = None
        self.why_not = ""
        try:
            found = ShiftDiagnosis(alpha=policy.level, random_state=seed)
            self.diagnosis = found.fit(reference.answer.features, reference.answer.proba, reference.labels)
        except InputError as e:
            self.why_not = f"nothing is adapted: {e}"

    def estimator(self, twin: Tensor | None, prior: Sequence[float] | None = None) -> Estimator:
        """Estimates the accuracy of a model that says ``twin`` of the reference (logits; ``None``: the frozen one), on rows of this class prior.

        Raises:
            InputError: for a reference that is too small.
        """
        ref = self.reference
        proba = ref.answer.proba if twin is None else Answer(twin, ref.answer.features).proba
        rows = self.rows(prior)
        return Estimator(proba[rows], ref.labels[rows], self.policy, self.seed)

    def rows(self, prior: Sequence[float] | None) -> Array:
        """Rows of the reference, drawn to this class prior."""
        ref = self.reference
        return np.arange(len(ref.labels)) if prior is None else resampled(ref.labels, np.asarray(prior), self.seed)


def decide(lab: Lab, held: Sequence[Held], serving: Names, twin: Tensor | None, number: int, scores: Scores, truth: Truth) -> Verdict:
    """Decides on the rows held; the model's adapters are as before, but for those that won.

    Args:
        lab: Model, reference, policy.
        held: The recent rows.
        serving, twin: What serves, and its logits on the reference (:class:`Judged`).
        number: The decision's, for names and seeds.
        scores: For the order in which rows are worth a label.
        truth: Labels known of rows, by key and row.
    """
    frozen = lab.runner([h.batch for h in held])
    if lab.diagnosis is None:
        return Verdict("none", lab.why_not, serving, twin=twin)
    found = lab.diagnosis.diagnose(frozen.features, frozen.proba)
    verdict = Verdict("none", "", serving, found.kind, clean(found.p_values), clean(found.evidence), twin=twin)
    if found.kind == "novel":
        verdict.action = "ask"
        verdict.ask = _worth_labelling(held, frozen, scores, lab.policy.ask)
        verdict.reason = f"rows crowd where the reference is rare: labels of {len(verdict.ask)} rows would tell what they are"
        return verdict
    if found.kind == "none" and not serving:
        verdict.reason = "the rows are like the reference"
        return verdict
    _Round(lab, held, frozen, serving, number, truth, verdict).run()
    return verdict


def _worth_labelling(held: Sequence[Held], frozen: Answer, scores: Scores, most: int) -> list[list[Any]]:
    """Keys and rows, far from every class of the reference and from each other."""
    places = [(h.key, i) for h in held for i in h.ids]
    far = scores.distance(frozen.features) if scores.known is not None else -frozen.proba.max(1)
    pool = np.argsort(-far, kind="stable")[: 4 * most]
    chosen = [0]
    gaps = np.linalg.norm(frozen.features[pool] - frozen.features[pool[0]], axis=1)
    while len(chosen) < min(most, len(pool)):
        chosen.append(int(gaps.argmax()))
        gaps = np.minimum(gaps, np.linalg.norm(frozen.features[pool] - frozen.features[pool[chosen[-1]]], axis=1))
    return [list(places[pool[i]]) for i in chosen]


class _Round:
    """One round of candidates for one verdict."""

    def __init__(self, lab: Lab, held: Sequence[Held], frozen: Answer, serving: Names, number: int, truth: Truth, verdict: Verdict) -> None:
        self.lab, self.policy, self.runner, self.serving, self.verdict, self.number = lab, lab.policy, lab.runner, serving, verdict, number
        batches = [h.batch for h in held]
        order = np.random.default_rng([lab.seed, number]).permutation(len(frozen.logits))
        self.kept = np.zeros(len(order), dtype=bool)
        self.kept[order[: round(len(order) * lab.policy.verify)]] = True
        kept = torch.from_numpy(self.kept)
        self.rows = split(batches, kept)
        self.frozen = frozen.rows(self.kept)
        self.bench = Bench(lab.runner, lab.reference, split(batches, ~kept), lab.policy, lab.seed * 100_003 + number)
        places = [(h.key, i) for h in held for i in h.ids]
        unseen = [places[i] for i in np.flatnonzero(self.kept)]
        self.truth = {j: truth[k][i] for j, (k, i) in enumerate(unseen) if i in truth.get(k, {})}
        self.until = None if lab.policy.seconds is None else time.perf_counter() + lab.policy.seconds
        self.built: list[tuple[Plan, Names, dict[str, Any]]] = []
        self.errors: list[dict[str, Any]] = []

    def run(self) -> None:
        """Makes, examines and chooses; every shadow that did not win is off again."""
        winner: Names = self.serving
        try:
            for i, plan in enumerate(plans(self.verdict.kind, self.policy, self.runner.model)):
                self._build(i, plan)
            won = self._choose()
            winner = won.names if won is not None else self.serving
            if winner and winner != self.serving:
                provenance = {"decision": self.number, "kind": self.verdict.kind}
                self.verdict.files = {n: to_bytes(self.runner, n, provenance) for n in winner}
            self.verdict.names, self.verdict.twin = winner, self.verdict.twin if won is None else won.twin
        except BaseException:
            winner = self.serving
            raise
        finally:
            self.runner.remove(tuple(n for _, names, _ in self.built for n in names if n not in winner))

    def _build(self, i: int, plan: Plan) -> None:
        if self.until is not None and time.perf_counter() > self.until:
            self.errors.append({"name": plan.label, "error": f"left out: the {self.policy.seconds} s of one decision were over"})
            return
        names = tuple(f"loop{self.number}c{i}s{j}" for j in range(len(plan.steps)))
        try:
            self.built.append((plan, names, made(self.bench, plan, names)))
        except Exception as e:
            self.errors.append({"name": plan.label, "error": line_of(e)})

    def _prior(self) -> list[float] | None:
        """The class prior under which candidates are compared; ``None``: the reference's."""
        if "label" not in self.verdict.kind:
            return None
        found = [e["prior_correction"]["prior"] for _, _, e in self.built if "prior_correction" in e]
        return list(found[0]) if found else list(map(float, estimated_prior(self.bench, ())[0]))

    def _choose(self) -> Judged | None:
        """The candidate that wins; ``None``: what serves stays."""
        verdict, margin = self.verdict, self.policy.margin
        verdict.prior = self._prior()
        try:
            judged = self._judged(verdict.prior)
        except InputError as e:
            verdict.candidates, verdict.reason, verdict.action = clean(self.errors), f"nothing can be verified: {e}", "keep"
            return None
        verdict.candidates = clean([*(j.shown() for j in judged), *self.errors])
        serving, rest = judged[0], judged[1:]
        count = len(self.frozen.logits)
        passed: list[tuple[float, float, Judged]] = [(*gain(j, serving, count), j) for j in rest if not j.failed]
        if verdict.kind == "none":  # without a shift the source's own model is what to go back to, unless it is worse
            frozen = next((j for g, _, j in passed if not j.names and g >= -margin), None)
            verdict.action = "keep" if frozen is None else "revert"
            verdict.reason = "the rows are like the reference again" + ("; the frozen model is estimated worse than what serves" if frozen is None else "")
            return frozen
        gained, error, best = max(passed, key=lambda found: found[0], default=(-1.0, 0.0, None))
        if best is None or gained < max(margin, self.policy.errors * error):
            verdict.action = "keep"
            why = "the best candidate gains" if best is not None else "no candidate could be made" if not rest else "every candidate failed a test"
            more = f" {gained:+.3f} with a standard error of {error:.3f}" if best is not None else ""
            verdict.reason = f"{verdict.kind} shift, but {why}{more}; what serves stays"
            return None
        verdict.action = "promote" if best.names else "revert"
        verdict.reason = f"{verdict.kind} shift: {best.label} gains {gained:+.3f} of accuracy (standard error {error:.3f}) over what serves, and no test fails"
        return best

    def _judged(self, prior: list[float] | None) -> list[Judged]:
        """What serves, the frozen model where it is another, and the candidates, all on the rows kept for this."""
        lab, ref = self.lab, self.lab.reference
        rows = lab.rows(prior)
        share = ref.prior if prior is None else np.asarray(prior)
        spread = float(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))))
        source = ref.answer.proba[rows]
        expected = {"classes": min(spread, effective_classes(source)), "entropy": mean_entropy(source)}
        weights = np.ones(len(ref.labels)) if prior is None else np.divide(share, ref.prior, out=np.zeros(len(share)), where=ref.prior > 0)[ref.labels]
        still = leading(lab.estimator(None, prior)(self.frozen.proba))
        options: list[tuple[str, Names, Mapping[str, Any], Plan | None]] = [("serving", self.serving, {}, None)]
        options += [("frozen", (), {}, None)] if self.serving else []
        options += [(p.label, names, evidence, p) for p, names, evidence in self.built]
        judged: list[Judged] = []
        served: Array = np.zeros(0)
        for label, names, evidence, plan in options:
            own = self.runner(self.rows, names) if names else self.frozen
            if not bool(torch.isfinite(own.logits).all()):
                judged.append(Judged(label, names, Estimate(0.0, 0.0, 1.0, known=False), {}, ["logits are not finite"], evidence))
                continue
            try:
                twin = None if not names else self.verdict.twin if plan is None else self._twin(plan, rows)
                estimate = still if not names else leading(lab.estimator(twin, prior)(own.proba))
            except Exception as e:
                if plan is None:
                    raise
                self.errors.append({"name": label, "error": f"cannot be verified: {line_of(e)}"})
                continue
            right = None
            if "covariate" not in self.verdict.kind:
                right = self.runner(ref.batches, names).proba.argmax(1) == ref.labels
                estimate = weighted(right, weights, 1 - self.policy.level, estimate.evidence)
            one = examined(label, names, evidence, own, self.frozen, (estimate, still), expected, self.policy)
            one.twin, one.right = twin, None if right is None else right * weights / weights.mean()
            predicted = own.proba.argmax(1)
            served = predicted if not judged else served
            one.differs = float((predicted != served).mean())
            with_labels(one, predicted, served, self.truth, self.policy)
            judged.append(one)
        return judged

    def _twin(self, plan: Plan, drawn: Array) -> Tensor:
        """Logits on the reference by the same remedy, made for as many rows of the reference as the candidate had of the stream.

        Adapted to the stream, a model does badly on the reference, and an estimator that is fitted there learns nothing of what it does on the
        stream. Adapted to the reference, it is to the reference what the candidate is to the stream: as sure, and as noisy.
        """
        ref, names = self.lab.reference, tuple(f"loop{self.number}c{len(self.built)}s{j}" for j in range(len(plan.steps)))
        count = sum(map(len, self.bench.rows))
        order = np.random.default_rng([self.lab.seed, self.number, 1]).permutation(drawn)[:count]
        bench = replace(self.bench, rows=picked(ref.batches, order))
        try:
            made(bench, plan, names)
            return self.runner(ref.batches, names).logits
        finally:
            self.runner.remove(names)


def line_of(error: Exception) -> str:
    """An error in one line."""
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def gain(one: Judged, serving: Judged, rows: int) -> tuple[float, float]:
    """By how much a candidate is more accurate than what serves, and the standard error of that.

    On labels where there are enough; where only the prior differs, on the weighted reference, row by row; else as estimated on ``rows`` rows.
    """
    if one.labelled and serving.labelled and one.labelled["decides"]:
        n, apart = one.labelled["rows"], one.labelled["better"] + one.labelled["worse"]
        found = float(one.labelled["accuracy"] - serving.labelled["accuracy"])
        return found, float(np.sqrt(max(apart / n - found**2, 0) / n))
    if one.right is not None and serving.right is not None:
        each = one.right - serving.right
        return float(each.mean()), float(each.std() / np.sqrt(len(each)))
    found = one.estimate.value - serving.estimate.value  # only a row on which they differ can be right for one and wrong for the other
    return found, float(np.sqrt(max(one.differs - found**2, 0) / rows))
