"""Every objective with every parameter shift: ``fit`` ends, only the shift trains, and ``detach`` gives the base back bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import exapt
from exapt.core.attach import expanded
from exapt.core.calibrate import BACKWARD
from exapt.core.components import component_of
from exapt.core.contract import Method
from exapt.core.objective import Objective
from exapt.train import FitConfig
from exapt.train.tasks import ImageClassification

METHODS = exapt.methods()
ELSEWHERE = {"ulda": "needs embeddings of texts, and a place whose output is a map (n, c, h, w): its own tests bring both"}
"""Objectives without a model here."""
OBJECTIVES = [k for k in exapt.components("objective") if k not in ELSEWHERE]
ROWS, BATCH = 12, 6


class Pictures(tiny.Transformer):
    """Images (batch, 1, length, width) to logits: a row of pixels is a token, its first pixel chooses an embedding that is added."""

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, 0, :, 0].detach() * 10).round().long() % tiny.VOCABULARY
        return super().forward(self.embed(ids) + x[:, 0])


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4, num_channels=1)
    config.num_labels, config.hidden_dropout_prob = tiny.CLASSES, 0.0
    return ViTForImageClassification(config)


@functools.cache
def original(kind: str) -> nn.Module:
    made = {"text": tiny.Transformer, "image": tiny.ConvNet, "bert": tiny.tiny_bert, "pictures": Pictures, "vit": tiny_vit}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return made().eval()


@dataclass(frozen=True, eq=False)
class Tensors(ImageClassification):
    """Rows whose tensors are stacked as they are."""

    def collate(self, rows: Any, labelled: bool = True) -> Any:
        batch = {"inputs": torch.stack([r["image"] for _, r in rows])}
        return {**batch, "labels": torch.tensor([r["label"] for _, r in rows])} if labelled else batch


TASK = Tensors(tuple("abcde"))
SHAPES = {"image": (4, 9, 9), "pictures": (1, 6, tiny.WIDTH), "vit": (1, 8, 8)}


@functools.cache
def rows(kind: str, seed: int, labelled: bool = True) -> Any:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(ROWS, *SHAPES[kind], generator=g) if kind in SHAPES else torch.randint(3, tiny.VOCABULARY, (ROWS, 6), generator=g)
    if kind not in SHAPES:
        x[::2, 0] = 33  # what aLoRA waits for
    return [{"image": x[i], "label": i % tiny.CLASSES} if labelled else {"image": x[i]} for i in range(ROWS)]


def example(method: str, kind: str) -> Method:
    """The method as the other tests have it; a vision transformer's class token stands before its patches."""
    made = tiny.example(METHODS[method])
    return dataclasses.replace(made, prefix=1) if kind == "vit" and hasattr(made, "prefix") and hasattr(made, "height") else made


@functools.cache
def statistics(key: str, kind: str) -> Any:
    """Collected once for all objectives; of the methods that need none, nothing."""
    method = example(key, kind)
    if not any(m.needs for _, m in expanded(method)):
        return None
    batches = [(torch.stack([r["image"] for r in rows(kind, 0)[:4]]), torch.arange(4))]
    return exapt.calibrate(copy.deepcopy(original(kind)), batches, method, loss=lambda m, b: nn.functional.cross_entropy(tiny.call(m, b[0]), b[1]))


def data_for(objective: Objective, kind: str) -> dict[str, Any]:
    several = objective.setting == "generalisation" or type(objective).__name__ in SEVERAL
    source = {"first": rows(kind, 0), "second": rows(kind, 1)} if several else rows(kind, 0)
    target = rows(kind, 2, False)
    return {"adaptation": {"source": source, "target": target}, "source-free": {"target": target}}.get(objective.setting, {"source": source})


def kind_of(key: str, method: str) -> str:
    usual = tiny.kind_for(METHODS[method]())
    return {"text": "pictures", "bert": "vit"}.get(usual, usual) if key in IMAGES else usual


def run(key: str, method: str, by_fit: bool = False) -> None:
    """One fit. ``by_fit``: it attaches and calibrates by itself; otherwise statistics come from the cache and the start is noted."""
    kind = kind_of(key, method)
    model, shift = copy.deepcopy(original(kind)), example(method, kind)
    base = {k: t.detach().clone() for k, t in model.state_dict().items()}
    objective = component_of(key, "objective")(**FIELDS.get(key, {}))
    config = FitConfig(steps=1, batch_size=BATCH, lr=1e-2, warmup=0.0, schedule="constant", progress=False, accelerator="cpu")
    start: dict[str, Tensor] = {}
    if not by_fit:
        exapt.attach(model, shift, statistics=statistics(method, kind))
        start = {k: t.detach().clone() for k, t in exapt.trainable(model).items()}
    result = exapt.fit(model, TASK, objective=objective, method=shift if by_fit else None, config=config, **data_for(objective, kind))
    assert result.steps == 1
    losses = torch.tensor([float(e["loss"]) for e in result.history])
    assert len(losses)
    assert losses.isfinite().all()
    trained = exapt.trainable(model)
    assert all(t.isfinite().all() for t in trained.values())
    assert by_fit or key in STILL or any(not torch.equal(trained[k], t) for k, t in start.items()), "nothing moved"
    exapt.detach(model)
    after = model.state_dict()
    assert after.keys() == base.keys()
    assert [k for k in base if not torch.equal(after[k], base[k])] == []


def refusal(key: str, method: str, by_fit: bool) -> str | None:
    """What the message of the refusal holds, for pairs that cannot be."""
    if method in UNTRAINED or (method in BARE and not by_fit and not (key in IMAGES and method in TOKENS)):
        return "nothing asks for gradients"
    if key == "ulda":
        return "needs the embeddings of texts"  # tests/objectives/test_dense_language_driven.py runs it
    if key in ("shot", "core_reid") and (method in BARE or method in LATE):
        return "nothing before the head trains"
    if key == "udim" and any(m.contract == "side" for _, m in expanded(METHODS[method]())):
        return "none reaches them"  # the backbone of a side network runs without gradient
    if by_fit and component_of(key, "objective").setting == "source-free":
        needs = {n for _, m in expanded(METHODS[method]()) for n in m.needs}
        if needs & set(BACKWARD):
            return "needs gradients"  # which the target, without labels, has none to take of; the whole product gives statistics
    if key in IMAGES and method in TOKENS:
        return TOKENS[method]
    if key == "pond" and kind_of(key, method) == "vit":
        return "time series"  # an image of a fixed size takes no steps before it
    return PAIRS.get((key, method))


def check(key: str, method: str, by_fit: bool = False) -> None:
    message = refusal(key, method, by_fit)
    if message is None:
        run(key, method, by_fit)
        return
    with pytest.raises(exapt.InputError, match=message):
        run(key, method, by_fit)


SEVERAL = ("POND",)
"""Objectives of adaptation that learn from several sources."""

FIELDS: dict[str, dict[str, Any]] = {
    "udim": {"warm_up": 0.0},
    "pond": {"channels": tiny.WIDTH},
    "muscle": {"old": lambda s: torch.zeros_like(s.logits)},
    "knowledge_concentration": {
        "verticals": ((0,), tuple(range(1, tiny.CLASSES))),
        "teachers": (lambda s: torch.zeros_like(s.logits[:, :1]), lambda s: torch.zeros_like(s.logits[:, 1:])),
    },
}
"""Fields that an objective needs here in place of its defaults."""

IMAGES = {
    "generic_mixup": "mixes images with their edges",
    "idm": "changes images",
    "meta_causal": "changes images",
    "mixstyle": "mixes images",
    "mixup": "mixes inputs",
    "modify": "shuffles channels",
    "pond": "time series",
    "select_label_mix": "mixes inputs",
    "udim": "moves inputs",
}
"""Objectives that change the inputs themselves: what they say to token ids. They run on images here."""

UNTRAINED = {
    "arrow": "routes among adapters that were trained before",
    "lame": "corrects predictions in closed form",
    "norm_statistics": "takes statistics from the batch",
    "prior_correction": "divides by a prior",
    "shifcon": "computes its shift from statistics",
}
"""Methods without anything to train: fit says so."""

BARE = ("prefix_positions", "spatial_temporal_heads", "unmasked")
"""Methods that only rearrange: beside them fit trains a head of the transformers library, where there is one."""

STILL = {"wise": "goes back to the start where the source is answered best there", "adda": "moves what makes the features, and no head"}
"""Objectives that may leave a shift where it was after one step."""

LATE = ("full", "logit_plugin")
"""Methods at the head, so that SHOT, which holds it, has nothing to train."""

_NO_WORDS, _NO_IDS = "no token embedding", "reads input_ids"
TOKENS = {
    "alora": _NO_IDS, "cpt": _NO_WORDS, "dept": _NO_WORDS, "ept": _NO_WORDS, "logit_plugin": _NO_IDS, "multitask_prompt_tuning": _NO_WORDS,
    "p_tuning": _NO_WORDS, "pasta": _NO_IDS, "prefix_positions": _NO_WORDS, "prompt_tuning": _NO_WORDS,
}  # fmt: skip
"""Methods that read the words themselves, so that no objective that changes images can be had with them: what they say to images."""

PAIRS = {
    ("dr_tune", "logit_plugin"): "kept features",  # the plug-in reads the tokens of the call, and kept features have none
    ("mldg", "delora"): "norm of the gradient is nan",  # the norm that it divides by has no second derivative at its start
    ("mldg", "p_adapter"): "second derivative",
    ("udim", "p_adapter"): "second derivative",
    ("rsc", "logit_plugin"): "gradient",  # the plug-in holds the head's own answer constant
}
"""Further pairs that cannot be: what is said then."""

SOME = ("lora", "ia3", "boft", "kasa", "ssf", "adapter", "loreft", "prompt_tuning", "prefix_tuning", "bitfit", "full", "lst", "logit_plugin", "unipelt")
"""Of every contract some."""
DIAGONAL = [(o, m) for o in OBJECTIVES for m in SOME] + [(o, m) for m in METHODS for o in ("dann", "shot", "group_dro") if m not in SOME]


@pytest.mark.parametrize("key", sorted(IMAGES))
def test_objectives_that_change_images_say_so(key: str) -> None:
    objective = component_of(key, "objective")(**FIELDS.get(key, {}))
    config = FitConfig(steps=1, batch_size=BATCH, progress=False, accelerator="cpu")
    with pytest.raises(exapt.InputError, match=IMAGES[key]):
        exapt.fit(copy.deepcopy(original("text")), TASK, objective=objective, method=exapt.LoRA(rank=2), config=config, **data_for(objective, "text"))


@pytest.mark.parametrize("key", sorted(ELSEWHERE))
def test_objectives_left_to_their_own_tests(key: str) -> None:
    objective = component_of(key, "objective")()
    config = FitConfig(steps=1, batch_size=BATCH, progress=False, accelerator="cpu")
    with pytest.raises(exapt.InputError, match="needs the embeddings of texts"):
        exapt.fit(copy.deepcopy(original("text")), TASK, objective=objective, method=exapt.LoRA(rank=2), config=config, **data_for(objective, "text"))


@pytest.mark.parametrize(("key", "method"), DIAGONAL)
def test_representative_pairs(key: str, method: str) -> None:
    check(key, method, by_fit=True)


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(OBJECTIVES))
def test_every_shift_under(key: str) -> None:
    wrong, still = {}, []
    for method in METHODS:
        try:
            check(key, method)
        except (Exception, pytest.fail.Exception) as e:  # all of them are shown at once
            if "nothing moved" in str(e):
                still.append(method)  # one step can be none: a combination of gradients that is zero, a factor that starts at zero
            else:
                wrong[method] = f"{type(e).__name__}: {e}"[:300]
    assert not wrong
    assert len(still) <= len(METHODS) // 8, still
