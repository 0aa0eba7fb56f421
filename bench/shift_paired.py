"""Paired differences of the transfer benchmark, over seeds and rows together."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from shift_places import (
    Array,
)


def score(counts: tuple[Any, Any]) -> float:
    """The ratio of the sums of hits and totals."""
    return float(np.sum(counts[0]) / max(1, np.sum(counts[1])))


@functools.lru_cache(maxsize=16)
def resamples(seeds: int, rows: int, draws: int, number: int) -> tuple[Array, Array]:
    """How often each seed (draws, seeds) and each row (draws, rows) is drawn, the same for every method on transfer ``number`` of a mean."""
    rng = np.random.default_rng(number)
    made = (rng.multinomial(n, np.full(n, 1 / n), draws).astype(np.float32) for n in (seeds, rows))
    return next(made), next(made)


def paired(parts: list[tuple[Array, Array]], draws: int = 2000) -> dict[str, float]:
    """The mean over transfers of a method's score less that of source-only, with its paired 95 % bootstrap interval.

    In every resample each transfer draws its seeds and its test rows anew, the same for both.

    Args:
        parts: For each transfer counts of the method and of source-only, each (2, seeds, rows): hits and totals.

    >>> one = np.array([[[1, 1, 0, 1]], [[1, 1, 1, 1]]])
    >>> paired([(one, one * [[[0]], [[1]]])])["difference"]
    0.75
    """
    replicates, values = [], []
    for number, pair in enumerate(parts):
        w_seed, w_row = resamples(*pair[0].shape[1:], draws, number)
        sums = [[np.einsum("ds,sd->d", w_seed, v.astype(np.float32) @ w_row.T) for v in counts] for counts in pair]
        replicates.append(sums[0][0] / np.maximum(sums[0][1], 1) - sums[1][0] / np.maximum(sums[1][1], 1))
        values.append(score((pair[0][0], pair[0][1])) - score((pair[1][0], pair[1][1])))
    low, high = np.quantile(np.mean(replicates, 0), [0.025, 0.975])
    return {"difference": float(np.mean(values)), "low": float(low), "high": float(high)}


def gathered(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counts by family, transfer and method, (2, seeds, rows); the choice without labels and the oracle are methods too."""
    out: dict[str, dict[str, Any]] = {}
    for cell in sorted(found, key=lambda c: c["seed"]):
        counts = dict(cell["counts"])
        if "selected" in cell:
            counts["selected"] = counts[cell["selected"]["name"]]
            counts["(oracle)"] = counts[max(cell["counts"], key=lambda k: score(cell["counts"][k]))]
        place = out.setdefault(cell["family"], {}).setdefault(cell["transfer"], {})
        for key, value in counts.items():
            place.setdefault(key, []).append(value)
    return {f: {t: {k: np.array(v).transpose(1, 0, 2) for k, v in m.items()} for t, m in by.items()} for f, by in out.items()}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores and paired differences, for each transfer and for each family without books -> dvd."""
    out: dict[str, Any] = {}
    for family, by in gathered(found).items():
        each: dict[str, dict[str, Any]] = {t: {} for t in by}
        for t, m in by.items():
            for key, v in m.items():
                each[t][key] = {"score": score((v[0], v[1])), "seeds": [score(c) for c in zip(*v, strict=True)], **paired([(v, m["source"])])}
        kept = {t: m for t, m in by.items() if t != "books -> dvd"}
        means = {}
        for key in next(iter(by.values())) if kept else ():
            lows, highs = ([each[t][key][end] for t in kept] for end in ("low", "high"))
            means[key] = {
                "score": float(np.mean([each[t][key]["score"] for t in kept])), **paired([(m[key], m["source"]) for m in kept.values()]),
                "worst": float(min(each[t][key]["difference"] for t in kept)), "better": sum(v > 0 for v in lows), "worse": sum(v < 0 for v in highs),
                "transfers": len(kept),
            }  # fmt: skip
        out[family] = {"mean": means, "transfers": each}
    return out
