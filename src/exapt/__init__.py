"""exapt: parameter shifts for distribution shifts. Adapt pretrained models, and know that it helped.

Importing the package does not import torch: each name is fetched where it is defined when it is first asked for, or at once where torch is
imported already.
"""

from __future__ import annotations

import sys as _sys
from collections.abc import Iterator
from functools import cache as _cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exapt import methods as _methods
from exapt import online
from exapt.core import __version__
from exapt.core.components import Component, component, components
from exapt.core.components import imported as _imported
from exapt.core.components import places as _places
from exapt.core.errors import InputError
from exapt.core.hooks import COMPONENTS as _SOURCES
from exapt.core.hooks import UNPACK as _UNPACK
from exapt.core.registry import _METHODS, method, methods, register

if TYPE_CHECKING:
    from exapt.core.attach import attach, detach
    from exapt.core.calibrate import calibrate
    from exapt.core.contract import (
        ActivationMethod, Columns, Entries, Method, OutputMethod, SideMethod, SubsetMethod, Taps, TokenMethod, WeightMethod,
        Whole, frozen, seeded,
    )  # fmt: skip
    from exapt.core.file import AdapterFile, fingerprint, read, save
    from exapt.core.merge import merge, merged, unmerge
    from exapt.core.objective import Objective, objective
    from exapt.core.recompute import recomputed
    from exapt.core.replicate import replicate, unreplicate
    from exapt.core.routing import parallel, routed
    from exapt.core.sites import Site, sites
    from exapt.core.state import Count, activate, adapters, after_step, disabled, noted, parameter_count, penalty, trainable, using
    from exapt.core.warm import start_from
    from exapt.interop import export, load

_PLACES = {
    "core.attach": "attach detach",
    "core.calibrate": "calibrate",
    "core.contract": "ActivationMethod Columns Entries Method OutputMethod SideMethod SubsetMethod Taps TokenMethod WeightMethod Whole frozen seeded",
    "core.file": "AdapterFile fingerprint read save",
    "core.merge": "merge merged unmerge",
    "core.objective": "Objective objective",
    "core.recompute": "recomputed",
    "core.replicate": "replicate unreplicate",
    "core.routing": "parallel routed",
    "core.sites": "Site sites",
    "core.state": "Count activate adapters after_step disabled noted parameter_count penalty trainable using",
    "core.warm": "start_from",
    "interop": "export load",
    "online.wrapper": "online",  # the verb; its package is reached by import only
    "train": "fit evaluate predict",
    "loop": "Loop",
    "algebra.adapters": "combine",
}
_LAZY = {name: f"exapt.{place}" for place, names in _PLACES.items() for name in names.split()}
_ROOMS = ("algebra", "loop", "objectives", "online", "shift", "train")
"""Packages that hold components besides methods."""
del online, core  # type: ignore[name-defined]  # noqa: F821  the import system named the packages; asked for, they come with what is in them


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


def _core() -> None:
    """Imports what everything rests on, and with it torch."""
    for module in (m for m in _LAZY.values() if m.startswith(("exapt.core.", "exapt.interop"))):
        import_module(module)


def _method_places(name: str) -> Iterator[str]:
    """Modules that may hold a method's class: that of its name, which most are in, then what a look into all of them says."""
    if not name.startswith("_") and (Path(__file__).parent / "methods" / f"{name.lower()}.py").is_file():
        yield name.lower()
    if name in _methods.places():
        yield _methods.places()[name]


def __getattr__(name: str) -> Any:
    """Finds verbs and contracts where they are defined, packages by their names, methods and components by those of their classes."""
    if name in _LAZY:
        globals()[name] = getattr(import_module(_LAZY[name]), name)
        return globals()[name]
    if name in ("algebra", "core", "interop", "loop", "objectives", "search", "shift", "train"):
        if name == "core":
            _core()
        globals()[name] = import_module(f"exapt.{name}")
        return globals()[name]
    for place in _method_places(name):
        module = import_module(f"exapt.methods.{place}")
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
    "parallel", "parameter_count", "penalty", "read", "recomputed", "register", "replicate",
    "routed", "save", "seeded", "sites", "start_from", "trainable", "unmerge",
    "unreplicate", "using",
]  # fmt: skip

if "torch" in _sys.modules:  # who has torch is about to use it, and should not find the import in the time of the first call
    _core()
