"""Knowledge Concentration: many specialists distilled into one model at their own paces (Gao et al., 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.objective import Objective, Seen, Shapes, Step


def paced(z: Tensor, member: Tensor, pace: Tensor) -> Tensor:
    r"""Scales each vertical's logits to the length that is its pace: :math:`\gamma_v\, z_v / \|z_v\|_2`.

    Args:
        z: Logits (n, classes).
        member: (classes,) int64, the vertical of each class.
        pace: :math:`\gamma` (verticals).

    Returns:
        (n, classes).

    >>> paced(torch.tensor([[3.0, 4.0, -2.0]]), torch.tensor([0, 0, 1]), torch.tensor([5.0, 1.0]))
    tensor([[ 3.,  4., -1.]])
    """
    squares = z.new_zeros(len(z), len(pace)).index_add(1, member, z.square())
    return z * (pace / squares.clamp_min(1e-12).sqrt())[:, member]


class Paces(nn.Module):
    """The trained paces ``gamma`` (verticals) and each class's vertical."""

    member: Tensor

    def __init__(self, member: Tensor, counts: Tensor) -> None:
        super().__init__()
        self.register_buffer("member", member)
        self.gamma = nn.Parameter(counts.float().sqrt())


@component("knowledge_concentration", kind="objective", paper="Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN")
@dataclass(frozen=True)
class KnowledgeConcentration(Objective):
    r"""Distils specialists, each of which knows the classes of one vertical, into one model of all classes:

    .. math:: -\frac1n \sum_i \sum_j z^*_{ij} \log \sigma(x_{ij}) + (1 - z^*_{ij}) \log(1 - \sigma(x_{ij})),
        \qquad x_{i,v} = \gamma_v \frac{s_{i,v}}{\|s_{i,v}\|_2}

    The label of row i says whose vertical v it belongs to. :math:`z^*_i` is that specialist's :math:`\sigma(t_i)`, its K greatest, and zero for all
    other classes. The student's logits :math:`s` are normalised within each vertical and scaled by a trained pace :math:`\gamma_v`, which starts at
    :math:`\sqrt{N_v}`, as the gradient of a normalised logit shrinks with the vertical's number of classes :math:`N_v`. The model itself answers with
    :math:`s`; :func:`paced` with ``result.parts`` gives the answers x that were trained, which compare classes of different verticals.

    Args:
        verticals: For each specialist the classes that it knows, in the order of its logits; each class once.
        teachers: The specialists: each takes a batch as the objective sees it (:class:`~exapt.core.objective.Seen`) and returns its logits (n, N_v),
            trained with sigmoids.
        top: K.
        self_paced: Whether the student's logits are normalised and paced; otherwise they are x.
        part_rate: Factor on the paces' learning rate.

    Parts:
        ``gamma`` (verticals).

    Raises:
        InputError: without teachers, for verticals that do not hold every class once, or a teacher that answers other classes.

    References:
        Gao, Guo, Li and Nevatia, "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN", 2017. The paper's text was not at
        hand: its equations were taken from a detailed review. That the norm is taken within each vertical follows from the start of the paces. The
        structurally connected layers are a choice of the model's head, which is the caller's.

    >>> KnowledgeConcentration().top
    100
    """

    equation = r"\mathrm{BCE}\bigl(\sigma(\gamma_v s_v / \|s_v\|), \mathrm{top}_K\,\sigma(t^{(v)})\bigr)"
    setting = "source"

    verticals: tuple[tuple[int, ...], ...] = ()
    teachers: tuple[Callable[[Seen], Tensor], ...] = ()
    top: int = 100
    self_paced: bool = True
    part_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.top < 1 or len(self.teachers) != len(self.verticals):
            raise InputError(f"knowledge_concentration: top is {self.top}, at least 1; {len(self.teachers)} teachers for {len(self.verticals)} verticals")

    def parts(self, shapes: Shapes) -> nn.Module:
        if not self.teachers:
            raise InputError("knowledge_concentration needs specialists: KnowledgeConcentration(verticals=((0, 1), (2,)), teachers=(...))")
        if sorted(c for v in self.verticals for c in v) != list(range(shapes.classes)):
            raise InputError(f"knowledge_concentration: the verticals {self.verticals} do not hold each of the {shapes.classes} classes once")
        member = torch.empty(shapes.classes, dtype=torch.long)
        for i, v in enumerate(self.verticals):
            member[list(v)] = i
        return Paces(member, torch.tensor([len(v) for v in self.verticals]))

    def loss(self, s: Step) -> Tensor:
        paces = s.parts
        assert isinstance(paces, Paces)
        assert s.s.labels is not None
        z = s.s.logits
        x = paced(z, paces.member, paces.gamma) if self.self_paced else z
        return F.binary_cross_entropy_with_logits(x, self._taught(s.s, paces.member), reduction="sum") / len(z)

    @torch.no_grad()
    def _taught(self, seen: Seen, member: Tensor) -> Tensor:
        """Soft labels (n, classes) of each row's own specialist."""
        assert seen.labels is not None
        soft, mine = torch.zeros_like(seen.logits), member[seen.labels]
        for i in mine.unique().tolist():
            answers = self.teachers[i](seen).detach().to(soft).sigmoid()
            wide = len(self.verticals[i])
            if answers.shape != (len(soft), wide):
                raise InputError(f"knowledge_concentration: teacher {i} gives {tuple(answers.shape)}; ({len(soft)}, {wide}) is asked for")
            if self.top < wide:
                answers = torch.zeros_like(answers).scatter(1, (best := answers.topk(self.top, 1)).indices, best.values)
            own = mine == i
            soft[own.nonzero(), torch.tensor(self.verticals[i], device=soft.device)] = answers[own]
        return soft
