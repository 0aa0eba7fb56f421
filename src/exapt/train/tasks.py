"""Tasks: what rows mean, what a model is asked, what the loss is and what counts as good. Each is one dataclass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.calibrate import run
from exapt.core.errors import InputError, did_you_mean
from exapt.train import metrics
from exapt.train.data import column, field
from exapt.train.encode import encode, label_index, pad, pixels, tokenizer_of
from exapt.train.heads import Classifier, accepts, headless, logits_of, unwrapped
from exapt.train.metrics import Outcome

Rows = Sequence[tuple[int, Any]]
Batch = dict[str, Any]
IGNORED = -100
_OURS = ("labels", "inputs", "words", "gold", "lengths")


class Task:
    """What every task says of itself; subclass it for a task of your own.

    A batch is a dict of tensors whose first dimension is the row. ``"inputs"`` is given to the model by position,
    ``"labels"`` (with -100 where nothing is asked) is kept for the loss, everything else is given by keyword.
    """

    main: ClassVar[str] = "loss"
    """The metric by which models are compared."""
    larger: ClassVar[bool] = False
    """Whether more of it is better."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Returns the model for the task: a headless encoder gets a fresh head, others are returned as they are."""
        return model

    def rows(self, data: Any) -> Any:
        """The data set as the task reads it, row by row."""
        return data

    def check(self, data: Any, training: bool) -> None:
        """Raises ``InputError`` for data that the task cannot use, as far as that can be told without reading all of it."""
        if hasattr(data, "__len__") and len(data) == 0:
            raise InputError(f"the {'training' if training else 'evaluation'} data is empty")

    def collate(self, rows: Rows, labelled: bool = True) -> Batch:
        """Makes a batch of (number, row) pairs; without labels if they are not asked for."""
        raise NotImplementedError

    def adopt(self, batch: Any) -> Batch:
        """Makes a batch of what a ``DataLoader`` yields: a mapping, (inputs, labels), or inputs alone."""
        if isinstance(batch, Mapping):
            named = dict(batch)
            if "label" in named and "labels" not in named:
                named["labels"] = named.pop("label")
            return named
        if isinstance(batch, (tuple, list)):
            return dict(zip(("inputs", "labels"), batch, strict=False))
        return {"inputs": batch}

    def weight(self, batch: Batch) -> float:
        """The number of targets of a batch, by which its mean loss counts."""
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            return float((labels != IGNORED).sum()) if not labels.is_floating_point() else float(labels.shape[0])
        return float(next((v.shape[0] for v in batch.values() if isinstance(v, Tensor)), 1))

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits on a batch."""
        if "inputs" in batch:
            return logits_of(model(batch["inputs"]))
        inner = unwrapped(model)
        named = {k: v for k, v in batch.items() if k not in _OURS and (k != "token_type_ids" or isinstance(inner, Classifier) or accepts(inner, k))}
        if accepts(inner, "use_cache"):
            named["use_cache"] = False
        return logits_of(model(**named))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over a batch's targets, a scalar."""
        raise NotImplementedError

    def outcomes(self, model: nn.Module, batch: Batch) -> list[Outcome]:
        """What the model did on each row of a batch."""
        raise NotImplementedError

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """The metrics of an evaluation."""
        raise NotImplementedError

    def ratio(self, outcome: Outcome) -> tuple[float, float]:
        """What one example adds to above and below the line of the metric that gets an interval."""
        return outcome.loss, outcome.count

    interval: ClassVar[str] = "loss"
    """The metric that ``ratio`` belongs to."""


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


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the targets that are not ignored; zero where there are none."""
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp_min(1)


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


@dataclass(frozen=True, eq=False)
class Regression(Task):
    """One number for a text, or for a vector of features; squared error. Metrics: mse (main), mae, r2, loss.

    Args:
        tokenizer: For texts: a tokenizer of the transformers library, or where to load one from. ``None``: features.
        text, features, label: Columns; ``features`` holds a list of numbers, ``label`` the target.
        max_length: Tokens after which a text is cut.
    """

    main: ClassVar[str] = "mse"
    interval: ClassVar[str] = "mse"
    tokenizer: Any = None
    max_length: int = 256
    text: str = "text"
    features: str = "features"
    label: str = "label"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", tokenizer_of(self.tokenizer))

    def prepare(self, model: nn.Module) -> nn.Module:
        return Classifier(model, 1) if headless(model) else model

    def collate(self, rows: Rows, labelled: bool = True) -> Batch:
        batch: Batch
        if self.tokenizer is not None:
            batch = encode(self.tokenizer, [str(field(row, self.text, n)) for n, row in rows], self.max_length)
        else:
            batch = {"inputs": torch.tensor(np.array([field(row, self.features, n) for n, row in rows], dtype=np.float32))}
        if labelled:
            batch["labels"] = torch.tensor([self._number(field(row, self.label, n), n) for n, row in rows])
        return batch

    def _number(self, value: Any, number: int) -> float:
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise InputError(f"row {number}: {self.label} is {value!r}; a regression needs a finite number")
        return found

    def _values(self, model: nn.Module, batch: Batch) -> Tensor:
        values = self.call(model, batch).float()
        if values.dim() > 1 and values.shape[-1] != 1:
            raise InputError(f"the model gives {values.shape[-1]} numbers a row; a regression needs one")
        return values.flatten()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(self._values(model, batch), batch["labels"].float())

    def outcomes(self, model: nn.Module, batch: Batch) -> list[Outcome]:
        values = self._values(model, batch).tolist()
        if "labels" not in batch:
            return [Outcome(v) for v in values]
        return [Outcome(v, t, (v - t) ** 2) for v, t in zip(values, batch["labels"].tolist(), strict=True)]

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        return metrics.regression(outcomes)


@dataclass(frozen=True, eq=False)
class Custom(Task):
    """Any model, any loss.

    Args:
        loss_fn: ``loss_fn(model, batch)``: the mean loss over the batch, a scalar. The batch is what the ``DataLoader``
            yields, or torch's default collation of the rows.
        metric_fn: ``metric_fn(model, batch)``: numbers by name, averaged over batches by their rows.
        metric: The main metric.
        greater: Whether more of it is better.
    """

    loss_fn: Callable[[nn.Module, Any], Tensor]
    metric_fn: Callable[[nn.Module, Any], Mapping[str, float]] | None = None
    metric: str = "loss"
    greater: bool = False

    @property
    def main(self) -> str:  # type: ignore[override]
        """The metric by which models are compared."""
        return self.metric

    @property
    def larger(self) -> bool:  # type: ignore[override]
        """Whether more of it is better."""
        return self.greater

    def adopt(self, batch: Any) -> Any:
        return batch

    def collate(self, rows: Rows, labelled: bool = True) -> Any:
        return torch.utils.data.default_collate([row for _, row in rows])

    def weight(self, batch: Any) -> float:
        from torch.utils._pytree import tree_leaves

        return float(next((t.shape[0] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 1))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.loss_fn(model, batch)

    def outcomes(self, model: nn.Module, batch: Any) -> list[Outcome]:
        count = self.weight(batch)
        extra = {k: float(v) for k, v in (self.metric_fn(model, batch) if self.metric_fn else {}).items()}
        return [Outcome(None, None, float(self.loss_fn(model, batch)) * count, count, extra)]

    def predict(self, model: nn.Module, batch: Any) -> list[Any]:
        """The model's output, row by row, on a batch without its labels (the second of a pair, or ``"labels"``)."""
        if isinstance(batch, Mapping):
            batch = {k: v for k, v in batch.items() if k not in ("label", "labels")}
        elif isinstance(batch, (tuple, list)):
            batch = batch[:1] if len(batch) > 1 else batch
        return list(logits_of(run(model, batch)).cpu())

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        total = sum(o.count for o in outcomes)
        found = {k: sum((o.extra or {})[k] * o.count for o in outcomes) / total for k in outcomes[0].extra or {}}
        found.setdefault("loss", metrics.mean_loss(outcomes))
        if self.metric not in found:
            raise InputError(
                f'the main metric is "{self.metric}", which metric_fn does not return{did_you_mean(self.metric, found)} (it returns {", ".join(found)})'
            )
        return found
