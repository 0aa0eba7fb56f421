"""What the listing commands print: methods, sites, adapter files, the environment."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from exapt.cli.catalogue import method_entries
from exapt.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from exapt.core.contract import Method


def print_json(data: Any) -> None:
    """Prints JSON to stdout; methods inside it as their own JSON."""
    print(json.dumps(data, indent=1, default=_as_json, ensure_ascii=False))


def plain_json(data: Any) -> Any:
    """``data`` as it comes back from JSON.

    >>> plain_json({"shape": (1, 2)})
    {'shape': [1, 2]}
    """
    return json.loads(json.dumps(data, default=_as_json))


def _as_json(value: Any) -> Any:
    from exapt.core.contract import Method, as_dict  # here: what is listed from an index alone needs no torch

    return as_dict(value) if isinstance(value, Method) else str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Prints a table to stdout, as wide as the terminal, or up to 200 columns where stdout is none."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    numeric = (int, float)
    data = [list(r) for r in rows]
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        right = bool(data) and all(isinstance(r[i], numeric) for r in data)
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in data:
        table.add_row(*(Text(_text(v)) for v in row))
    width = None if sys.stdout.isatty() else min(max(80, Console(width=1000).measure(table).maximum), 200)
    Console(file=sys.stdout, width=width).print(table)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def size(number: int) -> str:
    """Bytes in words.

    >>> size(512), size(20_480)
    ('512 B', '20.0 KiB')
    """
    value, units = float(number), iter(("KiB", "MiB", "GiB", "TiB"))
    unit = "B"
    while value >= 1024:
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def method_entry(cls: type[Method]) -> dict[str, Any]:
    """Describes one method from its class alone: what ``exapt methods --json`` prints.

    >>> import exapt
    >>> entry = method_entry(exapt.LoRA)
    >>> entry["key"], entry["contract"], entry["parameters"][0]["name"]
    ('lora', 'weight', 'rank')
    """
    from exapt.core.contract import Method, SubsetMethod, WeightMethod

    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    required = any(f.default is f.default_factory is dataclasses.MISSING for f in fields)
    example: Any = cls if required else cls()  # what a method needs may depend on its fields
    helps, hints = argument_help(cls), get_type_hints(cls)
    return {
        "key": cls.key,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "contract": cls.contract,
        "paper": cls.paper,
        "variants": dict(cls.variants),
        "equation": cls.equation,
        "golden": cls.golden,
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "where": example.where,
        "mergeable": bool(example.mergeable),
        "shared": cls.shared is not Method.shared,
        "needs": list(example.needs),
        "reads": list(example.reads),
        "fast_path": issubclass(cls, (WeightMethod, SubsetMethod)) and cls.has_fast_path(),
        "parameters": [_parameter(f, type_text(hints[f.name]), helps.get(f.name, "")) for f in fields],
    }


def _parameter(field: dataclasses.Field[Any], kind: str, text: str) -> dict[str, Any]:
    required = field.default is field.default_factory is dataclasses.MISSING
    default = field.default if field.default is not dataclasses.MISSING else None if required else field.default_factory()  # type: ignore[operator]
    return {"name": field.name, "type": kind, "default": default, "required": required, "help": text}


def type_text(hint: Any) -> str:
    """A type as the user reads it.

    >>> type_text(Literal["a", "b"]), type_text(int | None)
    ("'a' | 'b'", 'int | None')
    """
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def argument_help(cls: type) -> dict[str, str]:
    """The texts of the ``Args:`` section of a class's docstring, or of the classes it extends.

    >>> from exapt import LoRA
    >>> argument_help(LoRA)["alpha"]
    'Scale of the update.'
    """
    from docstring_parser import DocstringStyle, parse

    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if one.__doc__ and dataclasses.is_dataclass(one):
            found |= {p.arg_name: " ".join((p.description or "").split()) for p in parse(inspect.cleandoc(one.__doc__), DocstringStyle.GOOGLE).params}
    return found


CONTRACTS = ("weight", "activation", "token", "subset", "side", "output", "recipe")


def list_methods(key: str | None, contract: str | None, as_json: bool) -> None:
    """Prints the registry, those of one contract, or one method with its parameters."""
    known = {e["key"]: e for e in method_entries()}
    if key is not None and key not in known:
        raise InputError(f'no method "{key}"{did_you_mean(key, known)} (exapt methods lists all {len(known)})')
    if contract is not None and contract not in CONTRACTS:
        raise InputError(f'no contract "{contract}"{did_you_mean(contract, CONTRACTS)} (there are {", ".join(CONTRACTS)})')
    chosen = [e for k, e in known.items() if key in (None, k) and contract in (None, e["contract"])]
    if as_json:
        print_json(chosen)
    elif key is not None:
        print_table(("", ""), [(k, v) for k, v in chosen[0].items() if k != "parameters"])
        rows = [(p["name"], p["type"], _default(p["default"]), p["help"]) for p in chosen[0]["parameters"]]
        print_table(("parameter", "type", "default", "what it is"), rows)
    else:
        table = [(e["key"], e["contract"], e["mergeable"], ", ".join(p["name"] for p in e["parameters"]), e["paper"]) for e in chosen]
        print_table(("method", "contract", "merges", "parameters", "paper"), table, f"{len(table)} methods")


def _default(value: Any) -> str:
    """A field's default as the user writes it.

    >>> _default({"method": "lora", "rank": 4})
    'lora(rank=4)'
    """
    if isinstance(value, dict) and "method" in value:
        return f"{value['method']}({', '.join(f'{k}={_default(v)}' for k, v in value.items() if k != 'method')})"
    return repr(value)


def list_sites(model: Any, where: str | None, as_json: bool) -> None:
    """Prints what of a model can be adapted."""
    from exapt.core.sites import choose, sites

    found = sites(model)
    chosen = found if where is None else choose(found, where, lambda _: True)
    if as_json:
        print_json([{"name": s.name, "role": s.role, "module": type(s.module).__name__, "shape": list(s.shape) if s.layer else None} for s in chosen])
        return
    rows = [(s.name or "(model)", s.role, type(s.module).__name__, "x".join(map(str, s.shape)) if s.layer else "") for s in chosen]
    print_table(("site", "role", "module", "shape (out x in)"), rows, f"{len(rows)} sites")


def file_entry(path: Path) -> dict[str, Any]:
    """Describes an adapter file: what ``exapt show --json`` prints."""
    from exapt.core.file import read

    data = read(path)
    tensors = {
        k: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "bytes": t.nbytes, "trains": data.manifest.get(k, [None, True])[1]}
        for k, t in data.tensors.items()
    }
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "methods": [{**rule["method"], "sites": rule["sites"]} for rule in data.rules],
        "base": data.base,
        "fingerprint": data.fingerprint,
        "versions": data.versions,
        "parameters": sum(data.tensors[k].numel() for k, v in tensors.items() if v["trains"]),
        "tensors": tensors,
        "remade_on_loading": data.checksums,
        "metrics": data.metrics,
        "provenance": data.provenance,
    }


def show_file(path: Path, as_json: bool) -> None:
    """Prints what is in an adapter file."""
    entry = file_entry(path)
    if as_json:
        print_json(entry)
        return
    facts: list[tuple[str, Any]] = [
        ("file", f"{path} ({size(entry['bytes'])})"),
        ("base", f"{entry['base']}, fingerprint {entry['fingerprint']}"),
        ("written by", ", ".join(f"{k} {v}" for k, v in entry["versions"].items())),
        ("parameters", f"{entry['parameters']:,} in {len(entry['tensors'])} tensors"),
    ]
    for one in entry["methods"]:
        fields = ", ".join(f"{k}={v}" for k, v in one.items() if k not in ("method", "sites"))
        places = [s or "(model)" for s in one["sites"]]
        facts.append(("method", f"{one['method']}({fields}) at {len(places)} sites: {', '.join(places[:3])}{', ...' if len(places) > 3 else ''}"))
    for part in ("metrics", "provenance"):
        facts += [(f"{part}.{k}", v if isinstance(v, (str, int, float, list)) else json.dumps(v, ensure_ascii=False)) for k, v in entry[part].items()]
    print_table(("", ""), facts)
    rows = [(k, "x".join(map(str, t["shape"])), t["dtype"], size(t["bytes"]), "" if t["trains"] else "frozen") for k, t in entry["tensors"].items()]
    print_table(("tensor", "shape", "type", "size", ""), rows)


def environment() -> str:
    """Versions of exapt, its extras, PyTorch and the machine, for a bug report."""
    from torch.utils.collect_env import get_pretty_env_info

    from exapt.cli.extras import extras
    from exapt.core import __version__

    lines = [f"exapt {__version__}, {len(method_entries())} methods"]
    for extra, packages in extras().items():
        lines.append(f"  [{extra}] " + ", ".join(f"{name} {version or '(not installed)'}" for name, version in packages.items()))
    return "\n".join([*lines, "", get_pretty_env_info()])  # type: ignore[no-untyped-call]
