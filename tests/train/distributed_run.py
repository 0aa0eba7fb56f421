"""What each process of ``torchrun`` does in the tests: ``distributed_run.py FOLDER STRATEGY PRECISION``."""

# ruff: noqa: E402  the script finds its neighbours first
from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from tiny import model_of
from words import TAGS, Encoder, Words, sentences

import exapt
from exapt.train import FitConfig, TokenClassification, evaluate, fit, predict
from exapt.train.strategy import whole, world_of

torch.set_num_threads(1)
METHODS: dict[str, tuple[exapt.Method, str | None]] = {
    "lora": (exapt.LoRA(4), None),
    # not the keys' biases: softmax cancels them, so that their gradient is nothing but rounding, which Adam then scales up
    "bitfit": (exapt.method("bitfit"), "attention.{query,value,output}"),
}


def rows() -> list[dict[str, Any]]:
    """Sentences of different lengths, one more than a multiple of the batch."""
    found = sentences(25)
    for i, r in enumerate(found):
        r["tokens"], r["tags"] = r["tokens"][: 2 + i % 5], r["tags"][: 2 + i % 5]
    return found


def train(folder: Path, strategy: str, key: str, **settings: Any) -> Any:
    """Ten steps of batches of eight rows in all, whatever the number of processes."""
    torch.manual_seed(5)
    model = Encoder()
    task = TokenClassification(TAGS, Words())
    fixed: dict[str, Any] = {"steps": 10, "batch_size": 4, "accumulate": 2, "lr": 1e-3, "progress": False, "log_every": 1}
    config = FitConfig(**{**fixed, "folder": str(folder), "strategy": strategy, **settings})
    result = fit(model, task, rows(), *METHODS[key], validation=rows()[:9], config=config)
    found = evaluate(result.model, task, rows()[:9], batch_size=4)
    tags = predict(result.model, task, rows()[:9], batch_size=2)
    return result, found, tags


def main(folder: Path, strategy: str) -> None:
    for key in METHODS:
        result, found, tags = train(folder / key, strategy, key, **({"checkpointing": True} if key == "lora" else {}))
        tensors = {n: whole(p).detach().clone() for n, p in exapt.trainable(result.model).items()}
        exapt.save(result.model, folder / f"{key}-saved", metrics={}, provenance={})
        kinds = sorted({type(p.data).__name__ for p in result.model.parameters()})
        if world_of()[0] == 0:
            torch.save(tensors, folder / f"{key}.pt")
            (folder / f"{key}.json").write_text(json.dumps([result.metrics, found, tags, kinds, [e["loss"] for e in result.history if "loss" in e]]))
    # stopped in the middle and resumed
    train(folder / "resumed", strategy, "lora", steps=10, save_every=5)
    for late in sorted((folder / "resumed" / "checkpoints").glob("*10.safetensors")) if world_of()[0] == 0 else []:
        late.unlink()
    torch.distributed.barrier()
    again, _, _ = train(folder / "resumed", strategy, "lora", steps=10, save_every=5, resume=True)
    exapt.save(again.model, folder / "resumed-saved", metrics={}, provenance={})
    if strategy == "fsdp2":
        before_any_step(folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def before_any_step(folder: Path) -> None:
    """A sharded model that has not moved, for the comparison of bytes."""
    from torch.distributed.device_mesh import init_device_mesh

    from exapt.train.strategy import shard

    model = model_of("text")
    exapt.attach(model, exapt.LoRA(4), seed=0)
    shard(model, init_device_mesh("cpu", (world_of()[1],), mesh_dim_names=("data_parallel",)))
    exapt.save(model, folder / "unmoved")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    # Past the interpreter's own end: gloo's threads may outlive it, and one that then asks for the lock aborts the process (seen once in CI).
    sys.stdout.flush()
    os._exit(0)
