"""What is asked of edits: reliability, generalisation and locality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from exapt.algebra.edit.reading import answers, called, device_of
from exapt.algebra.edit.request import Edit, Probe, checked
from exapt.core.components import component
from exapt.core.errors import InputError


@component("edit_score", kind="editing score", oracle="NumPy")
def edit_score(model: nn.Module, edits: Sequence[Edit], *, exact: bool = False) -> dict[str, float | None]:
    r"""Reliability, generalisation and locality of edits: the share of answers that are as wanted.

    .. math:: \frac1{|D|} \sum_{(x, y) \in D} \frac1{|y|} \sum_t 1[\arg\max f(x, y_{<t}) = y_t]

    with D the edits' own prompts, their rephrasings, or their locality prompts with the answers that are to stay. Continuations are scored as they
    are in the field: given the tokens before.

    Args:
        model: The model as it is.
        edits: The edits.
        exact: Count an answer only if all of its tokens are right.

    Returns:
        ``reliability``, ``generalisation`` and ``locality``; ``None`` where the edits hold nothing to measure it with.

    References:
        Mitchell, Lin, Bosselut, Finn and Manning, "Fast Model Editing at Scale", ICLR 2022.
        Yao, Wang, Tian, Cheng, Li, Deng, Chen and Zhang, "Editing Large Language Models: Problems, Methods, and Opportunities", EMNLP 2023.

    >>> edit_score(nn.Identity(), [Edit(torch.tensor([0.0, 1.0]), 1)])
    {'reliability': 1.0, 'generalisation': None, 'locality': None}
    """
    found = checked(edits)
    parts = {
        "reliability": [Probe(e.prompt, e.target) for e in found],
        "generalisation": [Probe(r, e.target) for e in found for r in e.rephrasings],
        "locality": [p for e in found for p in e.locality],
    }
    return {name: _share(model, probes, exact) if probes else None for name, probes in parts.items()}


@torch.no_grad()
def _share(model: nn.Module, probes: Sequence[Probe], exact: bool) -> float:
    model.eval()
    hits = [z.argmax(-1).cpu() == p.answer.cpu() for z, p in zip(answers(model, probes), probes, strict=True)]
    return float(torch.stack([h.all().float() if exact else h.float().mean() for h in hits]).mean())


@torch.no_grad()
def unchanged(model: nn.Module, prompts: Sequence[Tensor], length: int = 1) -> tuple[Probe, ...]:
    """Locality probes: prompts with what the model answers now (call it before editing).

    Args:
        model: The model; one of language continues greedily, a classifier names the class.
        prompts: Token ids (n,), or inputs of a classifier.
        length: Tokens of the continuation.

    Returns:
        One probe for each prompt; on the model as it is their locality is 1.

    >>> unchanged(nn.Identity(), [torch.tensor([0.0, 1.0])])[0].target
    1
    """
    if length < 1:
        raise InputError(f"unchanged: length is {length}; a continuation has at least one token")
    model.eval()
    found = []
    for prompt in prompts:
        row = prompt
        for _ in range(length):
            logits = called(model, row[None].to(device_of(model)))[0].cpu()
            if logits.dim() == 1:
                break
            row = torch.cat([row, logits[-1].argmax(-1)[None].to(row)])
        found.append(Probe(prompt, int(logits.argmax()) if logits.dim() == 1 else row[len(prompt) :]))
    return tuple(found)


def with_locality(model: nn.Module, edits: Sequence[Edit], prompts: Sequence[Tensor], length: int = 1) -> list[Edit]:
    """The edits, each with ``prompts`` as further locality probes, answered by the model as it is now."""
    kept = unchanged(model, prompts, length)
    return [replace(e, locality=(*e.locality, *kept)) for e in edits]
