"""How well merged tensors do on each validation row, with labels or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.errors import InputError

Tree = Mapping[str, Tensor]
Evaluate = Callable[[Tree], Tensor]


def run(model: nn.Module, tensors: Tree, inputs: Any) -> Any:
    """The model's output with other tensors in the place of its own; inputs are a tensor, a tuple of them or a mapping of names."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})
    return torch.func.functional_call(model, dict(tensors), args, kwargs)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: itself, its ``logits``, or the first of a tuple."""
    found = getattr(output, "logits", output)
    return found[0] if isinstance(found, (tuple, list)) else found  # type: ignore[no-any-return]


@component("row_scores", kind="weight choice")
def row_scores(
    model: nn.Module, inputs: Any, labels: Tensor | None = None, *, score: Callable[..., Tensor] | None = None,
    read: Callable[[Any], Tensor] = logits_of,
) -> Evaluate:  # fmt: skip
    """Returns a function that scores tensors on every row of a validation set: what greedy soups, sweeps and choices of weights ask for.

    Args:
        model: Any module of the tensors' names; it is run in evaluation mode and left as it was.
        inputs: What the model is called with: a tensor, a tuple of them or a mapping of names.
        labels: (n,) int64. With labels a row's score is 1 if it is classified right and 0 otherwise; without, minus the entropy of its
            prediction (in nats), the label-free objective of AdaMerging.
        score: Another score, of (logits, labels), or of the logits alone without labels; higher is better.
        read: Takes the logits (n, classes) from the model's output.

    Returns:
        A function from tensors by name to scores (n,).

    Raises:
        InputError: from that function, for scores that are not one finite number a row.

    >>> one = nn.Linear(1, 2, bias=False)
    >>> evaluate = row_scores(one, torch.ones(2, 1), torch.tensor([0, 1]))
    >>> evaluate({"weight": torch.tensor([[2.0], [1.0]])})
    tensor([1., 0.])
    """

    def own(logits: Tensor) -> Tensor:
        if score is not None:
            return score(logits) if labels is None else score(logits, labels)
        return -entropy(logits) if labels is None else (logits.argmax(-1) == labels).float()

    def evaluate(tensors: Tree) -> Tensor:
        training = {m: m.training for m in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                rows = own(read(run(model, tensors, inputs)))
        finally:
            for module, was in training.items():
                module.training = was
        return checked_rows(rows, "row_scores")

    return evaluate


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row's prediction, in nats."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def checked_rows(rows: Tensor | float, name: str) -> Tensor:
    """Scores as a vector (n,).

    Raises:
        InputError: for scores that are not one finite number a row.
    """
    found = torch.as_tensor(rows).detach().float().cpu()
    found = found[None] if found.ndim == 0 else found
    if found.ndim != 1 or not len(found) or not bool(torch.isfinite(found).all()):
        raise InputError(f"{name}: the scores have shape {tuple(found.shape)} or are not finite; give one finite number for each validation row")
    return found
