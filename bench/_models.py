"""The models, the sides that are compared, and how they are timed. Nothing here prints or writes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

RANK, ALPHA = 8, 16.0
SIDES = ("exapt", "peft")


def build(kind: str) -> nn.Module:
    """A model with random weights and no dropout: "llama" (12 x 768, tied), "bert" (base), or "tiny" (2 x 32)."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return transformers.BertForSequenceClassification(config)
    d, layers, vocabulary = (32, 2, 100) if kind == "tiny" else (768, 12, 32000)
    config = transformers.LlamaConfig(
        hidden_size=d, intermediate_size=8 * d // 3, num_hidden_layers=layers, num_attention_heads=d // 64 or 1, vocab_size=vocabulary,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batch(model: Any, rows: int, length: int = 64) -> dict[str, Tensor]:
    """Random tokens and the labels that make the model return its loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids if "Llama" in type(model).__name__ else ids[:, 0] % 2}


def targets(kind: str) -> list[str]:
    """The names that make PEFT take the sites that exapt takes by default: every linear layer but the head."""
    return ["query", "key", "value", "dense"] if kind == "bert" else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_config(kind: str) -> Any:
    import peft

    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets(kind))


def attach(side: str, model: nn.Module, kind: str) -> nn.Module:
    """``model`` with a fresh LoRA on every linear layer: by exapt, by PEFT; or frozen; or as it is ("full")."""
    if side == "exapt":
        import exapt

        return exapt.attach(model, exapt.LoRA(rank=RANK, alpha=ALPHA))
    if side == "peft":
        import peft

        return peft.get_peft_model(model, peft_config(kind))
    if side == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda m, args, y: y.requires_grad_())  # type: ignore[operator]
    return model


def stepper(model: nn.Module, rows: int = 4) -> Callable[[], None]:
    """One training step: forward, backward, AdamW on what trains (on a frozen model: forward and backward to the embeddings)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    inputs = batch(unwrapped(model), rows)

    def step() -> None:
        model(**inputs).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Processor and wall seconds of one call, garbage collected before."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Bytes kept for backward by one forward pass, each storage once: all, and without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**inputs).loss
    del loss
    return {"all": sum(seen.values()), "activations": sum(n for k, n in seen.items() if k not in own)}
