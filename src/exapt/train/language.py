"""Causal language modelling: texts packed into blocks, each position asked for the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from exapt.core.errors import InputError
from exapt.train.data import field
from exapt.train.encode import tokenizer_of
from exapt.train.metrics import Outcome, mean_loss
from exapt.train.task import IGNORED, Batch, Rows, Task, cross_entropy


@dataclass(frozen=True, eq=False)
class CausalLM(Task):
    """Predicts each next token. Texts are joined, with the end-of-text token between them, and cut into blocks; what is left at
    the end is dropped. Metrics: loss per token in nats (main), perplexity. A prediction is the block's perplexity.

    Args:
        tokenizer: A tokenizer of the transformers library, or the folder or name to load one from.
        block: Tokens per block.
        text: Column.
    """

    main: ClassVar[str] = "loss"
    tokenizer: Any
    block: int = 64
    text: str = "text"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", tokenizer_of(self.tokenizer))
        if self.block < 2:
            raise InputError(f"block is {self.block}; a block needs at least two tokens")

    def rows(self, data: Any) -> Any:
        if isinstance(data, DataLoader) or not hasattr(data, "__len__") or len(data) == 0:
            return data
        if isinstance(data[0], Mapping) and "input_ids" in data[0]:
            return data
        stream: list[int] = []
        end = getattr(self.tokenizer, "eos_token_id", None)
        for number in range(len(data)):
            if number and end is not None:
                stream.append(end)
            stream += self.tokenizer(str(field(data[number], self.text, number)), add_special_tokens=False)["input_ids"]
        blocks = [{"input_ids": stream[i : i + self.block]} for i in range(0, len(stream) - self.block + 1, self.block)]
        if not blocks:
            raise InputError(f"the data is {len(stream)} tokens in all, less than one block of {self.block}; give more text or a smaller block")
        return blocks

    def collate(self, rows: Rows, labelled: bool = True) -> Batch:
        ids = [torch.as_tensor(field(row, "input_ids", n)) for n, row in rows]
        longest = max(map(len, ids))
        labels = torch.stack([F.pad(x, (0, longest - len(x)), value=IGNORED) for x in ids])
        return {"input_ids": labels.clamp_min(0), "labels": labels}

    def adopt(self, batch: Any) -> Batch:
        named = super().adopt(batch)
        tokens = named.get("input_ids", named.get("inputs"))
        if not isinstance(tokens, Tensor):
            raise InputError('a batch for a language model needs "input_ids"')
        named.setdefault("labels", torch.where(named["attention_mask"] > 0, tokens, IGNORED) if "attention_mask" in named else tokens)
        return named

    def weight(self, batch: Batch) -> float:
        return float((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(self.call(model, batch)[:, :-1].float(), batch["labels"][:, 1:])

    def outcomes(self, model: nn.Module, batch: Batch) -> list[Outcome]:
        logits, targets = self.call(model, batch)[:, :-1].float(), batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1).tolist()
        counts = (targets != IGNORED).sum(1).tolist()
        return [Outcome(math.exp(min(x / max(n, 1), 700)), None, x, n) for x, n in zip(losses, counts, strict=True)]

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        loss = mean_loss(outcomes)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
