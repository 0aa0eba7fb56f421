"""``online``: a model that adapts while it predicts, with the model's own call and output type."""

from __future__ import annotations

import collections
import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from exapt.core.attach import attach, detach
from exapt.core.contract import Method, seeded
from exapt.core.errors import InputError
from exapt.core.layers import walk
from exapt.core.registry import method as method_of
from exapt.core.resources import resident
from exapt.core.sites import sites
from exapt.core.slots import replace_first, slots_of
from exapt.core.state import activate, adapters, state_of
from exapt.core.views import Viewer, evaluating
from exapt.online.augment import augmented
from exapt.online.lame_online import OnlineLAME
from exapt.online.method import Batch, Host, Pass, Space, TestTime, entropy

SPACE, STATISTICS = "online", "online_statistics"
_BN = nn.modules.batchnorm._BatchNorm
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass
class Snapshot:
    """Everything that adapting can change, copied."""

    tensors: dict[str, Tensor]
    memory: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    generator: Tensor


class Online(nn.Module):
    """What :func:`online` returns.

    Attributes:
        model: The user's model, with the method's parameter space on it as the adapter ``"online"``.
        method, guard: As given.
        diagnostics: Of every batch: ``rows``, ``entropy`` (mean, nats), ``agreement`` (share of rows on which the frozen model says the same;
            ``None`` where it did not run), ``used`` rows, ``ms``, ``mb`` (resident memory of the process, on a GPU the allocator's peak),
            ``action`` and ``reason`` (what the guard did, or what was declared to happen for inputs that cannot be used).
    """

    model: nn.Module
    diagnostics: collections.deque[dict[str, Any]]

    def __init__(self, model: nn.Module, method: TestTime, guard: Any, host: Host, episodic: bool) -> None:
        super().__init__()
        self.model = model
        self.method, self.guard, self.host, self.episodic = method, guard, host, episodic
        self.diagnostics = collections.deque(maxlen=100_000)
        self.snapshots: dict[int, Snapshot] = {}
        self._count = 0
        self._begin()
        self._first = self._taken()

    def _begin(self) -> None:
        self.host.memory.clear()
        self.host.optimizer = self.method.optimizer(list(self.host.parameters.values())) if self.host.parameters else None
        with evaluating(self.model):
            self.method.start(self.host)
            if self.guard is not None:
                self.guard.start(self.host)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adapts on the batch and returns what the model returns, with the adapted logits, without gradient."""
        started = time.perf_counter()
        if self.episodic:
            self.reset()
        batch = Batch(args, kwargs)
        notes: dict[str, Any] = {}
        with evaluating(self.model):
            logits, output = self._answer(batch, notes)
        self.diagnostics.append(self._described(batch, logits, notes, started))
        return output

    def _answer(self, batch: Batch, notes: dict[str, Any]) -> tuple[Tensor, Any]:
        """Logits and output of one batch. Rows that are not finite are answered by the frozen model and not learned from."""
        host, x = self.host, batch.inputs
        good = torch.isfinite(x).flatten(1).all(1) if x.is_floating_point() else torch.ones(len(x), dtype=torch.bool, device=x.device)
        if not bool(good.all()):
            plain = host.run_frozen(batch)
            notes |= {"action": "frozen", "reason": f"{int((~good).sum())} rows are not finite", "used": 0}
            logits = plain.logits.clone()
            if bool(good.any()) and len(logits) == len(good):
                logits[good], _ = self._answer(batch.rows(good.nonzero()[:, 0]), {})
            return logits, self._written(plain, logits)
        before = self._taken() if self.guard is not None else None
        still = host.run_frozen(batch) if self.guard is not None else None
        host.notes = notes
        with torch.enable_grad():
            logits = self.method.step(host, batch).detach()
        if not bool(torch.isfinite(logits).all()):
            still = still or host.run_frozen(batch)
            self._put(before or self._first)
            notes |= {"action": "rollback", "reason": "the adapted model's logits are not finite", "used": 0}
            return still.logits, still.view.output
        if self.guard is not None:
            logits = self._guarded(batch, cast(Pass, still), logits, cast(Snapshot, before), notes)
        shown = still or host.notes.pop("pass", None) or host.run(batch)
        return logits, self._written(shown, logits)

    def _guarded(self, batch: Batch, still: Pass, logits: Tensor, before: Snapshot, notes: dict[str, Any]) -> Tensor:
        """The logits that the guard lets out, after what it decided."""
        verdict = self.guard.judge(self.host, batch, still, logits, self._from_the_start)
        notes |= {"action": verdict.action, "reason": verdict.reason, "agreement": float((still.logits.argmax(-1) == logits.argmax(-1)).float().mean())}
        if verdict.action in ("rollback", "reset"):
            kept = {k: t for k, t in self.host.memory.items() if k.startswith("guard/")}
            self._put(before if verdict.action == "rollback" else self._first)
            self.host.memory.update(kept)
        return cast(Tensor, verdict.logits)

    def _from_the_start(self, host: Host, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits of a batch in the method's first state: with the statistics alone where there are some, with their features; else after its own step."""
        if host.statistics:
            with host.values(host.source):
                seen = host.run(batch)
            return seen.logits, seen.features
        now, notes = self._taken(), dict(host.notes)
        self._put(self._first)
        with torch.enable_grad():
            logits = self.method.step(host, batch).detach()
        self._put(now)
        host.notes = notes
        return logits, None

    def _written(self, shown: Pass, logits: Tensor) -> Any:
        """The model's output with other logits, in its own shape and type."""

        def put(old: Tensor) -> Tensor:
            if old.shape == logits.shape:
                return logits.to(old.dtype)
            kept = torch.ones(old.shape[:-1], dtype=torch.bool, device=old.device) if shown.kept is None else shown.kept
            new = old.detach().clone()
            new[kept] = logits.to(old.dtype)
            return new

        return replace_first(shown.view.output, put)

    def _described(self, batch: Batch, logits: Tensor, notes: dict[str, Any], started: float) -> dict[str, Any]:
        device = logits.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident()
        mean = float(entropy(logits.float()).mean()) if len(logits) else 0.0
        found = {"rows": len(batch), "entropy": mean, "agreement": None, "used": len(batch), "action": "none", "reason": ""}
        known = {k: v for k, v in notes.items() if k != "pass"}
        return {**found, **known, "ms": 1e3 * (time.perf_counter() - started), "mb": memory / 2**20}

    def _tensors(self) -> dict[str, Tensor]:
        """What the method trains and counts."""
        return {**self.host.parameters, **_own(self.model, self.host.own)}

    def _taken(self) -> Snapshot:
        opt = self.host.optimizer
        return Snapshot(
            {k: t.detach().clone() for k, t in self._tensors().items()}, {k: t.clone() for k, t in self.host.memory.items()},
            None if opt is None else copy.deepcopy(opt.state_dict()), self.host.generator.get_state(),
        )  # fmt: skip

    def _put(self, s: Snapshot) -> None:
        with torch.no_grad():
            for k, t in self._tensors().items():
                t.copy_(s.tensors[k])
        self.host.memory.clear()
        self.host.memory.update({k: t.clone() for k, t in s.memory.items()})
        if self.host.optimizer is not None and s.optimizer is not None:
            self.host.optimizer.load_state_dict(copy.deepcopy(s.optimizer))
        self.host.generator.set_state(s.generator)

    def snapshot(self) -> int:
        """Keeps the present state and returns its number."""
        self._count += 1
        self.snapshots[self._count] = self._taken()
        return self._count

    def rollback(self, number: int | None = None) -> None:
        """Goes back to a snapshot, bit for bit; by default the last one.

        Raises:
            InputError: if there is no such snapshot.
        """
        number = max(self.snapshots, default=None) if number is None else number
        if number not in self.snapshots:
            raise InputError(f"there is no snapshot {number} (taken: {', '.join(map(str, self.snapshots)) or 'none'})")
        self._put(self.snapshots[number])

    def reset(self) -> None:
        """Goes back to the state before the first batch, bit for bit."""
        self._put(self._first)

    def close(self) -> nn.Module:
        """Takes everything off and returns the model as it was given."""
        for name in self.host.own:
            if name in adapters(self.model):
                detach(self.model, name)
        if adapters(self.model):
            activate(self.model, *self.host.names)
        return self.model


def online(
    model: nn.Module,
    method: TestTime | Method,
    guard: Any = None,
    *,
    space: Method | Space | str | None = None,
    where: Any = None,
    reference: Iterable[Any] | None = None,
    episodic: bool = False,
    head: str | None = None,
    augment: Augment | None = None,
    seed: int = 0,
) -> Online:
    """Returns ``model`` as a module that adapts to every batch it is called with.

    Args:
        model: Any module with logits (batch, classes) or (batch, length, classes), or an output of the transformers library that holds them.
            Its base weights are never changed: what adapts is an adapter, taken off by ``close``.
        method: ``Tent()``, ``EATA()`` ...; ``LAME()``, the method of :func:`exapt.attach`, serves too.
        guard: :class:`exapt.Guard`, which answers by the frozen model, resets or rolls back where adapting does harm.
        space: What trains in place of the method's own choice: a method (``LoRA(4)``) with ``where``, ``{where: method}``, or
            ``"adapters"``: the active adapters of the model themselves.
        where: Sites for ``space``.
        reference: Batches ``(inputs, labels)`` of the source, for methods that need them; inputs are a tensor, a tuple or a dict.
        episodic: Begin anew at every batch.
        head: Name of the module that makes the logits, where the model's structure does not tell.
        augment: ``augment(inputs, generator)`` for methods that compare views; by default flips, shifts and noise for images.
        seed: Of everything random.

    Raises:
        InputError: for a method that needs what the model, or the call, does not have.
    """
    if isinstance(method, Method) and method.key == "lame":
        method = OnlineLAME(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})  # type: ignore[arg-type]
    if not isinstance(method, TestTime):
        raise InputError(f"online needs a test-time method such as exapt.Tent(), not {method!r}")
    before = state_of(model).active if adapters(model) else ()
    batches = [_pair(item) for item in reference or ()]
    _check(model, method, batches, space is not None)
    own: list[str] = []
    try:
        parameters = _hung(model, method, space, where, before, own, seed)
        viewer = Viewer(model, head)
        if "head" in method.needs:
            viewer.head  # noqa: B018  raises where there is none
        source = {k: p.detach().clone() for k, p in parameters.items()}
        host = Host(
            model, viewer, tuple(own), tuple(before), parameters, source, _statistics(model), seeded(seed, "online"), augment or augmented, batches,
        )  # fmt: skip
        return Online(model, method, guard, host, episodic)  # what a method's start refuses must not leave its adapters on the model
    except BaseException:
        for name in own:
            detach(model, name)
        if before:
            activate(model, *before)
        raise


def _hung(model: nn.Module, method: TestTime, space: Any, where: Any, before: tuple[str, ...], own: list[str], seed: int) -> dict[str, nn.Parameter]:
    """Puts the method's adapters on, noting their names in ``own``, and returns what trains."""
    alpha = method.alpha()
    if alpha is not None and any(isinstance(m, _BN) for _, m in walk(model)):
        attach(model, method_of("norm_statistics", alpha=float(alpha)), _is_batch_norm, STATISTICS)
        own.append(STATISTICS)
    chosen = method.space() if space is None else space
    if chosen == "adapters" and not before:
        raise InputError('space="adapters" trains the model\'s active adapters, and there are none; attach one')
    if chosen is not None and chosen != "adapters":
        attach(model, cast(Any, chosen), where, SPACE, seed=seed)
        own.append(SPACE)
    if own or before:
        activate(model, *before, *own)
    trained = before if chosen == "adapters" else (SPACE,)
    return {n: p for n, p in _own(model, trained).items() if isinstance(p, nn.Parameter) and p.requires_grad}


def _is_batch_norm(site: Any) -> bool:
    return isinstance(site.module, _BN) and site.module.running_mean is not None


def _pair(item: Any) -> tuple[Batch, Tensor | None]:
    inputs, labels = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
    if isinstance(inputs, Batch):
        return inputs, labels
    if isinstance(inputs, Mapping):
        return Batch((), dict(inputs)), labels
    return Batch(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}), labels


def _check(model: nn.Module, method: TestTime, reference: list[tuple[Batch, Tensor | None]], chosen: bool) -> None:
    """Raises for what a method needs and the call does not give."""
    name = type(method).__name__
    if ("reference" in method.needs or "labels" in method.needs) and not reference:
        raise InputError(f"{name} needs rows of the source: give online reference=[(inputs, labels), ...]")
    if "labels" in method.needs and any(y is None for _, y in reference):
        raise InputError(f"{name} needs the labels of its reference; give (inputs, labels) pairs")
    if "norm" in method.needs and not chosen and not any(s.role == "norm" for s in sites(model)):
        raise InputError(f"{name} adapts norm layers, and {type(model).__name__} has none; give online another space=, or use T3A or LAME")
    if "batch norm" in method.needs and not any(isinstance(m, _BN) for _, m in walk(model)):
        raise InputError(f"{name} changes the statistics of batch norms, and {type(model).__name__} has none; use Tent, T3A or LAME")


def _own(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Parameters and buffers of these adapters, by their names in the model."""
    holders = [h for _, slots in slots_of(model) for e in slots.entries if e.adapter in names for h in (e.holder, e.common) if h is not None]
    held = {id(t) for h in holders for t in h.tensors().values()}
    return {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if id(t) in held}


def _statistics(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Statistics of every batch norm under the adapter that holds them."""
    entries = [e for _, slots in slots_of(model) for e in slots.entries if e.adapter == STATISTICS]
    return {e.site_name: {k: cast(Tensor, e.holder._buffers[k]) for k in ("mean", "var")} for e in entries}
