"""Adapters as vectors: what each adds to the weights, merged, added, subtracted, compared, and written as an adapter again."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exapt.algebra.lowrank import LowRank, concatenated, factors_of
from exapt.algebra.rule import rule_of
from exapt.algebra.rules.average import averaged
from exapt.algebra.rules.core_space import core_space_merged, in_core_space
from exapt.algebra.rules.knots import knots_merged, tied
from exapt.algebra.rules.task_arithmetic import summed
from exapt.algebra.tensors import merged_tensors
from exapt.core.attach import detach
from exapt.core.contract import Method, WeightMethod, as_dict
from exapt.core.errors import InputError
from exapt.core.file import AdapterFile, fingerprint, load, versions, write
from exapt.core.merge import new_values, refuse_unmergeable
from exapt.core.registry import from_dict
from exapt.core.registry import method as method_of
from exapt.core.sites import sites
from exapt.core.slots import slots_of
from exapt.core.state import activate, adapters, state_of
from exapt.interop.to_lora import compressed

Matrix = LowRank | Tensor
_ON_FACTORS: dict[Callable[..., Tensor], Callable[..., LowRank]] = {tied: knots_merged, in_core_space: core_space_merged}
"""Rules that have a form on low-rank factors."""


@dataclass(frozen=True)
class Shifts:
    """What an adapter adds to each weight matrix.

    Attributes:
        label: What messages call it.
        matrices: By site: (d_out, d_in), low-rank where it is.
        fingerprint, base: Of the base that it belongs to.
        biases: By site: what is added to the bias (d_out,).
    """

    label: str
    matrices: Mapping[str, Matrix]
    fingerprint: str
    base: str
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def dense(self, site: str) -> Tensor:
        """The matrix of a site, single precision."""
        found = self.matrices[site]
        return found.dense() if isinstance(found, LowRank) else found


def shifts_of(data: AdapterFile, label: str = "adapter", model: nn.Module | None = None) -> Shifts:
    """Reads what an adapter adds to the weights from its file.

    Args:
        data: The file (:func:`exapt.read`).
        label: What messages call it.
        model: The base, for methods whose shift depends on the base's weights, or is not in the weights of linear layers alone.

    Raises:
        InputError: for a method that needs ``model``, or has no merged form at all.
    """
    matrices: dict[str, Matrix] = {}
    biases: dict[str, Tensor] = {}
    for number, rule in enumerate(data.rules):
        method = from_dict(rule["method"])
        for site, shape in zip(rule["sites"], rule["shapes"], strict=True):
            p = _tensors(data, number, site)
            if model is not None or not isinstance(method, WeightMethod) or method.reads or shape is None or _seeded(data, number, site):
                return _on_model(data, label, model, method, site)
            if site in matrices:
                raise InputError(f"{label}: two of its rules act on {site}; merge them on the model first (exapt merge)")
            matrices[site] = _added(method, p, tuple(shape), label, site)
            if type(method).bias is not WeightMethod.bias and "d" in p:
                biases[site] = p["d"].float()
    return Shifts(label, matrices, data.fingerprint, data.base, biases)


def _tensors(data: AdapterFile, number: int, site: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for place in (f"{number}:*/", f"{number}:{site}/"):
        found |= {k.removeprefix(place): t.float() if t.is_floating_point() else t for k, t in data.tensors.items() if k.startswith(place)}
    return found


def _seeded(data: AdapterFile, number: int, site: str) -> bool:
    return any(k.startswith((f"{number}:*/", f"{number}:{site}/")) for k in data.checksums)


def _added(method: WeightMethod, p: dict[str, Tensor], shape: tuple[int, ...], label: str, site: str) -> Matrix:
    """The shift of one site, if it does not depend on the weight: low-rank where the method's own forward says that it is."""
    if method.key == "lora":
        return LowRank(p["B"] * method.factor, p["A"])  # type: ignore[attr-defined]
    other = type(method).bias is not WeightMethod.bias and method.key != "delta"
    zero = torch.zeros(shape)
    found = method.weight(p, zero)
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if other or not torch.allclose(method.weight(p, probe) - probe, found, rtol=1e-3, atol=1e-4 * float(found.abs().max() + 1)):
        raise InputError(f"{label}: what {method.key} does at {site} depends on the base's weights or biases; give the base (model=, --model)")
    factors = factors_of(method, p, (shape[0], shape[1]))
    fits = factors is not None and factors.shape == shape and factors.rank < min(shape)
    exact = fits and torch.allclose(factors.dense(), found, rtol=1e-5, atol=1e-6 * float(found.abs().max()))  # type: ignore[union-attr]
    return factors if factors is not None and exact else found


def _on_model(data: AdapterFile, label: str, model: nn.Module | None, method: Method, site: str) -> Shifts:
    if model is None:
        raise InputError(f"{label}: what {method.key} does at {site or '(model)'} cannot be told from the file alone; give the base (model=, --model)")
    with _loaded(model, data) as name:
        return shifts_on(model, name, label)


@contextlib.contextmanager
def _loaded(model: nn.Module, data: AdapterFile) -> Iterator[str]:
    """The adapter on the model, for as long as the block."""
    before, name = state_of(model).active if adapters(model) else (), "exapt_algebra"
    with tempfile.TemporaryDirectory() as folder:
        load(model, write(data, Path(folder) / "a.safetensors"), name)
    try:
        yield name
    finally:
        detach(model, name)
        if before:
            activate(model, *before)


def shifts_on(model: nn.Module, name: str, label: str = "") -> Shifts:
    """What an adapter on a model adds to the weights and biases of its linear layers, convolutions and embeddings.

    What does not depend on the base is read from the adapter's own tensors, by its factors where it is low-rank; the rest is the difference that a
    merge would make.

    Raises:
        InputError: for a method without merged form, or one that changes other parameters (a norm's, say).
    """
    state, label = state_of(model), label or name
    if name not in state.adapters:
        raise InputError(f'no adapter "{name}" on this model (attached: {", ".join(state.adapters)})')
    refuse_unmergeable(state.adapters[name])
    places = {}
    for s in sites(model):
        if s.layer is not None and s.name == s.module_name and not s.layer.stacked:
            for parameter in filter(None, (s.layer.parameter, s.layer.bias)):
                places[f"{s.module_name}.{parameter}".lstrip(".")] = (s, parameter == s.layer.parameter)
    matrices, biases, whole = _read_off(model, name, label, {s.name for s, _ in places.values()})
    read = set(matrices)
    for path, (stored, value) in ({} if whole else new_values(model, (name,))).items():
        if path in places and places[path][0].name in read:
            continue
        added = value.detach().float() - stored.detach().float()
        site, is_weight = places.get(path, (None, False))
        if site is None or site.layer is None:
            if not bool(added.any()):
                continue
            raise InputError(f"{label}: it changes {path}, which is no weight or bias of a plain layer; merge the models themselves (exapt merge-models)")
        if is_weight:
            matrices[site.name] = site.layer.to_matrix(added)
        else:
            biases[site.name] = added
            matrices.setdefault(site.name, torch.zeros(site.layer.shape))
    return Shifts(label, matrices, fingerprint(model), type(model).__name__, biases)


def _read_off(model: nn.Module, name: str, label: str, plain: set[str]) -> tuple[dict[str, Matrix], dict[str, Tensor], bool]:
    """What can be read from an adapter's own tensors at the layers ``plain``, matrices and biases, and whether that is all of it."""
    matrices: dict[str, Matrix] = {}
    biases: dict[str, Tensor] = {}
    whole = True
    for _, slots in slots_of(model):
        own = [e for e in slots.entries if e.adapter == name]
        for e in own:
            readable = len(own) == 1 and isinstance(e.method, WeightMethod) and not e.method.reads and e.layer is not None and e.site_name in plain
            p = {k: t.detach().float() if t.is_floating_point() else t for k, t in e.tensors().items() if k != "notes"}
            try:
                if readable:
                    matrices[e.site_name] = _added(e.method, p, e.layer.shape, label, e.site_name)  # type: ignore[union-attr]
            except InputError:
                readable = False
            whole &= readable
            if readable and type(e.method).bias is not WeightMethod.bias and "d" in p:
                biases[e.site_name] = p["d"]
    return matrices, biases, whole


def combined(
    rule: str | Callable[..., Tensor], items: Sequence[Shifts], weights: Sequence[float] | None = None, *, missing: str = "refuse", seed: int = 0,
    force: bool = False, **config: Any,
) -> Shifts:  # fmt: skip
    r"""Merges adapters by a rule applied to their shifts :math:`\Delta W_i`, whatever method each of them is.

    Sums and averages of low-rank shifts stay low-rank, by concatenation of the factors, without an error. Rules on models are given the shifts.

    Args:
        rule: A merge rule, or its key.
        items: The adapters.
        weights: One for each.
        missing: Of sites that not all of them have: ``"refuse"``, or ``"zero"`` (those without it have the shift 0 there).
        seed: Of rules that draw.
        force: Merge although they belong to different bases.
        **config: The rule's.

    Raises:
        InputError: for different bases, sites or shapes, all named; NaN; settings that the rule does not have.
    """
    found = rule_of(rule)
    settings = found.checked(config)
    named = _checked(items, missing, force)
    linear = found.function in (averaged, summed)
    matrices: dict[str, Matrix] = {}
    for site in named:
        own = [x.matrices.get(site) for x in items]
        on_factors = _ON_FACTORS.get(found.function) if settings.get("side", "left") == "left" else None
        if on_factors is not None and all(isinstance(m, LowRank) for m in own):
            matrices[site] = on_factors(own, weights, seed=seed, name=site, **{k: settings[k] for k in ("inner", "settings")})
        elif linear and all(m is None or isinstance(m, LowRank) for m in own):
            factors = _coefficients(found.function, len(items), weights, settings)
            parts = [(m, f) for m, f in zip(own, factors, strict=True) if isinstance(m, LowRank)]
            matrices[site] = concatenated([m for m, _ in parts], [f for _, f in parts])
        else:
            matrices[site] = _merged(
                rule, items, site, weights, seed, settings, [None if m is None else x.dense(site) for m, x in zip(own, items, strict=True)]
            )
    biases = {}
    for site in dict.fromkeys(s for x in items for s in x.biases):
        biases[site] = _merged(rule, items, f"{site} (bias)", weights, seed, settings, [x.biases.get(site) for x in items])
    return Shifts(found.function.__name__, matrices, items[0].fingerprint, items[0].base, biases)


def combine(
    model: nn.Module, *names: str, rule: str | Callable[..., Tensor] = "average", weights: Sequence[float] | None = None, name: str = "combined",
    rank: int | None = None, **config: Any,
) -> nn.Module:  # fmt: skip
    """Merges adapters of a model into a new one, which becomes active; they stay attached.

    Args:
        model: The model that carries them.
        names: The adapters.
        rule: A merge rule, or its key (``exapt.components("merge rule")``).
        weights: One for each.
        name: The new adapter's name.
        rank: Cut every site to this rank; the header's metrics then hold the largest relative error.
        **config: The rule's configuration, and ``missing`` and ``seed`` as in :func:`combined`.

    Returns:
        ``model`` itself.

    Raises:
        InputError: as :func:`combined` and :func:`shifts_on` do.

    >>> import exapt
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> for n in "ab":
    ...     model = exapt.attach(model, exapt.LoRA(rank=1), where="all", name=n)
    >>> exapt.adapters(exapt.combine(model, "a", "b", rule="ties"))
    ('a', 'b', 'combined')
    """
    found = combined(rule, [shifts_on(model, n) for n in names], weights, **config)
    data, errors = as_file(
        found, rank, {"combined": list(names), "rule": getattr(rule, "__name__", rule), "weights": None if weights is None else list(weights)}
    )
    with tempfile.TemporaryDirectory() as folder:
        return load(model, write(replace(data, metrics={"largest_error": max(errors.values())}), Path(folder) / "a.safetensors"), name)


def _checked(items: Sequence[Shifts], missing: str, force: bool) -> list[str]:
    """The sites to merge."""
    if not items:
        raise InputError("there is no adapter to merge")
    if missing not in ("refuse", "zero"):
        raise InputError(f'missing="{missing}"; it is "refuse" or "zero"')
    first = items[0]
    for x in items[1:]:
        if x.fingerprint != first.fingerprint and not force:
            raise InputError(
                f"{first.label} belongs to base {first.fingerprint} ({first.base}), {x.label} to {x.fingerprint} ({x.base}); force merges them all the same"
            )
        if not set(x.matrices) & set(first.matrices):
            raise InputError(f"{first.label} and {x.label} have no site in common ({_some(first.matrices)}; {_some(x.matrices)})")
        apart = sorted(set(x.matrices) ^ set(first.matrices))
        if apart and missing == "refuse":
            raise InputError(f"{first.label} and {x.label} differ in their sites: {_some(apart)}; missing=zero takes the shift 0 where there is none")
    for x in items:
        for site, m in x.matrices.items():
            parts = (m.B, m.A) if isinstance(m, LowRank) else (m,)
            if not all(bool(torch.isfinite(t).all()) for t in parts):
                raise InputError(f"{x.label} holds NaN or infinity at {site}")
            for other in items:
                if site in other.matrices and _shape(other.matrices[site]) != _shape(m):
                    raise InputError(f"{site}: {x.label} has shape {_shape(m)}, {other.label} {_shape(other.matrices[site])}")
    return list(dict.fromkeys(s for x in items for s in x.matrices))


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _shape(m: Matrix) -> tuple[int, ...]:
    return (m.B.shape[0], m.A.shape[1]) if isinstance(m, LowRank) else tuple(m.shape)


def _coefficients(function: Callable[..., Tensor], count: int, weights: Sequence[float] | None, settings: Mapping[str, Any]) -> list[float]:
    """What a rule that is linear multiplies each shift by: its answer to the unit vectors."""
    return [float(v) for v in function(torch.eye(count, dtype=torch.float64), None if weights is None else torch.tensor(weights).double(), **settings)]


def _merged(rule: Any, items: Sequence[Shifts], site: str, weights: Any, seed: int, settings: Mapping[str, Any], own: Sequence[Tensor | None]) -> Tensor:
    zero = torch.zeros_like(next(t for t in own if t is not None))
    trees = [{site: zero if t is None else t} for t in own]
    base = {site: zero} if rule_of(rule).needs_base else None
    return next(iter(merged_tensors(rule, trees, base, weights, names=[x.label for x in items], seed=seed, **settings)))[1]


def as_file(found: Shifts, rank: int | None = None, provenance: Mapping[str, Any] | None = None) -> tuple[AdapterFile, dict[str, float]]:
    """An adapter file of shifts: LoRAs where a site is low-rank, :class:`exapt.Delta` elsewhere.

    Args:
        found: The shifts.
        rank: Cut every site to this rank, by its best approximation; ``None``: none is cut.
        provenance: For the file's header.

    Returns:
        The file, and by site the relative error (Frobenius norm) of cutting, 0 where nothing was lost.

    Raises:
        InputError: for a rank below 1, or biases where a rank is asked for, which a LoRA cannot hold.
    """
    if rank is not None and (rank < 1 or found.biases):
        raise InputError(f"rank is {rank}; it is at least 1, and biases ({_some(found.biases) or 'none here'}) need a file without it")
    groups: dict[str, tuple[Method, dict[str, dict[str, Tensor]]]] = {}
    errors: dict[str, float] = {}
    for site, m in found.matrices.items():
        whole, errors[site] = (m, 0.0) if rank is None else _cut(m, rank)
        if isinstance(whole, LowRank) and site not in found.biases and whole.rank < min(_shape(whole)):
            method, tensors = method_of("lora", rank=whole.rank, alpha=float(whole.rank)), {"A": whole.A, "B": whole.B}
        else:
            method, tensors = method_of("delta"), {"D": whole.dense() if isinstance(whole, LowRank) else whole}
            tensors |= {"d": found.biases[site]} if site in found.biases else {}
        groups.setdefault(str(method), (method, {}))[1][site] = tensors
    return _file(found, list(groups.values()), provenance), errors


def _cut(m: Matrix, rank: int) -> tuple[LowRank, float]:
    if isinstance(m, LowRank):
        return (m, 0.0) if m.rank <= rank else m.compressed(rank)
    found = compressed(m, rank)
    return LowRank(found.B, found.A), found.error


def _file(found: Shifts, rules: Sequence[tuple[Method, Mapping[str, Mapping[str, Tensor]]]], provenance: Mapping[str, Any] | None) -> AdapterFile:
    tensors = {f"{n}:{s}/{k}": t.contiguous() for n, (_, own) in enumerate(rules) for s, p in own.items() for k, t in p.items()}
    listed = [{"method": as_dict(m), "sites": list(own), "shapes": [list(_shape(found.matrices[s])) for s in own]} for m, own in rules]
    data = AdapterFile(listed, found.fingerprint, found.base, versions(), dict(provenance or {}))
    return replace(data, tensors=tensors, manifest={k: [list(t.shape), True] for k, t in tensors.items()})
