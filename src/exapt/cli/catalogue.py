"""What the listings print, from ``catalogue.json``: importing every method and statistic, and torch for them, would take seconds.

The file is written by ``scripts/component_table.py``, and its ``--check`` compares it with the registry. It answers only while the package holds
the source files that it was written from; else, and for what a user registered, the registry itself is asked.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("catalogue.json")
_PACKAGE = Path(__file__).parent.parent


def method_entries() -> list[dict[str, Any]]:
    """Every method as ``exapt methods --json`` prints it, sorted by key.

    >>> next(e for e in method_entries() if e["key"] == "lora")["contract"]
    'weight'
    """
    index = _index()
    return live_methods() if index is None else sorted([*index["methods"], *live_methods(own=False)], key=lambda e: str(e["key"]))


def records() -> list[dict[str, Any]]:
    """Everything in the catalogue, sorted by kind and key; the methods have the kind ``"method"``.

    >>> {r["key"]: r["kind"] for r in records()}["tent"]
    'test-time'
    """
    index = _index()
    rows = live_components() if index is None else [*index["components"], *live_components(own=False)]
    return sorted([*rows, *map(_of_method, method_entries())], key=lambda r: (r["kind"], r["key"]))


def _of_method(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": entry["key"], "kind": "method", "name": entry["class"].rpartition(".")[2], "module": entry["class"].rpartition(".")[0],
        "paper": entry["paper"], "variants": entry["variants"], "oracle": entry["golden"], "summary": entry["summary"],
    }  # fmt: skip


def live_methods(own: bool | None = None) -> list[dict[str, Any]]:
    """Entries made from the registered classes: all, only exapt's own, or only those of others."""
    from exapt.core.registry import _METHODS, methods

    if own is False and not any(_foreign(c.__module__) for c in _METHODS.values()):
        return []
    from exapt.cli.show import method_entry, plain_json

    chosen = methods() if own is not False else dict(sorted(_METHODS.items()))
    found: list[dict[str, Any]] = plain_json([method_entry(c) for c in chosen.values() if own is None or own is not _foreign(c.__module__)])
    return found


def live_components(own: bool | None = None) -> list[dict[str, Any]]:
    """Records of what ``@component`` noted: all, only exapt's own, or only those of others."""
    from exapt.core.components import _COMPONENTS, components

    noted = _COMPONENTS if own is False else components()
    return [c.record() for _, c in sorted(noted.items()) if own is None or own is not _foreign(c.module)]


def _foreign(module: str) -> bool:
    return not module.startswith("exapt.")


def text() -> str:
    """The file's text, made from the registry: one line for each entry."""
    parts = [f'"{name}": [\n' + ",\n".join(json.dumps(e, ensure_ascii=False) for e in found) + "\n]" for name, found in _made().items()]
    return f'{{"files": {_files()},\n' + ",\n".join(parts) + "}\n"


def _made() -> dict[str, list[dict[str, Any]]]:
    return {"methods": live_methods(own=True), "components": live_components(own=True)}


@functools.cache
def _index() -> Any:
    """The file's content, or ``None`` where there is none or the package's source files are not those that it was written from."""
    try:
        index = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if index.get("files") == _files() else None


def _files() -> int:
    """A checksum of the names of the source files that can hold a method or a component: one more or one less is noticed."""
    names = []
    for folder, inside, files in os.walk(_PACKAGE):
        inside[:] = sorted(d for d in inside if d not in ("__pycache__", "cli", "core"))
        place = os.path.relpath(folder, _PACKAGE).replace(os.sep, "/")
        names += [f"{place}/{f}" for f in files if f.endswith(".py")]
    return zlib.crc32("\n".join(sorted(names)).encode())
