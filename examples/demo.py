"""A tour of exapt on a real model and real text, on a laptop's processor, without network.

MiniLM (22.7 million parameters) learns to tell five kinds of BBC news apart, in three ways on the same split: a linear head
on the frozen model, LoRA, and full fine-tuning, each in a process of its own so that memory compares. The adapter goes into
one file, is loaded in a new process, merged and detached, each time compared bit by bit. At last all three meet a shifted
stream: headlines instead of articles, and another mix of classes.

    python examples/demo.py            everything, some minutes
    python examples/demo.py --quick    a smaller split, for a check that it runs

Writes report.html and demo_out/ (results.json, adapter.safetensors) into the current folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from demo_steps import LABELS, QUICK, STREAM_MIX, WAYS, Plan, Rows, articles, split, stream_members

from exapt.report import Decomposition, Interval, Page, accuracy, compare, confusion, decompose, plots, show

COLUMNS = ["method", "test accuracy %", "trainable parameters", "seconds", "peak memory MB", "file MB", "on the shifted stream %"]
Results = dict[str, dict[str, Any]]


def run(step: str, out: Path, quick: bool) -> dict[str, Any]:
    """Runs one step in a new process, which prints as it likes, and returns what it found."""
    command = [sys.executable, str(Path(__file__).with_name("demo_steps.py")), step, str(out), *(["--quick"] if quick else [])]
    if subprocess.run(command).returncode:
        raise SystemExit(f"the step {step} failed; its message is above")
    found: dict[str, Any] = json.loads((out / f"{step}.json").read_text())
    (out / f"{step}.json").unlink()
    return found


def right(rows: Rows, predicted: list[str]) -> list[bool]:
    """Whether each prediction is right."""
    return [r["label"] == p for r, p in zip(rows, predicted, strict=True)]


def difference(name: str, other: str, d: Interval) -> str:
    """One sentence on a paired difference: what it says depends on where the interval lies."""
    if d.contains(0):
        return f"{name} minus {other}: {d.percent(sign=True)} points; the interval contains 0, so these test articles do not tell the two apart."
    return f"{name} minus {other}: {d.percent(sign=True)} points; {name if d.low > 0 else other} is ahead, and the interval excludes 0."


def table(results: Results, shown: dict[str, Interval], shifts: dict[str, Decomposition]) -> list[list[str]]:
    """The rows of the table."""
    rows = []
    for way, name in WAYS.items():
        r = results[way]
        memory, size = f"{r['peak'] / 1e6:,.0f} (+{(r['peak'] - r['before']) / 1e6:,.0f})", f"{r['bytes'] / 1e6:.2f}"
        rows.append([name, shown[way].percent(), f"{r['trainable']:,}", f"{r['seconds']:.1f}", memory, size, shifts[way].target.percent()])
    return rows


NOTE = (
    "Accuracy with 95 % bootstrap interval. Seconds and memory of training only, validation passes included; memory: the process's highest, "
    "in brackets how much that is above what it held before. Each method ran in its own process. File: what has to be kept beside the base "
    "(for full fine-tuning the whole model)."
)


def compared(results: Results, test: Rows, shifts: dict[str, Decomposition]) -> list[str]:
    """Sentences on accuracy, cost and shift, each from the numbers."""
    hits = {way: right(test, results[way]["predicted"]) for way in WAYS}
    lora, full = results["lora"], results["full"]
    lines = [difference(WAYS["lora"], WAYS[other], compare(hits["lora"], hits[other])) for other in ("head", "full")]
    times = full["trainable"] / lora["trainable"]
    lines.append(f"LoRA trains {lora['trainable']:,} parameters, full fine-tuning {full['trainable']:,}: {times:.0f} times as many. "
                 f"Its file is {full['bytes'] / lora['bytes']:.0f} times smaller.")  # fmt: skip
    for way, name in WAYS.items():
        s = shifts[way]
        lines.append(f"{name} on the stream: {s.drop.percent(sign=True)} points against the articles; of it {s.inputs.percent(sign=True)} from reading "
                     f"headlines only (old mix of classes), {s.mix.percent(sign=True)} from the new mix.")  # fmt: skip
    return lines


def proven(lora: dict[str, Any], reload: dict[str, Any]) -> tuple[list[str], bool]:
    """Sentences on the adapter's life, and whether everything that should be equal is."""

    def words(a: dict[str, Any]) -> str:
        bits = "bit-equal logits" if a["bit_equal"] else f"largest difference of a logit {a['largest']:.1e} (largest absolute logit {a['scale']:.1f})"
        return f"{a['same']} of {a['rows']} predictions equal, {bits}"

    bases = {"training and detach": lora["base_identical"], "load, merge, unmerge and detach": reload["base_identical"]}
    loaded, merged = reload["loaded"], reload["merged"]
    lines = [
        f"Loaded from one file of {lora['bytes'] / 1e6:.2f} MB in a new process ({reload['load_seconds']:.2f} s): {words(loaded)}.",
        f"Merged into the base's own weights: {words(merged)}.",
        *(f"Base after {what}: all {reload['tensors']} tensors {'bit-identical (SHA-256)' if same else 'NOT identical'}." for what, same in bases.items()),
    ]
    sound = loaded["bit_equal"] and merged["same"] == merged["rows"] and merged["largest"] < 1e-3 and all(bases.values())
    return lines, sound


def drawings(results: Results, test: Rows, shown: dict[str, Interval], shifts: dict[str, Decomposition]) -> dict[str, plots.Draw]:
    """The plots of the report, with their captions."""
    lora = results["lora"]
    grid = confusion([r["label"] for r in test], lora["predicted"], LABELS)
    stages = ["articles", "headlines,\nold mix", "headlines,\nnew mix (stream)"]
    series = {}
    for way in ("lora", "full"):
        steps = [h for h in results[way]["history"] if "loss" in h]
        checks = [h for h in results[way]["history"] if "validation_loss" in h]
        series[WAYS[way]] = ([h["step"] for h in steps], [h["loss"] for h in steps])
        series[f"{WAYS[way]}, validation"] = ([h["step"] for h in checks], [h["validation_loss"] for h in checks])
    return {
        "Accuracy on the test articles against the number of trainable parameters.":
            plots.accuracy_against_parameters({name: (results[way]["trainable"], shown[way]) for way, name in WAYS.items()}),
        "Loss while training, on the training and on the validation articles.":
            plots.curves(series, "optimiser step", "cross-entropy", "Training", first=1),
        "From articles to the shifted stream; bars show 95 % bootstrap intervals.":
            plots.grouped_bars(stages, {WAYS[w]: [s.source, s.changed, s.target] for w, s in shifts.items()}, "Under shift"),
        "What LoRA takes for what, on the test articles.":
            plots.confusion_matrix(grid, LABELS, "LoRA, test articles"),
    }  # fmt: skip


def setting(plan: Plan, data: dict[str, Rows], files: int, kept: int, results: Results) -> list[str]:
    """What was run, in sentences."""
    members = stream_members(data["test"])
    mix = ", ".join(f"{c} {share:.0%}" for c, share in STREAM_MIX.items())
    old = Counter(r["label"] for r in data["test"])
    before = ", ".join(f"{c} {old[c] / len(data['test']):.0%}" for c in LABELS)
    return [
        f"Model: all-MiniLM-L6-v2. Text: {files:,} BBC articles in 5 classes; {files - kept} that repeat a headline were left out.",
        f"Split: {len(data['train'])} training, {len(data['validation'])} validation, {len(data['test'])} test articles, first {plan.length} tokens.",
        f"LoRA and full fine-tuning: {plan.epochs} epochs, batches of {plan.batch}, learning rates {plan.lora_lr:g} and {plan.full_lr:g}, "
        f"chosen on the validation articles beforehand; LoRA of rank {plan.rank} on queries and values, with the head.",
        f"Linear head: logistic regression on features computed once, {results['head']['chosen']}, chosen on the validation articles.",
        f"Stream: the headlines of {sum(members)} test articles, drawn for the mix {mix} (test articles: {before}).",
    ]


def report(sections: dict[str, list[str]], rows: list[list[str]], draws: dict[str, plots.Draw], picture: Path | None) -> Path:
    """Writes report.html, and the four plots as one small picture if asked."""
    page = Page("exapt: one model, three ways to adapt it")
    page.points(sections.pop("What was run")).table(COLUMNS, rows, NOTE)
    for title, lines in sections.items():
        page.heading(title).points(lines)
    page.heading("Plots")
    for caption, draw in draws.items():
        page.picture(plots.figure([draw]), caption)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(plots.png(plots.figure(list(draws.values()), columns=2, width=5.6, height=3.7), dpi=80))
    return page.write("report.html")


def main() -> int:
    """The whole demo; exit status 1 if something that must be equal is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller split")
    parser.add_argument("--picture", type=Path, help="also write the plots as one PNG")
    given = parser.parse_args()
    start, plan, out = time.perf_counter(), QUICK if given.quick else Plan(), Path("demo_out")
    out.mkdir(exist_ok=True)
    rows, files = articles()
    data = split(rows, plan)
    results: Results = {}
    for i, (step, name) in enumerate((*WAYS.items(), ("reload", "a new process loads the adapter")), 1):
        print(f"[{i}/4] {name}", flush=True)
        results[step] = run(step, out, given.quick)
    test, members = data["test"], stream_members(data["test"])
    shown = {way: accuracy(right(test, results[way]["predicted"])) for way in WAYS}
    shifts = {w: decompose(right(test, results[w]["predicted"]), right(test, results[w]["predicted_headlines"]), members) for w in WAYS}
    life, sound = proven(results["lora"], results["reload"])
    sections = {
        "What was run": setting(plan, data, files, len(rows), results),
        "What the numbers say": compared(results, test, shifts),
        "One file, and the base stays itself": life,
    }
    cells = table(results, shown, shifts)
    show(COLUMNS, cells, title="MiniLM on BBC news" + (" (quick run: small split, small numbers)" if given.quick else ""), note=NOTE)
    for line in (x for lines in sections.values() for x in lines):
        print(f"- {line}")
    (out / "results.json").write_text(json.dumps({"plan": vars(plan), "sections": sections, "columns": COLUMNS, "table": cells, "steps": results}, indent=1))
    path = report(sections, cells, drawings(results, test, shown, shifts), given.picture)
    print(f"{path}, {out}/adapter.safetensors and {out}/results.json written in {time.perf_counter() - start:.0f} s.")
    if not sound:
        print("Something that must be equal is not; see above.", file=sys.stderr)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
