"""The contract of objectives: what is minimised when source and target differ, whatever parameters are shifted.

An objective knows only tensors. Models, adapters, data and optimisers are dealt with once, by ``fit``; an objective is a frozen
dataclass of numbers with one method, ``loss``, and more where its paper needs more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.components import component_of
from exapt.core.errors import InputError
from exapt.core.sites import Where


@dataclass
class Seen:
    """What the model did on one batch, one row for every prediction.

    Attributes:
        logits: (n, classes), single precision.
        features: (n, d), the input of the head; ``None`` where the model has none that can be told.
        labels: (n,) int64; ``None`` for the target.
        domains: (n,) int64, which of the source's domains; zeros where there is one.
        index: (n,) int64, the row's place in its data.
        batch: The batch itself, which ``Step.run`` takes.
        taps: Outputs of the sites that the objective asks for, by name.
    """

    logits: Tensor
    features: Tensor | None
    labels: Tensor | None
    domains: Tensor
    index: Tensor
    batch: dict[str, Any]
    taps: dict[str, Tensor] = field(default_factory=dict)

    @property
    def p(self) -> Tensor:
        """Softmax of the logits (n, classes)."""
        return self.logits.softmax(-1)

    @property
    def h(self) -> Tensor:
        """The features (n, d).

        Raises:
            InputError: if there are none.
        """
        if self.features is None:
            raise InputError("this objective reads the head's input, but no layer of the model can be told to be its head; give fit head=")
        return self.features


@dataclass(frozen=True)
class Shapes:
    """What ``parts`` is told: width of the features, number of classes, of source domains, of source and target rows, and of each tap."""

    features: int
    classes: int
    domains: int = 1
    source_rows: int = 0
    target_rows: int = 0
    taps: Mapping[str, torch.Size] = field(default_factory=dict)


@dataclass
class Step:
    """One step of training, as an objective sees it.

    Attributes:
        source: The labelled batch; ``None`` for source-free objectives.
        target: The unlabelled batch; ``None`` where the objective asks for none.
        parts: What ``Objective.parts`` made.
        progress: How much of the training is done, in [0, 1].
        step: Number of the step, from 0.
        run: ``run(batch, change=None)``: another forward pass, as a ``Seen``; ``change`` as in :class:`exapt.core.views.Viewer`.
        head: ``head(features)``: logits of given features.
        frozen: A context in which the model is as it was before training.
        parameters: The tensors that train, parts included.
        memory: Tensors that the objective keeps between steps, by name; saved with checkpoints.
        backward: ``backward(loss)``: adds the loss's gradients.
        generator: For everything random.
        sources, targets: ``sources()``: all batches of the data in order as ``Seen``, without gradient (a pass over the data).
        noting: Whether methods note things of the last pass that their penalties read; an objective that moves parameters ends with a pass where they are.
    """

    source: Seen | None
    target: Seen | None
    parts: nn.Module
    progress: float
    step: int
    run: Callable[..., Seen]
    head: Callable[[Tensor], Tensor]
    frozen: Callable[[], AbstractContextManager[Any]]
    parameters: Mapping[str, Tensor]
    memory: dict[str, Tensor]
    backward: Callable[[Tensor], None]
    generator: torch.Generator
    sources: Callable[[], Any]
    targets: Callable[[], Any]
    noting: bool = False

    @property
    def s(self) -> Seen:
        """The source batch, where the objective's setting promises one."""
        assert self.source is not None
        return self.source

    @property
    def t(self) -> Seen:
        """The target batch, where the objective's setting promises one."""
        assert self.target is not None
        return self.target


class Objective:
    """What every objective shares; subclass it as a frozen dataclass and register it with ``@component(key, kind="objective")``."""

    setting: ClassVar[str] = "adaptation"
    """"adaptation": labelled source and unlabelled target; "source-free": unlabelled target alone; "generalisation": several labelled
    domains; "source": labelled data alone (regularised fine-tuning)."""
    equation: ClassVar[str] = ""
    """The objective in one line of LaTeX."""
    needs_features: ClassVar[bool] = False
    """Whether it reads the head's input."""
    part_rate: float = 1.0
    """Factor on the learning rate of the parts."""

    @property
    def taps(self) -> Where | None:
        """Sites whose outputs ``Seen.taps`` holds."""
        return None

    def parts(self, shapes: Shapes) -> nn.Module | None:
        """Returns trainable tensors of the objective's own (a discriminator, a second head), or nothing."""
        return None

    def loss(self, s: Step) -> Tensor:
        """Returns the scalar to minimise, the labelled data's own loss included."""
        raise NotImplementedError

    def update(self, s: Step) -> Tensor:
        """Fills the gradients of one step and returns the loss; override it where they are no gradient of one scalar."""
        loss = self.loss(s)
        s.backward(loss)
        return loss.detach()

    def before_epoch(self, s: Step) -> None:
        """Called before each pass over the data (``s.source`` and ``s.target`` are ``None``): pseudo-labels, centres, statistics."""

    def after_step(self, s: Step) -> None:
        """Called after the optimiser's step, under ``no_grad``: averages, teachers. May change ``s.parameters`` in place."""

    def finish(self, s: Step) -> None:
        """Called at the end, under ``no_grad``: what the model is left with."""


def task_loss(seen: Seen, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of labelled rows, a scalar; with ``weights`` (n,) their weighted mean.

    >>> z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> round(float(task_loss(Seen(z, None, torch.tensor([0, 0]), torch.zeros(2), torch.arange(2), {}))), 4)
    0.7201
    """
    assert seen.labels is not None
    if weights is None:
        return F.cross_entropy(seen.logits, seen.labels, label_smoothing=smoothing)
    each = F.cross_entropy(seen.logits, seen.labels, reduction="none", label_smoothing=smoothing)
    return (weights * each).sum() / weights.sum().clamp_min(1e-12)


def objective(key: str, **fields: Any) -> Objective:
    """Returns an objective by its key.

    Raises:
        InputError: for a key or field that does not exist.
    """
    cls = component_of(key, "objective")
    try:
        made: Objective = cls(**fields)
    except TypeError as e:
        raise InputError(f"objective {key}: {e}") from e
    return made


class Around(Objective):
    """An objective that changes what another one sees, or adds to it; subclass it with a field ``inner``, which may be its key.

    All but the loss is the inner objective's, on the step that :meth:`seen_by_inner` gives.
    """

    inner: Objective | str | None = None

    @property
    def objective(self) -> Objective | None:
        """The inner objective itself."""
        return objective(self.inner) if isinstance(self.inner, str) else self.inner

    def seen_by_inner(self, s: Step) -> Step:
        """The step as the inner objective sees it."""
        return s

    @property
    def taps(self) -> Where | None:
        return None if self.objective is None else self.objective.taps

    def parts(self, shapes: Shapes) -> nn.Module | None:
        return None if self.objective is None else self.objective.parts(shapes)

    def before_epoch(self, s: Step) -> None:
        if self.objective is not None:
            self.objective.before_epoch(self.seen_by_inner(s))

    def after_step(self, s: Step) -> None:
        if self.objective is not None:
            self.objective.after_step(s)

    def finish(self, s: Step) -> None:
        if self.objective is not None:
            self.objective.finish(s)


class HeldOut(nn.Module):
    """Which of the source's rows are held out for a choice: ``held`` (rows,), booleans.

    >>> int(HeldOut(10, 0.3, 0).held.sum())
    3
    """

    held: Tensor

    def __init__(self, rows: int, share: float, seed: int) -> None:
        super().__init__()
        held = torch.zeros(rows, dtype=torch.bool)
        held[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: max(1, round(share * rows))]] = True
        self.register_buffer("held", held)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grads[0], None


def reversed_gradient(x: Tensor, factor: float = 1.0) -> Tensor:
    """Returns ``x``; on the way back its gradient is multiplied by ``-factor``.

    >>> x = torch.ones(2, requires_grad=True)
    >>> reversed_gradient(x, 0.5).sum().backward()
    >>> x.grad
    tensor([-0.5000, -0.5000])
    """
    return _Reversed.apply(x, factor)  # type: ignore[no-any-return,no-untyped-call]
