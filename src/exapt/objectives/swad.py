"""SWAD: Stochastic Weight Averaging Densely (Cha et al., NeurIPS 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.objective import HeldOut, Objective, Shapes, Step, task_loss


def loss_valley(losses: Sequence[float], n_start: int = 3, n_end: int = 6, ratio: float = 1.3) -> tuple[int | None, int | None]:
    r"""Where averaging starts and ends (the paper's Algorithm 1).

    It starts at the first check :math:`t_s` whose loss is the lowest of ``n_start`` in a row; with :math:`l` their mean times ``ratio``, it ends
    before the first ``n_end`` checks in a row that are all above :math:`l`.

    Args:
        losses: Validation losses, check after check.
        n_start, n_end: Lengths of the two windows.
        ratio: Factor on the mean.

    Returns:
        Numbers of the first and the last check that count; ``None`` where not found (yet).

    >>> loss_valley([3.0, 1.0, 1.1, 1.2, 1.1, 2.0, 2.0, 2.0], n_start=3, n_end=2)
    (1, 4)
    """
    for t in range(n_start - 1, len(losses)):
        window = losses[t - n_start + 1 : t + 1]
        if window[0] > min(window):
            continue
        limit = ratio * sum(window) / n_start
        dead = (i for i in range(t + 1, len(losses)) if i >= n_end and min(losses[i - n_end + 1 : i + 1]) > limit)
        end = next(dead, None)
        return t - n_start + 1, None if end is None else end - n_end
    return None, None


@component("swad", kind="objective", paper="SWAD: Domain Generalization by Seeking Flat Minima")
@dataclass(frozen=True)
class SWAD(Objective):
    r"""Averages the weights of every step between the start and the end of the valley of the validation loss: :math:`\frac{1}{|T|} \sum_{t \in T} \theta_t`.

    The validation rows are a random part of the source (over all its domains), which does not train. Their loss is checked every so many
    steps, and :func:`loss_valley` says between which checks the averages of all steps count. Where no start was found, the steps before the
    last check are averaged, as in the official code. Costs up to ``n_start + n_end`` copies of what trains, and a pass over the source at
    every check.

    Args:
        every: Steps between checks; the paper's 50 to 1000, about a hundredth of the training.
        n_start, n_end: Checks in the two windows.
        ratio: Factor on the mean loss of the first window, above which the valley ends; the official code's 1.3, in the paper also 1.2.
        held_out: Share of the source's rows that is held out.
        seed: Which rows.

    Parts:
        ``held`` (source rows,), booleans.

    References:
        Cha, Chun, Lee, Cho, Park, Lee and Park, "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021. Followed is the paper's
        Algorithm 1; the official code also looks back from the start, and trims the end. Statistics of batch norm stay those of the last step.

    >>> SWAD(every=50).ratio
    1.3
    """

    equation = r"\bar\theta = \frac{1}{t_e - t_s + 1} \sum_{t = t_s}^{t_e} \theta_t"
    setting = "source"

    every: int = 10
    n_start: int = 3
    n_end: int = 6
    ratio: float = 1.3
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.every, self.n_start, self.n_end) < 1 or not 0 < self.held_out < 1:
            raise InputError("swad: every, n_start and n_end are at least 1, held_out lies between 0 and 1")

    def parts(self, shapes: Shapes) -> nn.Module:
        return HeldOut(shapes.source_rows, self.held_out, self.seed)

    def _held(self, s: Step) -> Tensor:
        assert isinstance(s.parts, HeldOut)
        return s.parts.held

    def loss(self, s: Step) -> Tensor:
        return task_loss(s.s, (~self._held(s)[s.s.index]).float())

    def validation_loss(self, s: Step) -> float:
        """Mean cross-entropy of the held-out rows."""
        total, count = 0.0, 0
        for seen in s.sources():
            rows = self._held(s)[seen.index]
            total += float(F.cross_entropy(seen.logits[rows], seen.labels[rows], reduction="sum")) if rows.any() else 0.0
            count += int(rows.sum())
        return total / max(count, 1)

    def after_step(self, s: Step) -> None:
        losses = s.memory.get("losses", torch.zeros(0)).tolist()
        _average(s, f"segment{len(losses)}", s.parameters)
        if (s.step + 1) % self.every:
            return
        losses.append(self.validation_loss(s))
        s.memory["losses"] = torch.tensor(losses, dtype=torch.float64)
        start, end = loss_valley(losses, self.n_start, self.n_end, self.ratio)
        now = len(losses) - 1
        if start is None:
            _forget(s, now - self.n_start + 1)
        else:  # what can no longer fall behind the end
            self._settle(s, start, now - self.n_end + 1 if end is None else end)

    def finish(self, s: Step) -> None:
        losses = s.memory.get("losses", torch.zeros(0)).tolist()
        start, end = loss_valley(losses, self.n_start, self.n_end, self.ratio)
        if start is None:
            last = max(int(k.removeprefix("segment").split("/")[0]) for k in s.memory if k.startswith("segment"))
            source = f"segment{last if f'segment{last - 1}/count' not in s.memory else last - 1}"
        else:
            self._settle(s, start, len(losses) if end is None else end)
            source = "mean"
        for name, p in s.parameters.items():
            p.copy_(s.memory[f"{source}/{name}"])

    def _settle(self, s: Step, start: int, last: int) -> None:
        """Takes the segments up to ``last`` into the mean, each weighted by its steps."""
        _forget(s, start)
        for number in sorted(int(k.removeprefix("segment").removesuffix("/count")) for k in s.memory if k.startswith("segment") and k.endswith("/count")):
            if number <= last:
                count = s.memory[f"segment{number}/count"]
                _average(s, "mean", {n: s.memory[f"segment{number}/{n}"] for n in s.parameters}, float(count))
                _forget(s, number + 1)


def _average(s: Step, name: str, values: object, weight: float = 1.0) -> None:
    assert hasattr(values, "items")
    count = s.memory.get(f"{name}/count", torch.zeros(())) + weight
    for k, t in values.items():
        old = s.memory.get(f"{name}/{k}")
        s.memory[f"{name}/{k}"] = t.detach().clone() if old is None else old + (t.detach() - old) * (weight / float(count))
    s.memory[f"{name}/count"] = count


def _forget(s: Step, before: int) -> None:
    """Drops the segments before a number."""
    for key in [k for k in s.memory if k.startswith("segment") and int(k.removeprefix("segment").split("/")[0]) < before]:
        del s.memory[key]
