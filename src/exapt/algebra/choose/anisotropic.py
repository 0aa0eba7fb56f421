"""aTLAS: task vectors composed with one learned coefficient for each parameter block (Zhang et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.algebra.choose.coefficients import LearnedMerge, TaskVectors
from exapt.algebra.choose.rows import Tree, entropy, logits_of, run
from exapt.core.components import component
from exapt.core.errors import InputError


@component("atlas", kind="weight choice", paper="Knowledge Composition using Task Vectors with Learned Anisotropic Scaling")
def atlas(
    model: nn.Module, base: Tree, models: Sequence[Tree], batches: Sequence[Any], *,
    objective: Literal["supervised", "entropy"] | Callable[[Tensor, Any], Tensor] = "supervised", partition: int = 1, steps: int = 100,
    lr: float = 0.1, weight_decay: float = 0.1, clip: float | None = 1.0, evaluate: Callable[[Tree], Tensor | float] | None = None, every: int = 10,
    read: Callable[[Any], Tensor] = logits_of, seed: int = 0,
) -> LearnedMerge:  # fmt: skip
    r"""Composes task vectors for a new task: :math:`\theta = \theta_0 + \sum_t \Lambda_t \tau_t` with :math:`\Lambda_t` block-diagonal, one
    learned coefficient for each tensor (or part of one) and task vector, from zero.

    With so few numbers to learn, a handful of labelled rows is enough, or none. The tensors may be a part of the
    model's, such as an adapter's, by their names in it.

    Args:
        model: A module of the tensors' names; run in evaluation mode and left as it was.
        base: The base's tensors.
        models: The models' whose task vectors are composed.
        batches: Pairs of inputs (a tensor, a tuple or a mapping) and labels (rows,), taken in turn; with "entropy" the inputs alone.
        objective: ``"supervised"``: cross-entropy; ``"entropy"``: the predictions' entropy, without labels; or a function of the logits and the
            batch's second part.
        partition: Number of parts into which every tensor's entries are divided at random, each with a coefficient of its own: more
            parameters where there are more labels.
        steps: Number of AdamW's steps; the learning rate falls to zero along a cosine.
        lr: Learning rate at the start.
        weight_decay: Of the coefficients: pulls towards the base.
        clip: Largest norm of the coefficients' gradient.
        evaluate: Scores tensors on validation rows (:func:`~exapt.algebra.choose.rows.row_scores`); the best coefficients seen are returned,
            and the base if none is better. Without it the last are.
        every: After how many steps.
        read: Takes the logits (rows, classes) from the model's output.
        seed: Of the parts.

    Returns:
        :class:`~exapt.algebra.choose.coefficients.LearnedMerge` with coefficients (m, tensors, partition).

    Raises:
        InputError: for models that do not fit the base, no batch, a batch that is no pair, an objective of another name.

    The official code (fredzzhang/atlas) was followed, its settings of few-shot learning being the defaults; it has no coefficients for
    buffers, here every floating-point tensor of ``base`` has one.

    References:
        Zhang, Albert, Rodriguez-Opazo, van den Hengel and Abbasnejad, "Knowledge Composition using Task Vectors with Learned Anisotropic
        Scaling", NeurIPS 2024.

    >>> net = nn.Linear(1, 2, bias=False)
    >>> base, tuned = {"weight": torch.zeros(2, 1)}, {"weight": torch.tensor([[1.0], [0.0]])}
    >>> found = atlas(net, base, [tuned], [(torch.ones(4, 1), torch.ones(4, dtype=torch.long))], steps=20)
    >>> bool(found.coefficients < 0)  # the labels are those that the task vector speaks against
    True
    """
    if not len(batches):
        raise InputError("atlas: there is no batch; give pairs of inputs and labels, or inputs alone with objective='entropy'")
    if isinstance(objective, str) and objective not in ("supervised", "entropy"):
        raise InputError(f'atlas: there is no objective "{objective}"; take "supervised", "entropy" or a function of the logits and the labels')
    labelled = objective != "entropy"
    if labelled and not all(isinstance(b, (tuple, list)) and len(b) == 2 for b in batches):
        raise InputError("atlas: a batch is no pair of inputs and labels; objective='entropy' needs no labels")
    vectors = TaskVectors(base, models, lambda name: name, "atlas", partition, seed)

    def loss(tensors: dict[str, Tensor], step: int) -> Tensor:
        batch: Any = batches[step % len(batches)]
        inputs, labels = (batch[0], batch[1]) if labelled else (batch, None)
        logits = read(run(model, tensors, inputs))
        if callable(objective):
            return objective(logits, labels)
        return F.cross_entropy(logits.float(), torch.as_tensor(labels)) if labelled else entropy(logits).mean()

    def better(tensors: dict[str, Tensor]) -> float:
        assert evaluate is not None
        return float(torch.as_tensor(evaluate(tensors)).double().mean())

    return vectors.learned(
        model, loss, lambda p: torch.optim.AdamW([p], lr, weight_decay=weight_decay), start=0.0, steps=steps, clip=clip, cosine=True,
        better=better if evaluate is not None else None, every=every,
    )  # fmt: skip
