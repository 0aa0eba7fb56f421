"""What a merge rule needs to work on tensors that are never whole in memory: their parts, order statistics, inner products and draws from them.

A function that is given to :func:`exapt.algebra.rule.rule` as ``streamed`` reads :class:`Parts` as often as it likes, first for the few numbers that it
needs of the whole tensors, at last to give the merged parts in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.algebra.sparsify import Rescale, check_choice, kept
from exapt.core.errors import InputError

BLOCK = 1 << 20
"""Numbers of all models together that are in memory at a time."""
Source = Callable[[int, int], Tensor]
"""Gives the entries from one to another of a tensor laid flat."""
Mark = Callable[[int, Tensor], tuple[Tensor, Tensor | float]]
"""From a model's number and the part of its task vector that comes next: which entries are kept, and with what probability each."""


@dataclass
class Parts:
    """The tensors that all models have under one name, part by part, as often as they are asked for.

    A part is the caller's own: it may be written to. Iterating gives parts (m, k) of the tensors laid flat.

    Attributes:
        models: One source for each model.
        shape: Of the tensors.
        base: The base's.
        deltas: Whether parts are differences from the base.
        dtype: Of the parts.
        name: The tensor's, for messages.
        labels: What messages call the models.
        passed: Called with the range of a part that has been dealt with.
        block: How many numbers of all models are given at a time; vectors that must not be cut may be more.
    """

    models: Sequence[Source]
    shape: tuple[int, ...]
    base: Source | None = None
    deltas: bool = False
    dtype: torch.dtype = torch.float32
    name: str = "tensor"
    labels: Sequence[str] = ()
    passed: Callable[[int, int], None] = lambda begin, end: None
    block: int = BLOCK
    _seen: bool = False

    def __len__(self) -> int:
        return len(self.models)

    @property
    def elements(self) -> int:
        """How many numbers each tensor holds."""
        return torch.Size(self.shape).numel()

    def __iter__(self) -> Iterator[Tensor]:
        return (part for part, _ in self.pairs())

    def rows(self, size: int) -> Iterator[Tensor]:
        """Parts (m, k, size) of whole vectors of ``size`` entries that lie beside each other."""
        return (part.unflatten(1, (-1, size)) for part, _ in self.pairs(size))

    def pairs(self, size: int = 1) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Parts (m, k) with k a multiple of ``size``, and the base's (k), if there is one."""
        step = max(1, self.block // (len(self.models) + 1) // size) * size
        for begin in range(0, self.elements, step):
            end = min(begin + step, self.elements)
            yield self._read(begin, end)
            self.passed(begin, end)
        self._seen = True

    def start(self, begin: int, end: int) -> Tensor:
        """The base's entries from one to another."""
        assert self.base is not None
        return self.base(begin, end).to(self.dtype, copy=True)

    def _read(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        still = None if self.base is None else self.start(begin, end)
        part = torch.empty((len(self.models), end - begin), dtype=self.dtype)
        for row, source in zip(part, self.models, strict=True):
            row.copy_(source(begin, end))
            if self.deltas and still is not None:
                row.sub_(still)
        if not self._seen and not bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()):
            self._refuse(begin, end)
        return part, still

    def _refuse(self, begin: int, end: int) -> None:
        named = [*zip(self.labels, self.models, strict=False), *([] if self.base is None else [("the base", self.base)])]
        for label, source in named:
            if not bool(torch.isfinite(source(begin, end)).all()):
                raise InputError(f"{self.name}: {label} holds NaN or infinity")


def in_parts(tensors: Tensor, base: Tensor | None = None, *, deltas: bool = False, block: int = BLOCK) -> Parts:
    """Parts of tensors that are in memory.

    Args:
        tensors: (m, ...).
        base: (...).
        deltas: Whether parts are differences from the base.
        block: See :class:`Parts`.

    >>> [p.tolist() for p in in_parts(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), block=6)]
    [[[1.0, 2.0], [4.0, 5.0]], [[3.0], [6.0]]]
    """

    def source(flat: Tensor) -> Source:
        return lambda begin, end: flat[begin:end]

    still = None if base is None else source(base.flatten())
    return Parts([source(t.flatten()) for t in tensors], tuple(tensors.shape[1:]), still, deltas, tensors.dtype, block=block)


def gram(parts: Parts, origin: bool = False) -> Tensor:
    """Inner products of all models with each other (m, m), in double precision.

    Args:
        parts: The models.
        origin: Whether the base is the origin; without one zero is.

    >>> gram(in_parts(torch.tensor([[3.0, 4.0], [1.0, 0.0]])))
    tensor([[25.,  3.],
            [ 3.,  1.]], dtype=torch.float64)
    """
    total = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for part, base in parts.pairs():
        rows = (part.sub_(base) if origin and base is not None else part).double()
        total += rows @ rows.mT
    return total


def spanned(parts: Parts, coefficients: Tensor, origin: bool = False) -> Iterator[Tensor]:
    """Parts of the sum of models times their coefficients (m,).

    Args:
        parts: The models.
        coefficients: (m,).
        origin: Whether the base is the origin.
    """
    for part, base in parts.pairs():
        merged = torch.tensordot(coefficients.to(part), part.sub_(base) if origin and base is not None else part, 1)
        yield merged + base if origin and base is not None else merged


@dataclass(frozen=True)
class Cut:
    """Which entries of each row :func:`exapt.algebra.sparsify.smallest` marks, as two numbers a row.

    Attributes:
        thresholds: (r,), the largest size that is marked.
        equal: How many of those of that size are marked, which are the first.
    """

    thresholds: Tensor
    equal: Sequence[int]

    def marker(self) -> Callable[[int, Tensor], Tensor]:
        """A function of a row's number and the sizes that come next in it, which marks them."""
        left = list(self.equal)

        def mark(row: int, sizes: Tensor) -> Tensor:
            marked = sizes < self.thresholds[row]
            if left[row]:
                first = (sizes == self.thresholds[row]).nonzero()[: left[row], 0]
                marked[first] = True
                left[row] -= len(first)
            return marked

        return mark


def cuts(sizes: Callable[[], Iterable[Tensor]], counts: Sequence[Sequence[int]], elements: int) -> list[Cut]:
    r"""For every list of counts (one for each row) what marks that many smallest entries of each row, exactly.

    A number that is not negative has a bit pattern that grows with it: passes over the parts count the patterns by their leading 16 bits, then, of those that
    begin as the one that is sought does, by their next 16. Two passes in single precision, four in double, whatever the numbers are.

    Args:
        sizes: Gives parts (r, k), not negative, each time it is called.
        counts: Lists of r.
        elements: How many entries a row has.

    >>> low, high = cuts(lambda: [torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])], [[1], [3]], 4)
    >>> low.thresholds.tolist(), low.equal, high.thresholds.tolist(), high.equal
    ([1.0], [1], [2.0], [1])
    """
    sought = {(q, i): (0, count - 1) for q, row in enumerate(counts) for i, count in enumerate(row) if 0 < count < elements}  # leading bits, rank in them
    kind, left = torch.float32, 0
    while sought:
        tallies: dict[tuple[int, int], Tensor] = {}
        shift = -1
        for part in sizes():
            kind, bits = part.dtype, part.view(torch.int64 if part.dtype == torch.float64 else torch.int32)
            shift = max(0, (left or 8 * part.dtype.itemsize) - 16)
            for row, leading in {(i, prefix) for (_, i), (prefix, _) in sought.items()}:
                digits = ((bits[row] - (leading << (shift + 16))) >> shift).clamp_(-1, 1 << 16).add_(1)
                tally = digits.bincount(minlength=(1 << 16) + 2)
                tallies[row, leading] = tallies[row, leading].add_(tally) if (row, leading) in tallies else tally
        for at, (leading, rank) in sought.items():
            below = tallies[at[1], leading][1:-1].cumsum(0)
            digit = int(torch.searchsorted(below, rank, right=True))
            sought[at] = (leading << 16 | digit, rank - (int(below[digit - 1]) if digit else 0))
        left = shift
        if not left:
            break
    found = []
    for q, wanted in enumerate(counts):
        patterns = [sought[q, i][0] if (q, i) in sought else 0 for i in range(len(wanted))]
        exact = torch.tensor(patterns, dtype=torch.int64 if kind == torch.float64 else torch.int32).view(kind)
        every = torch.tensor([count >= elements > 0 for count in wanted])
        found.append(Cut(exact.masked_fill(every, float("inf")), [sought[q, i][1] + 1 if (q, i) in sought else 0 for i in range(len(wanted))]))
    return found


def banded(parts: Parts, shares: Sequence[float], band: Callable[[int, float], tuple[int, int]]) -> Callable[[], Mark]:
    """What marks the entries whose rank by size in their task vector is in a band.

    Args:
        parts: Task vectors.
        shares: One for each; only those between 0 and 1 are looked at.
        band: From the number of entries and the share: how many of the smallest are left out, and how many there are up to the largest kept.

    Returns:
        Function that begins a pass over the parts.
    """
    bands = [band(parts.elements, share) if 0 < share < 1 else (0, parts.elements) for share in shares]
    low, high = cuts(lambda: (part.abs_() for part in parts), [[a for a, _ in bands], [b for _, b in bands]], parts.elements)

    def begin() -> Mark:
        small, large = low.marker(), high.marker()

        def mark(i: int, x: Tensor) -> tuple[Tensor, float]:
            sizes = x.abs()
            out = small(i, sizes)
            return (~out if bands[i][1] >= parts.elements else large(i, sizes) & ~out), shares[i]

        return mark

    return begin


def sparse(blocks: Callable[[], Iterable[Tensor]], shares: Sequence[float], begin: Callable[[], Mark], rescale: Rescale = "none") -> Iterator[Tensor]:
    """Parts of sparsified task vectors: :func:`exapt.algebra.sparsify.sparsified`, part after part.

    Args:
        blocks: Gives parts (m, ...) each time it is called.
        shares: Share of entries to keep, one for each model.
        begin: Begins a pass over the parts: see :data:`Mark`.
        rescale: See :func:`exapt.algebra.sparsify.kept`.
    """
    check_choice("rescale", rescale, Rescale)
    some = [i for i, share in enumerate(shares) if 0 < share < 1]
    factors = torch.ones(len(shares), dtype=torch.float64)
    if rescale == "l1" and some:
        sums, mark = torch.zeros(2, len(shares), dtype=torch.float64), begin()
        for part in blocks():
            for i in some:
                mask, _ = mark(i, part[i])
                sums[:, i] += torch.stack([part[i].abs().sum(), (part[i] * mask).abs().sum()])
        factors = torch.where(sums[1] > 0, sums[0] / sums[1], 1.0)
    mark = begin()
    for part in blocks():
        for i, share in enumerate(shares):
            if i in some:
                mask, probability = mark(i, part[i])
                part[i] = kept(part[i], mask, "density" if rescale == "density" else "none", probability)
                if rescale == "l1":
                    part[i] *= float(factors[i])
            elif not share:
                part[i] = 0
        yield part


def generators(generator: torch.Generator, shares: Sequence[float], elements: int) -> Callable[[], dict[int, torch.Generator]]:
    """Each model's draws by themselves, where one generator draws for all entries of the first, then of the second, and so on.

    Args:
        generator: That one.
        shares: One for each model; only those between 0 and 1 are drawn for.
        elements: Draws for each model.

    Returns:
        Function that gives generators by the model's number, each at the first of its model's draws.
    """
    states: dict[int, Tensor] = {}
    for i in (i for i, share in enumerate(shares) if 0 < share < 1):
        states[i] = generator.get_state()
        if any(0 < share < 1 for share in shares[i + 1 :]):
            for done in range(0, elements, BLOCK):  # takes as many numbers from the generator as `drawn`, in less time
                torch.empty(min(BLOCK, elements - done), dtype=torch.int32).random_(generator=generator)

    def begin() -> dict[int, torch.Generator]:
        made = {i: torch.Generator() for i in states}
        for i, state in states.items():
            made[i].set_state(state)
        return made

    return begin
