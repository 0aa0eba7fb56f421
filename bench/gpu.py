"""LoRA on a Llama of 1.2 billion parameters on one GPU: ``python bench/gpu.py`` writes ``bench/results/gpu.json``.

Tokens per second and peak memory of training in bfloat16, and the time of one decoded token: the frozen base, exapt's LoRA and DoRA, PEFT's LoRA, full
fine-tuning, and exapt's LoRA compiled, without and with CUDA graphs. The sides take turns on one card, timed between CUDA events after a warm-up;
every one has a copy of the same base, from its configuration. ``--quick`` runs what compiles nothing on a tiny model, on whatever there is.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from speed import machine
from speed_clock import timed
from speed_models import freeze
from speed_table import interval, significant
from torch import nn

import exapt

OUT = Path(__file__).parent / "results" / "gpu.json"
RANK = 16
SIDES = ("frozen", "exapt lora", "peft lora", "exapt dora", "whole", "exapt lora, compiled", "exapt lora, CUDA graphs")


def build(quick: bool) -> nn.Module:
    """A Llama of the proportions of Llama 3.2 1B, in bfloat16, or a tiny one."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, int] = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100}
        if quick
        else {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        }
    )  # fmt: skip
    place = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False)  # type: ignore[arg-type]
    with torch.device(place):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def side(name: str, base: nn.Module) -> nn.Module:
    """One side's own copy of the base, adapted."""
    model = copy.deepcopy(base).train()
    if name == "frozen":
        return freeze("llama", model)
    if name == "whole":
        return model.requires_grad_(True)
    if name.startswith("peft"):
        import peft

        return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", lora_dropout=0.0))
    method = exapt.DoRA(rank=RANK) if "dora" in name else exapt.LoRA(rank=RANK)
    exapt.attach(model, method, where="linear")
    if name.endswith("compiled"):
        return torch.compile(model, fullgraph=True)  # type: ignore[return-value]
    return torch.compile(model, fullgraph=True, mode="reduce-overhead") if name.endswith("graphs") else model  # type: ignore[return-value]


def trains(model: nn.Module, data: dict[str, Any]) -> Callable[[], None]:
    """A training step with AdamW; of the frozen base, its forward and backward."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(own, lr=1e-4, fused=True) if own else None

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        model(**data).loss.backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return run


def decodes(model: nn.Module, vocabulary: int, place: Any) -> Callable[[], None]:
    """One token of one row, without gradients."""
    ids = torch.full((1, 1), vocabulary // 2, device=place)

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            model(input_ids=ids)

    return run


def allocated() -> int:
    """Bytes that are in use on the GPU; none without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def peak(run: Callable[[], None], before: int) -> int | None:
    """The highest number of bytes of two calls above ``before``, the optimiser's state among them; nothing without a GPU."""
    if not torch.cuda.is_initialized():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    run()
    return torch.cuda.max_memory_allocated() - before


def measure(base: Any, rows: int, length: int, repeats: int, quick: bool) -> dict[str, Any]:
    """All sides in turn: medians, and ratios to the frozen base's neighbouring measurement."""
    place, vocabulary = base.device, base.config.vocab_size
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).to(place)
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    models: list[nn.Module] = []
    runs: dict[str, dict[str, Callable[[], None]]] = {"step": {}, "token": {}}
    memory: dict[str, int | None] = {}
    refused: dict[str, str] = {}
    for name in SIDES:
        if name.endswith("graphs") and not torch.cuda.is_available():
            refused[name] = "no GPU"
            continue
        if quick and name.endswith("compiled"):
            refused[name] = "compiling takes longer than all else in a quick run"
            continue
        try:
            model = side(name, base)
            step, before = trains(model, data), allocated()
            step()  # warms up: compiles, and makes the optimiser's state
            memory[name] = peak(step, before)
            token = decodes(model.eval(), vocabulary, place)
            token()
        except Exception as e:
            refused[name] = f"{type(e).__name__}: {e}".split("\n")[0][:300]
            continue
        models.append(model)
        runs["step"][name], runs["token"][name] = step, token
        print(name, memory[name], file=sys.stderr, flush=True)
    out: dict[str, Any] = {"peak_bytes": memory, "refused": refused}
    for row, each in runs.items():
        for model in models:
            model.train(row == "step")
        taken: dict[str, list[float]] = {name: [] for name in each}
        for i in range(-2, repeats):  # the first two are not counted
            for name in list(each) if i % 2 else list(each)[::-1]:
                seconds = timed(each[name])
                if i >= 0:
                    taken[name].append(seconds)
        out[row] = {
            name: {
                "seconds": significant(sorted(v)[len(v) // 2]),
                "over_frozen": interval([a / b for a, b in zip(v, taken["frozen"], strict=True)]),
                **({"tokens_per_second": round(rows * length / sorted(v)[len(v) // 2])} if row == "step" else {}),
            }
            for name, v in taken.items()
        }
    return out


def main() -> None:
    """Measures and writes; see the module's own text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    if not (a.quick or torch.cuda.is_available()):
        parser.error("there is no GPU here; --quick runs the same on a tiny model on the processor")
    warnings.simplefilter("ignore")
    rows, length, repeats = (2, 16, 2) if a.quick else (a.rows, a.length, a.repeats)
    base = build(a.quick)
    shape = f"Llama, {sum(p.numel() for p in base.parameters()) / 1e9:.2f} B, bfloat16, LoRA of rank {RANK} on every linear layer, {rows} x {length} tokens"
    result = {"model": shape, **measure(base, rows, length, repeats, a.quick), "machine": machine()}
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
