"""Merging models that lie in files, one tensor (or one part of a tensor) after the other, however large they are."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exapt.algebra.plan import Plan
from exapt.algebra.rule import rule_of
from exapt.algebra.shards import INDEX, SINGLE, Layout, Shards, Writer, laid_out, size_of
from exapt.algebra.tensors import check_trees
from exapt.core.errors import InputError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz")
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Written:
    """What a merge has written.

    Attributes:
        path: The file or folder.
        tensors: How many there are.
        bytes: Of the shards.
        shards: How many files hold them.
    """

    path: Path
    tensors: int
    bytes: int
    shards: int


def merge_files(
    rule: str | Callable[..., Tensor], models: Sequence[PathLike], output: PathLike, base: PathLike | None = None, weights: Sequence[float] | None = None, *,
    shard_size: int | str = "5GB", dtype: torch.dtype | str | None = None, seed: int = 0, statistics: Sequence[Mapping[str, Any] | PathLike] | None = None,
    overwrite: bool = False, **config: Any,
) -> Written:  # fmt: skip
    r"""Merges models out of core: only a part of one tensor of each model is in memory at a time.

    A rule declared ``entrywise`` reads parts once, one with a ``streamed`` form several times (first for thresholds, norms, inner products); both take some
    100 MB at most, whatever the models' size. They give what the rule gives on whole tensors, ties at a threshold and random draws included; sums of
    numbers agree to 1e-6. Only these need whole tensors, some :math:`3 m` times the largest for :math:`m` models (in single precision): ``core_space``,
    ``iso_c``, ``iso_cts``, ``knots``, ``tsv`` (decompositions of matrices), ``regmean`` (solves for a matrix), ``wudi`` (steps of an optimiser),
    ``arcee_fusion`` (quantiles of one model's scores, which may be negative), ``nuslerp`` along any but the last dimension, DELLA where a row is the whole
    tensor, and rules of yours that declare neither. The output is written under a temporary name beside it, synced and renamed: it is whole, or not there. What
    a killed run left is cleared away by the next run to the same output.

    Args:
        rule: A merge rule, or its key (``exapt.components("merge rule")``).
        models: ``.safetensors`` files, or folders with ``model.safetensors`` or ``model.safetensors.index.json`` and its shards.
        output: ``NAME.safetensors`` for one file; anything else is a folder, with the base's (or first model's) configuration and tokenizer beside the weights.
        base: The base, in the same forms.
        weights: One for each model; by default the rule's own.
        shard_size: Largest shard in a folder, as bytes or ``"5GB"``.
        dtype: Type of the floating-point tensors written; by default the base's, and then all models must have the same.
        seed: Of rules that draw.
        statistics: For each model what the rule needs of its tensors, by name: a mapping, or a safetensors file.
        overwrite: Whether an output that is there is replaced, once the new one is whole.
        **config: The rule's configuration.

    Returns:
        What was written.

    Raises:
        InputError: for paths that are no models, other names, shapes or types than the first's, NaN (model and tensor named), a base that is missing, an
            output that is there, too little disk space. Nothing is left at ``output`` then, or what was there before.

    >>> import tempfile, safetensors.torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> for i in range(2):
    ...     safetensors.torch.save_file({"w": torch.full((2,), float(i))}, folder / f"{i}.safetensors")
    >>> merge_files("average", [folder / "0.safetensors", folder / "1.safetensors"], folder / "merged.safetensors").tensors
    1
    >>> safetensors.torch.load_file(folder / "merged.safetensors")
    {'w': tensor([0.5000, 0.5000])}
    """
    found = rule_of(rule)
    config = found.checked(config)
    target = Path(output)
    kind = _dtype(dtype)
    limit = float("inf") if target.suffix == ".safetensors" else size_of(shard_size)
    _refuse_target(target, [*models, *([] if base is None else [base])], overwrite)
    opened = [Shards(m) for m in models]
    start = None if base is None else Shards(base)
    check_trees(found, opened, start, weights, [m.label for m in opened])
    first = opened[0] if start is None else start
    _check_stored(first, opened, kind)
    if statistics is not None and ("statistics" not in found.given or len(statistics) != len(models)):
        wanted = "for each of the models" if "statistics" in found.given else "to none, which this rule does not use"
        raise InputError(f"{found.function.__name__}: {len(statistics)} statistics for {len(models)} models; give them {wanted}")
    told = [Shards(s) if isinstance(s, (str, os.PathLike)) else s for s in statistics] if statistics is not None else None
    plan = Plan(found, opened, start, told, weights, seed, config, kind)
    with _written_to(target) as folder:
        types = {n: (plan.kinds[n], s.shape) for n, s in first.entries.items()}
        layout = laid_out(folder, types, limit, plan.note)
        extra = [] if target.suffix == ".safetensors" else _beside([first, *opened])
        _refuse_space(target, layout, extra)
        with Writer(layout) as writer:
            for (name, begin), tensor in plan.merged():
                writer.write(name, begin, tensor)
            writer.finish()
        _copy(extra, folder, kind)
    return Written(target, len(first), layout.size, len(layout.shards))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    found = known.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in known.values():
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(known)}")
    return found


def _refuse_target(target: Path, inputs: Sequence[PathLike], overwrite: bool) -> None:
    """Refuses an output that is there, one of the models, or a folder that holds something else than a model."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{target}: is there already; name another output, or pass overwrite=True (--overwrite)")
    for path in map(Path, inputs):
        if path.resolve() in (target.resolve(), *target.resolve().parents) or target.resolve() in path.resolve().parents:
            raise InputError(f"{target}: is, or holds, the model {path} that is to be merged; name another output")
    if target.is_dir() != (target.suffix != ".safetensors") or (target.is_dir() and not any((target / n).is_file() for n in (SINGLE, INDEX))):
        raise InputError(f"{target}: what is there is no model that a merge wrote, and is not replaced; name another output")


def _check_stored(first: Shards, models: Sequence[Shards], kind: torch.dtype | None) -> None:
    """Refuses other shapes and types, from the headers alone."""
    if not len(first):
        raise InputError(f"{first.label}: holds no tensor")
    for name, one in first.entries.items():
        for model in models:
            other = model.entries[name]
            if other.shape != one.shape:
                raise InputError(f"{name}: {model.label} has shape {other.shape}, {first.label} {one.shape}; only models of one architecture can be merged")
            both = other.dtype.is_floating_point and one.dtype.is_floating_point
            if other.dtype != one.dtype and (kind is None or not both):
                advice = "give the type to write with dtype= (--dtype bfloat16)" if both else "they must be of one type"
                raise InputError(f"{name}: {model.label} is {other.dtype}, {first.label} {one.dtype}; {advice}")


def _beside(models: Sequence[Shards]) -> list[Path]:
    """What lies beside the weights of the first model that is a folder: configuration, tokenizer, licence; not a description, which would be of another."""
    folder = next((m.path for m in models if m.path.is_dir()), None)
    files = sorted(folder.iterdir()) if folder is not None else []
    return [f for f in files if f.is_file() and not f.name.startswith(".") and f.suffix not in _WEIGHTS and not f.name.endswith((".index.json", "README.md"))]


def _copy(files: Sequence[Path], folder: Path, kind: torch.dtype | None) -> None:
    for file in files:
        shutil.copyfile(file, folder / file.name)
    config = folder / "config.json"
    if kind is not None and config.is_file():
        with contextlib.suppress(ValueError, AttributeError):  # not JSON: then it is no concern of this library
            data = json.loads(config.read_text(encoding="utf-8"))
            data |= {k: str(kind).removeprefix("torch.") for k in ("dtype", "torch_dtype") if k in data}
            config.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        if file.suffix != ".safetensors":  # shards are synced as they are written
            _sync(file)
    _sync(folder)


def _refuse_space(target: Path, layout: Layout, extra: Sequence[Path]) -> None:
    needed = layout.size + sum(f.stat().st_size for f in extra)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise InputError(f"{target}: the merged model takes {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB; make room or name another folder")


@contextlib.contextmanager
def _written_to(target: Path) -> Iterator[Path]:
    """Gives an empty folder to write to, which (or whose one file) takes the target's name at the end; after an error nothing is left of it."""
    holder, handle = None, -1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target)
        holder, handle = _holder(target)
        folder = holder / "new"
        folder.mkdir()
        yield folder
        if target.is_dir() and any(target.iterdir()):
            os.replace(target, holder / "old")  # a folder cannot be replaced in one step
        os.replace(folder / SINGLE if target.suffix == ".safetensors" else folder, target)
        _sync(target.parent)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room or name another folder" if full else "check the path and your rights to it"
        raise InputError(f"{target}: could not be written ({e.strerror or e}); nothing was left of it, {advice}") from e
    finally:
        if holder is not None:
            _remove(holder, target)
            os.close(handle)


def clear_leftovers(target: Path) -> list[Path]:
    """Removes what runs that were killed left beside ``target`` (``.NAME.merging-...``), and returns it; a run that is alive holds a lock on its own."""
    removed = []
    for holder in sorted(target.parent.glob(f".{glob.escape(target.name)}.merging-*")):
        handle = os.open(holder, os.O_RDONLY)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(holder, target)
            removed.append(holder)
        os.close(handle)
    return removed


def _holder(target: Path) -> tuple[Path, int]:
    """A folder of this run's own, and the lock on it."""
    while True:
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.merging-", dir=target.parent))
        handle = os.open(holder, os.O_RDONLY)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if holder.is_dir():  # another run may have taken it for a leftover before it was locked
                return holder, handle
        os.close(handle)


def _remove(holder: Path, target: Path) -> None:
    if (holder / "old").exists() and not target.exists():
        os.replace(holder / "old", target)  # the run ended between the two steps of replacing a folder
    shutil.rmtree(holder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
