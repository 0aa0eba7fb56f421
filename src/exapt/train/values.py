"""Tasks whose answer is a number, or whatever a loss of the user's own asks for."""

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
from exapt.train.data import field
from exapt.train.encode import encode, tokenizer_of
from exapt.train.heads import Classifier, headless, logits_of
from exapt.train.metrics import Outcome
from exapt.train.task import Batch, Rows, Task


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
