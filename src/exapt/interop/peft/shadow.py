"""PEFT's SHADOW: tensors under whole blocks, and a decoder beside the model; keys keep the name ``default``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.contract import Tensors
from exapt.core.errors import InputError
from exapt.core.registry import method as make
from exapt.core.sites import sites
from exapt.interop.peft.codec import PREFIX, Codec, Folder, Part, codec

BACKBONE, PROJECTION = "base_model.shadow_backbone.default.", "base_model.shadow_projection.default.weight"
BLOCK = {
    "down": "shadow_down.default.weight", "up": "shadow_up.default.weight",
    **{f"{k}_{i}": f"shadow_update_{long}.default.{j}.weight" for k, long in (("T", "transform"), ("G", "gate")) for i, j in ((1, 0), (2, 2))},
    **{f"{k}_{i}": f"shadow_update_{long}.default.{j}.bias" for k, long in (("t", "transform"), ("g", "gate")) for i, j in ((1, 0), (2, 2))},
}  # fmt: skip
LAYER = {
    "norm_1": "input_layernorm.weight", "norm_2": "post_attention_layernorm.weight",
    **{k: f"self_attn.{k}_proj.weight" for k in "qkvo"},
    "gate": "mlp.gate_proj.weight", "wide": "mlp.up_proj.weight", "narrow": "mlp.down_proj.weight",
}  # fmt: skip


@codec
class ShadowCodec(Codec):
    """The decoder beside the model as PEFT mirrors a Llama (``shadow_model="mirror"``); the updates behind the last block, which nothing
    reads, are dropped and written as zeros."""

    peft_type = "SHADOW"
    methods = ("shadow",)

    def decode(self, folder: Folder, model: nn.Module) -> list[Part]:
        c, base = folder.config, _base(model)
        if c.get("shadow_model", "mirror") != "mirror":
            raise folder.error(f"shadow_model={c['shadow_model']!r} is not supported: only a decoder that mirrors the model's is computed here")
        if any(k.startswith("base_model.shadow_head.") for k in folder.tensors):
            raise folder.error("shadow_head is not supported: the head of a loss on the shadow's own state has no place here")
        embedding, blocks = _places(model)
        for name in blocks:
            missing = [s for s in BLOCK.values() if f"{PREFIX}{name}.{s}" not in folder.tensors]
            if missing:
                raise folder.error(f"{name} lacks {missing[0]}; the folder is incomplete, or wraps some blocks only, which is not supported")
        shared = {k: torch.stack([folder.take(f"{PREFIX}{name}.{s}") for name in blocks]) for k, s in BLOCK.items()}
        shared = {k: t if k in ("down", "up") else t[:-1] for k, t in shared.items()}
        n = len({k.split(".")[4] for k in folder.tensors if k.startswith(f"{BACKBONE}layers.")})
        if not n:
            raise folder.error(f"no tensor {BACKBONE}layers... in it; the folder is incomplete")
        shared |= {k: torch.stack([folder.take(f"{BACKBONE}layers.{i}.{s}") for i in range(n)]) for k, s in LAYER.items()}
        shared["norm"] = folder.take(f"{BACKBONE}norm.weight")
        for k, full in (("embed", f"{BACKBONE}embed_tokens.weight"), ("project", PROJECTION)):
            if full in folder.tensors:
                shared[k] = folder.take(full)
        w, heads = shared["norm"].shape[0], c.get("shadow_num_attention_heads") or base["heads"]
        size = shared["q"].shape[1] // heads
        method = make(
            "shadow", rank=shared["down"].shape[1], alpha=float(c.get("shadow_alpha", 0.1)), update=shared["t_1"].shape[1], layers=n, hidden=w,
            intermediate=shared["gate"].shape[1], heads=heads, kv_heads=shared["k"].shape[1] // size, head_dim=size, theta=base["theta"], eps=base["eps"],
            embeds="embed" in shared, padded=True,
        )  # fmt: skip
        return [Part(method, {name: {} for name in (embedding, *blocks)}, shared)]

    def encode(self, parts: Sequence[Part], model: nn.Module) -> tuple[dict[str, Any], Tensors]:
        (part,), base, (_, blocks) = parts, _base(model), _places(model)
        m: Any = part.method
        p = part.shared
        w, d = p["norm"].shape[0], p["up"].shape[1]
        size = p["q"].shape[1] // m.heads
        mirrored = {"theta": m.theta, "eps": m.eps, "kv_heads": p["k"].shape[1] // size, "head_dim": size}
        for k, value in mirrored.items():
            if value != base[k]:
                raise InputError(f"PEFT's shadow decoder has the model's own {k}, {base[k]}; this one has {value}")
        if list(part.tensors)[1:] != blocks:
            raise InputError("PEFT's SHADOW is exported for all blocks of a decoder; this adapter sits at some of them")
        tensors: dict[str, Tensor] = {}
        for i, name in enumerate(blocks):
            for k, s in BLOCK.items():
                last = i == len(blocks) - 1 and k not in ("down", "up")
                shape = p[k].shape[1:]
                tensors[f"{PREFIX}{name}.{s}"] = torch.zeros(shape) if last else p[k][i]
        tensors |= {f"{BACKBONE}layers.{i}.{s}": p[k][i] for k, s in LAYER.items() for i in range(m.layers)}
        tensors[f"{BACKBONE}norm.weight"] = p["norm"]
        tensors |= {full: p[k] for k, full in (("embed", f"{BACKBONE}embed_tokens.weight"), ("project", PROJECTION)) if k in p}
        config = {
            "r": m.rank, "shadow_alpha": m.alpha, "update_hidden_size": p["t_1"].shape[1], "shadow_num_hidden_layers": m.layers, "shadow_model": "mirror",
            "shadow_hidden_size": None if w == d else w, "shadow_intermediate_size": p["gate"].shape[1], "shadow_num_attention_heads": m.heads,
            "share_embeddings": "embed" not in p, "target_modules": blocks, "task_type": "CAUSAL_LM", "shadow_dropout": 0.0, "init_weights": True,
        }  # fmt: skip
        return config, tensors


def _places(model: nn.Module) -> tuple[str, list[str]]:
    """Names of the token embedding and of the blocks."""
    found = sites(model)
    embedding, blocks = ([s.name for s in found if s.role.partition(".")[0] == role] for role in ("embedding", "block"))
    if len(embedding) != 1 or not blocks:
        raise InputError("SHADOW is read and written for decoders with one token embedding in front of their blocks, as Llama's; this model is none")
    return embedding[0], blocks


def _base(model: nn.Module) -> dict[str, Any]:
    """What PEFT copies of the model's configuration into the decoder beside it."""
    c: Any = getattr(model, "config", None)
    rope = getattr(c, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(c, "rope_theta", None))
    biased = any(getattr(c, k, False) for k in ("attention_bias", "mlp_bias"))
    plain = getattr(c, "hidden_act", "") == "silu" and getattr(c, "sliding_window", None) is None and rope.get("rope_type", "default") == "default"
    if theta is None or biased or not plain or getattr(c, "model_type", "") not in ("llama", "mistral"):
        raise InputError("SHADOW is supported beside Llama and Mistral models with plain rotary positions, no biases and no window; this model is none of them")
    heads = c.num_attention_heads
    size = getattr(c, "head_dim", None) or c.hidden_size // heads
    return {"heads": heads, "kv_heads": c.num_key_value_heads, "head_dim": size, "theta": float(theta), "eps": float(c.rms_norm_eps)}
