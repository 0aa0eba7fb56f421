"""Ratios with bootstrap intervals, and the table of them."""

from __future__ import annotations

from typing import Any

import numpy as np

MODELS = {"llama": "Llama, 110 M (12 x 768, tied)", "bert": "BERT base, 110 M", "tiny": "tiny Llama (2 x 32)"}
# row: (what it says, target as text, test of the median ratio)
ROWS: dict[str, tuple[str, str, Any]] = {
    "attach": ("attach, first in a fresh process", "<= 0.10", lambda r: r <= 0.10),
    "attach_warm": ("attach, later in a process", "", None),
    "step": ("training step / PEFT's", "<= 1.00", lambda r: r <= 1.0),
    "step_frozen": ("training step / frozen base's", "<= 1.15", lambda r: r <= 1.15),
    "step_frozen_peft": ("  (PEFT's step / frozen base's)", "", None),
    "peak": ("peak training memory / PEFT's", "<= 0.80", lambda r: r <= 0.80),
    "peak_full": ("peak training memory / full fine-tuning's", "<= 1.00", lambda r: r <= 1.0),
    "peak_frozen": ("peak training memory / frozen base's", "", None),
    "save": ("save (ours syncs the disk, PEFT does not)", "<= 0.33", lambda r: r <= 1 / 3),
    "save_unsynced": ("save, neither syncs", "", None),
    "save_wall": ("save, wall clock", "", None),
    "load": ("load, first adapter", "<= 0.33", lambda r: r <= 1 / 3),
    "forty": ("40 adapters, one after the other", "", None),
    "merge": ("merge", "", None),
    "unmerge": ("unmerge (ours is exact)", "", None),
    "forward_1": ("forward, batch 1", "", None),
    "forward_16": ("forward, batch 16", "", None),
    "forward_16_frozen": ("forward, batch 16 / bare base's", "", None),
}


def interval(values: list[float], seed: int = 0, draws: int = 4000) -> dict[str, float]:
    """Median and its 95% percentile bootstrap interval.

    >>> interval([1.0, 2.0, 3.0])["median"]
    2.0
    """
    v = np.asarray(values)
    medians = np.median(np.random.default_rng(seed).choice(v, (draws, len(v))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"median": float(np.median(v)), "low": float(low), "high": float(high), "n": len(values)}


def _over(above: list[Any], below: list[Any], clock: str = "cpu") -> list[float]:
    """Ratios of neighbours: of seconds, or of plain numbers."""
    pick = (lambda v: v[clock]) if isinstance(above[0], dict) else float
    return [pick(a) / pick(b) for a, b in zip(above, below, strict=True)]


def ratios(result: dict[str, Any]) -> dict[str, list[float]]:
    """For each row, exapt's measurements over their neighbours'."""
    lives = {side: [v for v in result["lives"] if v["side"] == side] for side in ("exapt", "peft", "full", "frozen")}
    pair = result["pair"]
    found: dict[str, list[float]] = {}
    for key in ("attach", "load", "peak"):
        found[key] = _over([v[key] for v in lives["exapt"]], [v[key] for v in lives["peft"]])
    for other in ("full", "frozen"):
        below = [v["peak"] for v in lives[other]]
        found[f"peak_{other}"] = _over([v["peak"] for v in lives["exapt"]][: len(below)], below)
    for key in ("save", "save_unsynced"):
        a, b = ([s for v in lives[side] for s in v[key]] for side in ("exapt", "peft"))
        found[key] = _over(a, b)
        if key == "save":
            found["save_wall"] = _over(a, b, "wall")
    a, b = ([sum(s["cpu"] for s in v["forty"]) for v in lives[side]] for side in ("exapt", "peft"))
    found["forty"] = _over(a, b)
    for key in ("attach_warm", "step", "merge", "unmerge", "forward_1", "forward_16"):
        found[key] = _over(pair[key]["exapt"], pair[key]["peft"])
    found["step_frozen"] = _over(pair["step"]["exapt"], pair["step"]["frozen"])
    found["step_frozen_peft"] = _over(pair["step"]["peft"], pair["step"]["frozen"])
    found["forward_16_frozen"] = _over(pair["forward_16"]["exapt"], pair["forward_16"]["frozen"])
    return found


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Each row's interval, its target and whether the median meets it."""
    out: dict[str, Any] = {}
    for key, (_, target, test) in ROWS.items():
        out[key] = interval(found[key])
        if test is not None:
            out[key] |= {"target": target, "passed": bool(test(out[key]["median"]))}
    return out


def _median(values: list[Any]) -> float:
    return float(np.median([v["cpu"] if isinstance(v, dict) else v for v in values]))


def absolute(result: dict[str, Any], key: str) -> tuple[str, str]:
    """exapt's and PEFT's medians of one row, with a unit."""
    shown = []
    for side in ("exapt", "peft"):
        lives = [v for v in result["lives"] if v["side"] == side]
        if key == "peak":
            shown.append(f"{_median([v[key] for v in lives]) / 2**20:.0f} MiB")
        elif key == "forty":
            shown.append(f"{_median([sum(s['cpu'] for s in v[key]) for v in lives]):.2f} s")
        elif key in ("save", "save_unsynced"):
            shown.append(f"{_median([s for v in lives for s in v[key]]) * 1e3:.1f} ms")
        elif key in ("attach", "load"):
            shown.append(f"{_median([v[key] for v in lives]) * 1e3:.1f} ms")
        elif key in result["pair"]:
            shown.append(f"{_median(result['pair'][key][side]) * 1e3:.1f} ms")
        else:
            shown.append("")
    return shown[0], shown[1]


def growth(result: dict[str, Any], side: str) -> float:
    """Median time of the last five of forty loads over that of the second to sixth (the first also wraps the model)."""
    values = [_median(v["forty"][-5:]) / _median(v["forty"][1:6]) for v in result["lives"] if v["side"] == side]
    return float(np.median(values))


def table(results: list[dict[str, Any]]) -> str:
    """The page that stands beside the results."""
    lines = ["# exapt beside PEFT", "", "Written by `python bench/run.py` from the `.json` files here; do not edit.", ""]
    lines += [
        "LoRA of rank 8 on every linear layer, single precision, 4 x 64 tokens, one thread, random weights. A ratio is exapt's",
        "measurement over PEFT's (or what the row names), made in turn in one run; below 1 is faster or smaller. Median and 95% bootstrap",
        "interval of the median. Times are processor time; the machine is shared, so the wall clock is shown only where named.", "",
    ]  # fmt: skip
    for r in results:
        v, m = r["versions"], r["machine"]
        lines += [
            f"## {MODELS[r['model']]}", "",
            f"{m['processor']}, {m['cores']} cores, load {m['load']} before and {m['load_after']} after; "
            f"exapt {v['exapt']}, PEFT {v['peft']}, torch {v['torch']}, transformers {v['transformers']}; "
            f"{r['rounds']} fresh processes a side, {r['repeats']} repetitions within one.", "",
            "| | exapt | PEFT | ratio | interval | target | |", "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for key, (text, target, _) in ROWS.items():
            s, (ours, theirs) = r["summary"][key], absolute(r, key)
            mark = {True: "pass", False: "**fail**", None: ""}[s.get("passed")]
            lines.append(f"| {text} | {ours} | {theirs} | {s['median']:.2f} | {s['low']:.2f} to {s['high']:.2f} | {target} | {mark} |")
        total = _median([sum(s["cpu"] for s in v["forty"]) for v in r["lives"] if v["side"] == "exapt"])
        slope = growth(r, "exapt")
        mark = "pass" if total <= 1.2 and slope <= 1.25 else "**fail**"
        lines.append(f"| 40 adapters: the last five loads / the second to sixth | {slope:.2f} | {growth(r, 'peft'):.2f} | | | about 1 s, <= 1.25 | {mark} |")
        lines += ["", "Kept for the backward pass, MiB (activations; with the model's own tensors in brackets):", ""]
        lines += ["| | LoRA, exapt | LoRA, PEFT | full fine-tuning | |", "|---|---|---|---|---|"]
        for dtype in ("float32", "bfloat16"):
            cells = [r["saved"][f"{side} {dtype}"] for side in ("exapt", "peft", "full")]
            texts = [f"{c['activations'] / 2**20:.1f} ({c['all'] / 2**20:.1f})" for c in cells]
            mark = "pass" if cells[0]["activations"] <= cells[2]["activations"] else "**fail**"
            lines.append(f"| {dtype} | {' | '.join(texts)} | {mark}: LoRA <= full |")
        lines.append("")
    return "\n".join(lines)
