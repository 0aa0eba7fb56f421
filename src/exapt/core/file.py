"""One adapter, one ``.safetensors`` file. The format is written down in ``docs/file_format.md``; nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor, nn

from exapt.core import __version__
from exapt.core.attach import hang, made_tensors, remove, uncollected
from exapt.core.contract import Method, as_dict, frozen
from exapt.core.disk import MAX_HEADER as MAX_HEADER
from exapt.core.disk import contents, dump, refuse
from exapt.core.disk import write_aside as write_aside
from exapt.core.entry import Entry, Holder, chosen_of
from exapt.core.errors import InputError
from exapt.core.hooks import UNPACK as UNPACK
from exapt.core.layers import Layer, dense, walk
from exapt.core.registry import from_dict
from exapt.core.sites import Site, Sites, sites
from exapt.core.slots import Slots
from exapt.core.state import Adapter, activate, start, state_of

FORMAT, PACKED = 1, 2  # plain files, and compressed ones, which have a "codec" entry
_SAMPLE = 16
_QUANTISED = ("quant_state", "SCB")  # what bitsandbytes hangs on a parameter
_HEADER = ("rules", "fingerprint", "base", "versions", "provenance", "metrics", "checksums")


@dataclass
class AdapterFile:
    """What a file says of its adapter.

    Attributes:
        rules: The methods as JSON, each with its sites: ``[{"method": {...}, "sites": [...]}]``.
        fingerprint: Of the base weights it belongs to.
        versions: Of exapt and torch when it was written.
        provenance, metrics: What the writer noted.
        checksums: SHA-256 (first 16 digits) of tensors that are made again on loading.
        manifest: ``[shape, trains]`` of every stored tensor.
        tensors: The tensors, by ``rule:site/tensor``.
        codec: What compressed the file that it was read from; empty for a plain one.
    """

    rules: list[dict[str, Any]]
    fingerprint: str
    base: str
    versions: dict[str, str]
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, list[Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    codec: dict[str, Any] = field(default_factory=dict)


def fingerprint(model: nn.Module, skip: frozenset[str] = frozenset()) -> str:
    """Returns a short digest of the base weights: names, shapes and a sample of values of every parameter.

    Values are sampled (16 places spread over each parameter) and rounded to bfloat16, so that a base in fp32 and the same
    base in bf16 agree, and the cost does not grow with the model's size. Parameters in ``skip`` are left out: an adapter
    that replaces a parameter whole does not depend on it.
    """
    parts: list[str] = []
    samples: list[Tensor] = []
    for name, p in _own_parameters(model):
        if name in skip:
            continue
        if type(p) is nn.Parameter and p.__dict__.keys().isdisjoint(_QUANTISED) and p.is_contiguous():  # the common case, in a fifth of the time
            parts.append(f"{name}{tuple(p.shape)}")
            n = p.numel()
            samples.append(torch.as_strided(p.detach(), (min(n, _SAMPLE),), (max(1, n // _SAMPLE),)))
            continue
        shape = getattr(getattr(p, "quant_state", None), "shape", p.shape)
        parts.append(f"{name}{tuple(shape)}")
        flat = dense(p if hasattr(p, "quant_state") else _whole(p)).detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        samples.append(flat[: step * _SAMPLE : step])
    if len({s.device for s in samples}) > 1:
        samples = [s.cpu() for s in samples]
    values = torch.cat(samples).to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes() if samples else b""
    return hashlib.sha256("\n".join(parts).encode() + values).hexdigest()[:16]


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``named_parameters``, without the adapters'."""
    seen: set[int] = set()
    for path, module in walk(model):
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield f"{path}.{name}" if path else name, p


def _whole(t: Tensor) -> Tensor:
    """A sharded tensor gathered from every process; other tensors as they are."""
    gather = getattr(t, "full_tensor", None)
    return cast(Tensor, gather()) if gather is not None else t


def _collect(adapter: Adapter, entries: Sequence[Entry]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, list[Any]]]:
    tensors: dict[str, Tensor] = {}
    manifest: dict[str, list[Any]] = {}
    checksums: dict[str, str] = {}
    rules = adapter.rules
    for path, holder in _holders(adapter, entries):
        number, _, place = path.partition(":")
        held: dict[str, Tensor] = {k: _whole(t).detach() for k, t in holder.tensors().items()}
        for k, t in (held if place == "*" else rules[int(number)][0].stored(held)).items():
            value = t.detach().cpu().contiguous()
            if k in holder._non_persistent_buffers_set:
                checksums[f"{path}/{k}"] = _digest(value)
            else:
                tensors[f"{path}/{k}"] = value
                manifest[f"{path}/{k}"] = [list(value.shape), k in holder._parameters or (k not in holder._buffers and not isinstance(t, nn.Buffer))]
    return tensors, checksums, manifest


def _digest(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def entries_of(model: nn.Module, name: str) -> list[tuple[str, Entry]]:
    """The entries of one adapter, each with the path of its module."""
    found = []
    for path, module in walk(model):
        slots = module._modules.get("exapt")
        if isinstance(slots, Slots):
            found += [(path, e) for e in slots.of(name)]
    return found


def holders(model: nn.Module, name: str) -> list[tuple[str, Holder]]:
    """Where the tensors of an adapter are, under the paths that the file uses."""
    return _holders(state_of(model).adapters[name], [e for _, e in entries_of(model, name)])


def _holders(adapter: Adapter, entries: Sequence[Entry]) -> list[tuple[str, Holder]]:
    found: dict[int, tuple[str, Holder]] = {}
    numbers: dict[tuple[int, str], int] = {}
    for number, (m, where) in enumerate(adapter.rules):
        for w in where:
            numbers.setdefault((id(m), w), number)
    for e in entries:
        number = numbers[id(e.method), e.site_name]
        found[id(e.holder)] = (f"{number}:{e.site_name}", e.holder)
        if e.common is not None:
            found[id(e.common)] = (f"{number}:*", e.common)
    return sorted(found.values(), key=lambda pair: pair[0])


def _replaced(entries: Iterable[tuple[str, Entry]]) -> frozenset[str]:
    """Parameters that the adapter replaces whole."""
    return frozenset(f"{path}.{p}" if path else p for path, e in entries for p, how in e.chosen.items() if how == "whole")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    metrics: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one adapter to one file: aside, synced, renamed, so that a full disk leaves an older file as it was.

    Args:
        model: The model that carries it; sharded tensors are gathered, every process must call.
        path: The file; ``.safetensors`` is added if it has no ending.
        name: Which adapter.
        metrics: What was measured, kept in the header.
        provenance: Where it comes from (data, seed, command), kept in the header.

    Returns:
        The path written.
    """
    state = state_of(model)
    if name not in state.adapters:
        raise InputError(f'no adapter "{name}" on this model to save (attached: {", ".join(state.adapters)})')
    adapter = state.adapters[name]
    placed = entries_of(model, name)
    entries = [e for _, e in placed]
    tensors, checksums, manifest = _collect(adapter, entries)
    layers = {e.site_name: e.layer for e in entries}
    data = AdapterFile(
        [{"method": as_dict(m), "sites": where, "shapes": [_shape(layers[w]) for w in where]} for m, where in adapter.rules],
        fingerprint(model, _replaced(placed)), cast(Any, model._modules["exapt"]).base_class.__name__, versions(),
        dict(provenance if provenance is not None else adapter.metadata.get("provenance", {})),
        dict(metrics if metrics is not None else adapter.metadata.get("metrics", {})), checksums, manifest, tensors,
    )  # fmt: skip
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return _target(path)
    return write(data, path)


def versions() -> dict[str, str]:
    """Of exapt and torch, as a file keeps them."""
    return {"exapt": __version__, "torch": str(torch.__version__)}


def write(data: AdapterFile, path: str | os.PathLike[str]) -> Path:
    """Writes an adapter that is on no model, as :func:`save` does; returns the path written."""
    header = {"format": FORMAT, **{k: getattr(data, k) for k in _HEADER}, "tensors": data.manifest}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    write_aside(_target(path), lambda aside: dump(data.tensors, aside, {"exapt": text}))
    return _target(path)


def _target(path: str | os.PathLike[str]) -> Path:
    return Path(path) if Path(path).suffix else Path(f"{os.fspath(path)}.safetensors")


def read(path: str | os.PathLike[str]) -> AdapterFile:
    """Reads an adapter file without a model. Raises ``InputError`` on anything that is not one."""
    path = Path(path)
    refuse(path)
    try:
        text, tensors = contents(path, "exapt")
    except safetensors.SafetensorError as e:
        raise InputError(f"{path}: not a whole safetensors file ({e}); it is damaged or truncated, fetch or save it again") from e
    if text is None:
        raise InputError(f'{path}: a safetensors file, but not an exapt adapter (its header has no "exapt" entry)')
    try:
        header = json.loads(text)
        if header["format"] > PACKED:
            raise InputError(f"{path}: format {header['format']} is newer than this exapt reads ({PACKED}); upgrade exapt")
        if header["format"] == PACKED:
            return UNPACK[0](path, header, tensors)
        known = {k: header[k] for k in _HEADER}
        known["manifest"] = {k: [list(map(int, v[0])), bool(v[1])] for k, v in header["tensors"].items()}
        for rule in known["rules"]:
            if not isinstance(rule["method"], dict) or len(rule["sites"]) != len(rule["shapes"]) or not rule["sites"]:
                raise TypeError("rules")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path}: its exapt header is malformed ({type(e).__name__}: {e}); save the adapter again") from e
    return AdapterFile(**known, tensors=tensors)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    force: bool = False,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Attaches an adapter from its file and makes it active; the base must be the one it was made for.

    Args:
        model: The base model.
        path: The file.
        name: Its name on this model.
        force: Load although the fingerprints of the bases differ.
        trainable: Whether its parameters ask for gradients.
        dtype: Type of the adapter's tensors; by default the file's.

    Raises:
        InputError: for another base (both fingerprints are named), a damaged file, or tensors that are missing, too many
            or of the wrong shape. The model is unchanged then.
    """
    with uncollected():
        return _loaded(model, read(path), path, name, force, trainable, dtype)


def _loaded(model: nn.Module, data: AdapterFile, path: Any, name: str, force: bool, trainable: bool, dtype: torch.dtype | None) -> nn.Module:
    plan = _planned(model, data, path)
    state = start(model, name)
    try:
        hang(model, state, name, plan, _Stored(data, dtype, path))
        replaces = any(m.contract == "subset" for m, _ in plan)
        own = fingerprint(model, _replaced(entries_of(model, name)) if replaces else frozenset())
        if own != data.fingerprint and not force:
            raise InputError(
                f"{path}: made for base {data.fingerprint} ({data.base}), this base is {own} ({type(model).__name__}); pass force=True to load it all the same"
            )
    except BaseException:
        remove(model, name, state)
        raise
    state.adapters[name].metadata = {"provenance": data.provenance, "metrics": data.metrics}
    state.adapters[name].trainable = trainable
    activate(model, name)
    return model


def _planned(model: nn.Module, data: AdapterFile, path: Any) -> list[tuple[Method, Sites]]:
    """Finds the file's sites on the model and compares the file's tensors with its own list of them."""
    for key, (shape, _) in data.manifest.items():
        if key not in data.tensors:
            raise InputError(f"{path}: the tensor {key} is missing; the file is incomplete")
        if list(data.tensors[key].shape) != shape:
            raise InputError(f"{path}: {key} has shape {list(data.tensors[key].shape)}, its own list says {shape}; the file is not sound")
    extra = set(data.tensors) - set(data.manifest)
    if extra:
        raise InputError(f"{path}: {len(extra)} tensors are not in its own list ({min(extra)}, ...); the file is not sound")
    known = {s.name: s for s in sites(model)}
    plan = []
    for rule in data.rules:
        chosen = Sites()
        for place, shape in zip(rule["sites"], rule["shapes"], strict=True):
            site = known.get(place)
            if site is None or _shape(site.layer) != shape:
                here = "has no such site" if site is None else f"has {_shape(site.layer)} there"
                raise InputError(
                    f"{path}: made for {place or '(model)'} of shape {shape} on a {data.base} (base {data.fingerprint}); this {type(model).__name__} {here}"
                )
            chosen.append(site)
        plan.append((from_dict(rule["method"]), chosen))
    return plan


def _shape(layer: Layer | None) -> list[int] | None:
    return list(layer.shape) if layer else None


def _by_place(listed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``place/tensor`` keys, gathered by place."""
    gathered: dict[str, dict[str, Any]] = {}
    for key, value in listed.items():
        place, _, tensor = key.rpartition("/")
        gathered.setdefault(place, {})[tensor] = value
    return gathered


class _Stored:
    """Takes an adapter's tensors from a file; only those made from a seed are made again."""

    def __init__(self, data: AdapterFile, dtype: torch.dtype | None, path: Any) -> None:
        self.data, self.dtype, self.path = data, dtype, path
        self.stored, self.again = _by_place(data.manifest), _by_place(data.checksums)

    def _holder(self, place: str, device: torch.device, make: Callable[[], dict[str, Tensor]]) -> tuple[Holder, dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        for k, (_, trains) in self.stored.get(place, {}).items():
            value = self.data.tensors[f"{place}/{k}"]
            tensors[k] = value if trains else frozen(value)
        again = self.again.get(place, {})
        if again:
            with torch.random.fork_rng(devices=[]):
                made = make()
            kind = next((t.dtype for t in self.data.tensors.values() if t.is_floating_point()), None)
            fresh = Holder({k: made[k] for k in again if k in made}, device, kind)
            for k, digest in again.items():
                t = fresh.tensors().get(k)
                if t is None or _digest(t.cpu()) != digest:
                    raise InputError(f"{self.path}: {place}/{k} is made from a seed and came out different here than where the file was written")
                tensors[k] = frozen(t, saved=False)
        return Holder(tensors, device, self.dtype), tensors

    def shared(self, number: int, method: Method, chosen: Sites) -> Holder | None:
        """As :meth:`exapt.core.attach.Fresh.shared`."""
        holder, tensors = self._holder(f"{number}:*", chosen[0].device, lambda: method.shared(chosen))
        return holder if tensors else None

    def site(self, number: int, method: Method, site: Site) -> tuple[Holder, dict[str, str]]:
        """As :meth:`exapt.core.attach.Fresh.site`."""
        holder, tensors = self._holder(f"{number}:{site.name}", site.device, lambda: made_tensors(method, site)[0])
        return holder, chosen_of(tensors) if method.contract == "subset" else {}
