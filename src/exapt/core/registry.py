"""The open registry of methods: ``@register`` makes a class a full citizen, wherever it is defined."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from exapt.core import hooks
from exapt.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from exapt.core.contract import Method

M = TypeVar("M", bound="type[Method]")
_METHODS: dict[str, type[Method]] = {}
SOURCES = hooks.METHODS


def register(cls: M) -> M:
    """Adds a method class to the registry under its ``key`` (the class name in lower case if it names none).

    Raises:
        InputError: if the class is no frozen dataclass, follows none of the six contracts, or its key is taken.
    """
    from exapt.core.contract import CONTRACTS  # here: it needs torch, and a listing must not wait for that

    if "key" not in cls.__dict__:
        cls.key = cls.__name__.lower()
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise InputError(f"{cls.__name__}: a method is a frozen dataclass; write @dataclass(frozen=True) below @register")
    if sum(issubclass(cls, c) for c in CONTRACTS) != 1:
        raise InputError(f"{cls.__name__}: subclass exactly one of {', '.join(c.__name__ for c in CONTRACTS)}")
    taken = _METHODS.get(cls.key)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise InputError(f'{cls.__name__}: the key "{cls.key}" belongs to {taken.__module__}.{taken.__qualname__}; choose another')
    _METHODS[cls.key] = cls
    return cls


def methods() -> dict[str, type[Method]]:
    """Returns every registered method class by key, sorted."""
    for source in SOURCES:
        source(None)
    return dict(sorted(_METHODS.items()))


def method(key: str, **fields: Any) -> Method:
    """Returns a method by its key.

    >>> import exapt
    >>> exapt.method("lora", rank=4)
    LoRA(rank=4, alpha=16.0, dropout=0.0, scaling='standard', start='kaiming', plus=1.0)
    """
    for source in SOURCES if key not in _METHODS else ():
        source(key)
    if key not in _METHODS:
        known = methods()
        raise InputError(f'no method "{key}"{did_you_mean(key, known)} (exapt methods lists all {len(known)})')
    cls = _METHODS[key]
    own = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    hints = _hints(cls)  # type: ignore[arg-type]
    for name, value in fields.items():
        if name not in own:
            raise InputError(f'{key} has no field "{name}"{did_you_mean(name, own)} (it has {", ".join(own) or "none"})')
        fields[name] = checked(key, name, value, hints[name])
    return cls(**{k: _made(v) for k, v in fields.items()})


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of a method's fields, looked up once: a file names its method each time it is loaded."""
    return get_type_hints(cls)


def _made(value: Any) -> Any:
    """A field's value with the methods that its JSON describes."""
    if isinstance(value, Mapping) and "method" in value:
        return from_dict(value)
    return tuple(map(_made, value)) if isinstance(value, (tuple, list)) else value


def checked(key: str, name: str, value: Any, hint: Any) -> Any:
    """Returns a field's value in the type its annotation asks for, or raises ``InputError`` naming what it may be."""
    allowed = get_args(hint) if get_origin(hint) is not tuple else ()
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if get_origin(hint) is tuple:
        raise InputError(f"{key}.{name} is {value!r}; it must be a list")
    simple = {t for t in (allowed or (hint,)) if isinstance(t, type)}
    if float in simple and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    literal = [a for a in allowed if not isinstance(a, type)]
    if literal and value not in literal:
        raise InputError(f"{key}.{name} is {value!r}; it must be one of {', '.join(map(repr, literal))}")
    if simple <= {int, float, bool, str, type(None)} and simple:
        right = isinstance(value, tuple(simple)) and (not isinstance(value, bool) or bool in simple)
        if not right and not literal:
            raise InputError(f"{key}.{name} is {value!r}; it must be {' or '.join(sorted(t.__name__ for t in simple))}")
    return value


def from_dict(data: Mapping[str, Any]) -> Method:
    """Returns the method that :func:`exapt.core.contract.as_dict` described.

    >>> import exapt
    >>> from_dict({"method": "lora", "rank": 2}).rank
    2
    """
    fields = dict(data)
    key = fields.pop("method", None)
    if not isinstance(key, str):
        raise InputError(f'a method needs its key under "method"; this has only {sorted(data)}')
    return method(key, **fields)
