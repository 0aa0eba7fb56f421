"""How two adapters differ, site by site: sizes, angle, ranks, signs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exapt.algebra.adapters import Shifts
from exapt.core.errors import InputError


def effective_rank(matrix: Tensor) -> float:
    r"""Exponential of the entropy of the singular values' shares, :math:`\exp(-\sum_i p_i \log p_i)`, :math:`p_i = \sigma_i / \sum_j \sigma_j`; 0 for 0.

    References:
        Roy and Vetterli, "The effective rank: A measure of effective dimensionality", EUSIPCO 2007.

    >>> round(effective_rank(torch.eye(3)), 4)
    3.0
    """
    s = torch.linalg.svdvals(matrix.double())
    if not float(s.sum()):
        return 0.0
    p = (s / s.sum()).clamp_min(1e-300)
    return float((-(p * p.log()).sum()).exp())


def difference(a: Shifts, b: Shifts) -> list[dict[str, Any]]:
    r"""Compares the shifts of two adapters.

    Returns:
        One record for every site of either: ``site``; Frobenius norms ``norm_a``, ``norm_b``; ``angle`` between them in degrees (``None`` where one
        is zero or missing); ``rank_a``, ``rank_b`` (effective); ``distance``, the norm of the difference; ``conflict``, the share of entries, of those
        where both are not zero, that differ in sign.

    Raises:
        InputError: where a site's shapes differ.
    """
    found = []
    for site in dict.fromkeys((*a.matrices, *b.matrices)):
        own = [x.dense(site).double() if site in x.matrices else None for x in (a, b)]
        shape = next(t.shape for t in own if t is not None)
        x, y = (torch.zeros(shape, dtype=torch.float64) if t is None else t for t in own)
        if x.shape != y.shape:
            raise InputError(f"{site}: {a.label} has shape {tuple(x.shape)}, {b.label} {tuple(y.shape)}")
        nx, ny = float(x.norm()), float(y.norm())
        cosine = float((x * y).sum()) / (nx * ny) if nx and ny else None
        both = (x != 0) & (y != 0)
        found.append({
            "site": site, "norm_a": nx, "norm_b": ny, "distance": float((x - y).norm()),
            "angle": None if cosine is None else float(torch.rad2deg(torch.acos(torch.tensor(cosine, dtype=torch.float64).clamp(-1, 1)))),
            "rank_a": effective_rank(x), "rank_b": effective_rank(y),
            "conflict": float((x.sign() != y.sign())[both].double().mean()) if bool(both.any()) else None,
        })  # fmt: skip
    return found


def draw(records: Sequence[dict[str, Any]], path: Path, labels: tuple[str, str]) -> Path:
    """Draws norms, angles, ranks and sign conflicts of every site as bars; the ending of ``path`` says the format. Returns it.

    Raises:
        InputError: where matplotlib is not installed, or the ending is none that it knows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError("a picture needs matplotlib; pip install 'exapt[cli]'") from e
    figure = Figure(figsize=(11, 1.6 + 0.28 * len(records)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4, sharey=True)
    place = range(len(records))
    for axes, title, keys in zip(
        panels,
        ("norm", "angle (degrees)", "effective rank", "sign conflict"),
        (("norm_a", "norm_b"), ("angle",), ("rank_a", "rank_b"), ("conflict",)),
        strict=True,
    ):
        for i, key in enumerate(keys):
            height = 0.8 / len(keys)
            axes.barh([p + (i - (len(keys) - 1) / 2) * height for p in place], [r[key] or 0.0 for r in records], height, label=labels[i])
        axes.set_title(title)
        if len(keys) == 2:
            axes.legend(fontsize="small")
    panels[0].set_yticks(list(place), [r["site"] for r in records], fontsize="small")
    panels[0].invert_yaxis()
    try:
        figure.savefig(path)
    except ValueError as e:
        raise InputError(f"{path}: {e}") from e
    return path
