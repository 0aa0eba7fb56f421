"""Surgery on mixtures of experts that became modules: take unused experts out, add new ones (Chen et al.'s modular vision model, 2023).

The experts and their routers are :class:`exapt.ModularExperts`. The paper's code could not be read here; the rule by which experts are taken out is that
of its forerunner Mod-Squad's official code: those above a threshold of usage stay, and at least as many as act on a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError
from exapt.methods.modular_experts import mutual_information

Tree = Mapping[str, Tensor]


@component("prune_experts", kind="upcycling", paper="An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training")
def prune_experts(tensors: Tree, load: Tensor, threshold: float = 0.01, least: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Takes out the experts that a task does not use, routers' rows and all.

    Where the router picks the k best, the result is exactly the same on data that never used what was taken out, as long as k experts are left.

    Args:
        tensors: One site's tensors, experts first: its router (E, d) and what its experts own (E, ...).
        load: Share of the task's tokens that fell on each expert (E,), as ``exapt.noted(model)`` shows it, averaged over batches.
        threshold: Experts of a smaller share go.
        least: How many stay in any case, the most used: at least as many as act on a token.

    Returns:
        The tensors of the experts that stay, and which they are.

    Raises:
        InputError: for tensors that do not have the experts first, or ``least`` above their number.

    References:
        Chen, Ding, Shen, Zhan, Tomizuka, Learned-Miller and Gan, "An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous
        Training", 2023.

    >>> left, kept = prune_experts({"R": torch.eye(3)}, torch.tensor([0.6, 0.0, 0.4]))
    >>> kept.tolist(), left["R"].tolist()
    ([0, 2], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    """
    _check(tensors, len(load))
    if not 1 <= least <= len(load):
        raise InputError(f"prune_experts: least is {least} of {len(load)} experts; choose 1 to {len(load)}")
    stays = (load >= threshold).nonzero()[:, 0]
    kept = stays if len(stays) >= least else load.topk(least).indices.sort().values
    return {k: t[kept].clone() for k, t in tensors.items()}, kept


def of_task(tensors: Tree, task: int, router: str = "R") -> dict[str, Tensor]:
    """One task's part of a site: the other tasks' routers are left out, so that the tensors serve a method with one task.

    Args:
        tensors: One site's tensors, experts first.
        task: Which task.
        router: The routers' name, (E, tasks, d).

    Raises:
        InputError: for a task that there is not.

    >>> of_task({"R": torch.arange(4).view(1, 2, 2)}, 1)["R"].tolist()
    [[[2, 3]]]
    """
    if router not in tensors or tensors[router].dim() != 3 or not 0 <= task < tensors[router].shape[1]:
        shape = tuple(tensors[router].shape) if router in tensors else None
        raise InputError(f"of_task: {router} is {shape}, and task {task} was asked for; give routers (experts, tasks, d) and a task of theirs, from 0")
    return {**tensors, router: tensors[router][:, task : task + 1].clone()}


@component("add_experts", kind="upcycling", paper="An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training")
def add_experts(tensors: Tree, copies: Sequence[int], *, noise: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """Adds experts for a task to come, each a copy of an old one; the old ones stay as they are, for :func:`only_new` to protect.

    Args:
        tensors: One site's tensors, experts first.
        copies: Which expert each new one is a copy of.
        noise: Standard deviation of what is added to the copies, in units of the copied tensor's own.
        seed: Of the noise.

    Raises:
        InputError: for an expert that there is not.

    References:
        As :func:`prune_experts`.

    >>> add_experts({"R": torch.eye(2)}, [1])["R"].tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    number = len(next(iter(tensors.values()))) if tensors else 0
    _check(tensors, number)
    if not copies or not all(0 <= c < number for c in copies):
        raise InputError(f"add_experts: copies {list(copies)} of {number} experts, which count from 0")
    grown = {}
    for name, t in tensors.items():
        new = t[list(copies)]
        drawn = torch.randn(new.shape, generator=seeded(seed, name)).to(new)
        grown[name] = torch.cat([t, new + noise * (t.std() if t.numel() > 1 else 0.0) * drawn])
    return grown


def only_new(parameters: Tree, old: int) -> None:
    """Lets only experts from number ``old`` on learn: gradients of those before are masked out (weight decay would still move them).

    >>> w = torch.ones(3, 2, requires_grad=True)
    >>> only_new({"w": w}, 2)
    >>> w.sum().backward()
    >>> w.grad.tolist()
    [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """
    for t in parameters.values():
        keep = (torch.arange(len(t), device=t.device) >= old).view(-1, *[1] * (t.dim() - 1))
        t.register_hook(lambda grad, keep=keep: grad * keep)


def task_information(probability: Tensor, tasks: Tensor, number: int) -> Tensor:
    r"""Mutual information of tasks and experts, :math:`I(T; E) = \sum_{t, e} p(t, e) \log \frac{p(t, e)}{p(t)\, p(e)}` with tasks weighted alike.

    Subtracted from the loss it makes modules of experts: each task settles on few, and all experts are used. (The model's forerunner,
    Mod-Squad, CVPR 2023, introduced it.)

    Args:
        probability: Router probabilities (tokens, E).
        tasks: Task of each token (tokens,).
        number: Number of tasks.

    Returns:
        A scalar from 0 to the logarithm of the smaller number.

    >>> float(task_information(torch.eye(2), torch.tensor([0, 1]), 2).exp().round(decimals=4))
    2.0
    """
    if probability.dim() != 2 or tasks.shape != probability.shape[:1]:
        raise InputError(f"task_information: probabilities {tuple(probability.shape)} and tasks {tuple(tasks.shape)}; give (tokens, E) and (tokens,)")
    member = torch.nn.functional.one_hot(tasks, number).to(probability.dtype)
    present = member.sum(0)
    given = member.T @ probability / present.clamp(min=1)[:, None]
    return mutual_information(given[present > 0] / (present > 0).sum())


def _check(tensors: Tree, number: int) -> None:
    odd = next((k for k, t in tensors.items() if t.dim() == 0 or len(t) != number), None)
    if odd is not None or not tensors:
        shape = tuple(tensors[odd].shape) if odd is not None else ()
        raise InputError(f"{odd or 'no tensor'} of shape {shape} does not have {number} experts first")
