"""Writes docs/components.md from the catalogue: statistics, objectives, test-time methods; the methods have a page of their own. Writes also
src/exapt/cli/catalogue.json, from which the command line lists all of them.

python scripts/component_table.py            rewrites both
python scripts/component_table.py --check    changes nothing; exit status 1 if one is out of date
"""

import argparse
import re
import sys
from pathlib import Path

from method_table import table

import exapt
from exapt.cli import catalogue
from exapt.core.components import Component

PAGE = Path(__file__).resolve().parent.parent / "docs" / "components.md"
KINDS = {
    "detector": "Detectors: has the data moved?",
    "alarm": "Alarms on streams",
    "diagnosis": "Diagnosis: which kind of shift?",
    "explanation": "Explanations of a shift",
    "attribution": "Attribution of a change of performance",
    "label-shift": "Label shift",
    "calibration": "Calibration",
    "weights": "Covariate shift: importance weights",
    "accuracy": "Accuracy without labels",
    "estimator": "Estimators robust to a shift",
    "stream": "Streams to test on",
    "corruption": "Corruptions to test on",
    "objective": "Objectives: `fit(..., source=, target=, objective=)`",
    "selection": "Model selection without target labels",
    "test-time": "Test-time methods: `online(model, ...)`",
    "procedure": "Procedures",
    "augmentation": "Augmentations",
    "metric": "Metrics",
    "score": "Scores",
}
"""Headings; kinds that are not named here come last, under their own names."""


def own() -> list[Component]:
    """The library's own components, by kind and key."""
    order = list(KINDS)
    found = [c for c in exapt.components().values() if c.module.startswith("exapt.")]
    return sorted(found, key=lambda c: (order.index(c.kind) if c.kind in KINDS else len(order), c.kind, c.key))


def plain(text: str) -> str:
    """The docstring's reStructuredText as Markdown: formulas and literals."""
    text = re.sub(r":math:`([^`]*)`", lambda m: f"${m[1]}$".replace(r"\|", r"\Vert ").replace("|", r"\vert "), text)
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")


def papers(c: Component) -> str:
    """The component's paper, and those it covers by its options."""
    return "; ".join(filter(None, [c.paper, *(f"{title} (`{how}`)" for title, how in c.variants.items())]))


def page() -> str:
    """The whole page: a table for each kind."""
    found = own()
    parts = [
        "# Components",
        f"{len(found)} components beside the [methods](methods.md): what `exapt components` lists. Written by `scripts/component_table.py` from the catalogue. "
        "Each is found as `exapt.NAME`; the last column says what its golden test compares with.",
    ]
    for kind in dict.fromkeys(c.kind for c in found):
        rows = [["name", "key", "what it does", "papers", "golden test"]]
        rows += [[f"`{c.name}`", f"`{c.key}`", plain(c.summary), papers(c), c.oracle] for c in found if c.kind == kind]
        parts += [f"## {KINDS.get(kind, kind.capitalize())}", table(rows)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Rewrites, or with ``--check`` only compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wanted = {PAGE: page(), catalogue.FILE: catalogue.text()}
    old = [f for f, text in wanted.items() if not f.is_file() or f.read_text(encoding="utf-8") != text]
    for f in old:
        if check:
            print(f"{f.name} is out of date: run python scripts/component_table.py", file=sys.stderr)
        else:
            f.write_text(wanted[f], encoding="utf-8")
            print(f"wrote {f.name}")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
