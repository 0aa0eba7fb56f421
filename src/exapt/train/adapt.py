"""Training under an objective: what ``fit(..., source=, target=, objective=)`` adds to the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.contract import seeded
from exapt.core.errors import InputError
from exapt.core.objective import Objective, Seen, Shapes, Step
from exapt.core.slots import Slots
from exapt.core.state import adapters, disabled, noted, penalty
from exapt.core.views import Viewer, evaluating, flat
from exapt.train.batches import Part, Source, is_loader, plain_parts
from exapt.train.checkpoint import part as named_part
from exapt.train.checkpoint import tracked
from exapt.train.config import FitConfig
from exapt.train.data import load_data
from exapt.train.heads import to_device
from exapt.train.loop import Loop
from exapt.train.task import IGNORED, Task


class Domains(Sequence[Any]):
    """Rows of several domains, one after the other.

    >>> rows = Domains({"a": [1, 2], "b": [3]})
    >>> rows[2], rows.domain(2), rows.names
    (3, 1, ('a', 'b'))
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.names = tuple(map(str, parts))
        self.parts = list(parts.values())
        self.starts = [0, *itertools.accumulate(len(p) for p in self.parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def domain(self, i: int) -> int:
        """Which domain row ``i`` is of."""
        return next(d for d, end in enumerate(self.starts[1:]) if i < end)

    def of(self, index: Tensor) -> Tensor:
        """Which domain each row is of, int64: :meth:`domain` for as many rows as an image has pixels."""
        return torch.bucketize(index, torch.tensor(self.starts[1:-1], device=index.device), right=True)

    def __getitem__(self, i: Any) -> Any:
        d = self.domain(range(len(self))[i])
        return self.parts[d][range(len(self))[i] - self.starts[d]]


def domains_of(source: Any, task: Task) -> Any:
    """The rows of one data set, or of a mapping from names of domains to data sets."""
    if not isinstance(source, Mapping):
        return task.rows(load_data(source))
    parts = {name: task.rows(load_data(data)) for name, data in source.items()}
    empty = [n for n, p in parts.items() if is_loader(p) or len(p) == 0]
    if empty or not parts:
        raise InputError(f"source domain {empty[0] if empty else '(none)'!r} has no rows")
    return Domains(parts)


class Balanced(Source):
    """Batches in which every domain has the same share; the small ones come round again."""

    def _count(self) -> int | None:
        sizes = [len(p) for p in self.data.parts]
        return -(-max(sizes) * len(sizes) // self.config.batch_size)

    def order(self, number: int) -> list[int]:
        sizes = [len(p) for p in self.data.parts]
        longest = max(sizes)
        rows = []
        for d, size in enumerate(sizes):
            turns = -(-longest // size)
            g = seeded(self.config.seed, "order", str(number), str(d))
            rows.append(torch.cat([torch.randperm(size, generator=g) for _ in range(turns)])[:longest] + self.data.starts[d])
        return torch.stack(rows, 1).flatten().tolist()


def driving(rows: Any, target: Any, task: Task, config: FitConfig, objective: Objective) -> Source:
    """The data that the loop goes through: the source, or the target where there is none."""
    if rows is None:
        return Source(target, task, config, (0, 1), labelled=False)
    return (Balanced if isinstance(rows, Domains) and len(rows.parts) > 1 else Source)(rows, task, config, (0, 1))


def check(objective: Objective, rows: Any, target: Any, world: int) -> None:
    """Raises where data and objective do not fit together."""
    name, setting = type(objective).__name__, objective.setting
    if world > 1:
        raise InputError(f"{name}: an objective runs in one process; start without torchrun")
    if rows is None and setting != "source-free":
        raise InputError(f"{name} needs labelled data: give source=")
    if target is None and setting in ("adaptation", "source-free"):
        raise InputError(f"{name} needs unlabelled data of the target: give target=")
    if setting == "generalisation" and not (isinstance(rows, Domains) and len(rows.parts) > 1):
        raise InputError(f'{name} needs several labelled domains: give source={{"first": rows, "second": rows}}')
    if any(is_loader(d) for d in (rows, target) if d is not None):
        raise InputError(f"{name}: with an objective, source and target are rows, not a DataLoader")
    if target is not None and len(target) == 0:
        raise InputError("the target has no rows")


@dataclass
class ObjectiveLoop(Loop):
    """A loop whose steps are an objective's."""

    objective: Objective = field(default_factory=Objective)
    target: Any = None
    viewer: Viewer = field(default=None)  # type: ignore[assignment]
    parts: nn.Module = field(default_factory=nn.Identity)
    memory: dict[str, Tensor] = field(default_factory=dict)
    original: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = self.objective.setting == "source-free"
        labelled = not self.free
        self.targets = None if self.target is None else Source(self.target, self.task, dataclasses.replace(self.config, accumulate=1), (0, 1), labelled=False)
        self._stream: tuple[int, Iterator[list[Part]]] | None = None
        if not adapters(self.model):
            self.original = {k: t.detach().clone() for k, t in tracked(self.model).items()}
        first = next(iter(plain_parts(self.source.data, self.task, min(2, len(self.source.data)), labelled=labelled)))
        with evaluating(self.model), torch.no_grad():
            seen = self._seen(first, None)
        if seen.features is None and self.objective.needs_features:
            seen.h  # noqa: B018  says what to do
        shapes = Shapes(
            0 if seen.features is None else seen.features.shape[-1], seen.logits.shape[-1],
            len(getattr(self.source.data, "parts", ())) or 1, 0 if self.free else len(self.source.data),
            0 if self.target is None else len(self.target), {k: t.shape for k, t in seen.taps.items()},
        )  # fmt: skip
        self.parts = (self.objective.parts(shapes) or nn.Identity()).to(self.fabric.device)
        trained = [p for p in self.parts.parameters() if p.requires_grad]
        if trained:
            rate = self.config.lr * self.objective.part_rate
            self.optimizer.add_param_group({"params": trained, "lr": rate, "factor": self.objective.part_rate, "weight_decay": self.config.weight_decay})

    def parameters(self) -> dict[str, Tensor]:
        """What trains, the objective's parts included."""
        own = {k: t for k, t in tracked(self.model).items() if t.requires_grad}
        return own | {f"parts.{k}": p for k, p in self.parts.named_parameters() if p.requires_grad}

    def _run(self, batch: dict[str, Any], change: Any, index: Tensor | None, label: bool) -> Seen:
        view = self.viewer(lambda: self.task.call(self.wrapped, batch), change)
        labels = batch.get("labels") if label else None
        kept = None
        if view.logits.dim() > 2:
            kept = labels != IGNORED if labels is not None else batch["words"] >= 0 if "words" in batch else batch.get("attention_mask")
            kept = None if kept is None else kept.bool()
        logits, features = flat(view.logits.float(), self.task.aligned(view.features, view.logits), kept)
        rows = torch.arange(len(view.logits), device=logits.device)
        index = rows if index is None else index.to(logits.device)
        if view.logits.dim() > 2:
            full = torch.ones(view.logits.shape[:-1], dtype=torch.bool, device=logits.device) if kept is None else kept
            index = index.view(-1, *[1] * (full.dim() - 1)).expand(full.shape)[full]
            labels = None if labels is None else labels[full]
        data = self.source.data
        domains = data.of(index) if isinstance(data, Domains) and label else torch.zeros_like(index)
        return Seen(logits, features, labels, domains, index, batch, view.taps)

    def _head(self, h: Tensor) -> Tensor:
        """The head's logits of given features, which belong to no call of the model."""
        slots = self.viewer.head._modules.get("exapt")
        for e in slots.entries if isinstance(slots, Slots) else ():
            read = next((t for n, t in e.state.call.items() if n in e.method.reads), None) if e.state is not None else None
            if read is not None and len(read) != len(h):
                raise InputError(f"{type(self.objective).__name__} runs the head on kept features, of which {e.method.key} knows no {e.method.reads[0]}")
        return self.task.judged(self.viewer.head, h)

    def _seen(self, part: Part, change: Any = None, label: bool = True) -> Seen:
        batch = to_device(part.batch, self.fabric.device)
        return self._run(batch, change, torch.as_tensor(list(part.rows)), label and "labels" in batch)

    def _target_part(self, number: int) -> Part:
        """Batch ``number`` of the target, which comes round again and again in new orders."""
        assert self.targets is not None
        per_epoch = self.targets.per_epoch
        assert per_epoch is not None
        if self._stream is None or self._stream[0] != number:
            self._stream = (number, self.targets.epoch(number // per_epoch, number % per_epoch))
        found = next(self._stream[1], None)
        if found is None:
            self._stream = (number, self.targets.epoch(number // per_epoch, 0))
            found = next(self._stream[1])
        self._stream = (number + 1, self._stream[1])
        return found[0]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block the model is as it was before training."""
        if adapters(self.model):
            with disabled(self.model):
                yield
            return
        now = {k: t.data for k, t in tracked(self.model).items()}
        try:
            for k, t in tracked(self.model).items():
                t.data = self.original[k] if isinstance(t, nn.Parameter) else self.original[k].clone()  # batch norms in training mode write theirs
            yield
        finally:
            for k, t in tracked(self.model).items():
                t.data = now[k]

    def _pass(self, data: Any, labelled: bool) -> Iterator[Seen]:
        with evaluating(self.model), torch.no_grad():
            for p in plain_parts(data, self.task, self.config.batch_size, labelled=labelled):
                yield self._seen(p, label=labelled)

    def made(self, source: Seen | None, target: Seen | None, share: float = 1.0) -> Step:
        """What the objective sees."""
        rows = None if self.free else self.source.data
        return Step(
            source, target, self.parts, self.step / max(self.source.total, 1), self.step,
            lambda batch, change=None: self._run(batch, change, None, "labels" in batch),
            self._head, self.frozen, self.parameters(), self.memory,
            lambda loss: self.fabric.backward(loss * share, retain_graph=bool(noted(self.model))),  # penalties read what this pass noted
            seeded(self.config.seed, "objective", str(self.step)),
            lambda: self._pass(rows, True), lambda: self._pass(self.target, False), bool(noted(self.model)),
        )  # fmt: skip

    def begin_epoch(self) -> None:
        self.objective.before_epoch(self.made(None, None))

    def optimise(self, group: list[Part]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[tuple[Tensor, Part]] = []
        step = self.made(None, None)
        for i, part in enumerate(group):
            seen = self._seen(part)
            other = None
            if self.target is not None:
                other = seen if self.free else self._seen(self._target_part(self.step * self.config.accumulate + i), label=False)
            step = self.made(None if self.free else seen, other, 1 / len(group))
            losses.append((self.objective.update(step) / len(group), part))
        extra = penalty(self.model)
        if extra is not None:
            self.fabric.backward(extra)
        value = float(sum(float(x) for x, _ in losses))
        self.apply(value, losses)
        with torch.no_grad():
            self.objective.after_step(step)
        return value

    def run(self) -> str:
        stopped = super().run()
        with torch.no_grad():
            self.objective.finish(self.made(None, None))
        return stopped

    def expected(self) -> dict[str, Any]:
        return {**super().expected(), "objective": type(self.objective).__name__}

    def extra(self) -> dict[str, Tensor]:
        kept = {f"memory/{k}": t for k, t in self.memory.items()} | {f"parts/{k}": t for k, t in self.parts.state_dict().items()}
        for name, p in self.parts.named_parameters():
            kept |= {f"optimizer/{name}/{k}": t for k, t in self.optimizer.state.get(p, {}).items()}  # type: ignore[call-overload]
        return kept

    def put_extra(self, tensors: dict[str, Tensor]) -> None:
        self.memory.update({k: t.to(self.fabric.device) for k, t in named_part(tensors, "memory").items()})
        self.parts.load_state_dict(named_part(tensors, "parts"))
        for name, p in self.parts.named_parameters():
            entries = {k: t if k == "step" else t.to(p.device) for k, t in named_part(named_part(tensors, "optimizer"), name).items()}
            if entries:
                self.optimizer.state[p] = entries  # type: ignore[index]
