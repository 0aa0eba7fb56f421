"""What an editor is: settings, and one verb that puts edits on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from exapt.algebra.edit.host import Editing
from exapt.algebra.edit.request import Edit
from exapt.core.components import component_of, components
from exapt.core.errors import InputError, did_you_mean


class Editor:
    """Puts edits on a model; subclass it as a frozen dataclass of settings with ``@component(key, kind="editor")``."""

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        """Makes the edits at once. What a sequence of calls needs to know of earlier ones is in ``editing.memory``.

        Raises:
            InputError: for edits that cannot be made; the model is as before then.
        """
        raise NotImplementedError


def editor(key: str, **settings: Any) -> Editor:
    """The editor of a key with settings.

    Raises:
        InputError: for a key that is no editor's, or a setting that it does not have.

    >>> editor("rome", ridge=0.1)
    ROME(value=Value(steps=20, rate=0.5, divergence=0.0625, decay=0.5, clamp=4.0, enough=0.05), ridge=0.1)
    """
    made = component_of(key, "editor")
    nested: dict[str, Any] = {f.name: f.default for f in fields(made) if is_dataclass(f.default)}
    own = {f.name for f in fields(made)} - nested.keys()
    inner: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        place = next((k for k, default in nested.items() if name in {f.name for f in fields(default)}), None)
        if name not in own and place is None:
            every = sorted(own | {f.name for d in nested.values() for f in fields(d)})
            raise InputError(f'editor {key} has no "{name}"{did_you_mean(name, every)} (it has {", ".join(every)})')
        inner.setdefault("" if name in own else str(place), {})[name] = value
    built = {place: replace(nested[place], **values) for place, values in inner.items() if place}
    found: Editor = made(**inner.get("", {}), **built)
    return found


def editors() -> dict[str, Any]:
    """All editors, by key."""
    return {k: c.target for k, c in components("editor").items()}
