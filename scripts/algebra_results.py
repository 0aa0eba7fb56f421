"""Writes docs/algebra_results.md from bench/results/algebra.json, merge_files.json and editing.json.

python scripts/algebra_results.py            rewrites it
python scripts/algebra_results.py --check    changes nothing; exit status 1 if it is out of date
"""

from __future__ import annotations

from collections.abc import Iterator
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
    yield "## Editing"
    yield ""
    yield f"{found['measure'][0].upper()}{found['measure'][1:]}; seeds {', '.join(map(str, found['seeds']))}. Percent of answers."
    yield ""
    body = []
    for c in found["cells"].values():
        body += [
            [c["model"], f"`{c['method']}`", p["edits"], *(f"{100 * p[k]:.0f}" for k in ("reliability", "generalisation", "locality"))] for p in c["points"]
        ]
    yield from table(["model", "method", "edits", "reliability", "generalisation", "locality"], body)


def files(found: dict[str, Any]) -> Iterator[str]:
    yield "## Merging files"
    yield ""
    yield found["about"].get("note", "Seconds and memory of merging models from file to file.")
    yield ""
    keys = list(found["table"][0])
    yield from table(keys, [[r[k] for k in keys] for r in found["table"]])


def page() -> str:
    lines = ["# What was measured of the algebra", "", "Written by `scripts/algebra_results.py` from `bench/results`; negative results stay in.", ""]
    for name, part in (("algebra", merging), ("editing", editing), ("merge_files", files)):
        found = read(name)
        if found is not None:
            lines += part(found)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    settle(PAGE, page(), "algebra_results.py")
