"""Sums of parameter shifts with a name of their own: language and task, and the reverse-engineered adapter.

The two papers' text and code could not be read here: the formulas are from the abstract and from memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exapt.algebra.tensors import Tree, merge_tensors
from exapt.core.components import component
from exapt.core.errors import InputError


@component("language_task_arithmetic", kind="recipe", paper="Language and Task Arithmetic with Parameter-Efficient Layers for Zero-Shot Summarization")
def language_and_task(
    task: Tree, languages: Sequence[Tree], sources: Sequence[Tree] = (), *, weight: float = 0.5, start: Tree | None = None
) -> dict[str, Tensor]:
    r"""A task learned in one language, carried to another for which there are no labels:
    :math:`\theta_0 + \lambda\, \tau_{task} + (1 - \lambda)\, (\bar\tau_{lang} - \bar\tau_{source})`, element by element.

    Task vectors are differences of adapters of one method, trained from one start: ``task`` on labels in the source language, ``languages`` on plain
    text of the target language (or of several that are related to it, which are averaged), ``sources`` on plain text of the source language.

    Args:
        task: The task adapter's tensors.
        languages: Tensors of one adapter or more of the target language or its relatives.
        sources: Tensors of adapters of the source language, to be taken away.
        weight: The factor :math:`\lambda`, in [0, 1].
        start: What all of them started from, :math:`\theta_0`; zeros by default, as if the adapters' values were the task vectors.

    Returns:
        Tensors of one adapter.

    Raises:
        InputError: for a weight outside [0, 1], no language, or adapters that do not fit together.

    References:
        Chronopoulou, Pfeiffer, Maynez, Wang, Ruder and Agrawal, "Language and Task Arithmetic with Parameter-Efficient Layers for Zero-Shot
        Summarization", MRL 2024.

    >>> task, german, english = ({"A": torch.tensor([float(i)])} for i in (4, 2, 1))
    >>> language_and_task(task, [german], [english], weight=0.75)["A"]
    tensor([3.2500])
    """
    if not 0 <= weight <= 1:
        raise InputError(f"language_and_task: weight is {weight}; it is the task's share, from 0 to 1")
    if not languages:
        raise InputError("language_and_task: there is no language adapter; give at least one in languages=")
    base = {k: torch.zeros_like(t) if t.is_floating_point() else t for k, t in task.items()} if start is None else start
    weights = [weight] + [(1 - weight) / len(languages)] * len(languages) + [-(1 - weight) / max(len(sources), 1)] * len(sources)
    called = ["task", *(f"language {i}" for i in range(len(languages))), *(f"source {i}" for i in range(len(sources)))]
    return merge_tensors("task_arithmetic", [task, *languages, *sources], base, weights, names=called)


@component(
    "re_adapt_ir",
    kind="recipe",
    paper="RE-AdaptIR: Improving Information Retrieval through Reverse Engineered Adaptation",
    variants={
        "RE-Adapt: Reverse Engineered Adaptation of Large Language Models": "re_adapted with an instruction-tuned model; energy below 1 is its LoRE-Adapt"
    },
)
def re_adapted(base: Tree, tuned: Tree, domain: Tree, *, tuned_weight: float = 1.0, domain_weight: float = 1.0, energy: float = 1.0) -> dict[str, Tensor]:
    r"""Gives a model that was tuned on labels new knowledge from text alone:
    :math:`W_0 + \alpha\, (W_{tuned} - W_0) + \beta\, (W_{domain} - W_0)`.

    The difference of a tuned model (a retriever, an instruction-tuned model) and the base it was made from is taken for an adapter, and added again to
    the base after it read unlabelled text of a domain.

    Args:
        base: Tensors of the base model, :math:`W_0`.
        tuned: Those of the model tuned from it.
        domain: Those of the base after training on the domain's text (adapters merged).
        tuned_weight: The factor :math:`\alpha`.
        domain_weight: The factor :math:`\beta` (the paper's partial adaptation: 0.5).
        energy: If below 1, the tuned model's difference in each matrix is its shortest truncated singular value decomposition that holds this share of
            the sum of squared singular values (LoRE-Adapt).

    Returns:
        Tensors of one model.

    Raises:
        InputError: for an energy outside (0, 1], or models that do not fit together.

    References:
        Fleshman and Van Durme, "RE-AdaptIR: Improving Information Retrieval through Reverse Engineered Adaptation", 2024.
        Fleshman and Van Durme, "RE-Adapt: Reverse Engineered Adaptation of Large Language Models", 2024.

    >>> base, tuned, domain = ({"w": torch.tensor([float(i)])} for i in (1, 3, 2))
    >>> re_adapted(base, tuned, domain, domain_weight=0.5)["w"]
    tensor([3.5000])
    """
    if not 0 < energy <= 1:
        raise InputError(f"re_adapted: energy is {energy}; it is a share, above 0 and at most 1")
    if energy < 1:
        tuned = {k: t if k not in base or t.shape != base[k].shape else base[k] + low_rank(t - base[k], energy).to(t.dtype) for k, t in tuned.items()}
    return merge_tensors("task_arithmetic", [tuned, domain], base, [tuned_weight, domain_weight], names=["tuned", "domain"])


def low_rank(delta: Tensor, energy: float) -> Tensor:
    """The truncated decomposition of a matrix of least rank that holds ``energy`` of its squared norm; vectors are returned as they are.

    >>> low_rank(torch.diag(torch.tensor([3.0, 1.0])), 0.9)
    tensor([[3., 0.],
            [0., 0.]])
    """
    if delta.dim() != 2 or not delta.is_floating_point():
        return delta
    u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
    held = s.square().cumsum(0)
    rank = int((held < energy * held[-1] * (1 - 1e-6)).sum()) + 1
    return (u[:, :rank] * s[:rank]) @ v[:rank]
