"""Compressing an adapter: by a codec, by a transform of its rules, or by one after the other."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from exapt.algebra.compress.codec import codec, codecs
from exapt.algebra.compress.file import packed, read_compressed
from exapt.algebra.compress.seeds import seeds_fitted
from exapt.algebra.compress.svd import svd_truncated
from exapt.core.errors import InputError, did_you_mean
from exapt.core.file import _HEADER, FORMAT, AdapterFile, write_aside

TRANSFORMS: Mapping[str, Callable[..., tuple[AdapterFile, dict[str, float]]]] = {"svd_truncation": svd_truncated, "seeded_bases": seeds_fitted}
Steps = Sequence[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Compressed:
    """An adapter in fewer bytes.

    Attributes:
        steps: What was done: ``(key, settings)``, in order.
        data: The bytes of its file.
        file: The adapter as whoever reads the file gets it.
        before: Bytes of the adapter in a plain file.
        errors: Relative error in the Frobenius norm, by tensor (codecs) and by site (``svd_truncation`` and ``seeded_bases``: of the update).
        error: That of all coded tensors together, or the largest of the sites' if that is larger.
    """

    steps: tuple[tuple[str, dict[str, Any]], ...]
    data: bytes
    file: AdapterFile
    before: int
    errors: dict[str, float]
    error: float

    @property
    def bytes(self) -> int:
        """Bytes of its file."""
        return len(self.data)

    @property
    def ratio(self) -> float:
        """How many times smaller than the plain file."""
        return self.before / self.bytes

    @property
    def name(self) -> str:
        """The steps on one line.

        >>> Compressed((("compeft", {"density": 0.1}),), b"", None, 1, {}, 0.0).name
        'compeft(density=0.1)'
        """
        return " + ".join(f"{k}({', '.join(f'{n}={v}' for n, v in s.items())})" for k, s in self.steps)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file, aside and renamed, and returns its path; ``exapt.load`` reads it."""
        target = Path(path) if Path(path).suffix else Path(f"{os.fspath(path)}.safetensors")
        write_aside(target, self.data)
        return target


def compress(file: AdapterFile | str | os.PathLike[str], method: str | Steps = "compeft", **settings: Any) -> Compressed:
    """Compresses an adapter.

    Args:
        file: The adapter, or its file.
        method: A codec (``"compeft"``, ``"precision_codebook"``, ``"uniform_groups"``, ``"bitdelta"``, ``"cast"``), a transform
            (``"svd_truncation"``, ``"seeded_bases"``), ``"lossless"``, or several: ``[("svd_truncation", {"rank": 2}), ("cast", {})]``,
            transforms first, at most one codec.
        **settings: Of the method.

    Raises:
        InputError: for a method or setting that is not known, an order that makes no sense, or NaN in a tensor.
    """
    source = file if isinstance(file, AdapterFile) else read_compressed(file)
    steps = _steps(method, settings)
    errors: dict[str, float] = {}
    adapter, made = source, None
    for key, given in steps:
        if key in TRANSFORMS:
            adapter, found = TRANSFORMS[key](adapter, **given)
            errors |= found
        elif key != "lossless":
            made = codec(key, **given)
    result = packed(adapter, made)
    squares = {k: float((result.file.tensors[k].double() - adapter.tensors[k].double()).square().sum()) for k in result.chosen}
    sizes = {k: float(adapter.tensors[k].double().square().sum()) for k in result.chosen}
    errors |= {k: (squares[k] / sizes[k]) ** 0.5 if sizes[k] else float(squares[k] > 0) for k in result.chosen}
    total = (sum(squares.values()) / sum(sizes.values())) ** 0.5 if any(sizes.values()) else 0.0
    total = max([total, *(e for k, e in errors.items() if k not in sizes)])
    return Compressed(tuple((k, dict(s)) for k, s in steps), result.data, result.file, plain_bytes(source), errors, total)


def _steps(method: str | Steps, settings: Mapping[str, Any]) -> Steps:
    if not isinstance(method, str) and settings:
        raise InputError(f"compress was given several methods and settings beside them ({', '.join(settings)}); put each method's into its pair")
    steps = [(method, settings)] if isinstance(method, str) else list(method)
    known = {*codecs(), *TRANSFORMS, "lossless"}
    for i, (key, given) in enumerate(steps):
        if key not in known:
            raise InputError(f'no compression "{key}"{did_you_mean(key, known)} (there are {", ".join(sorted(known))})')
        if key not in TRANSFORMS and i < len(steps) - 1:
            raise InputError(f'"{key}" ends a compression, and {steps[i + 1][0]} comes after it; put transforms first, and one codec last')
        own = [p.name for p in inspect.signature(TRANSFORMS[key]).parameters.values()][1:] if key in TRANSFORMS else []
        for name in given if key in TRANSFORMS or key == "lossless" else ():
            if name not in own:
                raise InputError(f'{key} has no "{name}"{did_you_mean(name, own)} (it has {", ".join(own) or "no settings"})')
    return steps


def plain_bytes(file: AdapterFile) -> int:
    """Bytes of an adapter in a plain file.

    >>> import torch
    >>> plain_bytes(AdapterFile([], "", "", {}, tensors={"a": torch.zeros(100)})) > 400
    True
    """
    header = {"format": FORMAT, **{k: getattr(file, k) for k in _HEADER}, "tensors": file.manifest}
    return len(safetensors.torch.save(file.tensors, {"exapt": json.dumps(header, sort_keys=True, separators=(",", ":"))}))
