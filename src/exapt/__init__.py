"""exapt: parameter shifts for distribution shifts. Adapt pretrained models, and know that it helped."""

from __future__ import annotations

from functools import cache as _cache
from importlib import import_module
from pathlib import Path
from typing import Any

from exapt import methods as _methods
from exapt.core import __version__
from exapt.core.attach import attach, detach
from exapt.core.calibrate import calibrate
from exapt.core.components import SOURCES as _SOURCES
from exapt.core.components import Component, component, components
from exapt.core.components import imported as _imported
from exapt.core.components import places as _places
from exapt.core.contract import (
    ActivationMethod, Columns, Entries, Method, OutputMethod, SideMethod, SubsetMethod, Taps, TokenMethod, WeightMethod,
    Whole, frozen, seeded,
)  # fmt: skip
from exapt.core.errors import InputError
from exapt.core.file import UNPACK as _UNPACK
from exapt.core.file import AdapterFile, fingerprint, read, save
from exapt.core.merge import merge, merged, unmerge
from exapt.core.objective import Objective, objective
from exapt.core.registry import _METHODS, method, methods, register
from exapt.core.replicate import replicate, unreplicate
from exapt.core.routing import parallel, routed
from exapt.core.sites import Site, sites
from exapt.core.warm import start_from
from exapt.core.state import (
    Count, activate, adapters, after_step, disabled, noted, parameter_count, penalty, trainable, using,
)  # fmt: skip
from exapt.interop import export, load
from exapt.online.wrapper import online  # the verb; its package is reached by import only

_LAZY = {"fit": "exapt.train", "evaluate": "exapt.train", "predict": "exapt.train", "Loop": "exapt.loop", "combine": "exapt.algebra.adapters"}
_ROOMS = ("algebra", "loop", "objectives", "online", "shift", "train")
"""Packages that hold components besides methods."""


def _folders() -> dict[Path, str]:
    return {Path(__file__).parent / room: f"exapt.{room}" for room in _ROOMS}


@_cache
def _source(kind: str | None) -> None:
    """Imports what holds components of a kind; statistics need scikit-learn, which those that train or adapt do not."""
    rooms = {"objective": ("objectives",), "test-time": ("online",), "guard": ("online",), "merge rule": ("algebra",), "editor": ("algebra",)}
    for room in rooms.get(kind or "", _ROOMS):
        _imported(Path(__file__).parent / room, f"exapt.{room}")


_SOURCES.append(_source)
_UNPACK.append(lambda path, header, tensors: import_module("exapt.algebra.compress.file").unpacked(path, header, tensors))


def __getattr__(name: str) -> Any:
    """Finds methods by their class names, and the training verbs without importing them first."""
    if name == "train":
        return import_module("exapt.train")
    if name in ("search", "shift", "objectives", "loop"):
        return import_module(f"exapt.{name}")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    place = _methods.places().get(name)
    module = import_module(f"exapt.methods.{place}") if place else None
    if hasattr(module, name):
        return getattr(module, name)
    for folder, package in _folders().items():
        if name in _places(folder, package):
            return getattr(import_module(_places(folder, package)[name]), name)
    found = {cls.__name__: cls for cls in _METHODS.values()}  # a user's own
    if name in found:
        return found[name]
    raise AttributeError(f"module 'exapt' has no attribute {name!r}")


def __dir__() -> list[str]:
    names = (n for folder, package in _folders().items() for n in _places(folder, package))
    return sorted({*globals(), *_LAZY, *names, *(c.__name__ for c in methods().values())})


__all__ = [
    "ActivationMethod", "AdapterFile", "Columns", "Component", "Count", "Entries", "InputError", "Method", "Objective", "OutputMethod", "SideMethod",
    "Site", "SubsetMethod", "Taps", "TokenMethod", "WeightMethod", "Whole", "activate", "adapters", "after_step", "attach",
    "calibrate", "component", "components", "detach", "disabled", "export", "fingerprint", "frozen", "load", "merge", "merged", "method",
    "methods", "objective", "online",
    "parallel", "parameter_count", "penalty", "read", "register", "replicate",
    "routed", "save", "seeded", "sites", "start_from", "trainable", "unmerge",
    "unreplicate", "using",
]  # fmt: skip
