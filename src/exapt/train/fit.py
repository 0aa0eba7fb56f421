"""The verbs of training: ``fit``, ``evaluate``, ``predict``."""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from exapt.core.attach import Statistics, attach, expanded
from exapt.core.calibrate import BACKWARD, calibrate
from exapt.core.contract import Method
from exapt.core.entry import usable
from exapt.core.errors import InputError
from exapt.core.file import save, write_aside
from exapt.core.objective import Objective
from exapt.core.recompute import recomputed
from exapt.core.registry import method as method_of
from exapt.core.sites import choose, sites
from exapt.core.slots import slots_of
from exapt.core.state import adapters, state_of
from exapt.core.views import Viewer
from exapt.train.adapt import ObjectiveLoop, check, domains_of, driving
from exapt.train.batches import Source, is_loader, plain_parts
from exapt.train.checkpoint import copied, tracked
from exapt.train.config import FitConfig
from exapt.train.data import load_data
from exapt.train.heads import Classifier, head_places, headless, to_device
from exapt.train.loop import Loop, observed, optimiser
from exapt.train.memory import Peak
from exapt.train.metrics import bootstrap as interval_of
from exapt.train.strategy import fabric_of, to_bfloat16, world_of
from exapt.train.task import Task
from exapt.train.values import Custom

Loss = Callable[[nn.Module, Any], Tensor]
_CALIBRATION_BATCHES = 8


@dataclass
class FitResult:
    """What :func:`fit` returns.

    Attributes:
        model: The trained model, in evaluation mode; the one given, unless the task put a head on it.
        metrics: Of the last evaluation on the validation data, with ``patience`` of the best one; empty without such data.
        history: The log's entries.
        seconds: Duration.
        steps: Optimiser steps done, those before resuming included.
        peak_bytes: Highest memory: on a GPU as CUDA's allocator counts, else growth of the process's resident memory.
        folder: Where everything was written.
        stopped: Why it ended.
        parts: The trained parts of the objective (domain-specific heads, discriminators), where it has some.
    """

    model: nn.Module
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    peak_bytes: int = 0
    folder: str | None = None
    stopped: str = ""
    parts: nn.Module | None = None


def fit(
    model: nn.Module,
    task: Task,
    data: Any = None,
    method: Method | Mapping[Any, Method] | None = None,
    where: Any = None,
    *,
    source: Any = None,
    target: Any = None,
    objective: Objective | None = None,
    head: str | None = None,
    validation: Any = None,
    name: str = "default",
    config: FitConfig | None = None,
    loss: Loss | None = None,
    statistics: Statistics | None = None,
) -> FitResult:
    """Adapts a model to a task, with AdamW, and returns it with what was measured.

    Python's, NumPy's and torch's generators are seeded. A head that the task makes, or that a ``...For...`` model of the
    transformers library carries, is trained under the same adapter (method ``full``), so that the adapter's file holds it;
    given ``{where: method}``, only the former.

    Args:
        model: Any module; a headless transformers encoder gets a head (``task.prepare``).
        task: What the rows mean and what is asked.
        data: Anything :func:`exapt.train.load_data` reads, a ``DataLoader`` included; its batches are shared out among the
            processes, and on resuming those done are read again and passed over.
        method: What to attach; ``None`` trains the adapters that are attached, and without any the model itself.
        where: Sites, as for :func:`exapt.attach`.
        source: With an objective: labelled data in place of ``data``; several domains as ``{"name": data}``, of which every batch then has
            the same share.
        target: With an objective: unlabelled data of the target. Labels in it are not read.
        objective: What is minimised where source and target differ (``exapt.objectives``), with any method. One process.
        head: With an objective: name of the module that makes the logits, where the model's structure does not tell.
        validation: Data to evaluate on.
        name: Name of the new adapter.
        config: How to train.
        loss: ``loss(model, batch)`` instead of the task's: the mean over the batch, a scalar.
        statistics: For methods that declare ``needs``; by default :func:`exapt.calibrate` collects them from the first 8 batches.

    Returns:
        The result. With ``config.folder`` the adapter is in ``adapter.safetensors`` there (without adapters, the trained
        tensors in ``model.safetensors``), beside ``log.jsonl``, ``tensorboard/`` and ``checkpoints/``.

    Raises:
        InputError: for data, settings, an objective or a model that cannot be used; for a loss or gradient that is not finite, before it
            has changed anything.

    >>> import torch
    >>> import exapt
    >>> from exapt.train import Custom, FitConfig
    >>> rows = [(torch.tensor([x / 8, 1.0]), torch.tensor(x / 4)) for x in range(8)]
    >>> task = Custom(lambda m, b: ((m(b[0])[:, 0] - b[1]) ** 2).mean())
    >>> result = fit(torch.nn.Linear(2, 1), task, rows, config=FitConfig(epochs=30, lr=0.1, progress=False))
    >>> result.steps, result.history[-1]["loss"] < result.history[0]["loss"]
    (30, True)
    """
    config = config or FitConfig()
    started = time.perf_counter()
    rows, goal = _data(task, data, source, target, objective, loss)
    held_out = None if validation is None else task.rows(load_data(validation))
    if held_out is not None:
        task.check(held_out, training=False)
    fabric = fabric_of(config)
    _seed(config.seed)
    model = _adapted(model, task, rows if rows is not None else goal, method, where, name, statistics, loss, config, fabric.device, rows is not None)
    _seed(config.seed + world_of()[0])
    if config.precision == "bf16-true":
        to_bfloat16(model)
        loss = _in_bfloat16(loss or task.loss)
    with Peak(fabric.device).measured() as peak, recomputed(model, config.checkpointing):
        wrapped = fabric.setup_module(model)
        optimizer = optimiser(model, config)
        common = (model, wrapped, optimizer, fabric, task)
        if objective is None:
            loop = Loop(*common, Source(rows, task, config, world_of()), config, loss or task.loss, held_out)
        else:
            order, viewer = driving(rows, goal, task, config, objective), Viewer(model, head, objective.taps)
            loop = ObjectiveLoop(*common, order, config, None, held_out, objective=objective, target=goal, viewer=viewer)
        if config.resume:
            loop.resume()
        loop.start_log()
        try:
            stopped = loop.run()
        finally:
            loop.log.close()
    model.eval()
    metrics = loop.best if config.patience is not None else loop.last
    _write(model, config, name, metrics, loop, task)
    parts = loop.parts if isinstance(loop, ObjectiveLoop) else None
    return FitResult(model, metrics, loop.log.history, time.perf_counter() - started, loop.step, peak.bytes, config.folder, stopped, parts)


def _data(task: Task, data: Any, source: Any, target: Any, objective: Objective | None, loss: Loss | None) -> tuple[Any, Any]:
    """Rows to learn from and rows of the target, checked."""
    if objective is None:
        if source is not None or target is not None:
            raise InputError("source= and target= belong to an objective; give objective=, or the rows as data")
        if data is None:
            raise InputError("fit needs data")
        rows = task.rows(load_data(data))
        task.check(rows, training=True)
        return rows, None
    if loss is not None or (data is not None and source is not None):
        raise InputError("an objective brings its own loss; leave loss= out" if loss is not None else "give the labelled data once, as source=")
    labelled = data if source is None else source
    rows = None if labelled is None else domains_of(labelled, task)
    if rows is not None:
        task.check(rows, training=True)
    goal = None if target is None else task.rows(load_data(target))
    check(objective, rows, goal, world_of()[1])
    return rows, goal


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _in_bfloat16(loss: Loss) -> Loss:
    """The loss with the batch's floating-point inputs (not its labels) in bfloat16."""

    def run(model: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            batch = {k: v.bfloat16() if k != "labels" and isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        return loss(model, batch).float()

    return run


def _adapted(
    model: nn.Module, task: Task, rows: Any, method: Any, where: Any, name: str, statistics: Statistics | None, loss: Loss | None,
    config: FitConfig, device: torch.device, labelled: bool = True,
) -> nn.Module:  # fmt: skip
    """The model for the task with what is to be trained on it."""
    inner = adapters(model)
    prepared = task.prepare(model)
    if prepared is not model and inner:
        raise InputError("the adapters hang on the encoder itself; call model = task.prepare(model) first, then attach to that")
    model = prepared
    if method is None:
        if isinstance(model, Classifier) and adapters(model) and not any(m is model.head for m, _ in slots_of(model)):
            raise InputError('the new head belongs to no adapter and would be lost; attach {"linear": LoRA(), "head": FullTuning()}, or give fit the method')
        return model
    rules: dict[Any, Method] = {tuple(place) if isinstance(place, list) else place: m for place, m in expanded(method, where)}
    heads = set(head_places(model)) if isinstance(model, Classifier) or (not isinstance(method, Mapping) and _judges(task)) else set()
    left = frozenset(heads - _replaced_whole(model, rules))
    if left:  # first, so that no other rule of the same contract takes a part of the head
        rules = {_Places(left): method_of("full"), **rules}
    if statistics is None and any(m.needs for m in rules.values()):
        statistics = _statistics(model.to(device), task, rows, rules, loss, config, labelled)
    if len(rules) == 1:
        ((place, only),) = rules.items()
        return attach(model, only, place, name, statistics=statistics, seed=config.seed)
    full = {m.where if place is None else place: m for place, m in rules.items()}
    return attach(model, full, None, name, statistics=statistics, seed=config.seed)


@dataclass(frozen=True)
class _Places:
    """A choice of sites by the names of their modules."""

    names: frozenset[str]

    def __call__(self, site: Any) -> bool:
        return site.module_name in self.names


def _judges(task: Task) -> bool:
    """Whether the task reads its answer from a head of its own (a language model's belongs to the base)."""
    return not isinstance(task, Custom) and hasattr(task, "label")


def _replaced_whole(model: nn.Module, rules: Mapping[Any, Method]) -> set[str]:
    """Modules that a rule replaces already."""
    found = sites(model)
    taken = set()
    for place, m in rules.items():
        if m.key == "full":
            taken |= {s.module_name for s in choose(found, m.where if place is None else place, functools.partial(usable, m))}
    return taken


def _statistics(
    model: nn.Module, task: Task, rows: Any, rules: Mapping[Any, Method], loss: Loss | None, config: FitConfig, labelled: bool
) -> Statistics:  # fmt: skip
    """What the methods need, from the first batches."""
    found: dict[str, dict[str, Tensor]] = {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for place, m in rules.items():
        if m.needs:
            if not labelled and set(m.needs) & set(BACKWARD):
                raise InputError(f"{m.key} needs gradients of a loss, and the target has no labels; give statistics= of labelled data")
            parts = plain_parts(rows, task, config.batch_size, labelled=labelled)
            batches = (to_device(p.batch, device) for p in islice(parts, _CALIBRATION_BATCHES))
            for site, values in calibrate(model, batches, m, place, loss or (task.loss if labelled else task.call)).items():
                found.setdefault(site, {}).update(values)
    return found


def _write(model: nn.Module, config: FitConfig, name: str, metrics: dict[str, float], loop: Loop, task: Task) -> None:
    """Writes the result into the folder: the adapters that were trained, or the trained tensors."""
    if config.folder is None:
        return
    folder = Path(config.folder)
    trained = state_of(model).active if adapters(model) else ()
    noted = {"task": type(task).__name__, "steps": loop.step, "train": {**config.fixed(), "processes": world_of()[1]}}
    for n in trained:
        file = folder / ("adapter.safetensors" if len(trained) == 1 else f"adapter-{n}.safetensors")
        save(model, file, n, metrics=metrics, provenance=noted)
    if not trained:
        tensors = copied(tracked(model))
        if world_of()[0] == 0:
            write_aside(folder / "model.safetensors", safetensors.torch.save(tensors))


def evaluate(model: nn.Module, task: Task, data: Any, batch_size: int = 32, bootstrap: int = 0, seed: int = 0, progress: bool = False) -> dict[str, Any]:
    """Measures a model on a task.

    Args:
        model: The model, with its adapters as they are active; its mode is left as it was.
        task: What is asked.
        data: Anything :func:`exapt.train.load_data` reads.
        batch_size: Rows at once; the result does not depend on it beyond rounding.
        bootstrap: Resamples for a 95 % percentile interval over examples; 0: none.
        seed: Seed of the resampling.
        progress: Show a progress bar on standard error.

    Returns:
        Metrics by name; with ``bootstrap`` also ``accuracy_interval`` (or that of the task's own measure), ``(low, high)``.

    Raises:
        InputError: for a model without the task's head, empty data, or a label that the task does not know, with its row.
    """
    outcomes = _observed(model, task, data, batch_size, True, progress)
    found: dict[str, Any] = dict(task.metrics(outcomes))
    if bootstrap:
        found[f"{task.interval}_interval"] = interval_of([task.ratio(o) for o in outcomes], bootstrap, seed)
    return found


def predict(model: nn.Module, task: Task, data: Any, batch_size: int = 32) -> list[Any]:
    """Returns the model's answer for each row, which needs no label: a label, a value, a list of tags; under ``Custom`` its output.

    Args:
        model: The model, with its adapters as they are active; its mode is left as it was.
        task: What is asked.
        data: Anything :func:`exapt.train.load_data` reads.
        batch_size: Rows at once.
    """
    found = _observed(model, task, data, batch_size, False, False)
    return found if isinstance(task, Custom) else [o.prediction for o in found]


def _observed(model: nn.Module, task: Task, data: Any, batch_size: int, labelled: bool, progress: bool) -> list[Any]:
    if headless(model) and task.prepare(model) is not model:
        raise InputError("the model has no head for this task; fit it, or load an adapter onto task.prepare(model)")
    rows = task.rows(load_data(data))
    if labelled:
        task.check(rows, training=False)
    elif hasattr(rows, "__len__") and len(rows) == 0:
        raise InputError("there are no rows to predict")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if progress and not is_loader(rows):
        rows = _Watched(rows)
    return observed(model, task, rows, batch_size, device, labelled)


@dataclass
class _Watched:
    """Rows that move a progress bar when they are read."""

    rows: Any
    bar: Any = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True))
        self.task = self.bar.add_task("evaluate", total=len(self.rows))
        self.bar.start()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        self.bar.advance(self.task)
        if self.bar.finished:
            self.bar.stop()
        return self.rows[i]
