"""What adapting would gain, told without labels: a kernel regression learned on shifts simulated on the labelled reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from exapt.online.method import Batch, Host

Adapted = Callable[[Host, Batch], tuple[Tensor, Tensor | None]]
"""Logits of the model whose gain is asked on a batch, and its features where they are its own."""
REPEATS = 3
STRENGTHS = (0.0, 0.1, 0.2, 0.4, 0.8)
CLASSES = (1, 2, 3, 5)
KINDS = ("noise", "light")
_ROWS, _POOL = 64, 64
LEAST_ROWS = 16
_WIDTH, _RIDGE = 4.0, 0.3


def signals(frozen: Tensor, adapted: Tensor, distance: Tensor, features: Tensor | None = None) -> Tensor:
    """The unlabelled measures that the gain is told from: the confidence of both, log distance, agreement, entropies of the mean predictions; and
    the log of the total variance of the adapted model's features, where it has its own.

    Args:
        frozen: Probabilities of the frozen model (n, classes).
        adapted: Probabilities of the other (n, classes).
        distance: Median distance of the frozen model's features to the nearest class of the reference.
        features: The other's features (n, d).

    Returns:
        (6,), or (7,) with features.

    >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> [round(v, 3) for v in signals(p, p, torch.tensor(1.0), p).tolist()]
    [0.85, 0.85, 0.0, 1.0, 0.688, 0.688, -1.406]
    """
    agreement = (frozen.argmax(-1) == adapted.argmax(-1)).double().mean()
    means = [p.double().mean(0) for p in (frozen, adapted)]
    spread = [-(m * m.clamp_min(1e-12).log()).sum() for m in means]
    sure = [p.double().max(-1).values.mean() for p in (adapted, frozen)]
    own = [] if features is None else [log_variance(features.double().mean(0), features.double().square().mean(0))]
    return torch.stack([*sure, distance.double().clamp_min(1e-12).log(), agreement, *spread, *own])


def log_variance(first: Tensor, second: Tensor) -> Tensor:
    """The log of the total variance, from the means (d,) of features and of their squares."""
    return (second - first.square()).sum().clamp_min(1e-12).log()


def learned(host: Host, size: int, adapted: Adapted, distance: Callable[[Tensor], Tensor]) -> dict[str, Tensor] | None:
    """Fits the gain in accuracy of ``adapted`` over the frozen model on simulated batches of the reference.

    The shifts are noise, and less contrast with another mean, of several strengths on the inputs (tokens: replaced by others of the reference), and
    several numbers of classes in a batch, each three times. Nothing of the target, and none of its corruptions, is used.

    Args:
        host: The host; its state is the caller's to put back.
        size: Rows of the batches to come.
        adapted: ``adapted(host, batch)``: logits of the model whose gain is asked, and its features or ``None``.
        distance: Median distance of features (n, d) to the reference.

    Returns:
        What :func:`predicted` takes: simulated signals ``z`` (m, 6 or 7), their ``centre`` and ``scale``, ``weights`` (m,), the ``mean`` gain, and ``error``,
        the root mean square of the leave-one-out residuals; ``None`` where the adapted model never differs from the frozen one.
    """
    whole = joined([b for b, _ in host.reference])
    labels = torch.cat([y.flatten() for _, y in host.reference if y is not None])
    if len(labels) != len(whole):
        return None
    new = torch.ones(len(labels), dtype=torch.bool)
    new[halves(len(labels))] = False
    g = torch.Generator().manual_seed(0)
    n = min(size, _ROWS)
    turns, chunk = max(1, -(-_POOL // n)), max(n, LEAST_ROWS)
    known = labels[new.to(labels.device)].unique()
    rows, gains = [], []
    for strength in STRENGTHS * REPEATS:
        for count in (*(c for c in CLASSES if c < len(known)), len(known)):
            for kind in KINDS if strength else KINDS[:1]:
                some = known[torch.randperm(len(known), generator=g)[:count]]
                pool = (torch.isin(labels, some) & new.to(labels.device)).nonzero()[:, 0]
                chosen = pool[torch.randint(len(pool), (turns, n), generator=g)]
                batches = [disturbed(whole.rows(c.to(labels.device)), strength, g, kind) for c in chosen]
                still = [host.run_frozen(b) for b in batches]
                made = [adapted(host, b) for b in batches]
                other = torch.cat([logits for logits, _ in made]).detach()
                said, truth = torch.cat([s.logits for s in still]), labels[chosen.flatten()].to(other.device)
                own = torch.cat([h for _, h in made if h is not None]) if made[0][1] is not None else None
                parts = [t.split(chunk) for t in (said.softmax(-1), other.softmax(-1), torch.cat([s.h for s in still]))]
                theirs = own.split(chunk) if own is not None else [None] * len(parts[0])
                rows.append(torch.stack([signals(f, a, distance(h), o) for f, a, h, o in zip(*parts, theirs, strict=True)]).mean(0))
                gains.append((other.argmax(-1) == truth).double().mean() - (said.argmax(-1) == truth).double().mean())
    x, y = torch.stack(rows), torch.stack(gains)
    if float(y.abs().max()) < 1e-3:
        return None
    centre, scale, mean = x.mean(0), x.std(0).clamp_min(1e-6), y.mean()
    z = (x - centre) / scale
    kernel = _kernel(z, z)
    inverse = torch.linalg.inv(kernel + _RIDGE * torch.eye(len(z), dtype=z.dtype, device=z.device))
    weights = inverse @ (y - mean)
    left_out = weights / inverse.diagonal()
    return {"z": z, "centre": centre, "scale": scale, "weights": weights, "mean": mean, "error": left_out.square().mean().sqrt()}


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(a, b).square() / (2 * _WIDTH**2))


def predicted(model: dict[str, Tensor], x: Tensor) -> float:
    """The gain that signals promise: kernel ridge regression, Gaussian kernel four standard deviations wide."""
    z = ((x - model["centre"]) / model["scale"])[None]
    return float(model["mean"] + (_kernel(z, model["z"]) @ model["weights"])[0])


def disturbed(batch: Batch, strength: float, generator: torch.Generator, kind: str = "noise") -> Batch:
    """The batch with noise: ``strength`` standard deviations on floats, tokens replaced with that probability by tokens of other places.

    ``kind="light"`` takes that share of the contrast from floats and moves their mean by up to twice as many standard deviations.
    """
    x = batch.inputs
    if strength == 0:
        return batch
    if x.is_floating_point() and kind == "light":
        move = 2 * strength * (2 * float(torch.rand((), generator=generator)) - 1)
        return batch.replaced((x - x.mean()) * (1 - strength) + x.mean() + move * x.std())
    if x.is_floating_point():
        return batch.replaced(x + strength * x.std() * torch.randn(x.shape, generator=generator).to(x))
    elsewhere = x.flatten()[torch.randint(x.numel(), x.shape, generator=generator).to(x.device)]
    swap = torch.rand(x.shape, generator=generator).to(x.device) < strength
    mask = batch.kwargs.get("attention_mask")
    return batch.replaced(torch.where(swap & (mask.bool() if mask is not None and mask.shape == x.shape else swap), elsewhere, x))


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of several that are alike; sequences are cut to the shortest."""
    leaves = [tree_flatten((b.args, dict(b.kwargs))) for b in batches]

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        if parts[0].dim() == 2 and not parts[0].is_floating_point():
            shortest = min(p.shape[1] for p in parts)
            parts = [p[:, :shortest] for p in parts]
        return torch.cat(list(parts))

    made = [stacked(p) if isinstance(p[0], Tensor) and p[0].dim() else p[0] for p in zip(*(values for values, _ in leaves), strict=True)]
    args, kwargs = tree_unflatten(made, leaves[0][1])
    return Batch(args, kwargs)


def averaging(n: int, rows: int) -> float:
    """Weight of the newest ``n`` rows in a running average over about ``rows``.

    >>> round(averaging(200, 200), 3)
    0.632
    """
    return 1 - math.exp(-n / rows)


def halves(n: int) -> Tensor:
    """Numbers of one half of ``n`` rows, drawn once and for all.

    >>> len(halves(7))
    3
    """
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[: n // 2]
