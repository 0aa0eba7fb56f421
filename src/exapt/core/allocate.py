"""Budgets: which sites get how much of a budget, before training (ranks for ``attach``) and during it (masks of components).

An allocator turns statistics of sites into an :class:`Allocation`. A method whose ranks change in training calls the same allocator in
``on_step`` on statistics of its own and writes the masks into its frozen buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from exapt.core.attach import hang, remove
from exapt.core.base import Base
from exapt.core.contract import Method, Tensors, WeightMethod
from exapt.core.entry import Holder, chosen_of
from exapt.core.errors import InputError
from exapt.core.file import holders
from exapt.core.sites import Site, Sites, sites
from exapt.core.state import activate, adapters, start, state_of

Statistics = Mapping[str, Mapping[str, Tensor]]
Masks = Mapping[str, Tensor]
A = TypeVar("A", bound="type[Allocator]")
_ALLOCATORS: dict[str, type[Allocator]] = {}


@dataclass(frozen=True)
class Places:
    """A choice of sites by their exact names, for ``where``."""

    names: tuple[str, ...]

    def __call__(self, site: Any) -> bool:
        return site.name in self.names


@dataclass(frozen=True)
class Allocation:
    """What every site gets.

    Attributes:
        ranks: A number per site (a rank; for some allocators the size of something else).
        masks: Per site which of its components act, boolean; or what else the allocator says it puts there.
        groups: Per site the number of its group, where sites share something.

    >>> import exapt
    >>> Allocation({"0": 2, "1": 0, "2": 2}).rules(exapt.LoRA(alpha=4.0))
    {Places(names=('0', '2')): LoRA(rank=2, alpha=4.0, dropout=0.0, scaling='standard', start='kaiming', plus=1.0)}
    """

    ranks: Mapping[str, int]
    masks: Masks = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The sum of the numbers."""
        return sum(self.ranks.values())

    def rules(self, method: Method, field: str = "rank") -> dict[Any, Method]:
        """Returns ``{where: method}`` for :func:`exapt.attach`: one rule for all sites of the same number (and group), whose ``field`` is that
        number; sites that get 0 are left out.

        Raises:
            InputError: if the method has no such field, or no site gets anything.
        """
        if not hasattr(method, field):
            raise InputError(f"{method.key} has no field {field!r} for an allocation to set; name another with field=")
        gathered: dict[tuple[int, int], list[str]] = {}
        for site, rank in self.ranks.items():
            if rank:
                gathered.setdefault((rank, self.groups.get(site, 0)), []).append(site)
        if not gathered:
            raise InputError("the allocation gives no site anything; raise the budget")
        return {Places(tuple(names)): replace(method, **{field: rank}) for (rank, _), names in sorted(gathered.items())}  # type: ignore[type-var]


@dataclass(frozen=True)
class Allocator:
    """Turns statistics of sites into what each of them gets. Subclasses are frozen dataclasses."""

    key: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    """Title of the paper."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Statistics of :func:`exapt.calibrate` that ``allocate`` reads; other allocators say in their documentation what they read."""

    def allocate(self, statistics: Statistics, *, budget: int | None = None, score: Callable[[Masks], float] | None = None) -> Allocation:
        """Shares the budget out.

        Args:
            statistics: Per site tensors by name.
            budget: The whole budget now, in the allocator's unit, where it is not the one that its fields give.
            score: For allocators that try masks out: what the model is worth with given masks, larger is better.
        """
        raise NotImplementedError

    def probe(self) -> Method:
        """What to give :func:`exapt.calibrate` in place of a method, so that it collects what this allocator reads."""
        return _Probe(self.needs)


@dataclass(frozen=True)
class _Probe(WeightMethod):
    """Stands for an allocator where a method's needs are asked for; it cannot be attached."""

    key = "probe"

    needs: tuple[str, ...] = ()  # type: ignore[misc]


def allocator(cls: A) -> A:
    """Registers an allocator under its key."""
    if _ALLOCATORS.setdefault(cls.key, cls).__qualname__ != cls.__qualname__:
        raise InputError(f'{cls.__name__}: the key "{cls.key}" belongs to {_ALLOCATORS[cls.key].__qualname__}; choose another')
    return cls


def registered() -> dict[str, type[Allocator]]:
    """The allocators of the modules imported so far, by key (``exapt.search.allocators`` imports all)."""
    return dict(sorted(_ALLOCATORS.items()))


def top(scores: Masks, budget: int) -> dict[str, Tensor]:
    """Returns masks of exactly the ``budget`` largest scores over all sites together (all, where there are fewer); of equal ones the first.

    >>> top({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}, 2)
    {'a': tensor([ True, False]), 'b': tensor([True])}
    """
    flat = torch.cat([s.detach().flatten().cpu().double() for s in scores.values()]) if scores else torch.zeros(0)
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[: max(budget, 0)]] = True
    parts = torch.split(kept, [s.numel() for s in scores.values()])
    return {site: part.view(s.shape).to(s.device) for (site, s), part in zip(scores.items(), parts, strict=True)}


def smoothed(now: Tensor, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    r"""One step of AdaLoRA's smoothing of a sensitivity :math:`I = |w \nabla_w|`, returned with its uncertainty:
    :math:`\bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I` and
    :math:`\bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |I - \bar I|`, with the new :math:`\bar I`."""
    sensitivity = beta1 * sensitivity + (1 - beta1) * now
    return sensitivity, beta2 * uncertainty + (1 - beta2) * (now - sensitivity).abs()


def cubic(step: int, first: int, last: int, start: int, target: int) -> int:
    """The budget of a step: ``start`` up to step ``first``, from there falling by the third power to ``target`` at step ``last``."""
    if step <= first:
        return start
    left = 1 - (step - first) / (last - first) if step < last else 0.0
    return int(target + (start - target) * left**3)


def shares(weights: Mapping[str, float], costs: Mapping[str, int], most: Mapping[str, int], budget: int) -> dict[str, int]:
    """Whole numbers near ``budget * weight / cost``, each at most ``most``, whose costs sum to at most ``budget``; what rounding down leaves goes
    to those that lost most by it.

    >>> shares({"a": 3.0, "b": 1.0}, {"a": 10, "b": 10}, {"a": 9, "b": 9}, 45)
    {'a': 3, 'b': 1}
    """
    whole = sum(weights.values())
    wanted = {k: budget * w / whole / costs[k] if whole > 0 else 0.0 for k, w in weights.items()}
    numbers = {k: min(int(v), most[k]) for k, v in wanted.items()}
    left = budget - sum(numbers[k] * costs[k] for k in numbers)
    for k in sorted(wanted, key=lambda k: numbers[k] - wanted[k]):
        if numbers[k] < min(wanted[k], most[k]) and costs[k] <= left:
            numbers[k] += 1
            left -= costs[k]
    return numbers


def gathered(t: Tensor) -> Tensor:
    """A sharded tensor whole; other tensors as they are."""
    gather: Any = getattr(t, "full_tensor", None)
    return t if gather is None else gather()


def put(t: Tensor, value: Tensor) -> None:
    """Copies whole values into a tensor, sharded or not."""
    if hasattr(t, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, t.device_mesh, t.placements)  # type: ignore[attr-defined]
    t.copy_(value)


class Budgeted(WeightMethod):
    """A low-rank update whose components come and go: :math:`W' = W + B A` with the factors that ``factors`` gives."""

    full_precision = True

    def factors(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """Returns ``A`` (rank, d_in) and ``B`` (d_out, rank) with gates and scale folded in; a component that does not act gives zero."""
        raise NotImplementedError

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self.factors(p)

    def live(self, p: Tensors) -> Tensor:
        """Which components act, boolean (rank,)."""
        raise NotImplementedError

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a, b = self.factors(p)
        return (w + b @ a).to(w.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        return base.low_rank(x, *self.factors(p))


Change = Callable[[Method, str, Tensors], "tuple[Method, Tensors] | None"]


class _Remade:
    """Where ``hang`` takes finished tensors from."""

    def __init__(self, rules: list[tuple[Method, dict[str, Holder], Holder | None]]) -> None:
        self.rules = rules

    def shared(self, number: int, method: Method, chosen: Sites) -> Holder | None:
        """As :meth:`exapt.core.attach.Fresh.shared`."""
        return self.rules[number][2]

    def site(self, number: int, method: Method, site: Site) -> tuple[Holder, dict[str, str]]:
        """As :meth:`exapt.core.attach.Fresh.site`."""
        holder = self.rules[number][1][site.name]
        return holder, chosen_of(holder.tensors()) if method.contract == "subset" else {}


def remade(model: nn.Module, name: str, kind: type[Method], change: Change) -> nn.Module:
    """Gives an adapter other methods and tensors where its method is a ``kind``; its other rules, its name and what is active stay.
    Its parameters are new ones: an optimiser that holds the old must be made anew.

    Args:
        model: The model that carries it.
        name: Which adapter.
        kind: The class of methods to change.
        change: From a method, a site's name and its tensors (the shared ones among them) to the new method and tensors, or ``None`` to
            leave the site out. Only sites of equal new methods form one rule again.

    Raises:
        InputError: if there is no such adapter, none of its methods is a ``kind``, or nothing of it is left.
    """
    state = state_of(model)
    if name not in state.adapters:
        raise InputError(f'no adapter "{name}" on this model (attached: {", ".join(state.adapters)})')
    old, active = state.adapters[name], state.active
    if not any(isinstance(m, kind) for m, _ in old.rules):
        raise InputError(f'the adapter "{name}" has no method of this kind ({", ".join(m.key for m, _ in old.rules)})')
    found = dict(holders(model, name))
    rules: list[tuple[Method, dict[str, Holder], Holder | None]] = []
    for number, (method, names) in enumerate(old.rules):
        shared, own = found.get(f"{number}:*"), {n: found[f"{number}:{n}"] for n in names}
        if isinstance(method, kind):
            rules += _changed(method, own, shared, change)
        else:
            rules.append((method, own, shared))
    if not rules:
        raise InputError(f'nothing of the adapter "{name}" acts; there is nothing to keep')
    remove(model, name, state)
    known = {s.name: s for s in sites(model)}
    state = start(model, name)
    hang(model, state, name, [(m, Sites(known[n] for n in own)) for m, own, _ in rules], _Remade(rules))
    state.adapters[name].metadata, state.adapters[name].trainable = old.metadata, old.trainable
    activate(model, *(n for n in active if n in adapters(model)))
    return model


def _changed(method: Method, own: Mapping[str, Holder], shared: Holder | None, change: Change) -> list[tuple[Method, dict[str, Holder], Holder | None]]:
    gathered_sites: dict[Method, dict[str, Holder]] = {}
    common = shared.tensors() if shared is not None else {}
    for site, holder in own.items():
        with torch.no_grad():
            new = change(method, site, {**common, **holder.tensors()})
        if new is not None:
            some = next(iter(holder.tensors().values()))
            gathered_sites.setdefault(new[0], {})[site] = Holder(new[1], some.device, None)
    return [(m, places, None) for m, places in gathered_sites.items()]


def live_ranks(model: nn.Module, name: str = "default") -> Allocation:
    """What a trained adapter with a budget came to: ranks and masks of its :class:`Budgeted` methods, ready for ``rules``."""
    masks: dict[str, Tensor] = {}
    for path, holder in holders(model, name):
        number, _, site = path.partition(":")
        method = state_of(model).adapters[name].rules[int(number)][0]
        if isinstance(method, Budgeted) and site != "*":
            masks[site] = method.live(holder.tensors()).detach()
    return Allocation({site: int(m.sum()) for site, m in masks.items()}, masks)
