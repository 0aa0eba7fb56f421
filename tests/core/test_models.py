"""Structure of real architectures (random weights from configuration): roles, attach, merge, tied weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import exapt

SMALL: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2)
ATTENTION = {"attention.query", "attention.key", "attention.value", "attention.output"}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers as t

    text = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if name == "bert":
        return t.BertForSequenceClassification(t.BertConfig(vocab_size=50, **SMALL)), {"input_ids": ids}
    if name == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, **text)), {"input_ids": ids, "use_cache": False}
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, tie_word_embeddings=True, **SMALL, **text)), {"input_ids": ids, "use_cache": False}
    if name == "t5":
        model = t.T5ForConditionalGeneration(
            t.T5Config(num_layers=2, d_model=32, d_kv=16, num_heads=2, d_ff=48, vocab_size=50, **{k: v for k, v in text.items() if k != "bos_token_id"})
        )
        return model, {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    if name == "vit":
        return t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, **SMALL)), {"pixel_values": pixels}
    if name == "resnet":
        return t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")), {
            "pixel_values": pixels
        }
    if name == "mobilenet":
        return t.MobileNetV2ForImageClassification(t.MobileNetV2Config(image_size=32, depth_multiplier=0.25)), {"pixel_values": pixels}
    if name == "mixtral":
        config = t.MixtralConfig(vocab_size=50, num_local_experts=4, num_key_value_heads=2, **SMALL, **text)
        return t.MixtralForCausalLM(config), {"input_ids": ids, "use_cache": False}
    one = {**SMALL, "num_hidden_layers": 1}
    config = t.CLIPConfig(text_config={**one, "vocab_size": 50, **text}, vision_config={**one, "image_size": 32, "patch_size": 8}, projection_dim=16)
    return t.CLIPModel(config), {"input_ids": ids, "pixel_values": pixels}


EXPECTED = {
    "bert": ATTENTION | {"mlp.up", "mlp.down", "mlp", "block", "norm", "embedding", "embeddings", "head", "attention"},
    "gpt2": {"attention.qkv", "attention.output", "mlp.up", "mlp.down", "mlp", "block", "norm", "embedding", "head", "attention"},
    "llama": ATTENTION | {"mlp.up", "mlp.down", "mlp.gate", "mlp", "block", "norm", "embedding", "head", "attention"},
    "t5": ATTENTION | {"mlp.up", "mlp.down", "mlp", "block", "norm", "embedding", "head", "attention"},
    "vit": ATTENTION | {"mlp.up", "mlp.down", "mlp", "block", "norm", "embeddings", "head", "attention", "conv"},
    "clip": ATTENTION | {"mlp.up", "mlp.down", "mlp", "block", "norm", "embedding", "embeddings", "head", "attention", "conv"},
    "resnet": {"block", "norm", "conv", "head"},
    "mobilenet": {"block", "norm", "conv", "head"},
    "mixtral": ATTENTION | {"mlp.up", "mlp.down", "mlp", "block", "norm", "embedding", "head", "attention"},
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_architecture(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = build(name)
    model.eval()
    assert EXPECTED[name] <= {s.role for s in exapt.sites(model)}
    base = {k: v.clone() for k, v in model.state_dict().items()}
    kind = type(model)
    with torch.no_grad():
        before = model(**inputs)[0]
    exapt.attach(model, exapt.LoRA(rank=2), ["linear", "embedding", "conv", "head"], seed=0)
    assert isinstance(model, kind)
    assert base.keys() <= model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], before)
        for p in exapt.trainable(model).values():
            p.normal_(std=0.05)
    output = model(**inputs)
    assert type(output).__name__.endswith("Output") or "Output" in type(output).__name__
    output[0].float().square().sum().backward()
    parameters = exapt.trainable(model)
    assert all(p.grad is not None for p in parameters.values()), [n for n, p in parameters.items() if p.grad is None]
    assert (output[0] - before).abs().max() > 1e-3 * before.abs().max()
    exapt.merge(model)
    assert model.state_dict().keys() == base.keys()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], output[0].detach(), rtol=1e-3, atol=1e-4)
    exapt.unmerge(model)
    exapt.detach(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("where", ["head", "embedding"])
def test_tied_weights_stay_tied(name: str, where: str) -> None:
    """A shift of a tied parameter is seen by everyone who holds it, before and after merging."""
    torch.manual_seed(0)
    model, inputs = build(name)
    if name == "t5":
        model.lm_head.weight = model.shared.weight
    model.eval()
    twins = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert twins[0].weight is twins[1].weight
    exapt.attach(model, exapt.LoRA(rank=2), lambda s: s.role == where and s.shape[0] + s.shape[1] == 82)
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.normal_(std=0.1)
        adapted = model(**inputs)[0]
        exapt.merge(model)
        torch.testing.assert_close(model(**inputs)[0], adapted, rtol=1e-4, atol=1e-4)
    assert twins[0].weight is twins[1].weight


def test_roles_of_a_plain_sequence() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert [s.role for s in exapt.sites(model)] == ["model", "linear", "linear", "head"]
    exapt.attach(model, exapt.LoRA(rank=2))
    assert len(model) == 5
    assert model[-1] is list(model)[4]
    assert [s.role for s in exapt.sites(model)] == ["model", "linear", "linear", "head"]


def test_where_chooses() -> None:
    model, _ = build("bert")
    found = exapt.sites(model)
    from exapt.core.sites import choose

    def names(where: Any) -> list[str]:
        return [s.name for s in choose(found, where, lambda s: s.layer is not None)]

    assert len(names("attention.{query,value}")) == 4
    assert names("*.1.*.query") == ["bert.encoder.layer.1.attention.self.query"]
    assert names(["attention.query", lambda s: s.name == "classifier"])[-1] == "classifier"
    assert len(names("linear")) == 13
    assert "classifier" not in names("linear")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("word_embeddings", "embedding"), ("embed_tokens", "embedding"), ("wte", "embedding"), ("token_embedding", "embedding"), ("shared", "embedding"),
        ("composed", "embedding"), ("position_embeddings", "embedding.position"), ("wpe", "embedding.position"), ("embed_positions", "embedding.position"),
        ("relative_attention_bias", "embedding.position"), ("rel_embeddings", "embedding.position"), ("distance_embedding", "embedding.position"),
        ("token_type_embeddings", "embedding.type"), ("lang_embeddings", "embedding.type"),
    ],
)  # fmt: skip
def test_tables_of_tokens_positions_and_types(name: str, role: str) -> None:
    model = nn.ModuleDict({name: nn.Embedding(5, 4), "out": nn.Linear(4, 2)})
    assert {s.name: s.role for s in exapt.sites(model)}[name] == role


def test_small_tokens_are_not_taken_for_positions() -> None:
    """Token 1 is a row of BERT's table of positions, and of its table of types, too."""
    model, _ = build("bert")
    exapt.attach(model, exapt.TrainableTokens(tokens=(1,)))
    assert [n for n, _ in exapt.trainable(model).items() if "position" in n or "type" in n] == []
    assert sum(p.numel() for p in exapt.trainable(model).values()) == model.get_input_embeddings().weight.shape[1]
