"""The tasks: each is one dataclass. Those that choose among labels are here, the others are brought in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.errors import InputError
from exapt.train import metrics
from exapt.train.data import column, field
from exapt.train.encode import encode, label_index, pad, pixels, tokenizer_of
from exapt.train.heads import Classifier, headless
from exapt.train.language import CausalLM
from exapt.train.metrics import Outcome
from exapt.train.task import IGNORED, Batch, Rows, Task, cross_entropy
from exapt.train.values import Custom, Regression

__all__ = ["CausalLM", "Custom", "ImageClassification", "Regression", "Task", "TextClassification", "TokenClassification"]


class _Classification(Task):
    main, larger, interval = "accuracy", True, "accuracy"
    labels: tuple[str, ...]
    label: str

    def check(self, data: Any, training: bool) -> None:
        super().check(data, training)
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise InputError(f"labels are {self.labels}; a classification needs at least two, all different")
        values = column(data, self.label)
        if values is None or (not training and None in values):
            return
        for number, row in enumerate(data if isinstance(data, (list, tuple)) else ()):
            field(row, self.label, number)
        seen = {label_index(self.labels, v, i, self.label) for i, v in enumerate(values)}
        if training and len(seen) < 2:
            raise InputError(f'all {len(values)} training rows have the {self.label} "{self.labels[seen.pop()]}"; a classifier needs at least two classes')

    def _targets(self, rows: Rows) -> Tensor:
        return torch.tensor([label_index(self.labels, field(row, self.label, n), n, self.label) for n, row in rows])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.call(model, batch)
        if logits.shape[-1] != len(self.labels):
            raise InputError(f"the model gives {logits.shape[-1]} logits, the task has {len(self.labels)} labels ({', '.join(self.labels[:5])}, ...)")
        return logits.float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(self._logits(model, batch), batch["labels"])

    def outcomes(self, model: nn.Module, batch: Batch) -> list[Outcome]:
        logits = self._logits(model, batch)
        found = [self.labels[i] for i in logits.argmax(-1).tolist()]
        if "labels" not in batch:
            return [Outcome(f) for f in found]
        losses = F.cross_entropy(logits, batch["labels"], reduction="none").tolist()
        return [Outcome(f, self.labels[t], x) for f, t, x in zip(found, batch["labels"].tolist(), losses, strict=True)]

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        return metrics.classification(outcomes)

    def ratio(self, outcome: Outcome) -> tuple[float, float]:
        return float(outcome.prediction == outcome.target), 1.0


@dataclass(frozen=True, eq=False)
class TextClassification(_Classification):
    """One label for a text. Metrics: accuracy (main), macro F1, loss.

    Args:
        labels: The class names, in the order of the logits. Rows hold a name, or its place.
        tokenizer: A tokenizer of the transformers library, or the folder or name to load one from.
        max_length: Tokens after which a text is cut.
        text, label: Columns.
    """

    labels: tuple[str, ...]
    tokenizer: Any
    max_length: int = 256
    text: str = "text"
    label: str = "label"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        object.__setattr__(self, "tokenizer", tokenizer_of(self.tokenizer))

    def prepare(self, model: nn.Module) -> nn.Module:
        return Classifier(model, len(self.labels)) if headless(model) else model

    def collate(self, rows: Rows, labelled: bool = True) -> Batch:
        batch = encode(self.tokenizer, [str(field(row, self.text, n)) for n, row in rows], self.max_length)
        return {**batch, "labels": self._targets(rows)} if labelled else batch


@dataclass(frozen=True, eq=False)
class TokenClassification(_Classification):
    """One tag for each word. Metrics: entity F1 (main), precision, recall, accuracy over words, loss.

    The first sub-word of a word carries its tag, the others are ignored. Words beyond ``max_length`` count as tagged ``"O"``.

    Args:
        labels: The tags, in the order of the logits, in BIO form.
        tokenizer: A fast tokenizer of the transformers library, or the folder or name to load one from.
        max_length: Tokens after which a sentence is cut.
        tokens, label: Columns: the words and their tags.
    """

    main: ClassVar[str] = "f1"
    labels: tuple[str, ...]
    tokenizer: Any
    max_length: int = 128
    tokens: str = "tokens"
    label: str = "tags"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        object.__setattr__(self, "tokenizer", tokenizer_of(self.tokenizer))

    def prepare(self, model: nn.Module) -> nn.Module:
        return Classifier(model, len(self.labels), pooling="none") if headless(model) else model

    def check(self, data: Any, training: bool) -> None:
        Task.check(self, data, training)
        values = column(data, self.label)
        if values is None or (not training and None in values):
            return
        seen = {label_index(self.labels, v, i, self.label) for i, tags in enumerate(values) if tags is not None for v in tags}
        if training and len(seen) < 2:
            raise InputError(f"the training rows hold {len(seen)} kinds of tags; a tagger needs at least two")

    def collate(self, rows: Rows, labelled: bool = True) -> Batch:
        words = [list(map(str, field(row, self.tokens, n))) for n, row in rows]
        encoded = self.tokenizer(words, truncation=True, max_length=self.max_length, is_split_into_words=True)
        batch = pad(encoded, self.tokenizer)
        first = torch.full_like(batch["input_ids"], -1)
        for i in range(len(words)):
            seen: set[int] = set()
            for position, word in enumerate(encoded.word_ids(i)):
                if word is not None and word not in seen:
                    first[i, position] = word
                    seen.add(word)
        batch.update(words=first, lengths=torch.tensor([len(w) for w in words]))
        if labelled:
            gold = torch.full((len(words), max(map(len, words), default=0) or 1), IGNORED)
            for i, (n, row) in enumerate(rows):
                tags = field(row, self.label, n)
                if len(tags) != len(words[i]):
                    raise InputError(f"row {n} has {len(words[i])} {self.tokens} and {len(tags)} {self.label}; each word needs one")
                gold[i, : len(tags)] = torch.tensor([label_index(self.labels, t, n, self.label) for t in tags])
            batch.update(gold=gold, labels=torch.where(first >= 0, gold.gather(1, first.clamp_min(0)), IGNORED))
        return batch

    def outcomes(self, model: nn.Module, batch: Batch) -> list[Outcome]:
        logits = self._logits(model, batch)
        found, places = logits.argmax(-1).tolist(), batch["words"].tolist()
        outside = "O" if "O" in self.labels else self.labels[0]
        outcomes = []
        for i, length in enumerate(batch["lengths"].tolist()):
            tags = [outside] * length
            for tag, word in zip(found[i], places[i], strict=True):
                if word >= 0:
                    tags[word] = self.labels[tag]
            outcomes.append(Outcome(tags))
        if "labels" in batch:
            losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none").sum(1).tolist()
            counts = (batch["labels"] != IGNORED).sum(1).tolist()
            for o, gold, loss, count in zip(outcomes, batch["gold"].tolist(), losses, counts, strict=True):
                o.target, o.loss, o.count = [self.labels[t] for t in gold[: len(o.prediction)]], loss, count
        return outcomes

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        return metrics.tagging(outcomes)

    def ratio(self, outcome: Outcome) -> tuple[float, float]:
        return float(sum(a == b for a, b in zip(outcome.prediction, outcome.target, strict=True))), float(len(outcome.target))


@dataclass(frozen=True, eq=False)
class ImageClassification(_Classification):
    """One label for an image. Metrics: accuracy (main), macro F1, loss.

    Args:
        labels: The class names, in the order of the logits. Rows hold a name, or its place.
        image, label: Columns. An image is a (H, W, C) or (H, W) array of bytes, a (C, H, W) tensor or array of floats, a
            Pillow image, or the path of a file.
        mean, std: Per channel, of images scaled to [0, 1].
        size: Height and width to resize to; by default images stay as they are and must agree.
    """

    labels: tuple[str, ...]
    image: str = "image"
    label: str = "label"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))

    def prepare(self, model: nn.Module) -> nn.Module:
        return Classifier(model, len(self.labels), pooling="cls") if headless(model) else model

    def collate(self, rows: Rows, labelled: bool = True) -> Batch:
        images = [pixels(field(row, self.image, n), n, self.mean, self.std, self.size) for n, row in rows]
        odd = next((i for i, x in enumerate(images) if x.shape != images[0].shape), None)
        if odd is not None:
            raise InputError(f"row {rows[odd][0]}: its image is {tuple(images[odd].shape)}, row {rows[0][0]}'s {tuple(images[0].shape)}; give the task size=")
        batch: Batch = {"inputs": torch.stack(images)}
        return {**batch, "labels": self._targets(rows)} if labelled else batch
