"""Writes docs/algebra_results.md from bench/results/algebra.json, merge_files.json and editing.json.

python scripts/algebra_results.py            rewrites it
python scripts/algebra_results.py --check    changes nothing; exit status 1 if it is out of date
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shift_results import points, read, settle, table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "algebra_results.md"
ABOUT = {
    "amazon": "reviews of books, dvd, electronics and kitchen: LoRAs on MiniLM's upper two layers, accuracy",
    "crossner": "tagged words of five domains: LoRAs on MiniLM's upper two layers, F1 of the words that are no O",
    "digits": "MNIST, USPS and optdigits: LoRAs on a small ViT that was trained on MNIST, accuracy",
}


def merging(found: dict[str, Any]) -> Iterator[str]:
    about = found["about"]
    yield "## Merge rules on real adapters"
    yield ""
    yield "One LoRA for each domain of a family; rules of the catalogue at their defaults. Of rules on differences the factor on the merged difference was"
    yield f"chosen of {', '.join(map(str, about['factors']))} on validation rows of all domains. Percent, 95 % intervals over seeds (Student's t)."
    yield ""
    for family, said in ABOUT.items():
        rows = sorted((r for r in found["table"] if r["family"] == family), key=lambda r: -r["mean"][0])
        if not rows:
            continue
        yield f"### {family}"
        yield ""
        yield f"{said[0].upper()}{said[1:]}; {len(rows[0]['seeds'])} seeds."
        yield ""
        body = []
        for r in rows:
            plain = r["rule"] in ("base", "all domains at once") or r["rule"].startswith("expert")
            over = r["over average"]
            said = f"{over[0]:+.1f}" if over[1] is None else points(*over)
            body.append([f"*{r['rule']}*" if plain else f"`{r['rule']}`", f"{r['mean'][0]:.1f}", f"{r['worst'][0]:.1f}", said])
        yield from table(["rule", "mean over domains", "worst domain", "mean against `average`"], body)


def editing(found: dict[str, Any]) -> Iterator[str]:
    about, rows = found["about"], found["table"]
    yield "## Editing"
    yield ""
    yield f"{about['measure'][0].upper()}{about['measure'][1:]} (Student's t). *unedited* is the model as it is, *fine-tuning* plain Adam on one matrix."
    yield f"Settings were chosen on {about['chosen on']}. Locality is of inputs of which nothing was edited; {about['undone']}."
    yield ""
    for model, said in about["models"].items():
        own = [r for r in rows if r["model"] == model]
        if not own:
            continue
        yield f"### {model}"
        yield ""
        blocks = sorted({" and ".join(map(str, p["layers"])) for p in about["plans"][model].values()})
        yield f"{said}. Blocks that are edited, counted from 0: {', or '.join(blocks)}; at the place that is answered from."
        yield ""
        body = []
        for r in own:
            plain = r["method"] in ("unedited", "fine-tuning")
            scores = [share(*r[k]) for k in ("reliability", "generalisation", "locality")]
            body.append([f"*{r['method']}*" if plain else f"`{r['method']}`", r["edits"], *scores, f"{r['seconds']:.2f}", len(r["seeds"])])
        yield from table(["editor", "edits", "reliability", "generalisation", "locality", "seconds an edit", "seeds"], body)
    for said in about["errors"]:
        yield f"- {said}"
    if about["errors"]:
        yield ""


def share(value: float, low: float | None, high: float | None) -> str:
    """A mean in per cent with its interval, whose ends are no shares beyond 0 and 100."""
    return f"{value:.0f}" if low is None or high is None else f"{value:.0f} [{max(low, 0):.0f}, {min(high, 100):.0f}]"


def files(found: dict[str, Any]) -> Iterator[str]:
    yield "## Merging files"
    yield ""
    yield "Whole models in safetensors files, each merge in a process of its own, exapt and mergekit in turns. Seconds are medians, with least and most;"
    yield "exapt's include waiting for the disk (`fsync`). The ratio is mergekit's time over exapt's in the same round. Memory is the peak over that before,"
    yield "in multiples of one model's largest shard."
    yield ""
    body = []
    for r in found["runs"]:
        for rule, sides in r["rules"].items():
            own, other = sides["exapt"], sides.get("mergekit")
            times = [spread_of(s["seconds"], ".1f") if s else "" for s in (own, other)]
            ratio = spread_of(other["ratio_seconds"], ".2f") if other else ""
            shape = " x ".join(map(str, r["shape"]))
            shards = f"{own['shards']:.2f}", f"{other['shards']:.1f}" if other else ""
            body.append([f"`{rule}`", f"{r['models']} of {shape}, {r['dtype']}, shard {r['shard'] / 1e6:.0f} MB", *times, ratio, *shards])
    yield from table(["rule", "models (width, blocks, words)", "exapt, s", "mergekit, s", "ratio", "exapt, shards", "mergekit, shards"], body)


def spread_of(values: Sequence[float], form: str) -> str:
    """The median with the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def page() -> str:
    lines = ["# What was measured of the algebra", "", "Written by `scripts/algebra_results.py` from `bench/results`; negative results stay in.", ""]
    for name, part in (("algebra", merging), ("editing", editing), ("merge_files", files)):
        found = read(name)
        if found is not None:
            lines += part(found)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    settle(PAGE, page(), "algebra_results.py")
