"""Files of tensors on disk: written aside, synced and renamed; read through a memory map. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from exapt.core.errors import InputError

MAX_HEADER = 64 * 1024 * 1024
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def refuse(path: Path) -> None:
    """Raises ``InputError`` for a file that cannot be a safetensors file, and says what it seems to be."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(9)
    if size == 0:
        raise InputError(f"{path}: the file is empty")
    if start[8:] != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        raise InputError(f"{path}: this is a pickle (a torch .pt/.bin file), which exapt never loads; convert it to safetensors")
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8:
        raise InputError(f"{path}: not a whole safetensors file ({size} bytes); it is damaged, truncated or something else")
    if length > MAX_HEADER:
        raise InputError(f"{path}: its header claims {length >> 20} MiB, more than the {MAX_HEADER >> 20} MiB an adapter may have")


def contents(path: Path, key: str) -> tuple[str | None, dict[str, Tensor]]:
    """An entry of a safetensors file's metadata, and the file's tensors.

    The tensors are those of ``safetensors.safe_open``, which checks the file; they are copied from one map of it here, because fetching them one by one
    costs several times more than all else in loading a small adapter.
    """
    with safetensors.safe_open(path, framework="np") as f:
        text = (f.metadata() or {}).get(key)
    if text is None:
        return None, {}
    with path.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        start = f.tell()
    flat = torch.from_file(os.fspath(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (begin, end) = _DTYPES.get(entry["dtype"]), entry["data_offsets"]
        if dtype is None or (start + begin) % dtype.itemsize or sys.byteorder == "big":
            with safetensors.safe_open(path, framework="pt") as f:
                return text, {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        # with memory of its own: parts of one map would share a version counter, which autograd looks at, and a storage, which other savers refuse
        found[name] = flat[start + begin : start + end].view(dtype).view(entry["shape"]).clone()
    return text, found


def dump(tensors: Mapping[str, Tensor], path: str, metadata: dict[str, str]) -> None:
    """Writes a safetensors file: what ``safetensors.torch.save_file`` writes, without its search for tensors that share memory."""
    kept = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    spec: Any = getattr(safetensors, "TensorSpec", None)
    if spec is None or sys.byteorder == "big":
        safetensors.torch.save_file(kept, path, metadata=metadata)
        return
    given = {k: spec(dtype=str(t.dtype).removeprefix("torch."), shape=list(t.shape), data_ptr=t.data_ptr(), data_len=t.nbytes) for k, t in kept.items()}
    safetensors.serialize_file(given, path, metadata=metadata)


def write_aside(path: Path, data: bytes | Callable[[str], None]) -> None:
    """Writes a file under another name in its folder, syncs it and renames it; on failure the old file stays.

    ``data`` is the file's content, or a function that writes it to the path it is given.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        if callable(data):
            data(temporary)
        else:
            Path(temporary).write_bytes(data)
        with open(temporary, "r+b") as f:  # opened anew: safetensors itself writes aside, so this may be another file by now
            os.fsync(f.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # a temporary file is its owner's alone; this one is to be like any other
        os.replace(temporary, path)
    except BaseException as e:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(e, (OSError, safetensors.SafetensorError)):
            raise InputError(f"{path}: could not be written ({getattr(e, 'strerror', None) or e}); what was there before is untouched") from e
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # the file is in place; some file systems cannot sync a folder
            os.fsync(folder)
    finally:
        os.close(folder)
