"""``merge-adapters``, ``arithmetic`` and ``diff`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shell import run
from torch import nn

import exapt

SOURCE = """
import torch
from torch import nn


def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net_of_algebra.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for i, (name, method) in enumerate((("a", exapt.LoRA(rank=2)), ("b", exapt.LoRA(rank=1)), ("scaled", exapt.IA3()))):
        model = exapt.attach(net(), method, "all")
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in exapt.trainable(model).values():
                p.add_(torch.randn(p.shape, generator=g))
        exapt.save(model, tmp_path / name)
    return tmp_path


def net() -> nn.Module:
    import net_of_algebra

    return net_of_algebra.make()


def weight(path: Path) -> torch.Tensor:
    return exapt.merge(exapt.load(net(), path))[0].weight.detach()


def test_merge_adapters(place: Path) -> None:
    done = run("merge-adapters", "a.safetensors", "b.safetensors", "--output", "c.safetensors", "--weights", "1,3", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["largest_error"] == 0
    torch.testing.assert_close(weight(place / "c.safetensors"), 0.25 * weight(place / "a.safetensors") + 0.75 * weight(place / "b.safetensors"))
    done = run("merge-adapters", "a.safetensors", "b.safetensors", "-o", "t.safetensors", "--rule", "task_arithmetic", "--scale", "0.5", "--rank", "1")
    assert done.code == 0, done.err
    assert "cut to rank 1" in done.out
    assert exapt.read(place / "t.safetensors").provenance["settings"] == {"scale": 0.5}


def test_arithmetic(place: Path) -> None:
    done = run("arithmetic", "2*a - first", "first=b.safetensors", "-o", "c.safetensors")
    assert done.code == 0, done.err
    base = net()[0].weight
    a, b = weight(place / "a.safetensors") - base, weight(place / "b.safetensors") - base
    torch.testing.assert_close(weight(place / "c.safetensors"), base + 2 * a - b, rtol=1e-5, atol=1e-5)


def test_diff(place: Path) -> None:
    done = run("diff", "a.safetensors", "scaled.safetensors", "--model", "python:net_of_algebra:make", "--picture", "d.png", "--json")
    assert done.code == 0, done.err
    assert {r["site"] for r in json.loads(done.out)} == {"0", "2"}
    assert (place / "d.png").stat().st_size > 1000
    assert "angle" in run("diff", "a.safetensors", "b.safetensors").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("merge-adapters", "a.safetensors", "scaled.safetensors", "-o", "x.safetensors"), "give the base"),
        (("merge-adapters", "a.safetensors", "b.safetensors", "-o", "x.safetensors", "--rule", "tise"), "tise"),
        (("merge-adapters", "a.safetensors", "b.safetensors", "-o", "x.safetensors", "--weights", "1;2"), "commas"),
        (("merge-adapters", "a.safetensors", "b.safetensors", "-o", "x.safetensors", "--density", "0.2"), 'has no "density"'),
        (("merge-adapters", "-o", "x.safetensors"), "needs adapter files"),
        (("arithmetic", "a * b", "-o", "x.safetensors"), "not a sum of multiples"),
        (("arithmetic", "a - z", "-o", "x.safetensors"), "z.safetensors: no such file"),
        (("diff", "a.safetensors", "none.safetensors"), "no such file"),
    ],
)
def test_wrong_words(place: Path, words: tuple[str, ...], said: str) -> None:
    assert said in run(*words).complaint
    assert not (place / "x.safetensors").exists()
