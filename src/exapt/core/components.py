"""The catalogue of everything that is no parameter shift: statistics, objectives, test-time methods. One component, one file.

``@component`` notes what a class or a function is. Packages that hold components give :data:`exapt.core.hooks.COMPONENTS` a function that imports them, so that
the catalogue answers for all of them and this floor names none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from exapt.core import hooks
from exapt.core.errors import InputError, did_you_mean

T = TypeVar("T")
_COMPONENTS: dict[str, Component] = {}
SOURCES = hooks.COMPONENTS
_NOTED = re.compile(r"^@(?:component|rule)\(\s*\"(\w+)\".*?^(?:class|def) (\w+)", re.MULTILINE | re.DOTALL)


@functools.cache
def places(folder: Path, package: str) -> dict[str, str]:
    """In which module each component below a package's folder is, by class's or function's name; told from the files, which are not imported."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("[a-z]*.py")):
        module = ".".join((package, *file.relative_to(folder).with_suffix("").parts))
        found |= {name: module for _, name in _NOTED.findall(file.read_text(encoding="utf-8"))}
    return found


def imported(folder: Path, package: str) -> None:
    """Imports every module below a package's folder that holds a component, so that the catalogue has it."""
    for module in sorted(set(places(folder, package).values())):
        import_module(module)


@dataclass(frozen=True)
class Component:
    """One entry of the catalogue.

    Attributes:
        key: Its name in files, on the command line and in tests; unique.
        kind: What it is: "detector", "alarm", "weights", "objective", "test-time" ...
        target: The class or function.
        paper: Title of the paper; empty where there is none to name.
        variants: Further papers that it covers: title, and how it is configured for them.
        oracle: What its golden test compares with.
    """

    key: str
    kind: str
    target: Any
    paper: str = ""
    variants: Mapping[str, str] = field(default_factory=dict)
    oracle: str = "NumPy"

    @property
    def name(self) -> str:
        """The name of the class or function."""
        return str(self.target.__name__)

    @property
    def module(self) -> str:
        """Where it is defined."""
        return str(self.target.__module__)

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring, on one line."""
        return " ".join((self.target.__doc__ or "").strip().split("\n\n")[0].split())

    def record(self) -> dict[str, Any]:
        """Returns what ``exapt components --json`` prints."""
        return {
            "key": self.key, "kind": self.kind, "name": self.name, "module": self.module, "paper": self.paper,
            "variants": dict(self.variants), "oracle": self.oracle, "summary": self.summary,
        }  # fmt: skip


def component(key: str, kind: str, paper: str = "", variants: Mapping[str, str] | None = None, oracle: str = "NumPy") -> Callable[[T], T]:
    """Returns a decorator that notes a class or a function in the catalogue and returns it as it is.

    Args:
        key: Its name, unique over all kinds.
        kind: What it is.
        paper: Title of the paper.
        variants: Further papers: title, and how the component is configured for them.
        oracle: What its golden test compares with.

    Raises:
        InputError: if the key is another component's.

    >>> @component("mean_gap", kind="detector")
    ... def mean_gap(x, y):
    ...     "Difference of means."
    >>> components()["mean_gap"].summary
    'Difference of means.'
    """

    def note(target: T) -> T:
        made = Component(key, kind, target, paper, dict(variants or {}), oracle)
        taken = _COMPONENTS.get(key)
        if taken is not None and (taken.module, taken.name) != (made.module, made.name):
            raise InputError(f'{made.name}: the key "{key}" belongs to {taken.module}.{taken.name}; choose another')
        _COMPONENTS[key] = made
        return target

    return note


def components(kind: str | None = None) -> dict[str, Component]:
    """Returns everything in the catalogue but the methods, sorted by key: detectors, weights, estimators, objectives, test-time methods.

    Args:
        kind: Only what is of this kind.

    >>> import exapt
    >>> exapt.components("test-time")["tent"].name
    'Tent'
    """
    for source in SOURCES:
        source(kind)
    return {k: c for k, c in sorted(_COMPONENTS.items()) if kind in (None, c.kind)}


def component_of(key: str, kind: str) -> Any:
    """Returns the class or function of a key of one kind.

    Raises:
        InputError: if there is none.
    """
    found = components(kind)
    if key not in found:
        raise InputError(f'no {kind} "{key}"{did_you_mean(key, found)} (exapt components lists all {len(found)})')
    return found[key].target
