"""Model surgery: shifting a behaviour by adding its probe to a few rows (Wang et al., NAACL 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.algebra.edit.host import Editing
from exapt.algebra.edit.reading import called, groups, hooked, stacked
from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.sites import Site
from exapt.core.sites import sites as all_sites


@component("model_surgery", kind="editing", paper="Model Surgery: Modulating LLM's Behavior Via Simple Parameter Editing", oracle="NumPy")
def modulated(editing: Editing, probe: Tensor, *, rows: int, alpha: float = 1.0) -> dict[str, Tensor]:
    r"""Adds a behaviour's probe to the rows that point most against it: :math:`w_j' = w_j + \alpha p` for the ``rows`` least :math:`\cos(w_j, p)` of all sites.

    The rows are those of gate projections (``Editing(where="mlp.gate")``; ``"mlp.up"`` where there is no gate). Follows the official code, which adds the
    toxic class's probe; a negative :math:`\alpha` pushes the rows further away instead.

    Args:
        editing: The model and its sites, whose inputs are as wide as the probe.
        probe: :math:`p` (d_in,), see :func:`behaviour_probe`.
        rows: How many rows are changed, over all sites (4096 times 4 of LLaMA2-7B's in the official code).
        alpha: :math:`\alpha`.

    Returns:
        What was added to each site, by its name.

    Raises:
        InputError: for a probe of another width, or a number of rows that there is not.

    References:
        Wang, Yue, Lu, Shi, Zhao, Wang, Song and Huang, "Model Surgery: Modulating LLM's Behavior Via Simple Parameter Editing", NAACL 2025.

    >>> editing = Editing(torch.nn.Sequential(torch.nn.Linear(2, 3)), where="0")
    >>> {k: int(v.any(1).sum()) for k, v in modulated(editing, torch.tensor([1.0, 0.0]), rows=1).items()}
    {'0': 1}
    """
    total = sum(s.shape[0] for s in editing.sites)
    wide = [s for s in editing.sites if probe.shape != (s.shape[1],)]
    if wide or not bool(torch.isfinite(probe).all()) or not bool(probe.any()):
        raise InputError(f"model surgery: the probe has shape {tuple(probe.shape)}; {(wide or editing.sites)[0].name} takes finite numbers, not all zero")
    if not 1 <= rows <= total:
        raise InputError(f"model surgery: rows is {rows}; the sites have {total}")
    cosine = torch.cat([F.cosine_similarity(s.weight.float(), probe.float()[None].to(s.device), dim=1) for s in editing.sites])
    chosen = torch.zeros(total, device=cosine.device).index_fill(0, cosine.topk(rows, largest=False).indices, alpha)
    parts = chosen.split([s.shape[0] for s in editing.sites])
    deltas = {s.name: torch.outer(part, probe.to(part)) for s, part in zip(editing.sites, parts, strict=True)}
    editing.shift(deltas)
    return deltas


@torch.no_grad()
def behaviour_probe(editing: Editing, inputs: Sequence[Tensor], labels: Sequence[int], *, strength: float = 1.0) -> Tensor:
    """A direction of hidden states that tells inputs with a behaviour from those without: logistic regression on their mean over places.

    Args:
        editing: The model; the states are those that the last of its blocks gives (without blocks, the inputs of its last site).
        inputs: Token ids (n,), or inputs of a classifier.
        labels: 1 with the behaviour, 0 without.
        strength: Inverse of the regularisation.

    Returns:
        (d,), the weights in the states' own scale.

    Raises:
        InputError: for labels of one class, or another number of them than inputs.
    """
    if len(labels) != len(inputs) or set(labels) != {0, 1}:
        raise InputError(f"behaviour_probe: {len(labels)} labels {sorted(set(labels))} for {len(inputs)} inputs; give one, 0 or 1, for each, and both")
    from sklearn.linear_model import LogisticRegression

    blocks = [s for s in all_sites(editing.model) if s.role == "block"]
    site = blocks[-1] if blocks else editing.sites[-1]
    states: dict[int, Tensor] = {}
    for group in groups(list(inputs)):

        def see(_: Site, x: Tensor, h: Tensor, group: Sequence[int] = group) -> None:
            own = h if blocks else x
            states.update({i: (row.mean(0) if row.dim() == 2 else row).float().cpu() for i, row in zip(group, own, strict=True)})

        with hooked([site], see):
            called(editing.model, stacked([inputs[i] for i in group], editing.model))
    fitted = LogisticRegression(C=strength, max_iter=1000).fit(torch.stack([states[i] for i in range(len(inputs))]).numpy(), list(labels))
    return torch.from_numpy(fitted.coef_[0]).float()
