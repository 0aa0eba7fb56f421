"""What the table of methods says of a method beyond its class: measured on one layer, by attaching it."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import exapt
from exapt.core.attach import expanded
from exapt.core.contract import Method
from exapt.core.slots import slots_of
from exapt.interop.peft import codec
from exapt.interop.peft.folder import encoded, parts_of
from exapt.interop.vllm import refusals

D, TOKENS = 768, 64


@dataclass(frozen=True)
class Facts:
    """One row's measured cells."""

    parameters: str
    extra: str
    mixed: str
    peft: str
    vllm: str


class Language(nn.Module):
    """Token ids to logits over the width: an embedding, one block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, D)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(D, 12, 4 * D, dropout=0.0, batch_first=True)])
        self.head = nn.Linear(D, 16)

    def forward(self, input_ids: Tensor, task_ids: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


def bert() -> nn.Module:
    """One layer of BERT's width, for what needs a transformers model."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_hidden_layers=1, vocab_size=16))


def places() -> list[tuple[str, Any, Any, Any]]:
    """Models to try in turn: label, builder, where, input."""
    ids = torch.arange(TOKENS)[None] % 16
    return [
        ("", lambda: nn.Sequential(nn.Linear(D, D)), "0", torch.randn(1, TOKENS, D)),
        ("a block: ", Language, None, ids),
        ("a block: ", bert, None, ids),
        ("a 3x3 convolution: ", lambda: nn.Sequential(nn.Conv2d(D, D, 3, padding=1)), "0", torch.randn(1, D, 8, 8)),
    ]


def attached(method: Method) -> tuple[str, nn.Module, nn.Module, Any] | None:
    """The method on the first model that takes it: label, adapted model, its base, input."""
    for label, build, where, x in places():
        torch.manual_seed(0)
        model, base = build().eval(), build().eval()
        rules = expanded(method)
        own = where if len(rules) == 1 and method.contract in ("weight", "activation", "subset") else None
        if label == "" and (own is None or rules[0][1].reads):
            continue
        try:
            statistics = None
            if any(m.needs for _, m in rules):
                statistics = exapt.calibrate(model, [(x,)], method, own, lambda m, b: _logits(m(*b)).square().mean())
            exapt.attach(model, method, own, statistics=statistics, seed=0)
            flops(model, x, any("task_ids" in m.reads for _, m in rules))
        except (exapt.InputError, NotImplementedError):
            continue
        return label, model, base, x
    return None


def _logits(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y.logits


def flops(model: nn.Module, x: Any, tasks: bool) -> int:
    """Multiply-adds of one forward that torch counts: products and convolutions."""
    asks = {p for p in model.parameters() if p.requires_grad}
    for parameter in asks:
        parameter.requires_grad_(False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer counts nothing, and adapters switch it off
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if tasks:
            model(x, task_ids=torch.zeros(1, dtype=torch.long))
        else:
            model(x)
    torch.backends.mha.set_fastpath_enabled(fused)
    for parameter in asks:
        parameter.requires_grad_(True)
    return counter.get_total_flops()


def vllm(model: nn.Module) -> str:
    """Whether vLLM serves it: as what it is, converted, or not."""
    try:
        config, tensors = encoded(parts_of(model, "default"), model)
    except exapt.InputError:
        return "no"
    if next(refusals(config, tensors), None) is not None:
        return "no"
    rank = parts_of(model, "default")[0].method
    return f"as LoRA of rank {config['r']}" if config["r"] != getattr(rank, "rank", config["r"]) or rank.key != "lora" else "yes"


@functools.cache
def facts(key: str) -> Facts:
    """Measures a method with its defaults on a layer of width 768."""
    cls = exapt.methods()[key]
    method = cls()
    kind = next((c.peft_type for c in codec.CODECS.values() if cls.key in c.methods), "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attached(method)
        if found is None:
            return Facts("", "", "", kind, "no")
        label, model, base, x = found
        count = f"{label}{exapt.parameter_count(model).trainable:,}"
        served = vllm(model)
        if all(m.mergeable for _, m in expanded(method)):
            extra = "none"
        else:
            tasks = any("task_ids" in m.reads for _, m in expanded(method))
            before = flops(base, x, False)
            share = 100 * (flops(model, x, tasks) - before) / before
            extra = "0" if share == 0 else "below 1 %" if 0 < share < 1 else f"{share:+.1f} %"  # a small one may hang on how often it iterates
        entries = [e for _, slots in slots_of(model) for e in slots.entries]
        whole = any(e.definition or e.source is not None or e.method.contract in ("token", "side") or e.sees_more for e in entries)
        mixed = "no" if "routing" in cls.exceptions else "a pass for each adapter" if whole else "one pass"
        return Facts(count, extra, mixed, kind, served)
