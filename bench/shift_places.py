"""The transfers of ``shift_transfers.py``: reviews, digits and tagged words as features, with the measure of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from shift_data import AMAZON, CROSSNER, UCI, _aside, cache, crossner, digits, features
from shift_models import digit_input, digit_model

NETWORKS = {"cnn": 5, "vit": 1}
"""How many pretrained networks of each kind there are; the seeds go through them in turn."""
Array = np.ndarray


@dataclass
class Transfer:
    """Labelled source, unlabelled target, labelled test.

    Attributes:
        x, y: Source features (n, d) and classes (n,).
        pool: Target features (m, d); ``pool_y`` is read by the search on books -> dvd alone.
        test, test_y: Features and classes of the target's other rows.
        measure: Predictions to (hits, totals) of every row or sentence; the score is the ratio of their sums: accuracy, or F1 of entities.
    """

    x: Array
    y: Array
    pool: Array
    pool_y: Array
    test: Array
    test_y: Array
    measure: Callable[[Array], tuple[Array, Array]]


def halves(x: Array, y: Array, most: int = 2000) -> tuple[Array, Array, Array, Array]:
    """The target in two halves, in an order that no seed changes."""
    order = np.random.default_rng(0).permutation(len(y))
    a, b = np.array_split(order, 2)
    return x[a[:most]], y[a[:most]], x[b[:most]], y[b[:most]]


def scaled(x: Array, *others: Array) -> list[Array]:
    """Features by the mean and standard deviation of the source."""
    mean, deviation = x.mean(0), np.maximum(x.std(0), 1e-3)
    return [((v - mean) / deviation).astype(np.float32) for v in (x, *others)]


def correct(y: Array) -> Callable[[Array], tuple[Array, Array]]:
    """The measure of accuracy."""
    return lambda found: ((found == y).astype(int), np.ones(len(y), dtype=int))


def texts(name: str, source: str, target: str) -> Transfer:
    found = features(name)
    x, y = found.of(source)
    pool, pool_y, test, test_y = halves(*found.of(target))
    x, pool, test = scaled(x, pool, test)
    return Transfer(x, y, pool, pool_y, test, test_y, correct(test_y))


@torch.inference_mode()
def seen_by(net: Any, x: Array) -> Array:
    return torch.cat([net.features(digit_input(x[i : i + 500])) for i in range(0, len(x), 500)]).numpy()


def drawn_digits(kind: str, target: str, seed: int) -> Transfer:
    net, own, other = digit_model(kind, seed % NETWORKS[kind]), digits("mnist")["train"].first(4000), digits(target)
    pool, test = other["train"].first(2000), other["test"].first(2000)
    x, p, t = scaled(*(seen_by(net, part.x) for part in (own, pool, test)))
    return Transfer(x, own.y, p, pool.y, t, test.y, correct(test.y))


KINDS = {
    "person": ("person", "politician", "writer", "musicalartist", "scientist", "researcher"), "location": ("location", "country"),
    "organisation": ("organisation", "politicalparty", "university", "band"),
}  # fmt: skip
"""What the five domains of CrossNER have in common; every other kind of entity is "misc"."""
TAGS = ("O", *(f"{part}-{kind}" for kind in (*KINDS, "misc") for part in "BI"))
Sentences = list[tuple[list[str], list[str]]]


def common(tag: str) -> int:
    """A tag's place in ``TAGS``."""
    part, _, kind = tag.partition("-")
    return TAGS.index(f"{part}-{next((k for k, v in KINDS.items() if kind in v), 'misc')}") if kind else 0


def spans(tags: Array) -> set[tuple[int, int, int]]:
    """Entities (first, last, kind) of a sentence's tags; an I that continues nothing begins one.

    >>> sorted(spans(np.array([1, 2, 0, 4, 4, 3])))
    [(0, 1, 0), (3, 4, 1), (5, 5, 1)]
    """
    found, start = [], -1
    for i, tag in enumerate([*tags, 0]):
        kind = (tag - 1) // 2
        goes_on = start >= 0 and tag and tag % 2 == 0 and kind == (tags[start] - 1) // 2
        if start >= 0 and not goes_on:
            found.append((start, i - 1, int(tags[start] - 1) // 2))
            start = -1
        if tag and not goes_on:
            start = i
    return set(found)


def entities(sentence: Array, gold: Array) -> Callable[[Array], tuple[Array, Array]]:
    """The measure of F1: twice the entities found and the sum of named and true ones, for every sentence."""
    cuts = np.flatnonzero(np.diff(sentence)) + 1
    truth = [spans(part) for part in np.split(gold, cuts)]

    def measure(found: Array) -> tuple[Array, Array]:
        named = [spans(part) for part in np.split(found, cuts)]
        return np.array([2 * len(a & b) for a, b in zip(named, truth, strict=True)]), np.array([len(a) + len(b) for a, b in zip(named, truth, strict=True)])

    return measure


@torch.inference_mode()
def embedded_words(sentences: Sentences, batch: int = 32) -> Array:
    """MiniLM's last hidden state at the first piece of every word, float32 (words, 384)."""
    from methods import minilm

    model, tokenizer = minilm()
    found: dict[int, Array] = {}
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i][0]))
    for part in (order[i : i + batch] for i in range(0, len(order), batch)):
        given = [sentences[i][0] for i in part]
        inputs = tokenizer(given, is_split_into_words=True, padding=True, truncation=True, max_length=512, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        for row, (i, w) in enumerate(zip(part, given, strict=True)):
            first = {k: j for j, k in reversed(list(enumerate(inputs.word_ids(row)))) if k is not None}
            if len(first) < len(w):
                raise SystemExit(f"crossner: a sentence of {len(w)} words has words without a piece, or is too long")
            found[i] = hidden[row, [first[k] for k in range(len(w))]].numpy()
    return np.concatenate([found[i] for i in range(len(sentences))])


def words(target: str) -> Transfer:
    """Training sentences of four domains to the fifth, whose training sentences are the pool; the first 300 test sentences."""
    sentences = {(d, part): parts[part][: 300 if part == "test" else None] for d, parts in crossner().items() for part in ("train", "test")}
    kept = cache() / "minilm_crossner.npz"
    if not kept.exists():
        every = embedded_words([s for v in sentences.values() for s in v])
        ends = np.cumsum([sum(len(w) for w, _ in v) for v in sentences.values()])[:-1]
        _aside(kept, **{f"{d}_{part}": x for (d, part), x in zip(sentences, np.split(every, ends), strict=True)})
    with np.load(kept) as z:
        x = {key: z[f"{key[0]}_{key[1]}"] for key in sentences}
    y = {key: np.array([common(t) for _, tags in v for t in tags]) for key, v in sentences.items()}
    assert all(len(x[k]) == len(y[k]) for k in x)
    others = [(d, "train") for d in CROSSNER if d != target]
    some = np.random.default_rng(0).permutation(sum(len(y[k]) for k in others))[:8000]
    source, source_y = (np.concatenate([v[k] for k in others])[some] for v in (x, y))
    here = np.random.default_rng(0).permutation(len(y[target, "train"]))[:3000]
    sentence = np.repeat(np.arange(len(sentences[target, "test"])), [len(w) for w, _ in sentences[target, "test"]])
    gold = y[target, "test"]
    a, pool, test = scaled(source, x[target, "train"][here], x[target, "test"])
    return Transfer(a, source_y, pool, y[target, "train"][here], test, gold, entities(sentence, gold))


def places(quick: bool = False) -> Iterator[tuple[str, str, Callable[[int], Transfer]]]:
    """Family, name and loader of every transfer; the one on which all is frozen comes first."""
    for name, domains in (("amazon", AMAZON), ("uci", UCI)):
        for a, b in itertools.islice(itertools.permutations(domains, 2), 1 if quick else None):
            yield name, f"{a} -> {b}", lambda _, n=name, s=a, t=b: texts(n, s, t)
    for kind, target in () if quick else itertools.product(NETWORKS, ("usps", "optdigits")):
        yield "digits", f"{kind}: mnist -> {target}", lambda seed, k=kind, t=target: drawn_digits(k, t, seed)
    for target in () if quick else CROSSNER:
        yield "crossner", f"others -> {target}", lambda _, t=target: words(t)
