"""Mixtures, fusions and X-LoRA layers whose experts are saved adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.attach import attach, detach
from exapt.core.components import component
from exapt.core.contract import Method, Recipe
from exapt.core.errors import InputError
from exapt.core.file import holders
from exapt.core.registry import method as make
from exapt.core.state import activate, adapters, state_of
from exapt.interop import load


@dataclass
class _Saved:
    """What a saved adapter has at its sites: one method, and its tensors by site (``"*"``: those that the sites share)."""

    path: Any
    method: Method
    tensors: dict[str, dict[str, Tensor]]


@component("from_adapters", kind="composition", oracle="NumPy; the adapters one by one")
def from_adapters(
    model: nn.Module, paths: Sequence[str | os.PathLike[str]], method: Method | None = None, name: str = "default", *, force: bool = False
) -> nn.Module:
    r"""Attaches a mixture whose experts are the saved adapters in ``paths``, frozen, and makes it active; what routes between them trains.

    The mixture says how it routes; the experts' method, their number and their rank are the files'. LoRAs may differ in rank and scale: smaller ones are
    filled up with zeros, and :math:`B` takes up the ratio of the scales, :math:`s_e B_e A_e = s (s_e B_e / s) A_e`.

    Args:
        model: The base model.
        paths: The experts, each an exapt file or a folder of PEFT's or AdapterHub's with one method, at the same sites.
        method: The mixture, a method with the fields ``expert`` and ``experts`` (:class:`~exapt.methods.mixture.Mixture`, ``ActivationMixture``,
            ``AdapterFusion``, ``ScaLearn``), one that keeps LoRAs as ``A`` and ``B`` (``XLoRA``, ``PSEC``, ``DLPLoRA``), or a recipe of one of these
            (``MeteoRA``). By default ``Mixture(router="token", top_k=2)``, for LoRAs and other shifts of matrices.
        name: Name of the new adapter.
        force: Take files that were made for another base.

    Returns:
        ``model`` itself.

    Raises:
        InputError: if there is none, they sit at different places, or are of different methods. The model is unchanged then.

    Examples:
        ``from_adapters(model, ["books.safetensors", "films.safetensors"], MeteoRA())``
    """
    if len(paths) < 1:
        raise InputError("from_adapters needs at least one expert; give the paths of their files")
    saved = [_read(model, path, force) for path in paths]
    first = saved[0]
    for s in saved[1:]:
        if s.tensors.keys() != first.tensors.keys():
            odd = min(s.tensors.keys() ^ first.tensors.keys())
            raise InputError(f"{s.path}: experts sit at the same sites; {odd} is in this one or in {first.path}, not in both")
        if s.method.key != first.method.key:
            raise InputError(f"{s.path}: experts are of one method; this one is {s.method.key}, {first.path} is {first.method.key}")
    expert = _common([s.method for s in saved], [s.path for s in saved])
    mixture = _holding(method or make("mixture", router="token", top_k=min(2, len(paths)) if len(paths) > 1 else 0), expert, len(paths))
    places = [site for site in first.tensors if site != "*"]
    active = state_of(model).active if adapters(model) else ()
    attach(model, mixture, lambda s: s.name in places, name)
    try:
        _fill(model, name, saved, expert)
    except BaseException:
        detach(model, name)
        if active:
            activate(model, *active)
        raise
    state_of(model).adapters[name].metadata = {"provenance": {"experts": [str(p) for p in paths]}, "metrics": {}}
    return model


def _read(model: nn.Module, path: Any, force: bool) -> _Saved:
    """A saved adapter's method and tensors; the model is left as it was."""
    taken = "from_adapters_expert"
    active = state_of(model).active if adapters(model) else ()
    load(model, path, taken, force=force)
    try:
        rules = state_of(model).adapters[taken].rules
        if len({str(m) for m, _ in rules}) > 1:
            raise InputError(f"{path}: an expert has one method; this adapter has {', '.join(sorted({m.key for m, _ in rules}))}")
        found: dict[str, dict[str, Tensor]] = {}
        for place, holder in holders(model, taken):
            site = place.partition(":")[2]
            if site == "*" and "*" in found:
                raise InputError(f"{path}: an expert shares tensors in one rule; this adapter does in several")
            found[site] = {k: t.detach().clone() for k, t in holder.tensors().items()}
        return _Saved(path, rules[0][0], found)
    finally:
        detach(model, taken)
        if active:
            activate(model, *active)


def _common(methods: Sequence[Method], paths: Sequence[Any]) -> Method:
    """One method for all experts: they are equal, or LoRAs, of which it is the one of the largest rank."""
    if all(m.key == "lora" for m in methods):
        largest = max(methods, key=lambda m: m.rank)  # type: ignore[attr-defined]
        return make("lora", rank=largest.rank, alpha=largest.alpha, scaling=largest.scaling)  # type: ignore[attr-defined]
    for m, path in zip(methods, paths, strict=True):
        if m != methods[0]:
            raise InputError(f"{path}: experts other than LoRAs need one configuration; this one is {m}, {paths[0]} is {methods[0]}")
    return methods[0]


def _holding(mixture: Method, expert: Method, count: int) -> Method:
    """The mixture for these experts."""
    if isinstance(mixture, Recipe):
        inner = list(mixture.rules().values())
        if len(inner) != 1:
            raise InputError(f"from_adapters: {mixture.key} is a recipe of {len(inner)} methods; attach these one by one")
        mixture = inner[0]
    own = {f.name for f in fields(mixture)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {"experts": count} if "experts" in own else {}
    if "expert" in own:
        changes["expert"] = expert
    elif {"rank", "alpha"} <= own and changes and expert.key == "lora":
        changes |= {"rank": expert.rank, "alpha": expert.factor * expert.rank}  # type: ignore[attr-defined]
    else:
        raise InputError(f"from_adapters: {mixture.key} cannot hold experts that are {expert.key}; see its argument method")
    if "train_experts" in own:
        changes["train_experts"] = False
    if getattr(mixture, "top_k", 0) > count:
        changes["top_k"] = 0
    return replace(mixture, **changes)  # type: ignore[type-var]


def _fill(model: nn.Module, name: str, saved: Sequence[_Saved], expert: Method) -> None:
    """Copies the experts' tensors into the mixture's."""
    for place, holder in holders(model, name):
        site = place.partition(":")[2]
        each = [_scaled(s.tensors.get(site, {}), s.method, expert) for s in saved]
        for k in each[0]:
            target = holder.tensors().get(f"expert_{k}", holder.tensors().get(k))
            if target is None:
                continue
            if site == "*":
                if any(not torch.equal(e[k], each[0][k]) for e in each):
                    raise InputError(f"{saved[0].path}: experts share {k} among their sites, so it must be the same in all; they differ")
                value = each[0][k]
            else:
                value = torch.stack(_padded([e[k] for e in each], target.shape[1:], f"{site}: {k}"))
            with torch.no_grad():
                target.copy_(value)
            if isinstance(target, nn.Parameter):  # a method that lets its LoRAs train; here they are others' work
                delattr(holder, kept := next(n for n, t in holder.tensors().items() if t is target))
                holder.register_buffer(kept, target.detach())


def _scaled(tensors: Mapping[str, Tensor], method: Method, expert: Method) -> Mapping[str, Tensor]:
    """A LoRA's factors for the common scale; anything else as it is."""
    if expert.key != "lora" or "B" not in tensors:
        return tensors
    return {**tensors, "B": tensors["B"] * (method.factor / expert.factor)}  # type: ignore[attr-defined]


def _padded(tensors: Sequence[Tensor], shape: torch.Size, what: str) -> list[Tensor]:
    made = []
    for t in tensors:
        if t.dim() != len(shape) or any(n > m for n, m in zip(t.shape, shape, strict=True)):
            raise InputError(f"{what} has shape {tuple(t.shape)} in one of the files; the mixture keeps {tuple(shape)}")
        made.append(nn.functional.pad(t, [v for n, m in zip(reversed(t.shape), reversed(shape), strict=True) for v in (0, m - n)]))
    return made
