"""Counts what every method keeps for the backward pass: ``python scripts/saved_table.py`` writes ``bench/results/saved.json`` and ``docs/saved.md``.

``--check`` writes nothing and compares the page with the file; that the file still holds is a test (tests/core/test_saved.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE, PAGE = ROOT / "bench" / "results" / "saved.json", ROOT / "docs" / "saved.md"
TEXT = """# What is kept for the backward pass

Written by `scripts/saved_table.py` from `bench/results/saved.json`; every number is counted, by `saved_tensors_hooks`, on one frozen linear layer of
64 inputs and 48 outputs whose input asks for a gradient, with the small configurations of the tests.

- **kept**: numbers of four bytes for each token. 64 is the layer's input, which the layers beside it share; 48 its output.
- **least**: what any backward pass must know of a token: the rank of the derivative, by the token, of all gradients that the layer gives. The masks
  of ReLUs and top-k choices are not in it, nor is what can be made again from the frozen weight.
- **fixed**: numbers kept however many tokens there are, beyond the layer's and the adapter's own: factors and changed weights that a
  method builds. They weigh less the more tokens there are.

{at} of {all} methods keep the least there is. Methods that need more than one linear layer (prompts, prefixes, side networks) are not in the table; a side
network keeps nothing of the backbone, and PaCA only its columns, which tests hold them to. `fit(..., config=FitConfig(checkpointing=True))`, or
`with exapt.recomputed(model)` in a training loop of one's own, keeps the inputs of whole blocks instead, with any method.
"""


def measured() -> dict[str, Any]:
    """Every method that one linear layer is enough for."""
    sys.path.insert(0, str(Path(__file__).parent))
    from saved_facts import saved

    import exapt

    found = {}
    for key, cls in exapt.methods().items():
        one = saved(cls)
        if one is not None:
            found[key] = asdict(one)
            print(key, one, file=sys.stderr)
    return found


def page(found: dict[str, Any]) -> str:
    """The page of the documentation."""
    rows = ["| method | kept | least | fixed |", "| --- | --- | --- | --- |"]
    rows += [f"| `{k}` | {v['kept']:g} | {v['least']} | {v['fixed']:,} |" for k, v in sorted(found.items(), key=lambda kv: (kv[1]["kept"], kv[0]))]
    text = TEXT.replace("{at}", str(sum(v["kept"] <= v["least"] for v in found.values()))).replace("{all}", str(len(found)))
    return text + "\n" + "\n".join(rows) + "\n"


def main() -> int:
    """Counts and writes, or with ``--check`` only compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        FILE.write_text(json.dumps(measured(), indent=1) + "\n")
        PAGE.write_text(page(json.loads(FILE.read_text())), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page(json.loads(FILE.read_text())):
        return 0
    print(f"{PAGE.relative_to(ROOT)} is not what {FILE.relative_to(ROOT)} says; run python scripts/saved_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
