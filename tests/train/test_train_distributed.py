"""Two CPU processes under torchrun, DDP and FSDP2 through Fabric, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import METHODS, train
from tiny import model_of

import exapt

pytestmark = pytest.mark.slow


def _torchrun(folder: Path, strategy: str) -> None:
    script = str(Path(__file__).parent / "distributed_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, str(folder), strategy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    _torchrun(folder, request.param)
    return request.param, folder


@pytest.mark.parametrize("key", list(METHODS))
def test_two_processes_equal_one(two: tuple[str, Path], key: str, tmp_path: Path) -> None:
    strategy, folder = two
    result, found, tags = train(tmp_path / "one", "auto", key)
    tensors = torch.load(folder / f"{key}.pt", weights_only=True)
    named = exapt.trainable(result.model)
    assert tensors.keys() == named.keys()
    for n, p in named.items():
        torch.testing.assert_close(tensors[n], p.detach(), rtol=0, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
    metrics, found_2, tags_2, kinds, losses = json.loads((folder / f"{key}.json").read_text())
    assert ("DTensor" in kinds) == (strategy == "fsdp2")
    assert metrics == pytest.approx(result.metrics, abs=1e-5)
    assert found_2 == pytest.approx(found, abs=1e-5)
    assert tags_2 == tags
    assert losses == pytest.approx([e["loss"] for e in result.history if "loss" in e], abs=1e-5)


def test_the_sharded_model_saves_the_same_bytes(two: tuple[str, Path], tmp_path: Path) -> None:
    """Before any step the file equals the unsharded model's; after training it equals what it says when loaded and saved again."""
    strategy, folder = two
    if strategy == "fsdp2":
        model = model_of("text")
        exapt.attach(model, exapt.LoRA(4), seed=0)
        assert exapt.save(model, tmp_path / "unmoved").read_bytes() == (folder / "unmoved.safetensors").read_bytes()
    for key in METHODS:
        one, _, _ = train(tmp_path / key, "auto", key)
        saved: dict[str, Any] = {"metrics": {}, "provenance": {}}
        with torch.no_grad():
            for n, t in torch.load(folder / f"{key}.pt", weights_only=True).items():
                exapt.trainable(one.model)[n].copy_(t)
        assert exapt.save(one.model, tmp_path / f"{key}-one", **saved).read_bytes() == (folder / f"{key}-saved.safetensors").read_bytes()


def test_resumed_on_two_processes_equals_unbroken(two: tuple[str, Path]) -> None:
    _, folder = two
    a, b = (exapt.read(folder / f"{n}.safetensors").tensors for n in ("lora-saved", "resumed-saved"))
    for k, t in a.items():
        torch.testing.assert_close(t, b[k], rtol=0, atol=1e-7)
