"""MUSCLE: an update that answers as before where it knows no better (Echterhoff et al., Findings of EMNLP 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.objective import Objective, Seen, Step, task_loss

IGNORED = -100


def compatible_distillation(z: Tensor, old: Tensor, new: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Distils from the new model what is right already, and the rest from the old one.

    .. math:: \frac1n \sum_i m_i\, \mathrm{KL}(\sigma(z^{old}_i / T) \,\|\, \sigma(z_i / T)) + (1 - m_i)\, \mathrm{KL}(\sigma(z^{new}_i / T) \,\|\,
        \sigma(z_i / T)), \qquad m_i = 1[\arg\max z_i \ne y_i]

    Args:
        z: Logits of the model that trains (..., classes); one prediction for each row or token.
        old: Those of the model before the update, of the same shape. No gradient goes there, nor to ``new``.
        new: Those of the updated model without compatibility.
        labels: (...) int64; -100 leaves a prediction out.
        temperature: T.

    Returns:
        A scalar; zero where nothing is left in.

    Raises:
        InputError: for other shapes, or a temperature that is not positive.

    >>> z, y = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> compatible_distillation(z, old=-z, new=z, labels=y), round(float(compatible_distillation(-z, old=z, new=z, labels=y)), 4)
    (tensor(0.), 1.5232)
    """
    if not z.shape == old.shape == new.shape or z.shape[:-1] != labels.shape or temperature <= 0:
        shapes = f"{tuple(z.shape)}, {tuple(old.shape)}, {tuple(new.shape)} with labels {tuple(labels.shape)}"
        raise InputError(f"compatible_distillation: logits {shapes} at temperature {temperature} do not fit; all three models answer the same predictions")
    wrong = (z.argmax(-1) != labels)[..., None]
    teacher = torch.where(wrong, old, new).detach() / temperature
    each = F.kl_div((z / temperature).log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    kept = labels != IGNORED
    return each[kept].sum() / kept.sum().clamp_min(1)


@component("muscle", kind="objective", paper="MUSCLE: A Model Update Strategy for Compatible LLM Evolution")
@dataclass(frozen=True)
class MUSCLE(Objective):
    r"""Trains a compatibility adapter: one that starts as the new model's task adapter and, where it errs, errs like the old model.

    The loss is :func:`compatible_distillation`; attach the new base's task adapter first, and train it with this. The new model's own logits
    :math:`z^{new}` are noted in one pass before training, a row for each row of the data; for language models, which answer many tokens a row, give
    ``new``. How compatible two models are tells :func:`exapt.algebra.transfer.flips.update_compatibility`.

    Args:
        old: Takes a batch as the objective sees it (:class:`~exapt.core.objective.Seen`) and returns the old model's logits, of the shape of
            ``seen.logits``: ``lambda seen: model(seen.batch["inputs"])``, or ``lambda seen: table[seen.index]``.
        new: The same for the new model; None: as it is when training begins.
        temperature: T.
        task: Weight of the cross-entropy, which the authors add where old and new model are far apart in accuracy.

    Memory:
        ``new`` (rows, classes): the new model's logits, where ``new`` is not given.

    Raises:
        InputError: without ``old``.

    References:
        Echterhoff, Faghri, Vemulapalli, Hu, Li, Tuzel and Pouransari, "MUSCLE: A Model Update Strategy for Compatible LLM Evolution", Findings of
        EMNLP 2024 (equation 1).

    >>> MUSCLE(old=lambda seen: seen.logits).temperature
    1.0
    """

    equation = r"\mathbb{E}\,m\,\mathrm{KL}(p^{old} \| p) + (1 - m)\,\mathrm{KL}(p^{new} \| p),\; m = 1[\arg\max p \ne y]"
    setting = "source"

    old: Callable[[Seen], Tensor] | None = None
    new: Callable[[Seen], Tensor] | None = None
    temperature: float = 1.0
    task: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.task < 0:
            raise InputError(f"muscle: temperature {self.temperature} must be positive, and task {self.task} not negative")

    def before_epoch(self, s: Step) -> None:
        if self.new is not None or "new" in s.memory:
            return
        seen = [(x.logits, x.index) for x in s.sources()]
        z, index = (torch.cat(list(x)) for x in zip(*seen, strict=True))
        if len(index.unique()) != len(index):
            raise InputError("muscle notes one prediction for each row, and here are more; give the new model as new=")
        table = torch.empty_like(z)
        table[index] = z
        s.memory["new"] = table

    def loss(self, s: Step) -> Tensor:
        if self.old is None:
            raise InputError("muscle needs the model before the update: MUSCLE(old=lambda seen: model(...)), logits for the rows of a batch")
        assert s.s.labels is not None
        with torch.no_grad():
            old = self.old(s.s).to(s.s.logits)
            new = self.new(s.s).to(s.s.logits) if self.new is not None else s.memory["new"].to(s.s.logits)[s.s.index]
        kept = compatible_distillation(s.s.logits, old, new, s.s.labels, self.temperature)
        return kept + self.task * task_loss(s.s) if self.task else kept
