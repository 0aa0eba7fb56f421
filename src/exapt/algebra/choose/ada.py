"""AdaMerging: coefficients of task vectors that make the merged model sure on unlabelled rows (Yang et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from exapt.algebra.choose.coefficients import LearnedMerge, TaskVectors
from exapt.algebra.choose.rows import Tree, entropy, logits_of, run
from exapt.core.components import component
from exapt.core.errors import InputError


def _of_task(output: Any, task: int) -> Tensor:
    return logits_of(output)


@component("adamerging", kind="weight choice", paper="AdaMerging: Adaptive Model Merging for Multi-Task Learning")
def adamerging(
    model: nn.Module, base: Tree, models: Sequence[Tree], batches: Sequence[Sequence[Any]], *, by: Literal["layer", "task"] | Callable[[str], str] = "layer",
    density: float | None = None, start: float = 0.3, steps: int = 500, lr: float = 1e-3, read: Callable[[Any, int], Tensor] = _of_task,
) -> LearnedMerge:  # fmt: skip
    r"""Merges by :math:`\theta = \theta_0 + \sum_t \lambda_t^l \tau_t^l` with the coefficients that minimise the entropy of the merged model's predictions on
    unlabelled rows, summed over the tasks.

    Args:
        model: A module of the tensors' names; run in evaluation mode and left as it was.
        base: The base's tensors.
        models: The fine-tuned models'.
        batches: For each task a list of unlabelled batches, each a tensor, a tuple or a mapping that the model is called with; a step takes one of
            every task, in turn. The number of tasks need not be that of the models.
        by: ``"layer"``: a coefficient for each model and tensor (layer-wise, as the official code does it); ``"task"``: one for each model; or a function
            from a tensor's name to its group.
        density: Share of every task vector's entries to keep before, those largest over the whole model, of which those of the elected sign are kept
            (AdaMerging++; 0.2 in the paper); None keeps all.
        start: First value of the coefficients, which stay in [0, 1].
        steps: Number of Adam's steps.
        lr: Learning rate.
        read: Takes the logits (rows, classes) from the model's output, given the task's number: the place of a task's own head.

    Returns:
        :class:`~exapt.algebra.choose.coefficients.LearnedMerge` with coefficients (m, groups, 1).

    Raises:
        InputError: for models that do not fit the base, no batch for a task, or a density outside (0, 1].

    The official code (EnnengYang/AdaMerging) was followed; it shuffles each task's rows anew for every step, which is left to the caller's batches.

    References:
        Yang, Wang, Shen, Liu, Guo, Wang and Tao, "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024.

    >>> net = nn.Linear(1, 2, bias=False)
    >>> base, tuned = {"weight": torch.zeros(2, 1)}, {"weight": torch.tensor([[1.0], [0.0]])}
    >>> found = adamerging(net, base, [tuned], [[torch.ones(4, 1)]], lr=0.1, steps=20)
    >>> found.coefficients.item(), bool(found.losses[-1] < found.losses[0])
    (1.0, True)
    """
    if not batches or not all(len(own) for own in batches):
        raise InputError(f"adamerging: {len(batches)} tasks, of which {sum(not len(own) for own in batches)} have no batch; give each task at least one")
    group: Callable[[str], str] = (lambda name: name) if by == "layer" else (lambda name: "all") if by == "task" else by  # type: ignore[assignment]
    vectors = TaskVectors(base, models, group, "adamerging")
    if density is not None:
        vectors.deltas = _elected(vectors.deltas, density)

    def loss(tensors: dict[str, Tensor], step: int) -> Tensor:
        return torch.stack([entropy(read(run(model, tensors, own[step % len(own)]), t)).mean() for t, own in enumerate(batches)]).sum()

    return vectors.learned(model, loss, lambda p: torch.optim.Adam([p], lr), start=start, steps=steps, bounds=(0.0, 1.0))


def _elected(deltas: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Task vectors trimmed over the whole model, and of the rest the entries of the elected sign; the models' own, not their mean."""
    if not 0 < density <= 1:
        raise InputError(f"adamerging: the density is {density}; it is the share of entries kept, above 0 and up to 1")
    flat = torch.cat([d.flatten(1) for d in deltas.values()], 1)
    keep = max(1, round(flat.shape[1] * density))
    least = flat.abs().kthvalue(flat.shape[1] - keep + 1, dim=1, keepdim=True).values
    kept = torch.where(flat.abs() >= least, flat, 0.0)
    sign = kept.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    kept = torch.where(torch.where(sign > 0, kept > 0, kept < 0), kept, 0.0)
    parts = kept.split([d[0].numel() for d in deltas.values()], 1)
    return {name: part.reshape(d.shape) for (name, d), part in zip(deltas.items(), parts, strict=True)}
