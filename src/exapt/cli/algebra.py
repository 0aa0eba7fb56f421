"""The commands on adapter files as vectors: ``merge-adapters``, ``arithmetic``, ``diff``."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from exapt.core.errors import InputError

Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Settings = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """``--density 0.2 --majority`` as a rule's configuration.

    >>> settings_of(["--density", "0.2", "--normalise=False", "--sign-method", "sum"])
    {'density': 0.2, 'normalise': False, 'sign_method': 'sum'}
    """
    found: dict[str, Any] = {}
    rest = [part for w in words for part in (w.split("=", 1) if w.startswith("--") else [w])]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f'"{word}" stands alone; a rule\'s settings are written --density 0.2')
        value = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
        try:
            found[word[2:].replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[word[2:].replace("-", "_")] = value
    return found


def told_apart(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """What is to be merged, and the rule's settings, which follow it."""
    cut = next((i for i, w in enumerate(words) if w.startswith("--")), len(words))
    return list(words[:cut]), settings_of(words[cut:])


def read_shifts(files: Sequence[Path], model: str | None, labels: Sequence[str] | None = None) -> list[Any]:
    """What adapters add to the weights; with the base where one is named."""
    from exapt.algebra.adapters import shifts_of
    from exapt.cli.models import load_model
    from exapt.core.file import read

    base = None if model is None else load_model(model)
    return [shifts_of(read(f), label, base) for f, label in zip(files, labels or [str(f) for f in files], strict=True)]


def _written(found: Any, output: Path, rank: int | None, provenance: dict[str, Any], json: bool) -> None:
    from exapt.algebra.adapters import as_file
    from exapt.cli.show import print_json
    from exapt.core.file import write

    data, errors = as_file(found, rank, provenance)
    path = write(data, output)
    worst = max(errors, key=lambda s: errors[s])
    record = {
        "output": str(path),
        "bytes": path.stat().st_size,
        "sites": len(errors),
        "rank": rank,
        "largest_error": errors[worst],
        "at": worst,
        "errors": errors,
    }
    if json:
        print_json({**record, **provenance})
        return
    lost = f"; cut to rank {rank}, relative error up to {errors[worst]:.3g} (at {worst})" if rank is not None else ""
    print(f"{path}: {len(errors)} sites, {record['bytes']} bytes{lost}")


def merge_adapters(
    *files_and_settings: Settings, output: Output, rule: str = "average", weights: str | None = None, rank: int | None = None, model: str | None = None,
    missing: str = "refuse", seed: int = 0, force: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Merges adapter files, of any methods and ranks, into one: `exapt merge-adapters A B -o C --rule ties --density 0.2`.

    Averages and sums of LoRAs are exact, their ranks add up; other rules give full-rank shifts, unless --rank cuts them. A rule's own
    settings follow it by name; `exapt components --kind "merge rule"` lists the rules.

    Args:
        files_and_settings: The adapter files, then settings of the rule.
        output: The new adapter file.
        rule: A merge rule.
        weights: One number for each file, with commas between them.
        rank: Cut every site to this rank; the relative error is printed.
        model: The base, for methods whose shift depends on its weights.
        missing: "refuse" files of different sites, or take "zero" where one has none.
        seed: Of rules that draw.
        force: Merge although the files belong to different bases.
        json: Print JSON.
    """
    from exapt.algebra.adapters import combined

    files, settings = told_apart(files_and_settings)
    if not files:
        raise InputError("merge-adapters needs adapter files")
    given = None if weights is None else numbers(weights)
    found = combined(rule, read_shifts([Path(f) for f in files], model), given, missing=missing, seed=seed, force=force, **settings)
    _written(found, output, rank, {"merged": files, "rule": rule, "weights": given, "settings": settings}, json)


def numbers(text: str) -> list[float]:
    """The numbers of ``--weights``."""
    try:
        return [float(w) for w in text.split(",")]
    except ValueError as e:
        raise InputError(f'--weights {text}: write numbers with commas between them, as in "0.5,0.5"') from e


def arithmetic(
    expression: str, /, *files: str, output: Output, rank: int | None = None, model: str | None = None, force: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Adds and subtracts adapters: `exapt arithmetic "A + 0.5*B - C" A=x.safetensors B=y.safetensors C=z.safetensors -o new`.

    Args:
        expression: A sum of multiples of names.
        files: NAME=FILE for each name; a name without is looked for as NAME.safetensors.
        output: The new adapter file.
        rank: Cut every site to this rank.
        model: The base, for methods whose shift depends on its weights.
        force: Although the files belong to different bases.
        json: Print JSON.
    """
    from exapt.algebra.arithmetic import arithmetic as summed
    from exapt.algebra.arithmetic import linear_form

    named = {}
    for word in files:
        name, equals, path = word.partition("=")
        if not equals:
            raise InputError(f'"{word}": write NAME=FILE, with the name that stands in the expression')
        named[name] = Path(path)
    form = linear_form(expression)
    for name in form:
        named.setdefault(name, Path(f"{name}.safetensors"))
    items = read_shifts([named[k] for k in form], model, list(form))
    found = summed(expression, dict(zip(form, items, strict=True)), force=force)
    _written(found, output, rank, {"expression": expression, "files": {k: str(named[k]) for k in form}}, json)


def diff(a: Path, b: Path, /, *, model: str | None = None, picture: Path | None = None, json: bool = False) -> None:
    """Compares two adapters site by site: norms, angle, effective ranks, sign conflict.

    Args:
        a: An adapter file.
        b: Another.
        model: The base, for methods whose shift depends on its weights.
        picture: Draw it too, into this .png, .svg or .pdf file.
        json: Print JSON.
    """
    from exapt.algebra.difference import difference, draw
    from exapt.cli.show import print_json, print_table

    records = difference(*read_shifts([a, b], model))
    if picture is not None:
        draw(records, picture, (a.stem, b.stem))
    if json:
        print_json(records)
        return
    keys = ("norm_a", "norm_b", "distance", "angle", "rank_a", "rank_b", "conflict")
    rows = [(r["site"], *("-" if r[k] is None else f"{r[k]:.3g}" for k in keys)) for r in records]
    print_table(("site", *(k.replace("_", " ") for k in keys)), rows, f"{len(rows)} sites")
