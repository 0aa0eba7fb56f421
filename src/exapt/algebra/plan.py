"""How models in files are merged: what is read when, in which parts, and given to a rule."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exapt.algebra.rule import Described
from exapt.algebra.shards import Shards
from exapt.algebra.streamed import BLOCK, Parts, Source
from exapt.algebra.tensors import is_finite, merged_tensor
from exapt.core import __version__
from exapt.core.contract import seeded
from exapt.core.errors import InputError

Part = tuple[str, int, int]


@dataclass(frozen=True)
class Plan:
    """A merge that has been found possible.

    Attributes:
        rule: The rule.
        models, base: What is merged.
        statistics: As :func:`merge_files`, files opened.
        weights, seed, config: As :func:`merge_files`.
        kind: Type to write; ``None``: as it is stored.
    """

    rule: Described
    models: Sequence[Shards]
    base: Shards | None
    statistics: Sequence[Mapping[str, Any]] | None
    weights: Sequence[float] | None
    seed: int
    config: Mapping[str, Any]
    kind: torch.dtype | None

    @property
    def first(self) -> Shards:
        """The model whose names, order and types the merged one has."""
        return self.models[0] if self.base is None else self.base

    @property
    def kinds(self) -> dict[str, torch.dtype]:
        """Types to write, by name."""
        return {n: self.kind if self.kind is not None and s.dtype.is_floating_point else s.dtype for n, s in self.first.entries.items()}

    @property
    def note(self) -> dict[str, str]:
        """Metadata of the files: ``format``, which other libraries look for, and how the model was made."""
        made = {
            "exapt": __version__, "rule": self.rule.function.__name__, "config": dict(self.config), "models": [m.path.name for m in self.models],
            "base": self.base.path.name if self.base is not None else None, "seed": self.seed,
            "weights": list(map(float, self.weights)) if self.weights is not None else None,
        }  # fmt: skip
        return {"format": "pt", "merged": json.dumps(made, default=str)}

    @property
    def step(self) -> int:
        """How many entries of each model make a block, of rules that hold fewer copies twice as many; smaller tensors are merged whole by any rule."""
        return max(1, (2 if self.rule.entrywise else 1) * BLOCK // (len(self.models) + 1))

    def parts(self) -> dict[str, Part]:
        """Tensors whole; or in parts that all models' fit into a block, if the rule says of itself that it works entry by entry."""
        apart = {"generator", "name"} & set(self.rule.given)  # draws and names go by whole tensors
        whole = not self.rule.entrywise or bool(apart) or not all(map(self._like_first, self.statistics or ()))
        step = self.step
        parts: dict[str, Part] = {}
        for name, s in self.first.entries.items():
            if whole or s.elements <= step:
                parts[name] = (name, 0, s.elements)
            else:
                parts |= {f"{name}[{a}:{min(a + step, s.elements)}]": (name, a, min(a + step, s.elements)) for a in range(0, s.elements, step)}
        return parts

    def _like_first(self, statistics: Mapping[str, Any]) -> bool:
        shapes = {n: s.shape for n, s in self.first.entries.items()}
        return isinstance(statistics, Shards) and all(shapes.get(n) == s.shape for n, s in statistics.entries.items())

    def _wide(self) -> dict[str, torch.dtype]:
        """The type that holds every model's numbers, where models of several types may meet."""
        if self.kind is None:
            return {}
        wide = {n: torch.float32 for n, s in self.first.entries.items() if s.dtype.is_floating_point}
        for model in (*self.models, self.first):
            wide |= {n: torch.promote_types(wide[n], model.entries[n].dtype) for n in wide}
        return wide

    def merged(self) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """Merged tensors, or parts, with their names and where they begin; the pages that they came from are given back."""
        parts, kinds, wide = self.parts(), self.kinds, self._wide()
        views = [View(m, parts, wide) for m in self.models]
        still = None if self.base is None else View(self.base, parts, wide, copied="base" in self.rule.given)
        seen = None
        if self.statistics is not None:
            seen = [View(s, {k: p for k, p in parts.items() if p[0] in s}, copied=True) if isinstance(s, Shards) else s for s in self.statistics]
        labels = [m.label for m in self.models]
        for key, (name, begin, end) in parts.items():
            in_parts = self._streamed(name, seen, wide.get(name)) if end - begin > self.step else None
            for place, tensor in in_parts or ():
                yield (name, place), _finite(tensor.to(kinds[name]), key, self.rule)
            if in_parts is None:
                copied = functools.partial(self._release, name, begin, end)
                tensor = merged_tensor(self.rule, key, views, still, self.weights, seen, labels, self.seed, self.config, copied)
                yield (name, begin), _finite(tensor.to(kinds[name]), key, self.rule)
            self._release(name, begin, end)

    def _streamed(self, name: str, statistics: Sequence[Mapping[str, Any]] | None, wide: torch.dtype | None) -> Iterator[tuple[int, Tensor]] | None:
        """Merged parts of a tensor and where they begin; ``None`` where the rule needs it whole."""
        stored = self.first.entries[name]
        if self.rule.streamed is None or not stored.dtype.is_floating_point:
            return None
        kind = wide or stored.dtype
        sources: list[Source] = [functools.partial(m.part, name) for m in self.models]
        base: Source | None = None if self.base is None else functools.partial(self.base.part, name)
        labels, passed = [m.label for m in self.models], functools.partial(self._release, name)
        parts = Parts(
            sources, stored.shape, base, self.rule.on_deltas, torch.promote_types(kind, torch.float32), name, labels, passed, block=BLOCK
        )  # fmt: skip
        given: dict[str, Any] = {"weights": None if self.weights is None else torch.tensor(self.weights, dtype=parts.dtype), "name": name}
        given |= {"generator": seeded(self.seed, name), "statistics": None}
        if statistics is not None and all(name in s for s in statistics):
            given["statistics"] = [s[name] for s in statistics]
        found = self.rule.streamed(parts, **{k: given[k] for k in self.rule.given if k != "base"}, **self.config)
        return None if found is None else self._placed(found, parts, kind)

    def _placed(self, found: Iterator[Tensor], parts: Parts, kind: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        begin = 0
        for merged in found:
            end = begin + merged.numel()
            flat = merged.reshape(-1)
            yield begin, (parts.start(begin, end).add_(flat) if self.rule.on_deltas else flat).to(kind)
            begin = end

    def _release(self, name: str, begin: int, end: int, model: int | None = None) -> None:
        held = [s for s in (*self.models, self.base, *(self.statistics or ())) if isinstance(s, Shards)]
        for source in held if model is None else [self.models[model]]:
            if name in source:
                source.release(name, begin, end)


class View(Mapping[str, Tensor]):
    """Parts of the tensors of a model in files, under names of their own.

    Args:
        shards: The model.
        parts: What each name stands for: a tensor's name, and the entries from where to where.
        wide: Types to read tensors in, by name; the others are read in their own.
        copied: Whether a tensor is a copy that may be written to; the model's own memory may not.
    """

    def __init__(self, shards: Shards, parts: Mapping[str, Part], wide: Mapping[str, torch.dtype] | None = None, copied: bool = False) -> None:
        self.shards, self.parts, self.wide, self.copied = shards, parts, wide or {}, copied

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __contains__(self, key: object) -> bool:
        return key in self.parts

    def __getitem__(self, key: str) -> Tensor:
        name, start, stop = self.parts[key]
        stored = self.shards.entries[name]
        t = self.shards.part(name, start, stop)
        t = t.reshape(stored.shape) if stop - start == stored.elements else t
        return t.to(self.wide.get(name, t.dtype), copy=self.copied)


def _finite(tensor: Tensor, name: str, rule: Described) -> Tensor:
    if not is_finite(tensor):
        said = f"{name}: merged by {rule.function.__name__} it holds NaN or infinity in {tensor.dtype}"
        raise InputError(f"{said}; look at the base and the weights, or write a wider dtype")
    return tensor
