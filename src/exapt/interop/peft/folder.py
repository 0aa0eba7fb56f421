"""A PEFT folder onto a model, and an adapter into a PEFT folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from exapt.core.attach import hang, remove, untied
from exapt.core.contract import Method
from exapt.core.entry import Holder, chosen_of
from exapt.core.errors import InputError, did_you_mean
from exapt.core.file import holders, write_aside
from exapt.core.replicate import replication, unreplicate
from exapt.core.sites import Site, Sites, sites
from exapt.core.state import activate, start, state_of
from exapt.interop.peft.codec import CODECS, PREFIX, Codec, Folder, Part
from exapt.interop.peft.extras import extra_fields, take_extras

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
EXTRAS = ("full", "bitfit")
TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip


def read_folder(path: Path) -> Folder:
    """Reads a PEFT folder without a model. Raises ``InputError`` where it is none, is a pickle, or is of an unknown type."""
    if not (path / CONFIG).is_file():
        inner = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        raise InputError(f"{path}: no {CONFIG} in it" + (f"; PEFT put its adapters into {', '.join(inner)}, name one of these folders" if inner else ""))
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}/{CONFIG}: not PEFT's configuration ({type(e).__name__}: {e})") from e
    if kind not in CODECS:
        raise InputError(f'{path}/{CONFIG}: peft_type is "{kind}"{did_you_mean(str(kind), CODECS)}; known are {", ".join(sorted(CODECS))}')
    if not (path / TENSORS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        why = "only adapter_model.bin, a pickle, which exapt never loads; save it with safe_serialization=True" if pickled else f"no {TENSORS}"
        raise InputError(f"{path}: {why}")
    try:
        tensors = safetensors.torch.load_file(path / TENSORS)
    except safetensors.SafetensorError as e:
        raise InputError(f"{path}/{TENSORS}: not a whole safetensors file ({e}); fetch or save it again") from e
    return Folder(path, config, tensors)


class _Parts:
    """Where ``hang`` takes the tensors from that a codec has made."""

    def __init__(self, parts: Sequence[Part], dtype: torch.dtype | None) -> None:
        self.parts, self.dtype = parts, dtype

    def shared(self, number: int, method: Method, chosen: Sites) -> Holder | None:
        """As :meth:`exapt.core.attach.Fresh.shared`."""
        made = self.parts[number].shared
        return Holder(made, chosen[0].device, self.dtype) if made else None

    def site(self, number: int, method: Method, site: Site) -> tuple[Holder, dict[str, str]]:
        """As :meth:`exapt.core.attach.Fresh.site`."""
        made = self.parts[number].tensors[site.name]
        return Holder(made, site.device, self.dtype), chosen_of(made) if method.contract == "subset" else {}


def load_parts(model: nn.Module, parts: Sequence[Part], name: str, trainable: bool, dtype: torch.dtype | None, provenance: Mapping[str, Any]) -> nn.Module:
    """Hangs finished tensors under their sites, as one adapter; on an error the model is what it was."""
    known = {s.name: s for s in sites(model)}
    plan = [(p.method, Sites(known[s] for s in p.tensors)) for p in parts]
    for method, chosen in plan:
        apart = {s.name for s in untied(chosen, method)}
        lost = [s.name for s in chosen if s.name not in apart]
        if lost:
            raise InputError(f"{lost[0]} shares its weight with another adapted layer; here a tied weight has one shift, so this adapter cannot be held")
    state = start(model, name)
    try:
        hang(model, state, name, plan, _Parts(parts, dtype))
    except BaseException:
        remove(model, name, state)
        raise
    state.adapters[name].metadata = {"provenance": dict(provenance), "metrics": {}}
    state.adapters[name].trainable = trainable
    activate(model, name)
    return model


def load_peft(model: nn.Module, path: Path, name: str = "default", *, trainable: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Attaches the adapter of a PEFT folder; see :func:`exapt.load`."""
    folder = read_folder(path)
    codec = CODECS[folder.config["peft_type"]]
    before = replication(model)
    try:
        return _loaded(folder, codec, model, name, trainable, dtype)
    except BaseException:
        if before is None and replication(model) is not None:
            unreplicate(model)
        raise


def _loaded(folder: Folder, codec: Codec, model: nn.Module, name: str, trainable: bool, dtype: torch.dtype | None) -> nn.Module:
    _complete(folder, codec, model)
    parts = codec.decode(folder, model) + take_extras(folder, model)
    if folder.tensors:
        raise folder.error(f"{len(folder.tensors)} tensors belong to nothing on this model ({min(folder.tensors)}, ...)")
    origin = {k: folder.config.get(k) for k in ("peft_type", "peft_version", "base_model_name_or_path")}
    return load_parts(model, parts, name, trainable, dtype, {"peft": origin})


def _complete(folder: Folder, codec: Codec, model: nn.Module) -> None:
    """Refuses a folder that has no tensor for a layer that its own ``target_modules`` names."""
    wanted = folder.config.get("target_modules")
    if not codec.suffixes or not isinstance(wanted, list) or folder.config.get("layers_to_transform") is not None:
        return
    excluded = folder.config.get("exclude_modules") or []
    for s in sites(model):
        named = s.layer is not None and s.name == s.module_name and any(s.name == t or s.name.endswith(f".{t}") for t in wanted)
        if not named or _excluded(s.name, excluded):
            continue
        if not any(k.startswith(f"base_model.model.{s.name}.") for k in folder.tensors):
            raise folder.error(f"its target_modules name {s.name}, but it holds no tensor for it; the folder is incomplete")


def _excluded(name: str, excluded: str | list[str]) -> bool:
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(name == t or name.endswith(f".{t}") for t in excluded)


def parts_of(model: nn.Module, name: str) -> list[Part]:
    """An adapter's rules with their tensors, on the CPU."""
    state = state_of(model)
    if name not in state.adapters:
        raise InputError(f'no adapter "{name}" on this model to export (attached: {", ".join(state.adapters)})')
    parts = [Part(method) for method, _ in state.adapters[name].rules]
    for path, holder in holders(model, name):
        number, _, site = path.partition(":")
        tensors = {k: t.detach().cpu().contiguous() for k, t in holder.tensors().items()}
        part = parts[int(number)]
        if site == "*":
            part.shared = tensors
        else:
            part.tensors[site] = tensors
    return parts


def export_peft(model: nn.Module, path: Path, name: str = "default", base: str | None = None) -> Path:
    """Writes an adapter as a folder that PEFT loads; see :func:`exapt.export`."""
    config, tensors = encoded(parts_of(model, name), model, base)
    write_folder(path, config, tensors)
    return path


def encoded(parts: Sequence[Part], model: nn.Module, base: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and tensors of an adapter as PEFT keeps them. Raises ``InputError`` where PEFT has no such adapter."""
    own = [p for p in parts if p.method.key not in EXTRAS] or list(parts)
    extras = [p for p in parts if p not in own]
    layers = [p for p in own if p.method.key != "trainable_tokens"] or own  # beside LORA's layers PEFT keeps single rows too
    writers = {p.method.key: next((c for c in CODECS.values() if p.method.key in c.methods), None) for p in layers}
    for key, writer in writers.items():
        if writer is None:
            raise InputError(f"PEFT has no form of {key}; export with format='lora' (approximate) or format='merged'")
    if len({w.peft_type for w in writers.values() if w}) > 1:
        raise InputError(f"a PEFT folder holds adapters of one type; this one has {', '.join(writers)}; export them one by one or with format='merged'")
    codec = next(iter(writers.values()))
    assert codec is not None
    if len(layers) < len(own) and codec.peft_type != "LORA":
        raise InputError(f"PEFT keeps trainable_tokens beside LORA only, not beside {codec.peft_type}; export them one by one or with format='merged'")
    fields, tensors = codec.encode(own, model)
    more, extra_tensors = extra_fields(extras, fields)
    extra_tensors = {codec.prefix + k.removeprefix(PREFIX): t for k, t in extra_tensors.items()}
    if replication(model) is not None and codec.peft_type != "LORA":
        raise InputError(f"PEFT replicates layers with LORA only, not with {codec.peft_type}; export with format='merged'")
    task = next((t for ending, t in TASKS.items() if type(model).__name__.endswith(ending)), None)
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and "modules_to_save" not in more:
        task = None  # with a task PEFT looks for a trained head in the folder
    path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = {"peft_type": codec.peft_type, "task_type": task, "inference_mode": True, "base_model_name_or_path": base or path, **fields, **more}
    return config, {k: t.contiguous() for k, t in {**tensors, **extra_tensors}.items()}


def write_folder(path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes both files aside and renames them, the tensors first."""
    unique = {k: t.clone() for k, t in tensors.items()}  # safetensors refuses tensors that share memory
    write_aside(path / TENSORS, lambda aside: safetensors.torch.save_file(unique, aside, metadata={"format": "pt"}))
    write_aside(path / CONFIG, (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode())
