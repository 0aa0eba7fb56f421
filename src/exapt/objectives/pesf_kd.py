"""PESF-KD: distillation from a frozen teacher whose soft labels a small adapter smooths for the student (Rao et al., TMM 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.objective import Objective, Seen, Shapes, Step, task_loss


def sharpness(z: Tensor) -> Tensor:
    r"""How sharp predictions are: :math:`\log \sum_k e^{z_k}` (...), of logits (..., classes) whose mean is taken out, so that only the prediction counts.

    The sharpness gap of a student is its teacher's mean sharpness minus its own.

    >>> sharpness(torch.tensor([[1.0, 1.0], [9.0, -9.0]]))
    tensor([0.6931, 9.0000])
    """
    return (z - z.mean(-1, keepdim=True)).logsumexp(-1)


@component("pesf_kd", kind="objective", paper="Parameter-Efficient and Student-Friendly Knowledge Distillation")
@dataclass(frozen=True)
class PESFKD(Objective):
    r"""Distils from a frozen teacher, of which only a small adapter trains, jointly with the student:

    .. math:: \mathrm{CE}(y, z_s) + \mathrm{CE}(y, z_t') + \alpha\, T^2\, \mathrm{KL}\big(\sigma(z_t' / T) \,\|\, \sigma(z_s / T)\big), \qquad
        z_t' = z_t + W_3\, \mathrm{ReLU}(W_2 (W_1 h_t + b_1) + b_2) + b_3

    The adapter gets gradients of both its own labels and the student's prediction, so that the soft labels come to be as smooth as the student can
    follow. With parameter shifts the student is the shifted model.

    Args:
        teacher: Takes a batch as the objective sees it (:class:`~exapt.core.objective.Seen`) and returns the teacher's logits (n, classes) and
            features (n, d), its head's input; None: the model before training, which the student then outgrows.
        width: The teacher's d; None: the student's own.
        hidden: Width of the adapter, whose other layers are as wide as there are classes.
        alpha: Weight of the distillation.
        temperature: T.
        part_rate: Factor on the adapter's learning rate.

    Parts:
        ``0`` (classes, d), ``1`` (hidden, classes) and ``3`` (classes, hidden), each with its bias.

    Raises:
        InputError: for a teacher that answers other rows or classes, or features that are not ``width`` wide.

    References:
        Rao, Meng, Ding, Qi, Liu, Zhang and Tao, "Parameter-Efficient and Student-Friendly Knowledge Distillation", IEEE Transactions on Multimedia
        2023. Followed is the official code, the paper's text was not at hand: the adapter and its temperature are those for images; for language
        the code weighs both cross-entropies by :math:`1 - \alpha` and distils by squared error. Its later version for images lets the student learn
        from labels swapped into the teacher's own logits, which are not the adapter's; that is left out.

    >>> PESFKD(alpha=0.5).hidden
    32
    """

    equation = r"\mathcal{L}_{ce}(z_s) + \mathcal{L}_{ce}(z_t') + \alpha T^2\, \mathrm{KL}(p_t'^{(T)} \| p_s^{(T)}),\; z_t' = z_t + A(h_t)"
    setting = "source"
    needs_features = True

    teacher: Callable[[Seen], tuple[Tensor, Tensor]] | None = None
    width: int | None = None
    hidden: int = 32
    alpha: float = 1.0
    temperature: float = 6.0
    part_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.alpha < 0 or self.hidden < 1:
            raise InputError(f"pesf_kd: temperature {self.temperature} and hidden {self.hidden} must be positive, alpha {self.alpha} not negative")

    def parts(self, shapes: Shapes) -> nn.Module:
        c = shapes.classes
        return nn.Sequential(nn.Linear(self.width or shapes.features, c), nn.Linear(c, self.hidden), nn.ReLU(), nn.Linear(self.hidden, c))

    def loss(self, s: Step) -> Tensor:
        z_t, h_t = self._taught(s)
        adapted, t = z_t + s.parts(h_t), self.temperature
        soft = F.kl_div((s.s.logits / t).log_softmax(-1), (adapted / t).log_softmax(-1), reduction="batchmean", log_target=True)
        assert s.s.labels is not None
        return task_loss(s.s) + F.cross_entropy(adapted, s.s.labels) + self.alpha * t**2 * soft

    @torch.no_grad()
    def _taught(self, s: Step) -> tuple[Tensor, Tensor]:
        """The frozen teacher's logits and features."""
        if self.teacher is None:
            with s.frozen():
                seen = s.run(s.s.batch)
            return seen.logits, seen.h.float()
        z, h = (x.detach().to(s.s.logits) for x in self.teacher(s.s))
        wide = self.width or s.s.h.shape[-1]
        if z.shape != s.s.logits.shape or h.shape != (len(z), wide):
            wanted = f"logits {tuple(s.s.logits.shape)} and features ({len(s.s.logits)}, {wide})"
            raise InputError(f"pesf_kd: the teacher gives logits {tuple(z.shape)} and features {tuple(h.shape)}; {wanted} are asked for (width=)")
        return z, h
