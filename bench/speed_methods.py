"""The methods whose speed is measured, and the same on PEFT's side: made from the folder that exapt exports, so that fields and sites agree."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from speed_models import INVOCATION, KINDS, batch
from torch import nn

import exapt

SHORT = (
    "lora", "dora", "ia3", "loha", "lokr", "vera", "oft", "boft", "fourierft", "hra", "ln_tuning", "prompt_tuning", "prefix_tuning", "bitfit",
    "pfeiffer_adapter", "full",
)  # fmt: skip
ALONE = ("bitfit", "adapter", "pfeiffer_adapter", "compacter", "ssf", "full")
"""Methods without a PEFT type that stand beside the frozen base only."""
FIELDS: dict[str, dict[str, Any]] = {
    "alora": {"tokens": INVOCATION},
    "pfeiffer_adapter": {"eps": 1e-12},  # of the norms of BERT and ViT
    "trainable_tokens": {"tokens": tuple(range(3, 19))},
    "cpt": {"tokens": tuple(range(3, 13)), "types": tuple([1, 2, 3, 4] * 2 + [1, 2])},
}
"""Fields of methods that cannot act with their defaults."""
PEER: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa", "r": 16, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}},
    "olora": {"init_lora_weights": "olora", "r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}},
    "mica": {"init_lora_weights": "mica"},
    "corda": {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}},
    "lora_ga": {"r": 8, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}},
    "soma": {"r": 16, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}},
    "loftq": {"r": 8, "lora_alpha": 8},
}
"""An exported adapter is one that has been trained, often as a LoRA of twice the rank; these fields make PEFT begin as the method does."""
UNSTARTED = {
    "corda": "PEFT's start needs a preprocessing call of its own", "eva": "PEFT's start needs a pass over data of its own",
    "lora_ga": "PEFT's start needs a preprocessing call of its own", "loftq": "PEFT quantises with bitsandbytes", "soma": "PEFT has no SoMA",
}  # fmt: skip
"""Methods whose layers PEFT runs but whose start is not timed against it, and why."""
IDLE = {("alora", "bert"): "PEFT's acts in causal language models only: here no parameter of it gets a gradient"}
"""Methods that PEFT attaches to a family of models without acting there, so that its time is the frozen base's."""
PENALISED = ("adalora",)
"""Methods whose penalty PEFT adds in its model's forward; a step of exapt adds it too. (Where PEFT leaves it to the training loop, neither counts it.)"""
TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}


def peft_keys() -> list[str]:
    """Every method that exports to a PEFT type, LoRA first."""
    import exapt.interop.peft  # noqa: F401
    from exapt.interop.peft.codec import CODECS

    found = sorted({m for c in CODECS.values() for m in c.methods} - {"prefix_positions"})  # which goes with the prefixes
    return sorted(found, key=lambda k: k != "lora")


def make(key: str, kind: str) -> Any:
    """The method at its defaults."""
    fields = FIELDS.get(key, {})
    if kind == "tiny":
        fields = {**fields, **{"c3a": {"block_size": 4}, "vblora": {"vector_length": 4}, "velora": {"num_groups": 4}}.get(key, {})}
    return exapt.method(key, **fields)


RESNET = dict.fromkeys(("lora", "dora", "loha", "lokr", "oft", "boft", "hra", "full"), "conv")


def rules(key: str, kind: str) -> Any:
    """The method at its own choice of sites; a prefix with the positions that PEFT's has; on convolutions where it would take linear layers."""
    method, family = make(key, kind), KINDS[kind].family
    if key in ("prefix_tuning", "cartridge") and family in TASKS:
        return {"attention": method, "model": exapt.method("prefix_positions", length=method.length)}
    if key == "full":
        return {"linear": method} if family != "resnet" else {"conv": method}
    return {RESNET[key]: method} if family == "resnet" and key in RESNET else method


def statistics(key: str, kind: str, model: nn.Module) -> Any:
    """What the method needs from a pass over two batches, or nothing."""
    if not make(key, kind).needs:
        return None
    return exapt.calibrate(model, [batch(kind, model, 2, labels=True)] * 2, rules(key, kind))


def attach(key: str, kind: str, model: nn.Module, found: Any = None, name: str = "default") -> nn.Module:
    """``model`` with a fresh adapter by exapt."""
    return exapt.attach(model, rules(key, kind), statistics=found, name=name)


def loss(key: str, model: Any, data: dict[str, Any]) -> Any:
    """What a training step goes backward from."""
    found = model(**data).loss
    extra = exapt.penalty(model) if key in PENALISED and exapt.adapters(model) else None
    return found if extra is None else found + extra


def peer(key: str, kind: str, model: nn.Module) -> dict[str, Any]:
    """The fields of PEFT's configuration, read from the export of exapt's adapter on ``model``."""
    if (key, KINDS[kind].family) in IDLE:
        raise RuntimeError(IDLE[key, KINDS[kind].family])
    with tempfile.TemporaryDirectory() as folder:
        exapt.export(model, Path(folder), format="peft")
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
    config |= PEER.get(key, {})
    if config["task_type"] is None and KINDS[kind].family in TASKS and config["peft_type"].endswith(("TUNING", "CARTRIDGE", "CPT", "PROMPT")):
        config["task_type"] = TASKS[KINDS[kind].family]
    return {**config, "inference_mode": False}


def configuration(fields: dict[str, Any]) -> Any:
    """PEFT's configuration from its fields."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(fields))
        return peft.PeftConfig.from_pretrained(folder)


def inputs(key: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs, with the task's number where the method reads it."""
    if key in ("poly", "multitask_prompt_tuning"):
        return {**given, "task_ids": next(iter(given.values())).new_zeros(len(next(iter(given.values()))))}
    return given
