"""What methods keep for the backward pass, by saved_tensors_hooks, against the recorded table and against the least there can be."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
from torch import nn

import exapt

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from saved_facts import kept, layer_with, least  # noqa: E402  the script finds its neighbours first

TABLE = json.loads((ROOT / "bench" / "results" / "saved.json").read_text())


@pytest.mark.parametrize("key", sorted(TABLE))
def test_no_method_keeps_more_than_recorded(key: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = layer_with(exapt.methods()[key])
        assert model is not None
        each, fixed = kept(model)
    assert each <= TABLE[key]["kept"] + 0.01
    assert each * 128 + fixed <= TABLE[key]["kept"] * 128 + TABLE[key]["fixed"] + 64


@pytest.mark.parametrize("key", ["lora", "lora_fa", "lora_xs", "tinylora", "miss", "paca", "bitfit", "ia3", "ssf", "road", "loldu", "orthogonal_adaptation"])
def test_the_least_is_reached(key: str) -> None:
    model = layer_with(exapt.methods()[key])
    assert model is not None
    each, _ = kept(model)
    assert each == TABLE[key]["kept"] == least(model)


def test_the_least_of_known_cases() -> None:
    """A trained matrix needs the whole input, a trained bias nothing, a factor behind a frozen one of rank r its r numbers."""
    assert [least(layer_with(exapt.methods()[k])) for k in ("full", "bitfit", "lora_fa")] == [64, 0, exapt.method("lora_fa").rank]  # type: ignore[arg-type, attr-defined]
    model = nn.Sequential(nn.Linear(64, 48))
    model[0].weight.requires_grad_(False)
    assert least(nn.Sequential(*model, nn.Tanh(), nn.Linear(48, 48).requires_grad_(False))) == 48  # through tanh, what comes out of it
