"""Reading data: files, folders, arrays and other libraries' sets, all as a sequence of rows (dicts by column)."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exapt.core.errors import InputError, did_you_mean

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class Table(Sequence[dict[str, Any]]):
    """Columns of equal length, read row by row.

    >>> Table({"x": [1, 2], "label": ["a", "b"]})[1]
    {'x': 2, 'label': 'b'}
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.columns = dict(columns)
        lengths = {k: len(v) for k, v in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"columns have different lengths: {', '.join(f'{k} {n}' for k, n in lengths.items())}")
        self.length = next(iter(lengths.values()), 0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Table({k: v[i] for k, v in self.columns.items()})
        if not -self.length <= i < self.length:
            raise IndexError(i)
        return {k: v[i] for k, v in self.columns.items()}


class ImageFolder(Sequence[dict[str, Any]]):
    """Images in one subfolder per class, opened when read: ``{"image": (H, W, 3) uint8, "label": subfolder}``."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(f for f in folder.glob("*/*") if f.suffix.lower() in IMAGES)
        if not self.files:
            raise InputError(f"{folder}: no images found; put them into one subfolder per class")
        self.columns = {"label": [f.parent.name for f in self.files]}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        from PIL import Image

        try:
            with Image.open(self.files[i]) as image:
                pixels = np.asarray(image.convert("RGB"))
        except OSError as e:
            raise InputError(f"{self.files[i]}: not a readable image ({e})") from e
        return {"image": pixels, "label": self.columns["label"][i]}


def column(data: Any, name: str) -> list[Any] | None:
    """One column of a data set without reading the others, or ``None`` where that cannot be done cheaply."""
    columns = getattr(data, "columns", None)
    if isinstance(columns, Mapping):
        return list(columns[name]) if name in columns else None
    if isinstance(data, (list, tuple)):
        return [row.get(name) if isinstance(row, Mapping) else None for row in data]
    if name in (getattr(data, "column_names", None) or ()):
        return list(data[name])
    return None


def label_set(data: Any, name: str = "label") -> tuple[str, ...]:
    """The distinct labels of a column (of lists of tags too), sorted; ``"O"`` first.

    >>> label_set([{"label": "b"}, {"label": "a"}])
    ('a', 'b')
    """
    values = column(data, name)
    if values is None:
        values = [data[i][name] for i in range(len(data))]
    found = {str(v) for value in values for v in (value if isinstance(value, (list, tuple)) else [value])}
    return tuple(sorted(found, key=lambda v: (v != "O", v)))


def load_data(source: Any, kind: str | None = None) -> Any:
    """Reads a data set.

    Args:
        source: A file (``.jsonl``, ``.jsonl.gz``, ``.csv``, ``.tsv``, ``.parquet``, ``.npz``, ``.conll``, ``.txt``), a folder
            with one subfolder of images per class, or what is a data set already: a list of rows, a ``datasets.Dataset``, a
            torch ``Dataset`` or a ``DataLoader``, returned as it is.
        kind: ``"jsonl"``, ``"csv"``, ``"tsv"``, ``"parquet"``, ``"npz"``, ``"conll"``, ``"text"`` or ``"images"``, where the
            name does not tell. A ``.txt`` file is taken for CoNLL if its lines end in BIO tags, else for one running text.

    Returns:
        A sequence of rows, or the ``DataLoader``.

    Raises:
        InputError: for a file that is missing, of unknown kind or malformed, with its line where there is one.
    """
    if isinstance(source, Mapping):
        return Table(source)
    if not isinstance(source, (str, os.PathLike)):
        if hasattr(source, "__getitem__") or hasattr(source, "__iter__"):
            return source
        raise InputError(f"data is {type(source).__name__}; give a path, a list of rows, a data set or a DataLoader")
    path = Path(source)
    if not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise InputError(f"{path}: no such file or folder{near}")
    kind = kind or _kind(path)
    if kind not in READERS:
        raise InputError(f'{path}: kind "{kind}" is not known{did_you_mean(kind, READERS)} (kinds are {", ".join(READERS)})')
    try:
        rows = READERS[kind](path)
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); convert it, or name its kind") from e
    if len(rows) == 0:
        raise InputError(f"{path}: holds no rows")
    return rows


def _kind(path: Path) -> str:
    if path.is_dir():
        return "images"
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    if suffix == ".txt":
        return "conll" if _is_conll(path) else "text"
    known = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".npz": "npz", ".conll": "conll", ".bio": "conll"}
    if suffix not in known:
        raise InputError(f"{path}: its ending does not say what it is; give kind= one of {', '.join(READERS)}")
    return known[suffix]


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _is_conll(path: Path) -> bool:
    with _open(path) as f:
        lines = [line.split() for _, line in zip(range(200), f, strict=False) if line.strip() and not line.startswith("-DOCSTART-")]
    return bool(lines) and all(len(w) > 1 and re.fullmatch(r"O|[BIESLU]-.+", w[-1]) for w in lines)


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with _open(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise InputError(f"{path}:{number}: not JSON ({e})") from e
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: a row must be an object with named columns, not {type(row).__name__}")
            rows.append(row)
    return rows


def _polars(read: str, **options: Any) -> Callable[[Path], list[dict[str, Any]]]:
    def reader(path: Path) -> list[dict[str, Any]]:
        try:
            import polars
        except ImportError as e:
            raise InputError(f'{path}: reading it needs polars; pip install "exapt[train]"') from e
        try:
            return getattr(polars, read)(path, **options).to_dicts()
        except (polars.exceptions.PolarsError, OSError) as e:
            raise InputError(f"{path}: could not be read ({str(e).splitlines()[0]})") from e

    return reader


def _npz(path: Path) -> Table:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as arrays:
            named = {k: arrays[k] for k in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile) as e:
        raise InputError(f"{path}: not an .npz of plain arrays ({e})") from e
    return Table(named)


def _conll(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    tokens: list[str] = []
    tags: list[str] = []

    def end() -> None:
        if tokens:
            rows.append({"tokens": list(tokens), "tags": list(tags)})
        tokens.clear()
        tags.clear()

    with _open(path) as f:
        for number, line in enumerate(f, 1):
            words = line.rstrip("\n").split("\t") if "\t" in line else line.split()
            if not line.strip() or line.startswith("-DOCSTART-"):
                end()
            elif len(words) < 2:
                raise InputError(f"{path}:{number}: a CoNLL line is a token and its tag, not {line.strip()!r}")
            else:
                tokens.append(words[0])
                tags.append(words[-1].strip())
    end()
    return rows


def _text(path: Path) -> list[dict[str, Any]]:
    with _open(path) as f:
        text = f.read()
    return [{"text": text}] if text.strip() else []


READERS: dict[str, Callable[[Path], Any]] = {
    "jsonl": _jsonl, "csv": _polars("read_csv", infer_schema_length=None), "tsv": _polars("read_csv", separator="\t", infer_schema_length=None),
    "parquet": _polars("read_parquet"), "npz": _npz, "conll": _conll, "text": _text, "images": ImageFolder,
}  # fmt: skip


def field(row: Any, name: str, number: int) -> Any:
    """``row[name]``; on failure an error that names the row, what it has and the nearest of that."""
    if not isinstance(row, Mapping):
        raise InputError(f'row {number} is {type(row).__name__}; the task needs rows with named columns, such as {{"{name}": ...}}')
    if name not in row:
        raise InputError(f'row {number} has no "{name}"{did_you_mean(name, map(str, row))} (it has {", ".join(map(str, row)) or "nothing"})')
    return row[name]


def numbered(rows: Iterable[Any]) -> list[tuple[int, Any]]:
    """Rows with their places, as tasks collate them."""
    return list(enumerate(rows))
