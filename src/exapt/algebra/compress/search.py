"""The smallest file that keeps a measured quality."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from exapt.algebra.compress.codec import codecs
from exapt.algebra.compress.compressing import Compressed, Steps, compress
from exapt.algebra.compress.file import read_compressed
from exapt.core.errors import InputError
from exapt.core.file import AdapterFile

CANDIDATES: tuple[Steps, ...] = (
    *((("compeft", {"density": d, "per": p}),) for d in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5) for p in ("adapter", "tensor")),
    *((("precision_codebook", {"bits": b}),) for b in (1, 2, 3, 4)),
    *((("uniform_groups", {"bits": b}),) for b in (2, 3, 4, 6, 8)),
    *((("svd_truncation", {"rank": r}), ("uniform_groups", {"bits": b})) for r in (1, 2, 3, 4, 6, 8, 12, 16) for b in (2, 3, 4)),
    *((("svd_truncation", {"rank": r}), ("uniform_groups", {"bits": 8})) for r in (1, 2, 4)),
    *((("svd_truncation", {"error": e}), ("uniform_groups", {"bits": b})) for e in (0.2, 0.4, 0.6) for b in (2, 3, 4)),
    *((("svd_truncation", {"error": e}), ("cast", {})) for e in (0.05, 0.2)),
    (("bitdelta", {}),),
    (("cast", {}),),
    (("lossless", {}),),
)
"""What is tried where nothing is said: every codec, from strong to weak, and low ranks in few bits, which together come out smallest. Alphas are tuned
besides."""
Score = Callable[[AdapterFile], Any]


@dataclass(frozen=True)
class Tried:
    """One candidate that was measured: its steps on one line, bytes, relative error, score, and drop of the score with its 95 % interval."""

    name: str
    bytes: int
    error: float
    score: float
    drop: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Smallest:
    """What the search found.

    Attributes:
        found: The smallest candidate that passed; the lossless one passes always.
        score: The adapter's own.
        drop, interval: How far the score of ``found`` is below it, and the 95 % bootstrap interval where scores are by row.
        tried: What was measured, in order.
        left_out: Candidates that this adapter does not allow, with the reason.
    """

    found: Compressed
    score: float
    drop: float
    interval: tuple[float, float] | None
    tried: tuple[Tried, ...]
    left_out: dict[str, str]


def smallest(
    file: AdapterFile | str | os.PathLike[str], score: Score, max_drop: float, candidates: Sequence[Steps] | None = None, *,
    certain: bool = False, resamples: int = 1000, seed: int = 0,
) -> Smallest:  # fmt: skip
    """Finds the smallest file whose score drops at most ``max_drop``.

    All candidates are encoded, and measured from the smallest up until one passes. Where a codec has a factor to tune (ComPEFT's alpha), its
    values are tried when the codec's own choice fails, from the middle on uphill; they do not change the size. Choosing among many on the
    same rows flatters the choice a little: keep other rows to measure it once more.

    Args:
        file: The adapter, or its file.
        score: From an adapter to its quality, larger is better: a number, or one for each row (n,), whose mean counts, or pairs (n, 2), of which
            the ratio of the sums counts. Rows must come in the same order each time; drops are then resampled over rows, in pairs.
        max_drop: Largest drop, in the score's units.
        candidates: What to try; by default :data:`CANDIDATES`.
        certain: Whether the upper end of the drop's interval must pass too.
        resamples: Bootstrap samples.
        seed: Of the resampling.

    Raises:
        InputError: for a score that is not finite, rows whose number changes, no candidate that fits, or ``certain`` without scores by row.
    """
    if not max_drop >= 0:
        raise InputError(f"max_drop is {max_drop}; it must be a number from 0 up")
    source = file if isinstance(file, AdapterFile) else read_compressed(file)
    first = _rows(score(source), None)
    if certain and len(first) < 2:
        raise InputError("certain=True needs a score for each row, to resample; this score is one number")
    left_out: dict[str, str] = {}
    made: dict[bytes, tuple[int, Steps]] = {}  # the candidates themselves would take the memory of many adapters
    for steps in candidates if candidates is not None else CANDIDATES:
        try:
            data = compress(source, steps).data
            made.setdefault(sha256(data).digest(), (len(data), steps))  # a rank above the adapter's own gives another's file again
        except InputError as e:
            left_out[" + ".join(k for k, _ in steps)] = str(e)
    if not made:
        raise InputError(f"none of {len(left_out)} candidates fits this adapter ({next(iter(left_out.values()), 'none was given')})")
    lossless = compress(source, "lossless")
    tried: list[Tried] = []
    for size, steps in sorted(made.values(), key=lambda c: c[0]):
        if size >= lossless.bytes:
            break
        for variant in _variants(source, compress(source, steps), tried):
            rows = _rows(score(variant.file), first)
            drop, interval = _drop(first, rows, resamples, seed)
            tried.append(Tried(variant.name, variant.bytes, variant.error, _value(rows), drop, interval))
            if drop <= max_drop and not (certain and interval is not None and interval[1] > max_drop):
                return Smallest(variant, _value(first), drop, interval, tuple(tried), left_out)
    return Smallest(lossless, _value(first), 0.0, (0.0, 0.0) if len(first) > 1 else None, tuple(tried), left_out)


def _variants(source: AdapterFile, candidate: Compressed, tried: Sequence[Tried]) -> Iterator[Compressed]:
    """The candidate itself, then with other values of what its codec lets a score choose: from the middle in the direction in which the drop, the last of
    ``tried``, does not grow."""
    yield candidate
    key, given = candidate.steps[-1]
    for name, values in codecs()[key].tunable.items() if key in codecs() else ():
        known = [v for v in values if v is not None and name not in given]
        start, best = len(known) // 2, float("inf")
        for places in ([start], range(start + 1, len(known)), range(start - 1, -1, -1)) if known else ():
            moved, worse = False, 0
            for i in places:
                yield compress(source, [*candidate.steps[:-1], (key, {**given, name: known[i]})])
                worse = worse + 1 if tried[-1].drop > best else 0
                if worse == 2:  # one may be chance
                    break
                if not worse:
                    moved, best = i != start, tried[-1].drop
            if moved:
                break


def _rows(found: Any, like: np.ndarray | None) -> np.ndarray:
    """A score as (n, 2): above and below the line, by row."""
    values = np.asarray(found, dtype=float)
    if values.ndim < 2:
        values = np.stack([values.reshape(-1), np.ones(values.size)], 1)
    if values.ndim != 2 or values.shape[1] != 2 or not len(values) or not np.isfinite(values).all() or values[:, 1].sum() <= 0:
        raise InputError("a score is a finite number, one for each row, or pairs (n, 2) whose second sum is above 0; this one is not")
    if like is not None and len(like) != len(values):
        raise InputError(f"the score gave {len(values)} rows, {len(like)} before; it must see the same rows each time")
    return values


def _value(rows: np.ndarray) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def _drop(before: np.ndarray, after: np.ndarray, resamples: int, seed: int) -> tuple[float, tuple[float, float] | None]:
    """The drop, and its percentile interval over rows drawn in pairs."""
    drop = _value(before) - _value(after)
    if len(before) < 2 or resamples < 1:
        return drop, None
    generator = np.random.default_rng(seed)
    drops = np.empty(resamples)
    for i in range(resamples):
        chosen = generator.integers(0, len(before), len(before))
        with np.errstate(invalid="ignore", divide="ignore"):
            a, b = before[chosen].sum(0), after[chosen].sum(0)
            drops[i] = a[0] / a[1] - b[0] / b[1]
    low, high = np.nanpercentile(drops, [2.5, 97.5])
    return drop, (float(low), float(high))
