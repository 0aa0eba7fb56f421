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

from exapt.algebra.rule import Described, rule_of
from exapt.algebra.shards import INDEX, SINGLE, Layout, Shards, Writer, laid_out, size_of
from exapt.algebra.tensors import check_trees, is_finite, merged_tensors
from exapt.core import __version__
from exapt.core.errors import InputError

BLOCK = 1 << 20
"""Numbers of all models together that a rule which works entry by entry is given at a time."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz")
Part = tuple[str, int, int]
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
    r"""Merges models out of core: only one tensor of each model is in memory, of a rule declared ``entrywise`` only a part of one.

    A rule needs some :math:`3 m` times the largest tensor for :math:`m` models (in single precision); an entrywise one some 100 MB at most. The output
    is written under a temporary name beside it, synced and renamed: it is whole, or not there. What a killed run left is cleared away by the next run
    to the same output.

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


@dataclass(frozen=True)
class Plan:
    """A merge that has been found possible.

    Attributes:
        rule: The rule.
        models, base: What is merged.
        statistics: As :func:`merge_files`, files opened.
        weights, seed, config: As :func:`merge_files`.
        kind: Type to write; ``None``: as it is stored.
    """

    rule: Described
    models: Sequence[Shards]
    base: Shards | None
    statistics: Sequence[Mapping[str, Any]] | None
    weights: Sequence[float] | None
    seed: int
    config: Mapping[str, Any]
    kind: torch.dtype | None

    @property
    def first(self) -> Shards:
        """The model whose names, order and types the merged one has."""
        return self.models[0] if self.base is None else self.base

    @property
    def kinds(self) -> dict[str, torch.dtype]:
        """Types to write, by name."""
        return {n: self.kind if self.kind is not None and s.dtype.is_floating_point else s.dtype for n, s in self.first.entries.items()}

    @property
    def note(self) -> dict[str, str]:
        """Metadata of the files: ``format``, which other libraries look for, and how the model was made."""
        made = {
            "exapt": __version__, "rule": self.rule.function.__name__, "config": dict(self.config), "models": [m.path.name for m in self.models],
            "base": self.base.path.name if self.base is not None else None, "seed": self.seed,
            "weights": list(map(float, self.weights)) if self.weights is not None else None,
        }  # fmt: skip
        return {"format": "pt", "merged": json.dumps(made, default=str)}

    def parts(self) -> dict[str, Part]:
        """Tensors whole; or in parts that all models' fit into a block, if the rule says of itself that it works entry by entry."""
        apart = {"generator", "name"} & set(self.rule.given)  # draws and names go by whole tensors
        whole = not self.rule.entrywise or bool(apart) or not all(map(self._like_first, self.statistics or ()))
        step = max(1, BLOCK // (len(self.models) + 1))
        parts: dict[str, Part] = {}
        for name, s in self.first.entries.items():
            if whole or s.elements <= step:
                parts[name] = (name, 0, s.elements)
            else:
                parts |= {f"{name}[{a}:{min(a + step, s.elements)}]": (name, a, min(a + step, s.elements)) for a in range(0, s.elements, step)}
        return parts

    def _like_first(self, statistics: Mapping[str, Any]) -> bool:
        shapes = {n: s.shape for n, s in self.first.entries.items()}
        return isinstance(statistics, Shards) and all(shapes.get(n) == s.shape for n, s in statistics.entries.items())

    def _wide(self) -> dict[str, torch.dtype]:
        """The type that holds every model's numbers, where models of several types may meet."""
        if self.kind is None:
            return {}
        wide = {n: torch.float32 for n, s in self.first.entries.items() if s.dtype.is_floating_point}
        for model in (*self.models, self.first):
            wide |= {n: torch.promote_types(wide[n], model.entries[n].dtype) for n in wide}
        return wide

    def merged(self) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """Merged tensors, or parts, with their names and where they begin; the pages that they came from are given back."""
        parts, kinds, wide = self.parts(), self.kinds, self._wide()
        views = [View(m, parts, wide) for m in self.models]
        still = None if self.base is None else View(self.base, parts, wide, copied="base" in self.rule.given)
        seen = None
        if self.statistics is not None:
            seen = [View(s, {k: p for k, p in parts.items() if p[0] in s}, copied=True) if isinstance(s, Shards) else s for s in self.statistics]
        labels = [m.label for m in self.models]
        held = [s for s in (*self.models, self.base, *(self.statistics or ())) if isinstance(s, Shards)]
        merging = merged_tensors(self.rule.function, views, still, self.weights, statistics=seen, names=labels, seed=self.seed, **self.config)
        for key, tensor in merging:
            name, begin, end = parts[key]
            yield (name, begin), _finite(tensor.to(kinds[name]), key, self.rule)
            for source in held:
                if name in source:
                    source.release(name, begin, end)


class View(Mapping[str, Tensor]):
    """Parts of the tensors of a model in files, under names of their own.

    Args:
        shards: The model.
        parts: What each name stands for: a tensor's name, and the entries from where to where.
        wide: Types to read tensors in, by name; the others are read in their own.
        copied: Whether a tensor is a copy that may be written to; the model's own memory may not.
    """

    def __init__(self, shards: Shards, parts: Mapping[str, Part], wide: Mapping[str, torch.dtype] | None = None, copied: bool = False) -> None:
        self.shards, self.parts, self.wide, self.copied = shards, parts, wide or {}, copied

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __contains__(self, key: object) -> bool:
        return key in self.parts

    def __getitem__(self, key: str) -> Tensor:
        name, start, stop = self.parts[key]
        stored = self.shards.entries[name]
        t = self.shards.part(name, start, stop)
        t = t.reshape(stored.shape) if stop - start == stored.elements else t
        return t.to(self.wide.get(name, t.dtype), copy=self.copied)


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


def _finite(tensor: Tensor, name: str, rule: Described) -> Tensor:
    if not is_finite(tensor):
        said = f"{name}: merged by {rule.function.__name__} it holds NaN or infinity in {tensor.dtype}"
        raise InputError(f"{said}; look at the base and the weights, or write a wider dtype")
    return tensor


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
