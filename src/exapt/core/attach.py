"""Attach and detach: the base keeps its object, its classes, its keys and its bits."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from exapt.core.checks import check_fields
from exapt.core.contract import Method, Recipe, SubsetMethod, Tensors, WeightMethod
from exapt.core.entry import HALF, Entry, Holder, selection, usable
from exapt.core.errors import InputError, did_you_mean
from exapt.core.layers import walk
from exapt.core.removal import remove as remove
from exapt.core.replicate import replica_of, replication
from exapt.core.sites import Site, Sites, Where, choose, site_of, sites, with_statistics
from exapt.core.state import Adapter, State, activate, slots_at, start, state_of

Rules = Mapping[Any, Method]
Statistics = Mapping[str, Mapping[str, Tensor]]


def attach(
    model: nn.Module,
    method: Method | Rules,
    where: Where | None = None,
    name: str = "default",
    *,
    statistics: Statistics | None = None,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
    seed: int | None = None,
) -> nn.Module:
    """Puts an adapter on ``model``, in place, freezes the base and makes the adapter the active one.

    Args:
        model: Any module; it stays the same object with the same class, keys and call.
        method: A method, or ``{where: method}`` for several under one name (a rank per site, a trained head).
            A later rule does not touch what an earlier one of the same contract took.
        where: Sites (see :func:`exapt.core.sites.choose`); by default the method's own choice.
        name: The adapter's name: letters, digits, ``_`` and ``-``.
        statistics: What :func:`exapt.calibrate` returned, for methods that declare ``needs``.
        dtype: Type of the adapter's tensors; by default the base's, and fp32 over a base of half precision.
        trainable: Whether the adapter's parameters ask for gradients while it is active.
        seed: Seed of the initialisation; by default the global generator is used.

    Returns:
        ``model`` itself.

    Raises:
        InputError: if the name is taken or malformed, ``where`` matches nothing, or the method cannot serve a site.

    >>> import exapt
    >>> model = attach(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), exapt.LoRA(rank=2))
    >>> exapt.parameter_count(model)
    Count(trainable=24, total=82)
    """
    rules = expanded(method, where)
    state = start(model, name)
    with uncollected():
        try:
            with _seeded(seed):
                plan = _plan(model, rules, statistics)
                hang(model, state, name, plan, Fresh(dtype))
        except BaseException:
            remove(model, name, state)
            raise
        state.adapters[name].trainable = trainable
        activate(model, name)
    return model


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pauses the search for garbage: what an adapter is made of lives on, and on thousands of sites looking at all of it time and again would
    cost more than making it."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def expanded(method: Method | Rules, where: Where | None = None) -> list[tuple[Any, Method]]:
    """The rules ``(where, method)`` of an adapter, with recipes replaced by theirs."""
    if isinstance(method, Mapping) and where is not None:
        raise InputError("attach was given both {where: method} and where=; put every place into the mapping")
    rules: list[tuple[Any, Method]] = []
    for place, m in method.items() if isinstance(method, Mapping) else [(where, method)]:
        if not isinstance(m, Method):
            raise InputError(f"attach needs a method such as exapt.LoRA(rank=8), not {m!r}")
        if not isinstance(m, Recipe):
            rules.append((place, m))
        elif place is None:
            rules += expanded(m.rules())
        else:
            raise InputError(f"{m.key} names its own sites; leave out where= (here {place!r}), or give its rules one by one: {m.key}.rules()")
    return rules


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _plan(model: nn.Module, rules: Sequence[tuple[Any, Method]], statistics: Statistics | None) -> list[tuple[Method, Sites]]:
    """Chooses the sites of every rule and checks them, before anything is changed."""
    whole = all((m.where if where is None else where) in ("model", "") for where, m in rules)  # then no other site need be told
    found = Sites(with_statistics(s, statistics) for s in ([site_of(model)] if whole else sites(model)))
    taken: set[tuple[str, str]] = set()
    plan = []
    for where, method in rules:
        check_fields(method)
        chosen = choose(found, method.where if where is None else where, lambda s, m=method: usable(m, s))  # type: ignore[misc]
        chosen = Sites(s for s in untied(chosen, method) if (method.contract, s.name) not in taken)
        taken |= {(method.contract, s.name) for s in chosen}
        for site in chosen:
            missing = [n for n in method.needs if n not in site.statistics]
            if missing:
                raise InputError(
                    f"{method.key} needs the statistics {', '.join(missing)} of {site.name or '(model)'}: "
                    "pass statistics=exapt.calibrate(model, batches, method, loss=...)"
                )
            method.check(site)
        plan.append((method, _decided(method, chosen)))
    return plan


def _decided(method: Method, chosen: Sites) -> Sites:
    """The sites with what the method decided over all of them; those of which it then chooses nothing are dropped."""
    added = method.plan(chosen)
    chosen = Sites(replace(s, statistics={**s.statistics, **added[s.name]}) if s.name in added else s for s in chosen)
    if isinstance(method, SubsetMethod):
        chosen = Sites(s for s in chosen if method.select(s))
        if not chosen:
            raise InputError(f"{method.key} chose no parameter of the sites that where= names")
    return chosen


def untied(chosen: Sites, method: Method) -> Sites:
    """Drops sites whose parameter is tied to an earlier one's: a shift of a tied parameter is one shift. Replicas have their own."""
    if method.contract not in ("weight", "subset"):
        return chosen
    seen: set[tuple[int, int]] = set()
    kept = Sites()
    for s in chosen:
        parameter = s.module._parameters.get(s.layer.parameter) if s.layer else None
        which = id(parameter), replica_of(s.module)
        if parameter is not None and which in seen:
            continue
        seen.add(which)
        kept.append(s)
    return kept


class Fresh:
    """Makes the tensors of a new adapter with the methods' own ``init`` and ``shared``."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def shared(self, number: int, method: Method, chosen: Sites) -> Holder | None:
        """The tensors that the sites of one rule share."""
        made = method.shared(chosen)
        return Holder(made, chosen[0].device, self.dtype or _default_dtype(chosen[0])) if made else None

    def site(self, number: int, method: Method, site: Site) -> tuple[Holder, dict[str, str]]:
        """The tensors of one site, and for subset methods how each parameter was chosen from."""
        tensors, how = made_tensors(method, site)
        return Holder(tensors, site.device, self.dtype or _default_dtype(site)), how


def hang(model: nn.Module, state: State, name: str, plan: Sequence[tuple[Method, Sites]], source: Any) -> None:
    """Hangs an adapter's tensors, from ``source``, under their modules."""
    modules = dict(walk(model))
    holders, fusing = _holders(modules.values()), {path: m for path, m in modules.items() if isinstance(m, _FUSING)}
    for number, (method, chosen) in enumerate(plan):
        common = source.shared(number, method, chosen)
        if common is not None:
            model._modules["exapt"].add_module(f"{name}_shared_{number}", common)  # type: ignore[union-attr]
        acts = method.contract in ("activation", "output")
        for i, site in enumerate(chosen):
            holder, how = source.site(number, method, site)
            above = _above(site, fusing) if fusing else []
            module = _called(method, site, above)
            slots = slots_at(module, state)
            key = f"{name}_{site.layer.parameter}" if site.layer and site.name != site.module_name else name
            while key in slots._modules:
                key += "_"
            slots._modules[key] = holder  # add_module would first look for an attribute of that name, in vain
            entry = Entry(name, method, site.name, site.layer, holder, common, chosen=how, position=i, last=i == len(chosen) - 1, state=state)
            entry.definition = _by_definition(method, site, above, how)
            if acts and (site.role != "model" or site.layer is not None):
                entry.axis = site.axis
            if site.source is not None:
                entry.source = slots_at(site.source, state)
                entry.source.watchers += 1
            if fusing and slots.hook is None and _fused(site, above):
                slots.hook = module.register_forward_pre_hook(_keeps_modules_called)
            slots.entries.append(entry)
            slots.chains.clear()
            for parameter in entry.names() if holders else ():
                _alias(site, parameter, holders, state)
    state.adapters[name] = Adapter(name, [(m, [s.name for s in chosen]) for m, chosen in plan])


def _default_dtype(site: Site) -> torch.dtype:
    dtype = site.dtype
    return torch.float32 if dtype in HALF or not dtype.is_floating_point else dtype


def made_tensors(method: Method, site: Site) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one site as the method makes them; for stacked experts one after the other, stacked."""
    if isinstance(method, SubsetMethod):
        return selection(method, site)
    if site.layer is None or site.layer.stacked is None or method.contract != "weight":
        return method.init(site), {}
    each = [method.init(_expert(site, e)) for e in range(site.layer.stacked)]
    stacked: Tensors = {}
    for k, first in each[0].items():
        value = torch.stack([t[k].detach() for t in each])
        stacked[k] = nn.Buffer(value, persistent=cast(Any, first).persistent) if isinstance(first, nn.Buffer) else value
    return stacked, {}


class _ExpertSite(Site):
    """One expert of a stacked weight, as ``init`` sees it."""

    expert: int = 0

    @property
    def weight(self) -> Tensor:
        return super().weight[self.expert]

    @property
    def bias(self) -> Tensor | None:
        whole = super().bias
        return None if whole is None else whole[self.expert]


def _expert(site: Site, number: int) -> Site:
    own = {k: v[number] if k.startswith(("gradient", "fisher")) and v.dim() == 3 else v for k, v in site.statistics.items()}
    one = _ExpertSite(f"{site.name}.{number}", site.module, site.module_name, site.role, site.layer, own)
    object.__setattr__(one, "expert", number)
    return one


def _by_definition(method: Method, site: Site, above: Sequence[nn.Module], chosen: Mapping[str, str]) -> bool:
    """Whether the method acts through the parameter at this site, because it or the site leaves no other way."""
    if isinstance(method, SubsetMethod):
        only_columns = set(chosen.values()) == {"columns"}
        operates = site.layer is not None and site.layer.operates
        return not (method.has_fast_path() and only_columns and operates) or _read_by_parent(site, above)
    if not isinstance(method, WeightMethod):
        return False
    assert site.layer is not None
    forced = not site.layer.operates or _read_by_parent(site, above)
    if forced and method.needs_forward():
        raise InputError(f"{site.name}: its weight is read as a parameter, and {method.key} as configured (dropout?) acts in forward only; leave the site out")
    served = method.fast_kinds is None or site.layer.kind in method.fast_kinds
    return forced or not (method.has_fast_path() and served)


def _called(method: Method, site: Site, above: Sequence[nn.Module]) -> nn.Module:
    """The module whose forward is run: an attention's, where an activation method is to act on its output projection."""
    if isinstance(method, (WeightMethod, SubsetMethod)):
        return site.module
    return next((m for m in above if isinstance(m, nn.MultiheadAttention)), site.module)


def _keeps_modules_called(module: nn.Module, args: Any) -> None:
    """Does nothing; while it is registered, fused kernels of torch step aside for the modules they would bypass."""


def _fused(site: Site, above: Sequence[nn.Module]) -> bool:
    """Whether torch may run the module or a parent by one fused kernel, which calls no child."""
    return isinstance(site.module, _FUSING) or any(isinstance(m, nn.TransformerEncoderLayer) for m in above)


def _read_by_parent(site: Site, above: Sequence[nn.Module]) -> bool:
    """nn.MultiheadAttention reads the parameters of its output projection without calling it."""
    return any(isinstance(m, nn.MultiheadAttention) and m is not site.module for m in above)


_FUSING = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that may run their children's work themselves."""


def _above(site: Site, fusing: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Those of ``fusing`` that the site's module is in, the outermost first; for the whole model itself."""
    parts = site.module_name.split(".")[:-1]
    paths = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
    return [fusing[p] for p in paths if p in fusing]


def tied(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Modules that hold the same parameter, by its identity, where a change of one is a change of all.

    Raises:
        InputError: for a model with replicated layers, which share parameters but not what adapters make of them.
    """
    if replication(model) is not None:
        raise InputError("replicated layers share their parameters, and a merge would write one layer's shift into all of them; keep the adapter attached")
    return _holders(m for _, m in walk(model))


def _holders(modules: Iterable[nn.Module]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Modules that hold the same parameter, by its identity."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for parameter, value in module._parameters.items():
            if value is not None:
                holders.setdefault(id(value), []).append((module, parameter))
    return {k: v for k, v in holders.items() if len(v) > 1}


def _alias(site: Site, parameter: str, tied: Mapping[int, list[tuple[nn.Module, str]]], state: State) -> None:
    """Lets every other holder of a tied parameter see the same shift."""
    for module, name in tied.get(id(site.module._parameters[parameter]), ()):
        if module is not site.module and replica_of(module) == replica_of(site.module):
            slots = slots_at(module, state)
            if not any(own == name for own, _ in slots.aliases):
                slots.aliases.append((name, (site.module, parameter)))
                slots.chains.clear()


def detach(model: nn.Module, *names: str) -> nn.Module:
    """Removes the named adapters (all, if none is named). With the last one the model is what it was, bit for bit.

    Raises:
        InputError: for a name that is not attached.
    """
    state = state_of(model)
    gone: dict[str, None] = {}
    for n in names or tuple(state.adapters):
        if n not in state.adapters or n in gone:
            left = [a for a in state.adapters if a not in gone]
            raise InputError(f'no adapter "{n}" on this model{did_you_mean(n, left)} (attached: {", ".join(left)})')
        gone[n] = None
    remove(model, gone, state)
    return model
