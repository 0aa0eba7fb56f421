"""Compressed adapters in one file: everything packed into one stream, the header deflated beside it (format 2)."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from exapt.algebra.compress.bits import golomb, pack, positions_of, unpack
from exapt.algebra.compress.codec import Codec, as_settings, codec
from exapt.core.errors import InputError
from exapt.core.file import _HEADER, MAX_HEADER, AdapterFile, read, write_aside
from exapt.core.registry import from_dict

PACKED = 2
"""The format of compressed files; plain ones stay format 1."""
MOST_VALUES = 1 << 32
"""More values than this no adapter decodes to; a header that says so is not sound."""
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A compressed adapter.

    Attributes:
        data: The file's bytes.
        file: The adapter as it comes out of them.
        chosen: The tensors that the codec coded; all others are exact.
    """

    data: bytes
    file: AdapterFile
    chosen: tuple[str, ...]


def coded(file: AdapterFile) -> list[str]:
    """The tensors that a codec may change: those that train, but for whole parameters of the base (heads, norms, biases), which are no update."""
    kinds = {str(i): from_dict(rule["method"]).contract for i, rule in enumerate(file.rules)}
    return [
        k for k, t in sorted(file.tensors.items())
        if t.is_floating_point() and file.manifest[k][1] and t.numel() > 1 and kinds[k.partition(":")[0]] != "subset"
    ]  # fmt: skip


def packed(file: AdapterFile, made: Codec | None) -> Packed:
    """Encodes an adapter.

    Args:
        file: The adapter.
        made: The codec; ``None`` packs without loss.

    Raises:
        InputError: for NaN or infinity in a tensor, which is named.
    """
    for k, t in sorted(file.tensors.items()):
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise InputError(f"{k} holds NaN or infinity, which cannot be compressed; train again or leave it out")
    names = coded(file) if made is not None else []
    streams: list[tuple[str, Tensor]] = []
    if made is not None and names:
        streams += [(f"*{k}", t) for k, t in made.encode({k: file.tensors[k] for k in names}).items()]
    for k in sorted(file.tensors):
        if k not in names:
            streams += [(f"{k}/{part}" if part else k, t) for part, t in _exact(file.tensors[k]).items()]
    raw = b"".join(_bytes(t) for _, t in streams)
    header = {
        **{k: getattr(file, k) for k in _HEADER},
        "tensors": file.manifest,
        "dtypes": {k: _name(t.dtype) for k, t in sorted(file.tensors.items())},
        "streams": [[k, _name(t.dtype), list(t.shape)] for k, t in streams],
    }
    short = zlib.compress(json.dumps(header, sort_keys=True, separators=(",", ":")).encode(), 9)
    smaller = zlib.compress(raw, 9)
    deflated = len(smaller) < len(raw)
    note = {"format": PACKED, "codec": as_settings(made) if made is not None else {"codec": "lossless"}, "bytes": len(raw), "deflated": deflated}
    blobs = {"header": short, "streams": smaller if deflated else raw}
    data = safetensors.torch.save(
        {k: torch.frombuffer(bytearray(b) or bytearray(1), dtype=torch.uint8) for k, b in blobs.items()},
        metadata={"exapt": json.dumps(note, sort_keys=True, separators=(",", ":"))},
    )
    return Packed(data, _unpacked(note, {k: torch.frombuffer(bytearray(b), dtype=torch.uint8) for k, b in blobs.items() if b}), tuple(names))


def unpacked(path: str | os.PathLike[str], note: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterFile:
    """The adapter in a compressed file.

    Args:
        path: What messages call it.
        note: Its ``exapt`` entry.
        tensors: Its tensors, as they are stored.

    Raises:
        InputError: for anything in it that is not sound.
    """
    try:
        return _unpacked(note, tensors)
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError, RecursionError, zlib.error) as e:
        raise InputError(f"{path}: its packed tensors are not sound ({type(e).__name__}: {e}); fetch or make the file again") from e


def _unpacked(note: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterFile:
    header = json.loads(_inflated(tensors["header"], MAX_HEADER))
    raw = _inflated(tensors["streams"], int(note["bytes"])) if note["deflated"] else tensors["streams"].numpy().tobytes()[: int(note["bytes"])]
    if len(raw) != note["bytes"]:
        raise InputError(f"its streams have {len(raw)} bytes, its header says {note['bytes']}; the file is not sound")
    streams = _streams(header["streams"], raw)
    shapes: dict[str, tuple[int, ...]] = {k: tuple(map(int, v[0])) for k, v in sorted(header["tensors"].items())}
    manifest = {k: [list(shapes[k]), bool(v[1])] for k, v in header["tensors"].items()}
    if any(s < 0 for shape in shapes.values() for s in shape) or sum(torch.Size(s).numel() for s in shapes.values()) > MOST_VALUES:
        raise InputError(f"its list of tensors claims more than {MOST_VALUES} values; the file is not sound")
    own = {k[1:]: t for k, t in streams.items() if k.startswith("*")}
    exact = {k: _again(streams, k, shapes[k], _DTYPES[header["dtypes"][k]]) for k in shapes if _stored(streams, k)}
    settings = dict(note["codec"])
    key = settings.pop("codec")
    left = {k: s for k, s in shapes.items() if k not in exact}
    found = dict(exact)
    if left:
        decoded = codec(key, **settings).decode(own, left)
        found |= {k: decoded[k].view(s).to(_DTYPES[header["dtypes"][k]]).contiguous() for k, s in left.items()}
    known = {k: header[k] for k in _HEADER}
    for rule in known["rules"]:
        if not isinstance(rule["method"], dict) or len(rule["sites"]) != len(rule["shapes"]) or not rule["sites"]:
            raise TypeError("rules")
    adapter = AdapterFile(**known, manifest=manifest, tensors={k: found[k] for k in sorted(found)})
    setattr(adapter, "codec", dict(note["codec"]))  # noqa: B010
    return adapter


def write_compressed(file: AdapterFile | str | os.PathLike[str], path: str | os.PathLike[str], made: Codec | None) -> Path:
    """Writes an adapter compressed, aside and renamed; returns the path. ``exapt.load`` reads it like any other.

    Args:
        file: The adapter, or its file.
        path: The file to write.
        made: The codec; ``None`` packs without loss.
    """
    source = file if isinstance(file, AdapterFile) else read_compressed(file)
    target = Path(path) if Path(path).suffix else Path(f"{os.fspath(path)}.safetensors")
    write_aside(target, packed(source, made).data)
    return target


def read_compressed(path: str | os.PathLike[str]) -> AdapterFile:
    """Reads an adapter file, compressed or plain.

    Raises:
        InputError: for anything that is not one.
    """
    try:
        with safetensors.safe_open(Path(path), framework="pt") as f:
            note = json.loads((f.metadata() or {}).get("exapt", "{}"))
            tensors = {k: f.get_tensor(k) for k in f.keys()} if note.get("format") == PACKED and "codec" in note else {}  # noqa: SIM118
    except (OSError, ValueError, AttributeError, safetensors.SafetensorError):
        return read(path)  # which says what is wrong
    return unpacked(path, note, tensors) if tensors else read(path)


def _exact(t: Tensor) -> dict[str, Tensor]:
    """A tensor without loss: indices as Golomb codes, other small whole numbers in the bits they need."""
    if t.is_floating_point() or t.numel() == 0:
        return {"": t}
    v = t.reshape(-1).long()
    if t.dtype == torch.int64 and v.numel() > 1 and int(v[0]) >= 0 and bool((v.diff() > 0).all()):
        return golomb(v)
    if int(v.min()) < 0 or int(v.max()) >= 1 << 32:
        return {"": t}
    width = int(v.max()).bit_length()
    return {"bits": pack(v, width), "width": torch.tensor([width])}


def _stored(streams: Mapping[str, Tensor], k: str) -> bool:
    return k in streams or f"{k}/golomb" in streams or f"{k}/width" in streams


def _again(streams: Mapping[str, Tensor], k: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_exact`."""
    if k in streams:
        return streams[k].view(shape)
    if f"{k}/golomb" in streams:
        return positions_of({part: streams[f"{k}/{part}"] for part in ("unary", "rest", "golomb")}).view(shape).to(dtype)
    return unpack(streams[f"{k}/bits"], int(streams[f"{k}/width"]), torch.Size(shape).numel()).view(shape).to(dtype)


def _streams(listed: list[Any], raw: bytes) -> dict[str, Tensor]:
    found, at = {}, 0
    for k, dtype, shape in listed:
        kind, size = _DTYPES[dtype], torch.Size(map(int, shape))
        end = at + size.numel() * kind.itemsize
        if min(size, default=0) < 0 or end > len(raw):
            raise InputError(f"its stream ends within {k}; the file is not sound")
        found[str(k)] = torch.frombuffer(bytearray(raw[at:end]), dtype=kind).view(size) if end > at else torch.zeros(size, dtype=kind)
        at = end
    if at != len(raw):
        raise InputError(f"its stream has {len(raw) - at} bytes that belong to nothing; the file is not sound")
    return found


def _inflated(blob: Tensor, most: int) -> bytes:
    """Inflates to at most ``most`` bytes, whatever the blob would become."""
    if blob.dtype != torch.uint8 or not 0 <= most <= MOST_VALUES * 8:
        raise InputError("its header is not sound; fetch or make the file again")
    machine = zlib.decompressobj()
    data = machine.decompress(blob.numpy().tobytes(), most + 1)
    if len(data) > most or not machine.eof:
        raise InputError(f"what it deflated is not the {most} bytes it should be at most, or is cut off; the file is not sound")
    return data


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
