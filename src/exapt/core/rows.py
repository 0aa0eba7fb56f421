"""Rows of a batch with different adapters, run together: the layer beneath once for all, then every row's own low-rank update by two batched
products over the adapters' stacked factors. What cannot be shared runs apart, for its rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain as chained
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from exapt.core.contract import Method, WeightMethod
from exapt.core.entry import Entry

if TYPE_CHECKING:
    from exapt.core.chain import Chain
    from exapt.core.slots import Slots

KINDS = ("linear", "conv1d_hf", "embedding")
SMALL = 16
"""A rank up to which updates are stacked at any layer; larger ones only while four times the factors have no more numbers than the matrix."""
COPY = 16
"""To copy a row of a factor costs about as much as this many of its products: what fills up shorter groups is weighed against it."""


class Rows:
    """Which adapter each row runs with; ``apart`` are those for which the whole model has to run by itself."""

    def __init__(self, names: tuple[str | None, ...], apart: frozenset[str | None] = frozenset()) -> None:
        self.names, self.apart = names, apart
        self.numbers: dict[str | None, tuple[int, ...]] = {}
        for name in dict.fromkeys(names):
            self.numbers[name] = tuple(i for i, n in enumerate(names) if n == name)
        together = tuple(n for n in names if n not in apart)
        self.rest = Rows(together) if apart and together else None
        self.block: object = self
        self.index: Tensor | None = None
        self.plans: dict[tuple[Slots, bool], Plan | None] = {}
        self.places: dict[Any, Tensor] = {}

    def plan(self, slots: Slots, module: nn.Module) -> Plan | None:
        """How these rows run at a module, or ``None`` where no adapter of theirs is."""
        key = slots, module.training
        if key not in self.plans:
            self.plans[key] = _planned(slots, module, self)
        return self.plans[key]

    def places_of(self, numbers: tuple[int, ...], repeats: int, device: torch.device) -> Tensor:
        """Where the rows ``numbers`` are in a batch with ``repeats`` samples for each row."""
        key = numbers, repeats, device
        if key not in self.places:
            self.places[key] = torch.tensor([i * repeats + j for i in numbers for j in range(repeats)], device=device)
        return self.places[key]


@dataclass(eq=False)
class Plan:
    """What the rows of a batch do at one module.

    Attributes:
        together: Rows that share one run of the layer beneath.
        apart: Adapters that need it for themselves, with their rows.
        products: The low-rank updates of the rows that run together.
        after: Chains of activation methods, and their rows among those that run together.
    """

    together: tuple[int, ...]
    apart: tuple[tuple[str, tuple[int, ...]], ...]
    products: Products | None
    after: tuple[tuple[Chain, tuple[int, ...]], ...]


def _planned(slots: Slots, module: nn.Module, rows: Rows) -> Plan | None:
    apart, after = [], []
    shared: dict[str | None, Chain] = {}
    for name, numbers in rows.numbers.items():
        if name is None or not slots.of(name):
            continue
        chain = slots.chain_of((name,))
        if _shares(chain, module):
            shared[name] = chain
        else:
            apart.append((name, numbers))
    if not shared and not apart:
        return None
    alone = {n for n, _ in apart}
    together = tuple(i for i, n in enumerate(rows.names) if n not in alone)
    where = {i: k for k, i in enumerate(together)}
    for name, chain in shared.items():
        if chain.after:
            after.append((chain, tuple(where[i] for i in rows.numbers[name])))
    fast = {n: c.fast for n, c in shared.items() if n is not None and c.fast}
    owners = {where[i]: k for k, n in enumerate(fast) for i in rows.numbers[n]}
    products = Products(tuple(fast), tuple(fast.values()), Layout([owners.get(i) for i in range(len(together))], len(fast))) if fast else None
    return Plan(together, tuple(apart), products, tuple(after))


def _shares(chain: Chain, module: nn.Module) -> bool:
    """Whether a chain can act after a run of the layer beneath that other adapters' rows share."""
    if chain.inner or chain.tokens or chain.sides or chain.prefixes or any(chain.entering):
        return False
    return all(is_product(e) and not (module.training and trains_otherwise(e)) for e in chain.fast) and not (
        chain.fast and getattr(module, "scale_grad_by_freq", False)
    )


def is_product(e: Entry) -> bool:
    """Whether all that an entry does is to add a product of low rank, small beside the layer's own."""
    if e.product is None:
        method, layer = e.method, e.layer
        e.product = False
        able = isinstance(method, WeightMethod) and type(method).low_rank is not WeightMethod.low_rank
        if able and layer is not None and layer.kind in KINDS and not (e.definition or method.notes or method.reads):
            with torch.no_grad():
                found = method.low_rank(e.tensors(), layer.shape)
            e.product = found is not None and (len(found[0]) <= SMALL or 4 * len(found[0]) * sum(layer.shape) <= math.prod(layer.shape))
    return e.product


def trains_otherwise(e: Entry) -> bool:
    """Whether the method's forward has more to it in training than its update: dropout, or what is noticed for its steps."""
    return bool(e.method.needs_forward()) or type(e.method).on_step is not Method.on_step


class Layout:
    """How rows are laid out for batched products: adapter by adapter, each with the same number of rows, or row by row with an index.

    Args:
        owners: The number of each row's adapter, or ``None``.
        n: The number of adapters.
    """

    def __init__(self, owners: Sequence[int | None], n: int) -> None:
        groups = [[i for i, k in enumerate(owners) if k == a] for a in range(n)]
        used = [i for group in groups for i in group]
        most = max(map(len, groups))
        self.n, self.rows, self.most = n, len(owners), most
        self.filled = n * most - len(used)
        self.whole = used == list(range(len(owners))) and n * most == len(used)  # the rows lie as they are needed
        self.taken = [i for g in groups for i in g + g[:1] * (most - len(g))]
        self.valid = [k * most + j for k, g in enumerate(groups) for j in range(len(g))]
        self.used, self.owners = used, [k for k in owners if k is not None]
        self.sorted = sorted(used)
        self.kept: dict[tuple[str, torch.device], Tensor] = {}

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """One of the lists as an index."""
        if (name, device) not in self.kept:
            self.kept[name, device] = torch.tensor(getattr(self, name), device=device)
        return self.kept[name, device]


@dataclass(eq=False)
class Products:
    """The low-rank updates of some rows: names of the adapters, each with its entries, and how the rows lie."""

    names: tuple[str, ...]
    entries: tuple[tuple[Entry, ...], ...]
    layout: Layout

    def added(self, slots: Slots, block: object, x: Tensor, y: Tensor, in_place: bool) -> Tensor:
        """``y`` with every row's update of its input ``x``."""
        A, B = factors(slots, self.names, self.entries, block, y.dtype)
        lay, device = self.layout, x.device
        looks_up = slots.layer.kind == "embedding"
        x = x.reshape(lay.rows, -1) if looks_up else x.to(y.dtype).reshape(lay.rows, -1, x.shape[-1])
        out = y.reshape(lay.rows, -1, y.shape[-1])
        if lay.whole:
            flat = (lay.n, -1, *out.shape[2:])
            h = _first(A, x.reshape(lay.n, -1, *x.shape[2:]), looks_up)
            out = out.reshape(flat)
            return (out.baddbmm_(h, B) if in_place else torch.baddbmm(out, h, B)).reshape(y.shape)
        if lay.filled * x.shape[1] <= COPY * len(lay.used) or looks_up:
            taken = x.index_select(0, lay.tensor("taken", device)).reshape(lay.n, -1, *x.shape[2:])
            new = torch.bmm(_first(A, taken, looks_up), B).reshape(lay.n * lay.most, -1, y.shape[-1])
            new = new if len(lay.valid) == len(new) else new.index_select(0, lay.tensor("valid", device))
            rows = lay.tensor("used", device)
        else:
            owners, rows = lay.tensor("owners", device), lay.tensor("sorted", device)
            new = torch.bmm(_first(A[owners], x.index_select(0, rows), False), B[owners])
        return (out.index_add_(0, rows, new) if in_place else out.index_add(0, rows, new)).reshape(y.shape)


def _first(A: Tensor, x: Tensor, looks_up: bool) -> Tensor:
    """Each adapter's ``A`` applied to its inputs (n, rows, d_in), or looked up at its places (n, rows): (n, rows, r)."""
    if looks_up:
        return A.mT[torch.arange(len(A), device=x.device)[:, None], x]
    return torch.bmm(x, A.mT)


_version = attrgetter("_version")


class Stack:
    """Adapters' factors stacked while they stay the same. A copy of the model, or a pickle, begins without.

    Changes are told from torch's version counters and the tensors' places in memory; what is written through ``.data`` in place goes
    unseen, so the stack of adapters that train lasts for one block of :func:`exapt.routed` only.
    """

    def __init__(self, names: tuple[str, ...], entries: Sequence[Sequence[Entry]], block: object, dtype: torch.dtype) -> None:
        self.names, self.dtype, self.block, self.entries = names, dtype, block, entries
        self.asks = block is not None
        self.views = [held.values() for group in entries for e in group for held in _held(e)]
        tensors = list(chained.from_iterable(self.views))
        self.told = not any(t.is_inference() or hasattr(t, "full_tensor") for t in tensors)  # others have no counter, or lie on several machines
        self.versions, self.places = (list(map(_version, tensors)), list(map(Tensor.data_ptr, tensors))) if self.told else ([], [])
        self.held = [t.detach() for t in tensors]  # so that no address is used anew
        with torch.inference_mode(False), torch.no_grad():
            self.A, self.B = stacked(entries, dtype)

    def serves(self, names: tuple[str, ...], block: object, dtype: torch.dtype) -> bool:
        """Whether this is the stack of these adapters as they are now."""
        if self.names != names or self.dtype != dtype or not self.told or not (self.block is None or self.block is block):
            return False
        tensors = list(chained.from_iterable(self.views))
        return list(map(_version, tensors)) == self.versions and list(map(Tensor.data_ptr, tensors)) == self.places

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _held(e: Entry) -> list[dict[str, Tensor]]:
    return [cast("dict[str, Tensor]", d) for h in (e.holder, e.common) if h is not None for d in (h._parameters, h._buffers) if d]


def pooled(slots: Slots, index: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``y`` with the update of each row's adapter, which ``index`` tells by its place in the module's pool: it is data, to a compiler too."""
    pool = slots.pool
    if pool is None:
        return y
    asked = torch.is_grad_enabled() and pool.asks
    A, B = stacked(pool.entries, y.dtype) if asked or pool.dtype != y.dtype else (pool.A, pool.B)
    if slots.layer.kind == "embedding":
        h = A.mT[index[:, None], x.reshape(len(index), -1)]
    else:
        h = torch.bmm(x.to(y.dtype).reshape(len(index), -1, x.shape[-1]), A[index].mT)
    return y + torch.bmm(h, B[index]).reshape(y.shape)


def factors(slots: Slots, names: tuple[str, ...], entries: Sequence[Sequence[Entry]], block: object, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The adapters' factors, stacked: ``A`` (n, r, d_in) and ``B`` transposed (n, r, d_out), padded with zeros to the largest rank.

    They are made anew while gradients are asked of them, else kept until a parameter changes.
    """
    tensors = [t for group in entries for e in group for held in _held(e) for t in held.values()] if torch.is_grad_enabled() else []
    if any(t.requires_grad for t in tensors) or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        slots.__dict__["stack"] = None
        return stacked(entries, dtype)
    stack = slots.stack
    if stack is None or not stack.serves(names, block, dtype):
        stack = Stack(names, entries, block if train(entries) else None, dtype)
        slots.__dict__["stack"] = stack
    return stack.A, stack.B


def train(entries: Sequence[Sequence[Entry]]) -> bool:
    """Whether any of the adapters trains when it is active."""
    return any(e.state is None or e.state.adapters[e.adapter].trainable for group in entries for e in group)


def stacked(entries: Sequence[Sequence[Entry]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stacks the factors of each adapter's entries, cast to ``dtype``."""
    pairs = [[e.method.low_rank(e.tensors(dtype), cast(Any, e.layer).shape) for e in group] for group in entries]
    some = next(pair for group in pairs for pair in group)
    none = some[0][:0], some[1][:, :0]  # of an adapter that is not here
    above = [torch.cat([a for a, _ in group]) if len(group) > 1 else (group or [none])[0][0] for group in pairs]
    below = [torch.cat([b.mT for _, b in group]) if len(group) > 1 else (group or [none])[0][1].mT for group in pairs]
    most = max(len(a) for a in above)
    return _padded(above, most, dtype), _padded(below, most, dtype)


def _padded(parts: Sequence[Tensor], most: int, dtype: torch.dtype) -> Tensor:
    filled: list[Tensor] = []
    for t in parts:
        filled.append(t.to(dtype))
        if len(t) < most:
            filled.append(filled[-1].new_zeros(most - len(t), t.shape[1]))
    return torch.cat(filled).view(len(parts), most, -1)
