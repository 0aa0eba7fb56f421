"""Models in safetensors files that need not fit into memory: read through a mapping, written one tensor after the other.

The layout of the format (an 8-byte length, a JSON header of names, types, shapes and offsets, then the data) is known before any tensor is, so the header
is written first and no shard is ever whole in memory, which ``safetensors.torch.save_file`` would need.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from exapt.core.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
}  # fmt: skip
_AROUND = 1 << 21
"""A page that is touched brings its neighbours with it, of no more than one page table (2 MiB)."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: The file.
        dtype, shape: Of the tensor.
        start: Where its first byte is.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.elements * self.dtype.itemsize


class Shards(Mapping[str, Tensor]):
    """The tensors of one model by name, in the order of its files; each is a view of the file's pages, read when it is touched.

    Args:
        path: A ``.safetensors`` file, or a folder with ``model.safetensors`` or ``model.safetensors.index.json`` and the shards it names.

    Raises:
        InputError: for a path that is none, a damaged file, an index that does not fit its shards, or types that cannot be merged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.label = os.fspath(path)
        files = _files(self.path)
        found: list[tuple[str, Stored]] = []
        for file, wanted in files.items():
            stored = _header(file)
            lacking = [name for name in wanted or () if name not in stored]
            if lacking:
                raise InputError(f"{self.path / INDEX}: {file.name} holds no {lacking[0]}, which the index says it does; fetch the model again")
            found += [(name, s) for name, s in stored.items() if wanted is None or name in wanted]
        self.entries = dict(found)
        self._maps: dict[Path, mmap.mmap] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Tensor:
        stored = self.entries[name]
        return self.part(name, 0, stored.elements).reshape(stored.shape)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of a tensor laid flat. The memory is the file's, and read-only: writing to it ends the process."""
        stored = self.entries[name]
        if stop == start:
            return torch.empty(0, dtype=stored.dtype)
        width = stored.dtype.itemsize
        first = stored.start + start * width
        if first % width:  # files by others need not be aligned
            return torch.frombuffer(bytearray(self._map(stored.file)[first : first + (stop - start) * width]), dtype=stored.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(self._map(stored.file), dtype=stored.dtype, count=stop - start, offset=first)

    def release(self, name: str, start: int, stop: int) -> None:
        """Gives the pages of these entries back, which otherwise count as this process's memory for as long as the file is mapped."""
        stored = self.entries[name]
        if stored.file not in self._maps or not hasattr(mmap, "MADV_DONTNEED"):
            return
        file = self._maps[stored.file]
        first = max(0, (stored.start + start * stored.dtype.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE - _AROUND)
        last = min(len(file), stored.start + stop * stored.dtype.itemsize + _AROUND)
        file.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            # Read-only, so that the kernel reserves no memory for copies of pages, however large the file is.
            with file.open("rb") as f:
                self._maps[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The files of a model, each with the names that an index gives it (``None``: all)."""
    if path.is_file():
        return {path: None}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give a .safetensors file, or a folder with {SINGLE} or {INDEX}")
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path}: an adapter, not a model; exapt merge-adapters merges those")
    if (path / SINGLE).is_file():  # where both are, transformers too takes this one
        return {path / SINGLE: None}
    if (path / INDEX).is_file():
        return _indexed(path)
    pickled = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt*"))
    why = f"holds only {pickled[0]}, a pickle, which exapt never loads; convert it to safetensors" if pickled else f"holds neither {SINGLE} nor {INDEX}"
    raise InputError(f"{path}: {why}")


def _indexed(path: Path) -> dict[Path, set[str] | None]:
    index = path / INDEX
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): str(file) for name, file in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{index}: cannot be read as an index ({type(e).__name__}: {e}); fetch the model again") from e
    files: dict[Path, set[str] | None] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise InputError(f'{index}: names the shard "{file}" outside its own folder; move the shards beside it')
        if not (path / file).is_file():
            raise InputError(f"{index}: names the shard {file}, which is missing; fetch the model again")
        files[path / file] = {name for name, place in places.items() if place == file}
    if not files:
        raise InputError(f"{index}: names no tensor; fetch the model again")
    return files


def _header(file: Path) -> dict[str, Stored]:
    """A file's tensors in the order of their bytes, once safetensors itself has found the file sound."""
    with file.open("rb") as f:
        start = f.read(8)
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            raise InputError(f"{file}: a pickle (a torch .pt/.bin file), which exapt never loads; convert it to safetensors")
        try:
            with safetensors.safe_open(file, framework="pt") as checked:
                metadata = checked.metadata() or {}
        except safetensors.SafetensorError as e:
            raise InputError(f"{file}: not a whole safetensors file ({e}); it is damaged or truncated, fetch or save it again") from e
        length = int.from_bytes(start, "little")
        listed = json.loads(f.read(length))
    if "exapt" in metadata:
        raise InputError(f"{file}: an exapt adapter, not a model; exapt merge-adapters merges those")
    listed.pop("__metadata__", None)
    stored = {}
    for name, t in sorted(listed.items(), key=lambda pair: (pair[1]["data_offsets"], pair[0])):
        if t["dtype"] not in DTYPES:
            raise InputError(f"{file}: {name} is of type {t['dtype']}; quantised weights cannot be merged, dequantise the model first")
        stored[name] = Stored(file, DTYPES[t["dtype"]], tuple(t["shape"]), 8 + length + t["data_offsets"][0])
    return stored


@dataclass
class Layout:
    """What is going to be written: every shard's tensors and where in it each begins, all known before the first is."""

    shards: list[dict[str, Stored]] = field(default_factory=list)
    headers: list[bytes] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(s.size for shard in self.shards for s in shard.values()) + sum(map(len, self.headers))


def laid_out(folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: float, metadata: Mapping[str, str]) -> Layout:
    """Divides tensors into shards of at most ``limit`` bytes (a larger tensor has one of its own), in their order.

    Args:
        folder: Where the shards go.
        tensors: Types and shapes by name.
        limit: Bytes of a shard; infinity for a single one.
        metadata: For every header.
    """
    groups: list[list[str]] = [[]]
    room = limit
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    layout = Layout()
    for number, group in enumerate(groups, 1):
        file = folder / (SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors")
        listed: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for name in sorted(group, key=lambda n: -tensors[n][0].itemsize):  # the widest first: then each begins at a multiple of its width
            dtype, shape = tensors[name]
            end = offset + prod(shape) * dtype.itemsize
            listed[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        layout.headers.append(len(text).to_bytes(8, "little") + text)
        start = len(layout.headers[-1])
        layout.shards.append({n: Stored(file, *tensors[n], start + listed[n]["data_offsets"][0]) for n in group})
    return layout


class Writer:
    """Writes tensors, or parts of them, into the places that a layout has for them. To be closed with :meth:`finish`, or by leaving its context."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.places = {name: (number, stored) for number, shard in enumerate(layout.shards) for name, stored in shard.items()}
        self.open: dict[int, BinaryIO] = {}
        self.left = [sum(s.size for s in shard.values()) for shard in layout.shards]
        self.syncs: list[Future[None]] = []
        self.pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Writer:
        for number in (n for n, left in enumerate(self.left) if left == 0):
            self._close(number)  # nothing but empty tensors
        return self

    def __exit__(self, *failed: object) -> None:
        self.pool.shutdown()
        for f in self.open.values():
            f.close()

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        """Writes a tensor's entries from ``start`` on."""
        number, stored = self.places[name]
        if tensor.numel() == 0:
            return
        f = self._file(number)
        f.seek(stored.start + start * stored.dtype.itemsize)
        data = tensor.to(stored.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        f.write(data.data)
        self.left[number] -= data.nbytes
        if self.left[number] == 0:
            self._close(number)

    def finish(self) -> None:
        """Waits until everything is on the disk, and writes the index of several shards."""
        for sync in self.syncs:
            sync.result()
        lacking = [n for n, left in enumerate(self.left) if left]
        if lacking:
            raise RuntimeError(f"shard {lacking[0]} lacks {self.left[lacking[0]]} bytes")
        if len(self.layout.shards) > 1:
            placed = {name: stored.file.name for shard in self.layout.shards for name, stored in shard.items()}
            total = sum(s.size for shard in self.layout.shards for s in shard.values())
            folder = next(iter(self.layout.shards[0].values())).file.parent
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}, indent=2)
            (folder / INDEX).write_text(text + "\n", encoding="utf-8")

    def _file(self, number: int) -> BinaryIO:
        if number not in self.open:
            f = next(iter(self.layout.shards[number].values())).file.open("wb")
            self.open[number] = f
            f.write(self.layout.headers[number])
        return self.open[number]

    def _close(self, number: int) -> None:
        """A whole shard goes to the disk while the next is merged."""
        f = self._file(number)
        del self.open[number]
        self.syncs.append(self.pool.submit(_synced, f))


def _synced(f: BinaryIO) -> None:
    with f:
        f.flush()
        os.fsync(f.fileno())


def size_of(text: int | str) -> int:
    """Bytes of ``"5GB"``, ``"500MB"``, ``"2GiB"`` or a number.

    >>> size_of("5GB"), size_of("1KiB"), size_of(7)
    (5000000000, 1024, 7)
    """
    units = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)} | {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
    word = str(text).strip().upper()
    number = word.rstrip("KMGTIB ")
    unit = units.get(word[len(number) :].strip())
    try:
        size = int(float(number) * (unit or 0))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise InputError(f"{text!r} is no size; write bytes, or a number with KB, MB, GB or GiB")
    return size
