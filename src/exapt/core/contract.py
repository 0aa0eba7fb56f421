"""The contracts: what a method must say of itself. A method knows only shapes and maths.

Names, freezing, devices, dtypes, several adapters, merging, saving, batching, sharding and quantised bases are written
once, in :mod:`exapt.core`, for every method. A method is a frozen dataclass whose fields are at once its configuration,
its JSON, its command-line flags and its documentation.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from exapt.core.attention import Attention
    from exapt.core.base import Base
    from exapt.core.sites import Site

Tensors = dict[str, Tensor]
Restarts = Sequence[tuple[Tensor, Tensor | None]]


def seeded(seed: int, *names: str) -> torch.Generator:
    """Returns a CPU generator that depends only on ``seed`` and ``names``, for tensors remade when a file is loaded.

    >>> bool((torch.rand(3, generator=seeded(0, "a")) == torch.rand(3, generator=seeded(0, "a"))).all())
    True
    """
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@functools.lru_cache(64)
def drawn_places(total: int, count: int, seed: int) -> Tensor:
    """Returns the first ``count`` of the numbers below ``total`` in the random order of ``seed``, (count,): drawn once for all layers of a size.

    >>> drawn_places(5, 2, 0).shape
    torch.Size([2])
    """
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].clone()


def frozen(tensor: Tensor, saved: bool = True) -> Tensor:
    """Marks a tensor returned by ``init`` or ``shared`` as not trained.

    Args:
        tensor: The tensor.
        saved: Whether it is written to the adapter file. If not, ``init`` must make the same tensor again from the
            method's fields and the site (a stored seed, say); the file keeps its checksum.
    """
    return nn.Buffer(tensor, persistent=saved)


class Method:
    """What every contract shares. Not used by itself: subclass one of the six contracts below."""

    key: ClassVar[str] = ""
    """Name in files, on the command line and in :func:`exapt.method`."""
    paper: ClassVar[str] = ""
    """Title of the paper."""
    variants: ClassVar[Mapping[str, str]] = {}
    """Further papers that the method covers: title, and how it is configured for them."""
    equation: ClassVar[str] = ""
    """The method in one line of LaTeX, for the table of methods."""
    golden: ClassVar[str] = ""
    """What its golden test compares with: "PEFT", "adapters", "NumPy" or another independent implementation."""
    contract: ClassVar[str] = ""
    where: ClassVar[str | tuple[str, ...]] = "linear"
    """Sites taken when the user names none."""
    mergeable: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    """Statistics to collect with :func:`exapt.calibrate` before ``attach`` (``site.statistics`` holds them)."""
    full_precision: ClassVar[bool] = False
    """Whether ``p`` keeps its own dtype (core otherwise casts it once to the layer's); the method then casts."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Inputs of the model's call that the method sees besides its site's own (``input_ids``, ``attention_mask``, ``task_ids``): ``p`` holds
    them as ``call.input_ids`` and so on. What the model's own forward does not take is kept from it."""
    notes: ClassVar[bool] = False
    """Whether the method notes things of its site in a call (a router's probabilities): ``p["notes"]`` is then a dict that keeps them until the
    next call, for ``penalty`` (with their graph) and for :func:`exapt.noted`."""
    exceptions: ClassVar[Mapping[str, str]] = {}
    """Invariants of the conformance suite that do not hold, each with its reason."""

    def check(self, site: Site) -> None:
        """Raises :class:`~exapt.core.errors.InputError` where the method cannot serve ``site``."""

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        """Decides what is decided over all chosen sites at once (a global top-k): statistics to add, by site name.

        Called once by ``attach``, before ``init`` and ``select``; not on loading.
        """
        return {}

    def init(self, site: Site) -> Tensors:
        """Returns the tensors of one site; those marked with :func:`frozen` are not trained."""
        raise NotImplementedError

    def shared(self, sites: Sequence[Site]) -> Tensors:
        """Returns tensors that all sites use; they join ``p`` under their names."""
        return {}

    def rates(self) -> Mapping[str, float]:
        """Factors on the learning rate, by tensor name, for tensors that train faster or slower than the rest (LoRA+)."""
        return {}

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        """Returns a scalar added to the loss for one site, or nothing."""
        return None

    def on_step(self, tensors: Mapping[str, Tensors], step: int, total: int) -> Restarts | None:
        """Called by training after each optimiser step with every site's tensors; may change them under ``no_grad``.

        May return pairs of a parameter that began anew and the flat places of it that did (``None``: all): the optimiser then forgets
        their moments.
        """
        return None

    def stored(self, p: Tensors) -> Tensors:
        """Returns what a file holds of one site's tensors, where that is less than training needed (the sparse form of a dense one).

        The method meets what it returned again in ``p`` when the file is loaded. New names train unless marked with :func:`frozen`.
        """
        return p


class WeightMethod(Method):
    """A shift of a matrix: Linear, Embedding, convolution, fused projection, expert.

    A matrix is always (output features, inputs per output): a convolution's is (out, in / groups x kernel), an
    embedding's (dimensions, vocabulary), so that the same maths serves every layer.
    """

    contract = "weight"
    mergeable = True
    reads_weight: ClassVar[bool] = False
    """Whether ``init`` or ``forward`` read ``W`` (on a quantised base it is dequantised for them)."""
    bias_reads_weight: ClassVar[bool] = False
    """Whether ``bias`` needs the matrix too: ``p["W"]`` is then :math:`W` as ``weight`` gets it."""
    fast_kinds: ClassVar[tuple[str, ...] | None] = None
    """Kinds of layer that ``forward`` serves, if not all that have an operation; the others run by the definition."""

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        """The definition: returns :math:`W'` of shape (d_out, d_in) from :math:`W`. Slow is fine, wrong is not."""
        raise NotImplementedError

    def bias(self, p: Tensors, b: Tensor) -> Tensor:
        """Returns the changed bias (d_out,), for methods that change it too."""
        return b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        """Optional fast path; it must equal the layer run with ``weight`` and ``bias``, gradients too."""
        raise NotImplementedError

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The update of a matrix of ``shape`` (d_out, d_in) by its factors, where all that the method does is :math:`W' = W + B A`.

        Returns:
            ``A`` (r, d_in) and ``B`` (d_out, r) with every scale and gate folded in and the gradients of ``p`` kept, or ``None``. Rows of a
            batch with different adapters then share one run of the layer. Dropout is left out (``needs_forward`` tells of it).
        """
        return None

    def needs_forward(self) -> bool:
        """Whether this configuration exists only in ``forward`` (dropout), so that a bare parameter cannot have it."""
        return False

    @classmethod
    def has_fast_path(cls) -> bool:
        """Whether ``forward`` is defined."""
        return cls.forward is not WeightMethod.forward


class ActivationMethod(Method):
    """A change of a module's output, from its input and output. Features are always the last dimension here."""

    contract = "activation"
    where: ClassVar[str | tuple[str, ...]] = "block"
    carries: ClassVar[bool] = False
    """Whether a site passes something on to the next: ``p["carried"]`` is then a tuple of what the rule's sites before it gave in this
    call, in the order in which they ran, and ``apply`` returns its output and what it gives."""

    def enter(self, p: Tensors, x: Tensor) -> Tensor:
        """Returns what the module gets in place of its input ``x``; ``apply`` then sees that."""
        return x

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        """Returns the new output from the module's input ``x`` (..., d_in) and output ``h`` (..., d_out); with ``carries`` a pair of it
        and what later sites see."""
        raise NotImplementedError

    def fold(self, p: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """For mergeable methods: the weight (d_out, d_in) and bias that give ``apply``'s result directly."""
        raise NotImplementedError


class TokenMethod(Method):
    """New tokens in a sequence (``level = "input"``) or in attention's keys and values (``level = "attention"``)."""

    contract = "token"
    level: ClassVar[str] = "input"

    def extend(self, p: Tensors, *streams: Tensor) -> tuple[Tensor, ...]:
        """Returns the longer streams, new tokens first.

        At level "input" the stream is the embedded sequence (batch, length, d); at level "attention" the streams are
        keys and values (batch, heads, length, d_head).
        """
        return streams

    def attend(self, p: Tensors, view: Attention) -> Tensor:
        """At level "attention": the heads' outputs (batch, heads, length, d_head), by default plain attention over what ``extend`` gives.

        A method that changes attention itself (gates, another kernel, other keys for some heads) overrides this; ``view`` holds the
        queries, keys and values, and is the layer's own attention with its mask and scale (:class:`exapt.core.attention.Attention`).
        """
        keys, values = self.extend(p, view.keys, view.values)
        return view(view.queries, keys, values)


@dataclass(frozen=True)
class Columns:
    """Selects whole columns of the matrix (input connections). ``index`` (k,) int64."""

    index: Tensor


@dataclass(frozen=True)
class Entries:
    """Selects single entries of a parameter. ``index`` (k,) int64 into the flattened parameter."""

    index: Tensor


class Whole:
    """Selects a whole parameter."""


class SubsetMethod(Method):
    """Trains a part of the existing parameters. The base stays frozen: the adapter holds the chosen entries' values."""

    contract = "subset"
    mergeable = True

    def select(self, site: Site) -> Mapping[str, Columns | Entries | Whole]:
        """Returns, for each parameter of the module to train, which part; an empty mapping passes the site over."""
        raise NotImplementedError

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        """Optional fast path where only the matrix is chosen from; equal to the layer with its values replaced."""
        raise NotImplementedError

    @classmethod
    def has_fast_path(cls) -> bool:
        """Whether ``forward`` is defined."""
        return cls.forward is not SubsetMethod.forward


@dataclass
class Taps:
    """What a side network sees: ``hidden`` states before the first and after every block, each (batch, length, d),
    the blocks' attention ``mask`` (added to scores, or boolean; broadcastable to (batch, heads, length, length)) and
    whether attention is ``causal`` when no mask is given."""

    hidden: list[Tensor]
    mask: Tensor | None = None
    causal: bool = False


class SideMethod(Method):
    """A network beside the frozen backbone. The backbone runs without gradient; the side network sees its taps.

    ``shared(sites)`` makes all tensors; ``forward`` returns what replaces the last block's output.
    """

    contract = "side"
    where: ClassVar[str | tuple[str, ...]] = "block"

    def init(self, site: Site) -> Tensors:
        return {}

    def forward(self, p: Tensors, taps: Taps) -> Tensor:
        """Returns the hidden state (batch, length, d) that goes on to the head."""
        raise NotImplementedError


class Recipe(Method):
    """Several methods under one name and one set of fields: ``attach`` expands it into rules, and the adapter's file holds these."""

    contract = "recipe"

    def rules(self) -> Mapping[Any, Method]:
        """Returns ``{where: method}``."""
        raise NotImplementedError


class OutputMethod(Method):
    """A change of the logits, from the head's input (features) and output (logits)."""

    contract = "output"
    where: ClassVar[str | tuple[str, ...]] = "head"

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        """Returns new logits from features ``x`` (batch, d) and logits ``h`` (batch, classes)."""
        raise NotImplementedError


CONTRACTS: tuple[type[Method], ...] = (
    WeightMethod, ActivationMethod, TokenMethod, SubsetMethod, SideMethod, OutputMethod, Recipe,
)  # fmt: skip


def as_dict(method: Method) -> dict[str, Any]:
    """Returns ``{"method": key, **fields}``, the method's JSON; methods among the fields become JSON of their own.

    >>> import exapt
    >>> as_dict(exapt.SSF())
    {'method': 'ssf', 'std': 0.0}
    """

    def value(v: Any) -> Any:
        if isinstance(v, Method):
            return as_dict(v)
        return [value(x) for x in v] if isinstance(v, (tuple, list)) else v

    return {"method": method.key, **{f.name: value(getattr(method, f.name)) for f in fields(method)}}  # type: ignore[arg-type]
