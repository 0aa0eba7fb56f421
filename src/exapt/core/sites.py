"""Sites: the places of a model that a method can act on, found from its structure, and how ``where`` chooses them."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.errors import InputError, did_you_mean
from exapt.core.layers import Layer, dense, feature_layout, holds_parameters, is_quantised, layers_of, walk
from exapt.core.roles import named_role, roles_of

Where = str | Callable[["Site"], bool] | Iterable[Any]


@dataclass(frozen=True, eq=False)
class Site:
    """One place of a model.

    Attributes:
        name: Module path, or parameter path for a weight that its module reads under another name than ``weight``.
        module: The module.
        module_name: Path of the module; the whole model is "".
        role: What part it plays (see :func:`exapt.core.roles.roles`).
        layer: Description of its weight matrix, or ``None``.
        statistics: What :func:`exapt.calibrate` collected for it.
        source: The module whose input is ``x`` here, where it is not the site's own: a feed-forward network that is no
            module of its own (BERT's) is the site "mlp" from the input of its first layer to the output of its last.
    """

    name: str
    module: nn.Module
    module_name: str
    role: str
    layer: Layer | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    source: nn.Module | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight matrix."""
        if self.layer is None:
            raise InputError(f"{self.name or '(model)'} has no weight matrix; choose a linear, convolution or embedding site")
        return self.layer.shape

    @property
    def weight(self) -> Tensor:
        """The base weight as a matrix (d_out, d_in) in floating point, dequantised on demand, without gradient."""
        stored = self.module._parameters[self._layer.parameter]
        assert stored is not None
        return self._layer.to_matrix(dense(stored).detach())

    @property
    def bias(self) -> Tensor | None:
        """The base bias (d_out,), or ``None``."""
        name = self._layer.bias
        stored = self.module._parameters.get(name) if name else None
        return None if stored is None else stored.detach()

    @property
    def features(self) -> int:
        """Features of the module's output; raises where the structure does not tell."""
        return self._layout[0]

    @property
    def axis(self) -> int:
        """Position of the features in the module's output, counted from the end; 1 for a ``BatchNorm1d``, which takes two or three dimensions."""
        return self._layout[1]

    @property
    def quantised(self) -> bool:
        """Whether the weight is stored quantised."""
        stored = self.module._parameters.get(self._layer.parameter)
        return stored is not None and is_quantised(stored)

    @property
    def device(self) -> torch.device:
        """Device of the base parameters."""
        return next((p.device for p in self._parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the base parameters (of a quantised base: of what it dequantises to)."""
        for p in self._parameters():
            if is_quantised(p):
                kind: torch.dtype = getattr(getattr(p, "quant_state", None), "dtype", None) or p.dtype
                return kind
            if p.is_floating_point():
                return p.dtype
        return torch.get_default_dtype()

    def _parameters(self) -> Iterator[Tensor]:
        yield from (p for p in self.module._parameters.values() if p is not None)
        if self.module._modules.keys() - {"exapt"}:  # most sites are layers, whose own come first and are all
            yield from (p for _, m in walk(self.module) if m is not self.module for p in m._parameters.values() if p is not None)

    @property
    def _layer(self) -> Layer:
        self.shape  # noqa: B018  raises where there is none
        assert self.layer is not None
        return self.layer

    @property
    def _layout(self) -> tuple[int, int]:
        found = feature_layout(self.module)
        if found is None:
            raise InputError(f"the output features of {self.name or '(model)'} cannot be told from its layers; choose a site inside it")
        return found

    def __repr__(self) -> str:
        shape = f" {self.layer.shape[0]}x{self.layer.shape[1]}" if self.layer else ""
        return f"{self.name or '(model)'}  [{self.role}]{shape}"


class Sites(list[Site]):
    """A list of sites that prints one a line."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))


def sites(model: nn.Module) -> Sites:
    """Returns everything in ``model`` that can be adapted, with a role for each.

    A module gives one site; so does each further weight that it holds itself (``in_proj_weight``, expert weights).

    >>> sites(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    (model)  [model]
    0  [linear] 8x4
    2  [head] 2x8
    """
    modules = dict(walk(model))
    known = roles_of(modules)
    found = Sites()
    held: dict[nn.Module, bool] = {}
    for name, module in modules.items():
        layers = layers_of(module)
        main = next((x for x in layers if x.parameter == "weight"), None)
        if main is None and name and not holds_parameters(module, held):
            continue
        found.append(Site(name, module, name, known[name], main))
        for layer in layers:
            if layer is not main:
                path = f"{name}.{layer.parameter}" if name else layer.parameter
                found.append(Site(path, module, name, _parameter_role(layer.parameter), layer))
    found += _feed_forwards(found)
    return found


def site_of(model: nn.Module) -> Site:
    """The site that the whole model is: the first of :func:`sites`."""
    return Site("", model, "", "model", next((x for x in layers_of(model) if x.parameter == "weight"), None))


def _feed_forwards(found: Sites) -> Sites:
    """The feed-forward networks whose two layers share a block but no module of their own."""
    inside: dict[str, tuple[list[Site], list[Site], list[Site]]] = {s.name: ([], [], []) for s in found if s.role == "block"}
    for s in found if inside else ():
        if s.role in _HALVES:
            name = s.name
            while name:
                name = name.rpartition(".")[0]
                if name in inside:
                    inside[name][_HALVES.index(s.role)].append(s)
    spread = Sites()
    for block, (ups, downs, whole) in inside.items():
        if len(ups) == len(downs) == 1 and not whole and ups[0].module is not downs[0].module:
            spread.append(Site(f"{block}.mlp", downs[0].module, downs[0].module_name, "mlp", source=ups[0].module))
    return spread


_HALVES = ("mlp.up", "mlp.down", "mlp")


def _parameter_role(parameter: str) -> str:
    return named_role(parameter) or "matrix"


LINEAR_ROLES = (
    "linear", "attention.query", "attention.key", "attention.value", "attention.qkv", "attention.output", "mlp.up", "mlp.down", "mlp.gate",
)  # fmt: skip


def _braces(pattern: str) -> list[str]:
    m = re.search(r"\{([^{}]*)\}", pattern)
    if m is None:
        return [pattern]
    return list(itertools.chain.from_iterable(_braces(pattern[: m.start()] + part + pattern[m.end() :]) for part in m[1].split(",")))


def _matches(site: Site, where: str) -> bool:
    if where == "linear":
        return site.layer is not None and (site.role in LINEAR_ROLES or site.layer.kind == "experts")
    if where in ("model", ""):
        return site.role == "model"
    if where == "all":
        return True
    role_hit = fnmatch.fnmatchcase(site.role, where)
    return role_hit or fnmatch.fnmatchcase(site.name, where)


def choose(found: Sequence[Site], where: Where, usable: Callable[[Site], bool]) -> Sites:
    """Returns the sites of ``found`` that ``where`` names and ``usable`` accepts, in model order.

    Args:
        found: All sites of the model.
        where: A role (``"attention.query"``, ``"block"``), ``"linear"``, ``"all"``, a glob on names or roles with
            ``{a,b}`` alternatives, a predicate on a site, or several of these.
        usable: What the method can act on.

    Raises:
        InputError: if nothing matches; the message lists near names.
    """
    patterns = [where] if isinstance(where, str) or callable(where) else list(where)
    texts = [p for w in patterns if isinstance(w, str) for p in _braces(w)]
    tests = [w for w in patterns if callable(w)]
    named = Sites(s for s in found if any(_matches(s, t) for t in texts) or any(t(s) for t in tests))
    chosen = Sites(s for s in named if usable(s))
    if chosen:
        return chosen
    words = ", ".join(repr(w) for w in patterns)
    if named:
        raise InputError(f"where={words} matches {len(named)} sites ({named[0].name or '(model)'}, ...), but the method cannot act on any of them")
    near = sorted({s.role for s in found if s.role not in ("other", "model")} | {"linear", "all"})
    names = [s.name for s in found if s.name]
    hints = "".join(did_you_mean(t, [n for n in (*near, *names) if n != t]) for t in texts[:1])
    raise InputError(f"where={words} matches no site{hints} (roles here: {', '.join(near)}; names such as {', '.join(names[:3])})")


def with_statistics(site: Site, statistics: Mapping[str, Mapping[str, Tensor]] | None) -> Site:
    """Returns the site with its own part of what :func:`exapt.calibrate` collected."""
    return replace(site, statistics=dict(statistics.get(site.name, {}))) if statistics else site
