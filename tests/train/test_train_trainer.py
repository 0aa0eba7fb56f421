"""An attached model is an ordinary module: transformers' Trainer and a plain loop train it with no change."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, call, model_of
from torch import Tensor, nn

import exapt


def rows(n: int = 32) -> list[dict[str, Tensor]]:
    x = torch.randint(3, 40, (n, 6), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": x[i], "labels": x[i, 0] % CLASSES} for i in range(n)]


def attached(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = model_of(kind)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    exapt.attach(model, {"linear": exapt.LoRA(8), "head": exapt.method("full")}, seed=0)
    return model, base


def unchanged(model: nn.Module, base: dict[str, Tensor]) -> None:
    exapt.detach(model)
    now = model.state_dict()
    assert now.keys() == base.keys()
    assert all(torch.equal(v, now[k]) for k, v in base.items())


@pytest.mark.parametrize("kind", ["text", "bert"])
def test_a_plain_loop(kind: str) -> None:
    pytest.importorskip("transformers") if kind == "bert" else None
    model, base = attached(kind)
    optimizer = torch.optim.AdamW(exapt.trainable(model).values(), lr=1e-2)
    batch: Any = torch.utils.data.default_collate(rows())
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(call(model, batch["input_ids"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    unchanged(model, base)


@pytest.mark.slow
def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, base = attached("bert")
    kind = type(model)
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=15, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=4, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message=".*pin_memory.*")  # torch, on machines without an accelerator
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows())
        trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.model is model
    assert isinstance(model, kind)
    path = exapt.save(model, tmp_path / "adapter")
    again = model_of("bert")
    exapt.load(again, path)
    x = torch.stack([r["input_ids"] for r in rows(4)])
    torch.testing.assert_close(call(again.eval(), x), call(model.eval(), x), rtol=0, atol=0)
    unchanged(model, base)
