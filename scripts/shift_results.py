"""Writes docs/shift_results.md from bench/results/shift_*.json.

python scripts/shift_results.py            rewrites it
python scripts/shift_results.py --check    changes nothing; exit status 1 if it is out of date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "shift_results.md"


def read(name: str) -> dict[str, Any] | None:
    path = ROOT / "bench" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(head: list[str], rows: list[list[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    yield from ("| " + " | ".join(str(v) for v in row) + " |" for row in rows)
    yield ""


def points(value: float, low: float, high: float) -> str:
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def streams(found: dict[str, Any]) -> Iterator[str]:
    about, rows = found["about"], found["streams"]
    names = list(dict.fromkeys(r["stream"] for r in rows))
    methods = [m for m in dict.fromkeys(r["method"] for r in rows) if m != "none"]
    cells = {(r["stream"], r["method"], r["guard"]): r for r in rows}
    seeds = {n: len(cells[n, "none", False]["seeds"]) for n in names if (n, "none", False) in cells}
    yield "## Test-time methods on streams"
    yield ""
    yield f"{about['model']} on CIFAR-10 images (JPEG copies) under {', '.join(about['domains'])}, severity {about['severity']}, batches of {about['batch']};"
    yield "`label sorted` holds one class a batch, `long` is one corruption 20 times over. Points of accuracy against no adaptation on the same rows, with"
    yield "95 % bootstrap intervals. Methods run at their defaults; the guard's settings were chosen on other corruptions. Seeds done: "
    yield ", ".join(f"{n} {k}" for n, k in seeds.items()) + "."
    yield ""
    for guarded in (False, True):
        yield f"### {'With' if guarded else 'Without'} the guard"
        yield ""
        body = []
        for m in methods:
            row = [m]
            for n in names:
                c = cells.get((n, m, guarded))
                row.append("" if c is None else "refused" if "refused" in c else points(c["gain"], c["low"], c["high"]))
            body.append(row)
        first = [f"{n} (none: {cells[n, 'none', False]['accuracy']:.1f} %)" for n in names if n in seeds]
        yield from table(["method", *first], body)
    worst = min((r for r in rows if r["guard"] and "gain" in r), key=lambda r: r["gain"], default=None)
    if worst:
        said = points(worst["gain"], worst["low"], worst["high"])
        yield f"The worst of all with the guard: {worst['method']} on {worst['stream']}, {said} points. The promise is none below -1."
        yield ""
    if found["corruptions"]:
        yield "## Batch statistics on every corruption"
        yield ""
        yield "Accuracy in per cent, frozen and with the statistics of a batch of 200."
        yield ""
        body = []
        for r in found["corruptions"]:
            gain = points(r["gain"], r["low"], r["high"])
            body.append([f"ResNet-{r['depth']}", r["corruption"].replace("_", " "), r["severity"], r["frozen"], r["batch statistics"], gain, r["seeds"]])
        yield from table(["model", "corruption", "severity", "frozen", "batch statistics", "gain", "seeds"], body)


def day(found: dict[str, Any]) -> Iterator[str]:
    about = found["about"]
    yield "## The loop over a day"
    yield ""
    yield f"{about['model']}, {about['segments']} segments of {about['batches']} batches of {about['batch']}: no shift, label shift and covariate shift"
    yield f"({', '.join(about['domains'][1:])}) in turn. Accuracy in per cent; the difference is paired over the same rows."
    yield f"Seeds: {len(found['accuracy'][0]['seeds'])}."
    yield ""
    body = []
    for r in found["accuracy"]:
        by, ahead = r["by type"], "" if r["policy"] == "loop" else points(*r["loop is ahead by"])
        body.append([r["policy"], r["accuracy"], by["none"], by["label"], by["covariate"], ahead])
    yield from table(["policy", "all", "no shift", "label shift", "covariate shift", "the loop is ahead by"], body)
    named = "; ".join(f"{k}: {v['right']} of {v['of']}" for k, v in found["segments named right"].items())
    quiet = found["days without shift"]
    yield f"Segments whose type the loop named: {named}."
    if quiet:
        promised = f"promised: at most {100 * quiet['promised']:.0f} %"
        yield f"The alarm rang on {quiet['rang']} of {quiet['runs']} simulated days of {quiet['rows']} rows without any shift ({promised})."
    yield ""


def estimates(found: dict[str, Any]) -> Iterator[str]:
    yield "## Accuracy without labels"
    yield ""
    yield "Mean absolute error over real shifts (review domains, sentence corpora, digits, message priors, image corruptions), against average confidence on"
    yield f"the same batches; the interval is of that difference. {found['cells']} cells, each a model on a seed of {len(found['seeds'])}."
    yield ""
    body = []
    for name, e in sorted(found["estimators"].items(), key=lambda item: item[1]["error"]):
        a = e["against"]
        covered = f"{100 * e['covered']:.0f} %" if e.get("covered") is not None else ""
        body.append(
            [name, e["batches"], f"{e['error']:.3f}", f"{a['difference']:+.3f} [{a['low']:+.3f}, {a['high']:+.3f}]", covered, e["worst"].replace("|", "/")]
        )
    yield from table(["estimator", "streams", "error", "against average confidence", "intervals that hold", "worst on"], body)
    d = found["diagnosis"]
    kinds = ", ".join(f"{k} {100 * v:.0f} %" for k, v in d["all"]["by_kind"].items())
    yield f"The diagnosis named {100 * d['all']['right']:.0f} % of {d['all']['batches']} batches right: {kinds}."
    yield ""


def transfers(found: dict[str, Any]) -> Iterator[str]:
    yield "## Transfers"
    yield ""
    yield "A small head on kept features of MiniLM (texts) and of small networks (digits). Means over the transfers of each family, in points against"
    yield f"source only, with 95 % paired intervals. Settings were frozen on {found['frozen_on'].removeprefix('amazon: ')}; `(oracle)` has seen target"
    yield "labels and is no method."
    yield ""
    for family, f in found["families"].items():
        body, counts = [], {len(t["source"]["seeds"]) for t in f["transfers"].values()}
        seeds = str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        for name, m in f["mean"].items():
            body.append([name, f"{m['score']:.3f}", points(100 * m["difference"], 100 * m["low"], 100 * m["high"]), m["better"], m["worse"]])
        yield f"### {family.replace('_', ' ')}, {len(f['transfers'])} transfers, {seeds} seeds"
        yield ""
        yield from table(["method", "score", "against source only", "transfers surely better", "surely worse"], body)


def page() -> str:
    lines = [
        "# What was measured under shift", "",
        "Written by `scripts/shift_results.py` from `bench/results/shift_*.json`, which `make bench-shift` makes; negative results stay in.", "",
    ]  # fmt: skip
    for name, part in (("shift_streams", streams), ("shift_day", day), ("shift_estimates", estimates), ("shift_transfers", transfers)):
        found = read(name)
        if found is not None:
            lines += part(found)
    return "\n".join(lines).rstrip() + "\n"


def settle(page: Path, made: str, script: str) -> None:
    """Writes a page, or with ``--check`` ends with status 1 where it is another."""
    if "--check" not in sys.argv:
        page.write_text(made, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")
    elif not page.exists() or page.read_text(encoding="utf-8") != made:
        print(f"{page.relative_to(ROOT)} is out of date: run python scripts/{script}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    settle(PAGE, page(), "shift_results.py")
