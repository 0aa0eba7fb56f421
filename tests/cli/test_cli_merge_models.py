"""``exapt merge-models``: whole models in files."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shell import run
from torch import Tensor

from exapt.algebra.rule import rule_of
from exapt.algebra.tensors import merge_tensors
from exapt.cli.algebra import settings_of
from exapt.cli.app import app
from exapt.core.components import components


def tree(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(8, 6, generator=g), "b": torch.randn(5, generator=g)}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    for i in range(3):
        (tmp_path / f"m{i}").mkdir()
        save_file(tree(i), tmp_path / f"m{i}" / "model.safetensors")
        (tmp_path / f"m{i}" / "config.json").write_text(json.dumps({"name": i}))
    return [tmp_path / f"m{i}" for i in range(3)]


def same(path: Path, expected: dict[str, Tensor]) -> bool:
    made = load_file(path)
    return made.keys() == expected.keys() and all(torch.equal(made[n], expected[n]) for n in made)


def test_merges_with_a_rules_settings(models: list[Path], tmp_path: Path) -> None:
    base, a, b = models
    done = run("merge-models", a, b, "-o", tmp_path / "out", "--rule", "ties", "--base", base, "--weights", "0.5,0.25", "--density", "0.4", "--normalise=False")
    assert done.code == 0, done.err
    assert done.out.startswith(f"{tmp_path / 'out'}: 2 tensors, 0.0 MB in 1 file, ")
    expected = merge_tensors("ties", [tree(1), tree(2)], tree(0), [0.5, 0.25], density=0.4, normalise=False)
    assert same(tmp_path / "out" / "model.safetensors", expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"name": 0}


def test_json_and_the_other_flags(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = run("merge-models", *models, "--output", out, "--shard-size", "200B", "--dtype", "float16", "--seed", 3, "--json").json
    seconds = record.pop("seconds")
    assert seconds >= 0
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert record == {
        "output": str(out), "tensors": 2, "bytes": size, "shards": 1, "rule": "average", "models": [str(m) for m in models], "base": None, "weights": None,
        "settings": {},
    }  # fmt: skip
    assert load_file(out / "model.safetensors")["a"].dtype == torch.float16
    assert "is there already" in run("merge-models", *models, "-o", out).complaint
    assert run("merge-models", *models, "-o", out, "--overwrite", "--shard-size", "100B", "--json").json["shards"] == 2


def test_statistics_of_each_model(models: list[Path], tmp_path: Path) -> None:
    stats = [{n: torch.rand(t.shape) for n, t in tree(i).items()} for i in range(2)]
    for i, s in enumerate(stats):
        save_file(s, tmp_path / f"f{i}.safetensors")
    files = [w for i in range(2) for w in ("--statistics", tmp_path / f"f{i}.safetensors")]
    done = run("merge-models", *models[:2], "-o", tmp_path / "out.safetensors", "--rule", "fisher", *files)
    assert done.code == 0, done.err
    assert same(tmp_path / "out.safetensors", merge_tensors("fisher", [tree(0), tree(1)], statistics=stats))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["M0", "M1", "--rule", "ties"], "merges differences from the base; give base="),
        (["M0", "M1", "--rule", "tties"], 'no merge rule "tties"; did you mean "ties"'),
        (["M0", "M1", "--rule", "ties", "--base", "M2", "--densty", "0.2"], 'has no "densty"; did you mean "density"'),
        (["M0", "M1", "--rule", "ties", "--base", "M2", "--density", "much"], '--density "much": ties takes a number there, by default 0.2'),
        (["M0", "M1", "--weights", "1;2"], "--weights 1;2: write numbers with commas"),
        (["M0", "M1", "--weights", "1,2,3"], "3 weights [1.0, 2.0, 3.0] for 2 models"),
        (["M0", "nowhere"], "nowhere: no such file or folder"),
        (["M0", "M1", "--dtype", "int4"], "dtype is 'int4'; it must be one of"),
        (["M0", "M1", "--shard-size", "big"], "'big' is no size"),
        ([], "needs models"),
    ],
)
def test_refusals_are_one_line(models: list[Path], tmp_path: Path, words: list[str], says: str) -> None:
    named = {f"M{i}": str(m) for i, m in enumerate(models)}
    assert says in run("merge-models", *(named.get(w, w) for w in words), "-o", tmp_path / "out").complaint
    assert not (tmp_path / "out").exists()


def test_every_rules_settings_can_be_given() -> None:
    own = {n.removeprefix("--") for a in app["merge-models"].assemble_argument_collection() for n in a.names}
    assert {"rule", "base", "seed"} <= own
    for key in components("merge rule"):
        for name, default in rule_of(key).config.items():
            assert name.replace("_", "-") not in own, f"{key}.{name} is a flag of the command itself"
            text = repr(default)
            assert settings_of([f"--{name.replace('_', '-')}", text])[name] == ast.literal_eval(text)
