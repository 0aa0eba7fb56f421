"""WiSE-FT: interpolation of the weights before and after fine-tuning (Wortsman et al., CVPR 2022)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.objective import HeldOut, Objective, Shapes, Step, task_loss


def interpolated(before: Mapping[str, Tensor], after: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    r"""Weights between two: :math:`(1 - \alpha)\,\theta_0 + \alpha\,\theta`.

    >>> interpolated({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)
    {'w': tensor([0.2500, 0.2500])}
    """
    return {k: torch.lerp(before[k], t, alpha) for k, t in after.items()}


@component("wise", kind="objective", paper="Robust fine-tuning of zero-shot models")
@dataclass(frozen=True)
class WiSE(Objective):
    r"""Fine-tunes, then goes back part of the way: :math:`(1 - \alpha)\,\theta_0 + \alpha\,\theta`.

    With several ``alphas`` the one of lowest loss on held-out rows of the source is taken, the smallest of equals; these rows do not train. With one,
    all rows train. What is interpolated is what trains: with adapters their own tensors, from where they started.

    Args:
        alphas: Candidates for :math:`\alpha`; one alone is taken as it is, and the paper recommends 0.5.
        held_out: Share of the source's rows that is held out for the choice.
        seed: Which rows.

    Memory:
        ``start/<name>``: the tensors at the start; ``alpha`` and, with a choice, ``losses`` at the end.

    Raises:
        InputError: for values that are not in [0, 1], or no rows left to learn from.

    References:
        Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.

    >>> WiSE(alphas=(0.5,)).alphas
    (0.5,)
    """

    equation = r"(1 - \alpha)\,\theta_0 + \alpha\,\theta"
    setting = "source"

    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 <= a <= 1 for a in self.alphas) or not 0 < self.held_out < 1:
            raise InputError("wise.alphas lie in [0, 1], at least one, and held_out between 0 and 1")

    def parts(self, shapes: Shapes) -> nn.Module | None:
        return HeldOut(shapes.source_rows, self.held_out, self.seed) if len(self.alphas) > 1 else None

    def before_epoch(self, s: Step) -> None:
        if not any(k.startswith("start/") for k in s.memory):
            s.memory.update({f"start/{k}": t.detach().clone() for k, t in s.parameters.items()})

    def loss(self, s: Step) -> Tensor:
        return task_loss(s.s, (~s.parts.held[s.s.index]).float()) if isinstance(s.parts, HeldOut) else task_loss(s.s)

    def finish(self, s: Step) -> None:
        before = {k: s.memory[f"start/{k}"] for k in s.parameters}
        after = {k: t.detach().clone() for k, t in s.parameters.items()}
        alpha = self.alphas[0]
        if len(self.alphas) > 1:
            losses = [self._validation(s, interpolated(before, after, a)) for a in self.alphas]
            alpha = min(zip(losses, self.alphas, strict=True))[1]
            s.memory["losses"] = torch.tensor(losses)
        s.memory["alpha"] = torch.tensor(alpha)
        _put(s, interpolated(before, after, alpha))

    def _validation(self, s: Step, tensors: Mapping[str, Tensor]) -> float:
        _put(s, tensors)
        assert isinstance(s.parts, HeldOut)
        total, count = 0.0, 0
        for seen in s.sources():
            rows = s.parts.held[seen.index]
            total += float(F.cross_entropy(seen.logits[rows], seen.labels[rows], reduction="sum"))
            count += int(rows.sum())
        return total / max(count, 1)


def _put(s: Step, tensors: Mapping[str, Tensor]) -> None:
    for k, t in s.parameters.items():
        t.copy_(tensors[k])
