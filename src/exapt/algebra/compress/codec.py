"""What a codec is: settings, and a pair of functions between an adapter's tensors and few small ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from exapt.core.components import imported
from exapt.core.errors import InputError, did_you_mean
from exapt.core.registry import checked

Shapes = Mapping[str, tuple[int, ...]]


class Codec:
    """A lossy code of named tensors; a frozen dataclass whose fields are its settings.

    ``encode`` is given floating tensors and returns a few packed ones, of any type, under names of its own; ``decode`` makes the tensors
    again from these and from the shapes, in the same order; it works in float32. What is packed may come from a stranger: ``decode`` may
    raise on it, but never executes anything.
    """

    key: ClassVar[str] = ""
    """Its name in files and on the command line."""
    tunable: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Settings to be chosen by a score, with the values to try; they do not change the size."""

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Packs tensors."""
        raise NotImplementedError

    def decode(self, packed: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Returns what became of the tensors, float32."""
        raise NotImplementedError

    def bound(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """For each tensor a number that the error of ``decode(encode(tensors))`` in the Frobenius norm does not exceed, but for rounding."""
        raise NotImplementedError


def codecs() -> dict[str, type[Codec]]:
    """Every codec by its key.

    >>> sorted(codecs())
    ['bitdelta', 'cast', 'compeft', 'precision_codebook', 'uniform_groups']
    """
    imported(Path(__file__).parent, __package__ or "")
    return {c.key: c for c in Codec.__subclasses__()}


def codec(key: str, **settings: Any) -> Codec:
    """The codec of a key.

    Raises:
        InputError: for an unknown key or setting, or a value of the wrong type.

    >>> codec("compeft", density=0.1).density
    0.1
    """
    known = codecs()
    if key not in known:
        raise InputError(f'no codec "{key}"{did_you_mean(str(key), known)} (there are {", ".join(sorted(known))})')
    cls, hints = known[key], get_type_hints(known[key])
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in settings:
        if name not in names:
            raise InputError(f'{key} has no "{name}"{did_you_mean(name, names)} (it has {", ".join(names) or "no settings"})')
    return cls(**{k: checked(key, k, v, hints[k]) for k, v in settings.items()})


def as_settings(made: Codec) -> dict[str, Any]:
    """Returns ``{"codec": key, **settings}``, what files hold."""
    return {"codec": made.key, **{f.name: getattr(made, f.name) for f in fields(made)}}  # type: ignore[arg-type]


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All values one after the other, float32."""
    return torch.cat([t.detach().float().reshape(-1) for t in tensors.values()]) if tensors else torch.zeros(0)


def cut(values: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The inverse of :func:`flat`."""
    sizes = [_count(s) for s in shapes.values()]
    return {k: part.view(shapes[k]) for k, part in zip(shapes, values.split(sizes), strict=True)}


def owners(shapes: Shapes) -> Tensor:
    """For each of all values the number of its tensor, int64."""
    return torch.repeat_interleave(torch.tensor([_count(s) for s in shapes.values()]))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes."""
    return {k: tuple(t.shape) for k, t in tensors.items()}


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n
