"""The catalogue as ``exapt components`` prints it: methods, statistics, objectives, test-time methods."""

from __future__ import annotations

from exapt.cli.catalogue import records
from exapt.cli.show import print_json, print_table
from exapt.core.errors import InputError, did_you_mean


def list_components(kind: str | None, as_json: bool) -> None:
    """Prints the catalogue, or what is of one kind."""
    found = records()
    kinds = sorted({r["kind"] for r in found})
    if kind is not None and kind not in kinds:
        raise InputError(f'no kind "{kind}"{did_you_mean(kind, kinds)} (there are {", ".join(kinds)})')
    chosen = [r for r in found if kind in (None, r["kind"])]
    if as_json:
        print_json(chosen)
        return
    rows = [(r["key"], r["kind"], r["name"], "; ".join(filter(None, [r["paper"], *r["variants"]]))) for r in chosen]
    print_table(("component", "kind", "in Python: exapt.", "papers"), rows, f"{len(rows)} components")
