"""Editing with canonical examples: one example a behaviour, judged elsewhere, within a bound on what it may cost (Hewitt et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from exapt.algebra.edit.editor import Editor
from exapt.algebra.edit.host import Editing
from exapt.algebra.edit.reading import loss
from exapt.algebra.edit.request import Edit, Probe, checked
from exapt.algebra.edit.score import edit_score
from exapt.core.components import component
from exapt.core.errors import InputError


@dataclass(frozen=True)
class Candidate:
    """One editor's outcome.

    Attributes:
        name: As it was given.
        success: Share of validation answers that are as wanted after its edits.
        degradation: Loss on usual text, over that before the edits.
        allowed: Whether that is within the bound.
    """

    name: str
    success: float
    degradation: float
    allowed: bool


@component("canonical_examples", kind="editing score", paper="Model Editing with Canonical Examples", oracle="NumPy")
def best_within(
    make: Callable[[], Editing], candidates: Mapping[str, Editor], edits: Sequence[Edit], validation: Sequence[Probe], usual: Sequence[Probe], *,
    bound: float = 1e-3,
) -> tuple[str | None, list[Candidate]]:  # fmt: skip
    r"""Chooses among editors (or settings of one) that which does best away from its examples, at a bounded cost:

    .. math:: \max_f\; \mathrm{success}(f; \mathrm{validation}) \quad \text{where} \quad \frac{L(f)}{L(f_0)} \le 1 + \epsilon \ \text{on usual text}

    Each learns from one canonical example of each behaviour; success is measured on other inputs that ask for the behaviour, the cost on usual text. The
    chosen edits can be carried over to a larger model of the same vocabulary by an ensemble of logits, large + (small edited - small): dynamic logits
    fusion with weight 1. Sense fine-tuning, which needs a Backpack model, is not part of this library.

    Args:
        make: Gives the model under edit, without edits; it may be the same ``Editing`` each time, for each candidate is undone.
        candidates: Editors by name.
        edits: The canonical examples, made at once.
        validation: Where success is measured.
        usual: Usual inputs with their own answers (text and its continuation), for the cost.
        bound: :math:`\epsilon`; the paper takes 1e-5, 1e-4 and 1e-3.

    Returns:
        The chosen name (``None`` if none is within the bound), and every candidate's outcome.

    Raises:
        InputError: for nothing to choose from or to measure with.

    References:
        Hewitt, Chen, Xie, Adams, Liang and Manning, "Model Editing with Canonical Examples", 2024.
    """
    found = checked(edits)
    if not candidates or not validation or not usual or bound < 0:
        raise InputError(
            f"best_within: {len(candidates)} candidates, {len(validation)} validation and {len(usual)} usual inputs, bound {bound}; give some of each"
        )
    outcomes = []
    for name, candidate in candidates.items():
        editing = make()
        before = _loss(editing.model, usual)
        try:
            candidate.edit(editing, found)
            success = edit_score(editing.model, [Edit(p.prompt, p.target) for p in validation])["reliability"]
            ratio = _loss(editing.model, usual) / max(before, torch.finfo(torch.float32).tiny)
        finally:
            editing.undo()
        outcomes.append(Candidate(name, success or 0.0, ratio, math.isfinite(ratio) and ratio <= 1 + bound))
    allowed = [c for c in outcomes if c.allowed]
    return (max(allowed, key=lambda c: c.success).name if allowed else None), outcomes


@torch.no_grad()
def _loss(model: nn.Module, probes: Sequence[Any]) -> float:
    model.eval()
    return float(loss(model, probes))
