"""Ratios with bootstrap intervals, from the cells that ``speed.py`` measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from speed_models import KINDS

ROWS = (
    "attach", "forward_1", "forward_16", "step", "token", "peak", "saved", "save", "load", "merge", "unmerge", "merge_unmerge", "switch",
)  # fmt: skip
TOKENS_OF_A_STEP = 4 * 64
SCALES = ("ia3", "ln_tuning", "bitfit", "ssf", "beft", "road")
"""Methods that scale or shift features."""


def interval(values: list[float], seed: int = 0, draws: int = 4000) -> dict[str, float]:
    """Median and its 95% percentile bootstrap interval.

    >>> interval([1.0, 2.0, 3.0])["median"]
    2.0
    """
    v = np.asarray(values, float)
    medians = np.median(np.random.default_rng(seed).choice(v, (draws, len(v))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": significant(np.median(v)), "low": significant(low), "high": significant(high), "n": len(values)}


def significant(value: float) -> float:
    """Four digits: more would be noise.

    >>> significant(1.23456)
    1.235
    """
    return float(f"{value:.4g}")


def ratio(row: dict[str, list[float]], above: str, below: str) -> dict[str, float] | None:
    """The interval of the ratio of neighbours; ``None`` where a side has none.

    >>> ratio({"exapt": [1.0, 1.0], "peft": [2.0, 2.0]}, "exapt", "peft")["high"]
    0.5
    """
    a, b = row.get(above) or [], row.get(below) or []
    n = min(len(a), len(b))
    return interval([x / y for x, y in zip(a[:n], b[:n], strict=True)]) if n and all(b[:n]) else None


def rows_of(cell: dict[str, Any], tokens: bool) -> dict[str, Any]:
    """For each row the medians of the sides, and the ratios."""
    out: dict[str, Any] = {}
    for name in ROWS:
        row = cell.get(name) or {}
        medians = {side: significant(np.median(v)) for side, v in row.items() if v}
        if not medians:
            continue
        found = {"median": medians, "peft": ratio(row, "exapt", "peft")}
        if "frozen" in medians:
            found |= {"frozen": ratio(row, "exapt", "frozen"), "peft_frozen": ratio(row, "peft", "frozen")}
        if name == "step" and tokens:
            found["tokens_per_second"] = {side: significant(TOKENS_OF_A_STEP / v) for side, v in medians.items()}
        out[name] = {k: v for k, v in found.items() if v is not None}
    return out


def light(key: str) -> bool:
    """Whether a method is of rank 16 or less, or a scale or shift.

    >>> light("lora"), light("vera"), light("ia3")
    (True, False, True)
    """
    import exapt

    return key in SCALES or 0 < getattr(exapt.method(key), "rank", 0) <= 16


def whole_of(found: dict[str, Any]) -> dict[str, Any]:
    """LoRA's own rows: many adapters, first attach, peaks, bytes for backward by dtype."""
    count = found["count"]
    loads = {side: found["many"][side] for side in ("exapt", "peft")}
    growth = {side: significant(np.median(v[-5:]) / np.median(v[1:6])) for side, v in loads.items()} if count >= 10 else {}
    return {
        "count": count,
        "many": {"seconds": {side: significant(sum(v)) for side, v in loads.items()}, "growth": growth},
        "first_attach": ratio(found["first_attach"], "exapt", "peft"),
        "peak": {below: ratio(found["peak"], "exapt", below) for below in ("peft", "frozen", "whole")},
        "kept": found["kept"],
    }  # fmt: skip


def summarised(kind: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What is committed of one model."""
    done = [c for c in cells if "failed" not in c]
    loads = [v for c in done for v in c["loads"]]
    methods: dict[str, Any] = {}
    for c in cells:
        if "failed" in c:
            methods[c["method"]] = {"failed": c["failed"]}
            continue
        methods[c["method"]] = {
            "peer": c.get("peer"),
            "trainable": c["trainable"],
            "file": c["file"],
            "light": light(c["method"]),
            "rows": rows_of(c, not KINDS[kind].image),
            "refused": c["refused"],
        }
        if c.get("whole"):
            methods[c["method"]]["whole"] = whole_of(c["whole"])
    return {
        "model": kind, "text": KINDS[kind].text, "machine": done[0]["machine"] if done else {},
        "load": {"lowest": min(loads), "median": float(np.median(loads)), "highest": max(loads)} if loads else {},
        "made": sorted({c["made"] for c in cells}), "sources": sorted({c["source"] for c in cells}), "seconds": sum(c["wall"] for c in cells),
        "methods": methods,
    }  # fmt: skip
