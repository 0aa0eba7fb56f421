"""The adapters that the algebra benchmark merges: one LoRA for each domain of three families, trained here and kept in ``runs/algebra``.

Reviews (Amazon, four domains) and tagged words (CrossNER, five, in the tags that all share) on MiniLM's upper two layers, whose input, the hidden
states of the lower four, is computed once; digits (MNIST, USPS, optdigits) on a small ViT that was trained on MNIST. The head is trained with the base on
a little of every domain and stays as it is, so that what a domain adds is in its LoRA alone.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shift_data import AMAZON, CROSSNER, amazon, crossner, digits
from shift_models import digit_input, digit_model
from torch import Tensor, nn

import exapt

HERE = Path(__file__).resolve().parent
LENGTH, BATCH, STEPS, RATE, RANK, LITTLE = 40, 16, 80, 2e-3, 8, 48
ROWS = {"train": 480, "validation": 100, "test": 300}


@dataclass
class Rows:
    """Inputs of the model and labels; -100 is no label."""

    inputs: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Any) -> Rows:
        return Rows(tuple(t[index] for t in self.inputs), self.labels[index])


@dataclass
class Family:
    """A base model, and for each domain its "train", "validation" and "test" rows.

    Attributes:
        f1: Whether the measure is the F1 of words that are no "O" rather than the accuracy.
        steps: Steps of an expert's training.
    """

    name: str
    model: nn.Module
    domains: dict[str, dict[str, Rows]]
    f1: bool = False
    steps: int = STEPS


def runs() -> Path:
    found = Path(os.environ.get("EXAPT_ALGEBRA_CACHE") or HERE.parent / "runs" / "algebra")
    found.mkdir(parents=True, exist_ok=True)
    return found


class Reader(nn.Module):
    """MiniLM's upper two layers and a linear head on their mean, or on every position."""

    def __init__(self, upper: nn.Module, classes: int, pooled: bool) -> None:
        super().__init__()
        self.backbone, self.head, self.pooled = upper, nn.Linear(384, classes), pooled

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        h = self.backbone(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        if self.pooled:
            kept = mask[..., None].to(h.dtype)
            h = (h * kept).sum(1) / kept.sum(1)
        return self.head(h)


def upper_layers() -> nn.Module:
    """MiniLM's last two layers, given the hidden states before them."""
    from methods import Given, minilm
    from transformers import BertModel

    model, _ = minilm()
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2
    upper = BertModel(config, add_pooling_layer=False).eval()
    state = {k.replace("layer.4", "layer.0").replace("layer.5", "layer.1"): v for k, v in model.state_dict().items() if "layer.4" in k or "layer.5" in k}
    upper.load_state_dict(state, strict=False)
    upper.embeddings = Given()
    return upper


@torch.inference_mode()
def lower_states(given: list[Any], split: bool) -> tuple[Tensor, Tensor, list[list[int | None]]]:
    """Hidden states after four layers (n, LENGTH, 384) in half precision, masks, and of every position its word."""
    from methods import minilm

    model, tokenizer = minilm()
    model.encoder.layer = model.encoder.layer[:4]
    states, masks, places = [], [], []
    for i in range(0, len(given), 64):
        e = tokenizer(given[i : i + 64], is_split_into_words=split, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        states.append(model(**e).last_hidden_state.half())
        masks.append(e["attention_mask"])
        places += [e.word_ids(j) for j in range(len(e["input_ids"]))] if split else []
    return torch.cat(states), torch.cat(masks), places


def _kept(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    path = runs() / f"{name}.safetensors"
    if not path.exists():
        save_file({k: t.contiguous() for k, t in make().items()}, path)
    return load_file(path)


def _parts(inputs: tuple[Tensor, ...], labels: Tensor, seed: int) -> dict[str, Rows]:
    """The rows of a domain, drawn for a seed."""
    order, found, start = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels))), {}, 0
    for part, count in ROWS.items():
        found[part] = Rows(tuple(t[order[start : start + count]].float() if t.is_floating_point() else t[order[start : start + count]] for t in inputs),
                           labels[order[start : start + count]])  # fmt: skip
        start += count
    return found


def reviews(seed: int) -> Family:
    def make() -> dict[str, Tensor]:
        rows, found = amazon(), {}
        for d in AMAZON:
            own = np.random.default_rng(0).permutation(np.flatnonzero(rows.domain == d))[:1000]
            hidden, mask, _ = lower_states([rows.texts[i] for i in own], split=False)
            found |= {f"{d}.hidden": hidden, f"{d}.mask": mask, f"{d}.y": torch.from_numpy(rows.y[own])}
        return found

    kept = _kept("amazon", make)
    domains = {d: _parts((kept[f"{d}.hidden"], kept[f"{d}.mask"]), kept[f"{d}.y"], seed) for d in AMAZON}
    return Family("amazon", Reader(upper_layers(), 2, pooled=True), domains)


def tagged(seed: int) -> Family:
    from shift_places import TAGS, common

    def make() -> dict[str, Tensor]:
        found = {}
        for d, parts in crossner().items():
            sentences = [s for p in ("train", "dev", "test") for s in parts[p]]
            sentences = [sentences[i] for i in np.random.default_rng(0).permutation(len(sentences))[:900]]
            hidden, mask, places = lower_states([w for w, _ in sentences], split=True)
            labels = torch.full(mask.shape, -100)
            for row, (place, (_, tags)) in enumerate(zip(places, sentences, strict=True)):
                for j, word in enumerate(place):
                    if word is not None and (j == 0 or place[j - 1] != word):
                        labels[row, j] = common(tags[word])
            found |= {f"{d}.hidden": hidden, f"{d}.mask": mask, f"{d}.y": labels}
        return found

    kept = _kept("crossner", make)
    domains = {d: _parts((kept[f"{d}.hidden"], kept[f"{d}.mask"]), kept[f"{d}.y"], seed) for d in CROSSNER}
    return Family("crossner", Reader(upper_layers(), len(TAGS), pooled=False), domains, f1=True)


def drawn(seed: int) -> Family:
    domains = {}
    for d in ("mnist", "usps", "optdigits"):
        found = digits(d)
        x = np.concatenate([found[p].x[:3000] for p in ("train", "test")])
        domains[d] = _parts((digit_input(x),), torch.from_numpy(np.concatenate([found[p].y[:3000] for p in ("train", "test")])), seed)
    return Family("digits", digit_model("vit", 0), domains, steps=300)


FAMILIES: dict[str, Callable[[int], Family]] = {"amazon": reviews, "crossner": tagged, "digits": drawn}


def loss_of(model: nn.Module, rows: Rows) -> Tensor:
    logits = model(*rows.inputs)
    return F.cross_entropy(logits.flatten(0, -2), rows.labels.flatten(), ignore_index=-100)


def train(model: nn.Module, rows: Rows, steps: int, seed: int, rate: float = RATE) -> nn.Module:
    """AdamW with a cosine schedule over what is trainable."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    g = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=g) for _ in range(steps * BATCH // len(rows) + 1)])
    model.train()
    for step in range(steps):
        optimiser.zero_grad()
        loss_of(model, rows.take(order[step * BATCH : (step + 1) * BATCH])).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def joined(parts: list[Rows]) -> Rows:
    return Rows(tuple(torch.cat(t) for t in zip(*(p.inputs for p in parts), strict=True)), torch.cat([p.labels for p in parts]))


@torch.inference_mode()
def counts(model: nn.Module, rows: Rows, f1: bool) -> tuple[np.ndarray, np.ndarray]:
    """Hits and totals of every row; the measure is the ratio of their sums (of F1: twice the right words, and named and true ones)."""
    hits, totals = [], []
    for i in range(0, len(rows), 100):
        part = rows.take(slice(i, i + 100))
        said, truth = model(*part.inputs).argmax(-1), part.labels
        if not f1:
            hits.append((said == truth).long())
            totals.append(torch.ones_like(truth))
            continue
        known = truth != -100
        hits.append(2 * ((said == truth) & (truth > 0) & known).sum(1))
        totals.append(((said > 0) & known).sum(1) + ((truth > 0) & known).sum(1))
    return torch.cat(hits).numpy(), torch.cat(totals).numpy()


def adapted(site: Any) -> bool:
    """Whether a LoRA acts there: on every linear layer but the head."""
    return site.role != "head" and site.layer is not None and site.layer.kind == "linear" and site.name == site.module_name


def prepared(name: str, seed: int) -> tuple[Family, Path]:
    """The family with its base trained on a little of every domain, and the folder of its adapters, trained if they are not there."""
    family, folder = FAMILIES[name](seed), runs() / f"{name}-{seed}"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    head: Any = family.model.head
    little = joined([d["train"].take(slice(0, LITTLE)) for d in family.domains.values()])
    base = folder / "base.safetensors"
    if not base.exists():
        for p in family.model.parameters():
            p.requires_grad_(False)
        for p in head.parameters():
            p.requires_grad_(True)
        train(family.model, little, 100, seed, 3e-3)
        save_file(head.state_dict(), base)
    head.load_state_dict(load_file(base))
    for p in family.model.parameters():
        p.requires_grad_(False)
    for expert in (*family.domains, "all"):
        path = folder / f"{expert}.safetensors"
        if not path.exists():
            rows = joined([d["train"] for d in family.domains.values()]) if expert == "all" else family.domains[expert]["train"]
            model = exapt.attach(copy.deepcopy(family.model), exapt.LoRA(rank=RANK), adapted, seed=seed)
            exapt.save(train(model, rows, family.steps * (2 if expert == "all" else 1), seed), path)
            print(f"{name} {seed}: {expert}", flush=True)
    return family, folder


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    for number in range(int(sys.argv[2]) if len(sys.argv) > 2 else 5):
        for which in sys.argv[1].split(","):
            prepared(which, number)
