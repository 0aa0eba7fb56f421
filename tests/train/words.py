"""A tokenizer and an encoder that have the transformers library's shapes without needing it, and rows to train on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tiny import VOCABULARY, WIDTH, Block
from torch import Tensor, nn


class Encoded(dict[str, Any]):
    def __init__(self, pieces: list[list[tuple[int | None, int]]]) -> None:
        super().__init__(input_ids=[[i for _, i in row] for row in pieces], attention_mask=[[1] * len(row) for row in pieces])
        self.pieces = pieces

    def word_ids(self, row: int) -> list[int | None]:
        return [w for w, _ in self.pieces[row]]


class Words:
    """Words are cut into pieces of four letters; 1 opens a text, 2 ends it, 0 pads."""

    pad_token_id, eos_token_id = 0, 2
    known = tuple(
        "a film inde ed fine grea t love ly poor dull awfu l so Anna Bert ram Chri stin went to old Pari s Reyk javi k the cat sat on mat and".split()  # noqa: SIM905
    )

    def _id(self, piece: str) -> int:
        return 3 + (self.known.index(piece) if piece in self.known else len(self.known)) % (VOCABULARY - 3)

    def __call__(self, texts: Any, truncation: bool = False, max_length: int = 512, is_split_into_words: bool = False, add_special_tokens: bool = True) -> Any:
        single = isinstance(texts, str)
        rows = []
        for text in [texts] if single else texts:
            words = text if is_split_into_words else text.split()
            pieces: list[tuple[int | None, int]] = [(n, self._id(word[i : i + 4])) for n, word in enumerate(words) for i in range(0, len(word), 4)]
            if add_special_tokens:
                pieces = [(None, 1), *pieces[: max_length - 2], (None, 2)]
            rows.append(pieces)
        found = Encoded(rows)
        return {k: v[0] for k, v in found.items()} if single else found


class Masked(Block):
    """A block whose attention leaves out padding, so that a row does not feel its neighbours' lengths."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        a, h = self.attention, self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (4, -1)).transpose(1, 2) for m in (a.query, a.key, a.value))
        allowed = None if mask is None else mask[:, None, None, :].bool()
        x = x + a.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A headless encoder: hidden states (batch, length, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Masked(), Masked()])

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h, attention_mask)
        return SimpleNamespace(last_hidden_state=h)


class Language(nn.Module):
    """A language model that looks at the present token only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.lm_head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.lm_head(torch.tanh(self.mix(self.embed(input_ids)))))


def reviews(n: int = 40) -> list[dict[str, str]]:
    kinds = {"good": ["fine", "great", "lovely"], "bad": ["poor", "dull", "awful"]}
    return [{"text": f"a {kinds[k][i % 3]} film" + " indeed" * (i % 4), "label": k} for i, k in zip(range(n), ["good", "bad"] * n, strict=False)]


def sentences(n: int = 24) -> list[dict[str, list[str]]]:
    people, places = ["Anna", "Bertram", "Christina"], ["Paris", "Reykjavik"]
    return [{"tokens": ["so", people[i % 3], "went", "to", "old", places[i % 2]], "tags": ["O", "B-person", "O", "O", "B-place", "I-place"]} for i in range(n)]


TAGS = ("O", "B-person", "B-place", "I-place")
