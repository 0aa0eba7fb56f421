"""Accuracy without labels, and the kind of shift, on real streams: ``python bench/shift_estimates.py [--seeds 5] [--worker 0/2]``, then ``--collect``.

Every case is a model with a labelled reference that it was not trained on, and batches: SMS spam under other priors, Amazon and UCI reviews of other
domains (MiniLM features, scikit-learn's logistic regression), digits (MNIST to USPS and optdigits; CNN and ViT), CIFAR-10 under 15 corruptions
(ResNet-20); with them batches that did not move. Each estimator names the accuracy on each batch, the diagnosis its kind of shift; the truth is
counted. A seed draws the rows of reference and batches (and the networks, as far as there are several). What was measured is not measured again: the
cells lie in ``runs/shift/cells_estimates``; ``--collect`` writes ``bench/results/shift_estimates.json`` from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from shift_data import AMAZON, UCI, _aside, cache, cifar10, digits, features
from shift_models import cifar_input, cifar_resnet, digit_input, digit_model
from shift_places import NETWORKS
from shift_transfers import about, commit, write
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from exapt.report.intervals import accuracy, compare, confusion
from exapt.shift.accuracy.ac import AverageConfidence
from exapt.shift.accuracy.aline import ALine
from exapt.shift.accuracy.atc import ATC
from exapt.shift.accuracy.base import AccuracyEstimator
from exapt.shift.accuracy.cbpe import MCBPE
from exapt.shift.accuracy.cot import COT, COTT
from exapt.shift.accuracy.ensemble import AccuracyEnsemble
from exapt.shift.accuracy.gde import GDE
from exapt.shift.diagnose.diagnosis import ShiftDiagnosis
from exapt.shift.simulate.corruptions import CORRUPTIONS, corrupt
from exapt.shift.simulate.streams import prior_shift

SPAM, SKEWED = (0.02, 0.3, 0.5, 0.7), np.repeat([4.0, 1.0], 5) / 25
BATCH, SEVERITIES, CLEAN, PICTURES = 300, (1, 3, 5), 2000, 300
KINDS = ("none", "label", "covariate", "label+covariate", "novel")
BASELINE = "ac"
# The ensemble's members at their defaults, with intervals, and these: what their papers scale by temperature first, scaled; and what needs more than
# probabilities. Without bootstrap replicates there is no interval to cover the truth.
ESTIMATORS: dict[str, AccuracyEstimator] = {
    "ac_scaled": AverageConfidence(n_boot=0, calibrate=True), "atc_scaled": ATC(n_boot=0, calibrate=True),
    "cot_scaled": COT(batch_size=BATCH, n_boot=0, calibrate=True), "cott_scaled": COTT(batch_size=BATCH, n_boot=0, calibrate=True),
    "mcbpe": MCBPE(n_boot=0, classifier=HistGradientBoostingClassifier(max_iter=50, random_state=0)), "gde": GDE(n_boot=40), "aline": ALine(n_boot=40),
}  # fmt: skip
COMPONENTS = 16  # principal components of the features for M-CBPE's boosted trees, which take seconds on hundreds of columns
OTHERS = {"gde": 1, "aline": 2}
"""Further models that an estimator needs, at least."""
Array = np.ndarray


@dataclass
class Rows:
    """Probabilities, features, classes, and probabilities of further models (models, n, classes)."""

    p: Array
    x: Array
    y: Array
    others: Array | None = None

    def take(self, rows: Array) -> Rows:
        return Rows(self.p[rows], self.x[rows], self.y[rows], None if self.others is None else self.others[:, rows])

    def without(self, last: int) -> Rows:
        """As a model sees it that knows the classes before ``last`` alone; classes stay."""
        p = np.clip(self.p[:, :last], 1e-12, None)
        return Rows(p / p.sum(1, keepdims=True), self.x, self.y)


@dataclass
class Case:
    """A reference and batches as (name, kind of shift, rows); ``novel`` is the reference for batches of that kind, without the last class."""

    reference: Rows
    batches: list[tuple[str, str, Rows]]
    novel: Rows | None = None


def some(rng: np.random.Generator, n: int, most: int) -> Array:
    return rng.permutation(n)[:most]


def under(rows: Rows, prior: Any, n: int, rng: np.random.Generator) -> Rows:
    """Rows drawn with another prior."""
    return rows.take(prior_shift(rows.y, prior, n=n, seed=rng))


def texts(name: str, source: str, seed: int) -> Case:
    """A logistic regression on one domain, met by the others; further ones learn from resamples of the same rows."""
    found, rng = features(name), np.random.default_rng(seed)
    x, y = found.of(source)
    order = rng.permutation(len(y))
    train, reference, rest = np.split(order, [len(y) // 2, len(y) * 3 // 4])
    models = [LogisticRegression(max_iter=2000).fit(x[rows], y[rows]) for rows in (train, *(rng.choice(train, len(train)) for _ in range(3)))]

    def rows(x: Array, y: Array) -> Rows:
        p = [m.predict_proba(x) for m in models]
        return Rows(p[0], x, y, np.stack(p[1:]))

    held, n = rows(x[rest], y[rest]), min(BATCH, len(rest))
    batches = [(f"{source}, as it is", "none", held.take(some(rng, len(rest), n)))]
    if name == "sms":
        return Case(rows(x[reference], y[reference]), batches + [(f"spam {100 * p:.0f} %", "label", under(held, [1 - p, p], 240, rng)) for p in SPAM])
    batches.append((f"{source}, prior 20 %", "label", under(held, [0.8, 0.2], n // 2, rng)))
    for i, domain in enumerate(d for d in (AMAZON if name == "amazon" else UCI) if d != source):
        there = rows(*found.of(domain))
        batches.append((f"{source} -> {domain}", "covariate", there.take(some(rng, len(there.y), n))))
        if i == 0:
            batches.append((f"{source} -> {domain}, prior 20 %", "label+covariate", under(there, [0.8, 0.2], n, rng)))
    return Case(rows(x[reference], y[reference]), batches)


@torch.inference_mode()
def seen_digits(nets: list[Any], x: Array) -> tuple[Array, Array]:
    """Probabilities of each network (models, n, 10) and the first one's features."""
    inputs = digit_input(x)
    p = np.stack([softmax(np.concatenate([net(part).double().numpy() for part in inputs.split(500)]), 1) for net in nets])
    return p, np.concatenate([nets[0].features(part).numpy() for part in inputs.split(500)])


def drawn_digits(kind: str, seed: int) -> Case:
    """A network of MNIST met by USPS and optdigits, with classes in equal parts unless the prior is what moves."""
    count, rng = NETWORKS[kind], np.random.default_rng(seed)
    nets = [digit_model(kind, (seed + i) % count) for i in range(count)]

    def rows(domain: str, most: int) -> Rows:
        found = digits(domain)["test"]
        found = type(found)(found.x[:most], found.y[:most])
        p, x = seen_digits(nets, found.x)
        return Rows(p[0], x, found.y, p[1:] if count > 1 else None)

    own = rows("mnist", 3000)
    order = rng.permutation(len(own.y))
    reference, held = own.take(order[:1000]), own.take(order[1000:])
    batches = [("mnist, as it is", "none", held.take(some(rng, len(held.y), BATCH))), ("mnist, skewed prior", "label", under(held, SKEWED, BATCH, rng))]
    for domain in ("usps", "optdigits"):
        there = rows(domain, 2007)
        batches += [(f"mnist -> {domain}", "covariate", under(there, np.full(10, 0.1), BATCH, rng))]
        batches += [(f"mnist -> {domain}, skewed prior", "label+covariate", under(there, SKEWED, BATCH, rng))]
    return with_novel(Case(reference, batches), held, rng)


def with_novel(case: Case, held: Rows, rng: np.random.Generator) -> Case:
    """The case with a batch in which the last class, a quarter of it, is new to reference and model."""
    last = case.reference.p.shape[1] - 1
    case.novel = case.reference.take(np.flatnonzero(case.reference.y < last)).without(last)
    case.batches.append(("a new class", "novel", under(held, [*np.full(last, 0.75 / last), 0.25], BATCH, rng).without(last)))
    return case


@torch.inference_mode()
def pictures() -> dict[str, Array]:
    """Logits and features of ResNet-20: 2,000 clean pictures, and 300 others under every corruption; made once (minutes)."""
    kept = cache() / "cifar_logits_resnet20.npz"
    if not kept.exists():
        net, found, begin = cifar_resnet(20), cifar10(), time.time()
        made: dict[str, Array] = {"y": found.y[: CLEAN + PICTURES]}
        moved = found.x[CLEAN : CLEAN + PICTURES]
        sets = itertools.chain([("clean", found.x[:CLEAN])], ((f"{c}_{s}", corrupt(moved, c, s)) for c in CORRUPTIONS for s in SEVERITIES))
        for name, x in sets:
            h = torch.cat([net.features(part) for part in cifar_input(x).split(100)])
            made[f"{name}_features"], made[f"{name}_logits"] = h.numpy(), net.linear(h).numpy()
            print(f"cifar: {name}, {time.time() - begin:.0f} s", flush=True)
        _aside(kept, **made)
    with np.load(kept) as z:
        return dict(z)


def corrupted(seed: int) -> Case:
    found, rng = pictures(), np.random.default_rng(seed)

    def rows(name: str, y: Array) -> Rows:
        return Rows(softmax(found[f"{name}_logits"].astype(float), 1), found[f"{name}_features"], y)

    clean, y = rows("clean", found["y"][:CLEAN]), found["y"][CLEAN:]
    order = rng.permutation(CLEAN)
    reference, held = clean.take(order[:1000]), clean.take(order[1000:])
    batches = [("cifar, as it is", "none", held.take(some(rng, 1000, BATCH))), ("cifar, skewed prior", "label", under(held, SKEWED, BATCH, rng))]
    for name, severity in itertools.product(CORRUPTIONS, SEVERITIES):
        there = rows(f"{name}_{severity}", y)
        batches.append((f"{name} {severity}", "covariate", there.take(some(rng, PICTURES, 240))))
        if severity == 3 and name in ("shot_noise", "defocus_blur", "fog"):
            batches.append((f"{name} {severity}, skewed prior", "label+covariate", under(there, SKEWED, 150, rng)))
    return with_novel(Case(reference, batches), held, rng)


def cases() -> Iterator[tuple[str, str, Callable[[int], Case]]]:
    """Family, name and loader of every case."""
    yield "sms", "sms", lambda seed: texts("sms", "sms", seed)
    for name, domains in (("amazon", AMAZON), ("uci", UCI)):
        for source in domains:
            yield name, source, lambda seed, n=name, s=source: texts(n, s, seed)
    for kind in NETWORKS:
        yield "digits", kind, lambda seed, k=kind: drawn_digits(k, seed)
    yield "cifar", "resnet20", corrupted


def fitted(reference: Rows, x: Array) -> tuple[AccuracyEnsemble, dict[str, Any]]:
    """The ensemble, and the estimators that the case has the further models for."""
    have = 0 if reference.others is None else len(reference.others)
    made = {k: clone(e).fit(reference.p, reference.y, x, reference.others) for k, e in ESTIMATORS.items() if OTHERS.get(k, 0) <= have}
    return AccuracyEnsemble().fit(reference.p, reference.y), made


def cell(case: Case, batches: int | None = None) -> list[dict[str, Any]]:
    """Estimates and the diagnosis of every batch, with the truth."""
    axes = PCA(COMPONENTS, random_state=0).fit(case.reference.x)
    ensemble, estimators = fitted(case.reference, axes.transform(case.reference.x))
    judges = {kind: ShiftDiagnosis().fit(r.x, r.p, r.y) for kind, r in (("", case.reference), ("novel", case.novel)) if r is not None}
    found = []
    for name, kind, rows in case.batches[:batches]:
        diagnosis = judges[kind if kind == "novel" else ""].diagnose(rows.x, rows.p)
        entry: dict[str, Any] = {"name": name, "kind": kind, "rows": len(rows.y), "diagnosis": diagnosis.kind, "p_values": dict(diagnosis.p_values)}
        if kind != "novel":
            together, x = ensemble.estimate(rows.p), axes.transform(rows.x)
            each = {**together.evidence["members"], **{k: e.estimate(rows.p, x, rows.others) for k, e in estimators.items()}, "ensemble": together}
            entry["truth"] = float((rows.p.argmax(1) == rows.y).mean())
            entry["estimates"] = {k: [e.value, e.low, e.high] if e.known else None for k, e in each.items()}
        found.append(entry)
    return found


def cells(quick: bool = False) -> Path:
    """Where the cells lie; those of ``--quick`` lie apart."""
    found = cache() / ("cells_estimates_quick" if quick else "cells_estimates")
    found.mkdir(parents=True, exist_ok=True)
    return found


def work(seeds: int, worker: tuple[int, int], quick: bool, families: list[str]) -> None:
    """Measures the cells that are missing."""
    torch.set_num_threads(1)
    chosen = [c for c in cases() if c[0] in (families or (["uci"] if quick else [c[0]]))][: 1 if quick else None]
    for number, (seed, (family, name, load)) in enumerate(itertools.product(range(seeds), chosen)):
        target = cells(quick) / f"{family}-{name}-{seed}.json"
        if number % worker[1] != worker[0] or target.exists():
            continue
        begin = time.time()
        found = cell(load(seed), 2 if quick else None)
        write(target, {"family": family, "case": name, "seed": seed, "batches": found, "load": os.getloadavg()[0]})
        right = sum(b["kind"] == b["diagnosis"] for b in found)
        print(family, name, seed, f"{right} of {len(found)} kinds named, {time.time() - begin:.0f} s", flush=True)


def errors(found: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By estimator and batch, means over the seeds whose estimate is known: absolute error, that of average confidence, whether the interval held the truth."""
    collected: dict[tuple[str, str], list[tuple[float, float, bool] | None]] = {}
    for c in found:
        for b in c["batches"]:
            for key, value in b.get("estimates", {}).items():
                base = abs(b["estimates"][BASELINE][0] - b["truth"])
                gap = None if value is None else (abs(value[0] - b["truth"]), base, value[1] <= b["truth"] <= value[2])
                collected.setdefault((key, f"{c['family']}/{c['case']}: {b['name']}"), []).append(gap)
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for (key, batch), gaps in collected.items():
        known = [g for g in gaps if g is not None]
        error, base, covered = np.mean(known, 0).tolist() if known else (None, None, None)
        out.setdefault(key, {})[batch] = {"error": error, "baseline": base, "covered": covered, "known": len(known) / len(gaps)}
    return out


def judged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """For each estimator that names one its mean absolute error with an interval over batches, and against average confidence on the same batches."""
    out = {}
    for key, every in errors(found).items():
        by = {b: v for b, v in every.items() if v["known"]}
        if not by:
            continue
        mine = np.array([v["error"] for v in by.values()])
        mean, gap = accuracy(mine), compare(mine, [v["baseline"] for v in by.values()])
        families = sorted({b.partition("/")[0] for b in by})
        per = {f: float(np.mean([v["error"] for b, v in by.items() if b.startswith(f"{f}/")])) for f in families}
        out[key] = {
            "batches": len(by), "error": mean.value, "low": mean.low, "high": mean.high,
            "against": {"difference": gap.value, "low": gap.low, "high": gap.high}, "families": per, "mean_of_families": float(np.mean(list(per.values()))),
            "worst": max(by, key=lambda b: by[b]["error"]), "worst_error": float(mine.max()), "known": float(np.mean([v["known"] for v in every.values()])),
            "below_average_confidence": bool(gap.value < 0), "below_surely": bool(gap.high < 0),
        }  # fmt: skip
        if key not in ESTIMATORS or ESTIMATORS[key].n_boot:
            out[key]["covered"] = float(np.mean([v["covered"] for v in by.values()]))
    return out


def named(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The confusion of kinds of shift, rows the truth, over all and by family; and the share that is right, with its interval."""
    out: dict[str, Any] = {"kinds": KINDS}
    for family in ("all", *sorted({c["family"] for c in found})):
        batches = [b for c in found if family in ("all", c["family"]) for b in c["batches"]]
        truth, said = [b["kind"] for b in batches], [b["diagnosis"] for b in batches]
        right = accuracy([float(t == s) for t, s in zip(truth, said, strict=True)])
        per = {k: float(np.mean([s == k for t, s in zip(truth, said, strict=True) if t == k])) for k in KINDS if k in truth}
        out[family] = {
            "batches": len(batches), "right": right.value, "low": right.low, "high": right.high, "by_kind": per,
            "mean_of_kinds": float(np.mean(list(per.values()))), "confusion": confusion(truth, said, KINDS).tolist(),
        }  # fmt: skip
    return out


def table(result: dict[str, Any]) -> str:
    """Errors of the estimators and the confusion, as Markdown."""
    families = sorted(result["estimators"][BASELINE]["families"])
    head = ["estimator", "batches", "mean absolute error, points", "against average confidence", *families, "covered", "known", "gate"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, e in result["estimators"].items():
        gap = e["against"]
        row = [key, str(e["batches"]), "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * e[k] for k in ("error", "low", "high")))]
        row.append("" if key == BASELINE else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * gap[k] for k in ("difference", "low", "high"))))
        row += [f"{100 * e['families'][f]:.1f}" if f in e["families"] else "" for f in families]
        row += [f"{100 * e['covered']:.0f} %" if "covered" in e else "", f"{100 * e['known']:.0f} %"]
        row.append("" if key == BASELINE else "pass" if e["below_average_confidence"] else "**fail**")
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "| kind of shift | " + " | ".join(f"said {k}" for k in KINDS) + " | right |", "|" + "---|" * (len(KINDS) + 2)]
    found = result["diagnosis"]["all"]
    for kind, row_ in zip(KINDS, found["confusion"], strict=True):
        lines.append(f"| {kind} | " + " | ".join(map(str, row_)) + f" | {100 * found['by_kind'].get(kind, math.nan):.0f} % |")
    return "\n".join([*lines, "", f"named rightly: {100 * found['right']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}] of {found['batches']}"])


def collect(seeds: int, quick: bool = False) -> dict[str, Any]:
    """One file of all cells."""
    found = [json.loads(f.read_text()) for f in sorted(cells(quick).glob("*.json"))]
    found = [c for c in found if c["seed"] < seeds]
    if not found:
        raise SystemExit(f"{cells(quick)}: no cells; run without --collect first")
    estimators = judged(found)
    gate = {
        word: [k for k, e in estimators.items() if k != BASELINE and e["below_average_confidence"] is b] for word, b in (("passed", True), ("failed", False))
    }
    return {
        **about("python bench/shift_estimates.py; python bench/shift_estimates.py --collect"), "seeds": sorted({c["seed"] for c in found}),
        "cells": len(found), "gate": gate, "estimators": estimators, "errors": errors(found), "diagnosis": named(found),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two batches of one case: to see that it runs")
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--family", action="append", default=[], help="only these")
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args(arguments)
    if not given.collect:
        own, _, of = given.worker.partition("/")
        work(given.seeds, (int(own), int(of)), given.quick, given.family)
        return
    result = collect(given.seeds, given.quick)
    if not given.quick:
        commit("shift_estimates", result)
    print(table(result))


if __name__ == "__main__":
    main()
