"""The YAML file, the command line's settings over it, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

import exapt
from exapt.cli.config import Config, read_config
from exapt.core.errors import InputError

TEXT = """
model: some/folder
task: {kind: text_classification, labels: [no, yes]}
data:
  train: a.jsonl
method: {method: lora, rank: 8}
where: attention.{query,value}
train: {lr: 1e-3, epochs: 2}
output: out.safetensors
"""


def config(folder: Path, *words: str, text: str = TEXT, **direct: str | None) -> Config:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path, words, direct)


def refusal(folder: Path, *words: str, text: str = TEXT, **direct: str | None) -> str:
    with pytest.raises(InputError) as e:
        config(folder, *words, text=text, **direct)
    assert "\n" not in str(e.value).strip()
    return str(e.value)


def test_scalars_are_what_they_look_like(tmp_path: Path) -> None:
    read = config(tmp_path)
    assert read.data["train"] == {"lr": 0.001, "epochs": 2}  # PyYAML by itself reads 1e-3 as text
    assert read.data["task"]["labels"] == ["no", "yes"]  # and these as truth values
    text = "model: x\ntask: {a: 2020-01-01, b: 0.5, c: .5, d: -3, e: null, f: true, g: 1_000, h: 007, i: 1e5, j: 1.2.3, k: .inf}"
    values = {"a": "2020-01-01", "b": 0.5, "c": 0.5, "d": -3, "e": None, "f": True, "g": 1000, "h": 7, "i": 1e5, "j": "1.2.3", "k": float("inf")}
    assert config(tmp_path, text=text).data["task"] == values


def test_the_line_lies_over_the_file(tmp_path: Path) -> None:
    words = ("--rank", "16", "--train.lr=3e-4", "--train.batch-size", "4", "--data.test", "t.csv", "--method.alpha", "32", "--train.checkpointing")
    read = config(tmp_path, *words, output="other.safetensors", where=None)
    assert read.method == exapt.LoRA(rank=16, alpha=32.0)
    assert read.data["train"] == {"lr": 3e-4, "epochs": 2, "batch_size": 4, "checkpointing": True}
    assert read.data["data"] == {"train": "a.jsonl", "test": "t.csv"}
    assert read["output"] == "other.safetensors"
    assert read["where"] == "attention.{query,value}"
    assert read.command.startswith("exapt fit ")
    assert read.command.endswith("--method.alpha 32 --train.checkpointing --output other.safetensors")


def test_the_method_can_be_changed_on_the_line(tmp_path: Path) -> None:
    assert config(tmp_path, "--rank", "4", "--method", "dora").method == exapt.method("dora", rank=4)
    assert config(tmp_path, text=TEXT.replace("{method: lora, rank: 8}", "lora")).method == exapt.LoRA()


def test_methods_by_place(tmp_path: Path) -> None:
    rules = "[{where: linear, method: lora}, {where: ['0', head], method: bitfit}]"
    text = TEXT.replace("{method: lora, rank: 8}", rules).replace("where: attention.{query,value}\n", "")
    assert config(tmp_path, "--rank", "2", text=text).method == {"linear": exapt.LoRA(rank=2), ("0", "head"): exapt.method("bitfit")}
    assert "keep one" in refusal(tmp_path, "--where", "linear", text=text)
    assert "names no place" in refusal(tmp_path, text=text.replace("where: linear, ", ""))


def test_where_stays_text(tmp_path: Path) -> None:
    assert config(tmp_path, where="0")["where"] == "0"
    assert config(tmp_path, where="[a.b, 0]")["where"] == ["a.b", "0"]
    assert config(tmp_path, "--where", "mlp.{up,down}")["where"] == "mlp.{up,down}"


def test_the_digest_tells_settings_apart(tmp_path: Path) -> None:
    assert config(tmp_path).digest == config(tmp_path).digest
    assert config(tmp_path).digest != config(tmp_path, "--train.lr", "2e-3").digest
    assert config(tmp_path, "--train.lr", "0.001").digest == config(tmp_path).digest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rnak", "4"), 'did you mean "rank"'),
        (("--lr", "1e-3"), 'did you mean "--train.lr"'),
        (("--batch-size", "4"), 'did you mean "--train.batch_size"'),
        (("--trian.lr", "1e-3"), 'did you mean "train"'),
        (("--rank", "many"), "must be int"),
        (("--method.scaling", "sr"), "'standard', 'rs'"),
        (("--method", "lorra"), 'did you mean "lora"'),
        (("--data.tset", "x"), 'did you mean "test"'),
        (("rank", "4"), "is not a flag"),
        (("--train", "4"), "no flag --train"),
    ],
)
def test_flags_that_are_refused(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refusal(tmp_path, *words)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model:", "modle:", 'no key "modle"; did you mean "model"?'),
        ("rank: 8", "rnak: 8", 'lora has no field "rnak"; did you mean "rank"?'),
        ("method: lora", "method: lorra", 'did you mean "lora"'),
        ("data:\n  train: a.jsonl", "data: a.jsonl", '"data" is'),
        ("train: a.jsonl", "tran: a.jsonl", 'did you mean "train"'),
        ("{method: lora, rank: 8}", "8", "give a method's key"),
        ("epochs: 2}", "epochs: 2", "run.yaml:9:"),
        ("output: out.safetensors", "model: other", 'run.yaml:9:1: not YAML (the key "model" is there twice)'),
        (TEXT, "- a\n- b", "holds list"),
        (TEXT, "", "holds NoneType"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in TEXT
    message = refusal(tmp_path, text=TEXT.replace(old, new, 1))
    assert said in message
    assert "run.yaml" in message


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_config(tmp_path / "b.yaml")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    read = config(tmp_path, text="model: x")
    with pytest.raises(InputError, match='"output" is missing; add it to the file or give --output'):
        read["output"]
    with pytest.raises(InputError, match=r"--data\.train"):
        read.place("train")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    assert "not YAML" in refusal(tmp_path, text="model: !!python/object/apply:os.getcwd []")
