"""Mixtures of experts whose experts are methods: any shift of a matrix, or any change of a module's output."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.base import Base
from exapt.core.contract import ActivationMethod, Method, Tensors, WeightMethod, frozen
from exapt.core.dispatch import dispatched, dispatches, low_rank_experts, select, spread
from exapt.core.errors import InputError
from exapt.core.registry import method, register
from exapt.core.sites import Site

PAPER = "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity"
VECTORS = ("linear", "conv1d_hf")  # layers whose input is a vector for each token
ONE = ("fixed", "hash", "modality")  # routers that choose one expert
PER_TOKEN = ("adapter", "adapter_bias", "adapter_plus", "compacter", "parallel_adapter", "ssf")  # changes of an output that see one token at a time


@dataclass(frozen=True)
class _Mixed(Method):
    """What both mixtures share: the router, its loss and its statistics, and the experts' stacked tensors."""

    notes: ClassVar[bool] = True
    full_precision: ClassVar[bool] = True  # a router in half precision sends tokens elsewhere

    expert: Method
    experts: int = 4
    router: Literal["task", "fixed", "token", "instance", "hash", "modality"] = "token"
    top_k: int = 0
    top_p: float = 1.0
    normalise: Literal["before", "after"] = "after"
    tasks: int = 1
    balance: float = 0.0
    z: float = 0.0
    train_experts: bool = True
    seed: int = 0

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the router reads of the call, and what the experts read."""
        asked = {"hash": ("input_ids",), "modality": ("token_type_ids",), "instance": ("attention_mask",), "fixed": ("task_ids",)}
        own = ("task_ids",) if self.router == "task" and self.tasks > 1 else asked.get(self.router, ())
        return tuple(dict.fromkeys((*own, *self.expert.reads)))

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the experts need."""
        return self.expert.needs

    def _check(self, site: Site) -> None:
        if min(self.experts, self.tasks) < 1 or not 0 <= self.top_k <= self.experts or not 0 < self.top_p <= 1 or min(self.balance, self.z) < 0:
            raise InputError(
                f"{self.key}: experts and tasks are at least 1, top_k 0 (all) to the number of experts, top_p above 0 and at most 1, balance and z not "
                f"negative; here {self.experts}, {self.tasks}, {self.top_k}, {self.top_p}, {self.balance} and {self.z}"
            )
        if self.top_k == 1 < self.experts and self.normalise == "after" and self.router in ("token", "instance", "task"):
            raise InputError(f"{self.key}: with top_k=1 the one gate is always 1 and the router learns nothing; set normalise='before'")
        if self.expert.notes or type(self.expert).on_step is not Method.on_step:
            raise InputError(f"{self.key}: {self.expert.key} cannot be an expert, because it routes by itself or changes as training goes on")
        self.expert.check(site)

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        return self.expert.plan(sites)

    def shared(self, sites: Sequence[Site]) -> Tensors:
        made = self.expert.shared(sites)
        return made if self.train_experts else {k: t if isinstance(t, nn.Buffer) else frozen(t) for k, t in made.items()}

    def rates(self) -> Mapping[str, float]:
        return {f"expert_{k}": v for k, v in self.expert.rates().items()}

    def _made(self, site: Site, width: int | None) -> Tensors:
        made = [self.expert.init(_numbered(site, e)) for e in range(self.experts)]
        p: Tensors = {}
        for k, first in made[0].items():
            if any(m[k].shape != first.shape for m in made):
                raise InputError(f"{site.name or '(model)'}: {self.key} stacks its experts, and {self.expert.key} makes {k} of other shapes for each")
            value, trains = torch.stack([m[k].detach() for m in made]), not isinstance(first, nn.Buffer)
            p[f"expert_{k}"] = value if trains and self.train_experts else frozen(value, saved=trains or cast(nn.Buffer, first).persistent)
        if self.router == "task":
            p["Z"] = torch.empty(self.tasks, self.experts, device=site.device).uniform_(-1e-3, 1e-3)
        elif width is not None:
            p["router"] = torch.empty(self.experts, width, device=site.device).uniform_(-(width**-0.5), width**-0.5)
        return p

    def _each(self, p: Tensors, dtype: torch.dtype | None = None) -> list[Tensors]:
        """The tensors of every expert, as it expects them."""
        own = {k.removeprefix("expert_"): t for k, t in p.items() if k not in ("router", "Z", "notes")}
        if dtype is not None and not self.expert.full_precision:
            own = {k: t.to(dtype) if t.is_floating_point() else t for k, t in own.items()}
        apart = {k: t.unbind() for k, t in own.items() if f"expert_{k}" in p}  # indexed one by one, each gradient would be as large as all
        return [{**own, **{k: t[e] for k, t in apart.items()}} for e in range(self.experts)]

    def _gates(self, p: Tensors, x: Tensor, shape: torch.Size) -> Tensor:
        """(..., experts): for each token, each row, or once for all; ``shape`` is that of the output without features."""
        if self.router in ONE:
            return F.one_hot(self._numbers(p, shape), self.experts).to(x.device)
        if self.router == "task":
            logits = p["Z"][self._ids(p["call.task_ids"], shape[:1], self.tasks, "task_ids")] if self.tasks > 1 else p["Z"][0]
        else:
            seen = x.to(p["router"].dtype)
            logits = F.linear(_pooled(seen, p.get("call.attention_mask")) if self.router == "instance" else seen, p["router"])
        gates = select(logits, self.top_k, self.top_p, self.normalise)
        if "notes" in p:
            self._note(p["notes"], logits, gates)  # type: ignore[arg-type]
        return gates

    def _sparse(self, gates: Tensor) -> bool:
        """Whether experts run on what chose them alone, because a choice is made and what they do to a part does not depend on the rest."""
        chosen = 0 < self.top_k < self.experts or self.top_p < 1 or self.router in ONE
        return chosen and not self.expert.reads and "rows" not in self.expert.exceptions and dispatches(gates)

    def _numbers(self, p: Tensors, shape: torch.Size) -> Tensor:
        """The number of the one expert of each row or token."""
        if self.router == "fixed":
            return self._ids(p["call.task_ids"], shape[:1], self.experts, "task_ids")
        name = "input_ids" if self.router == "hash" else "token_type_ids"
        ids = p.get(f"call.{name}")
        if ids is None:
            return torch.zeros(shape, dtype=torch.long)
        if self.router == "modality":
            return self._ids(ids, shape, self.experts, name)
        a, b, prime = 1103515245 + 2 * self.seed, 12345 + 40503 * self.seed, 2**31 - 1
        return (self._ids(ids, shape, 0, name) * (a % prime) + b) % prime % self.experts  # universal hashing: no table, any vocabulary

    def _ids(self, ids: Tensor, shape: torch.Size, count: int, name: str) -> Tensor:
        if ids.shape != shape:
            raise InputError(f"{self.key} was given {name} of shape {tuple(ids.shape)}; its gates here need one for each of {tuple(shape)}")
        if count and not torch.compiler.is_compiling() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
            raise InputError(f"{self.key} was given {name} from {int(ids.min())} to {int(ids.max())}; it takes 0 to {count - 1}")
        return ids.long()

    def _note(self, notes: dict[str, Tensor], logits: Tensor, gates: Tensor) -> None:
        flat, logits = gates.reshape(-1, self.experts), logits.reshape(-1, self.experts)
        probabilities = logits.softmax(-1)
        sparse = 0 < self.top_k < self.experts or self.top_p < 1
        used = ((flat > 0) if sparse else F.one_hot(flat.argmax(-1), self.experts)).to(flat.dtype)
        notes["logits"], notes["load"], notes["importance"] = logits, used.mean(0).detach(), probabilities.mean(0)
        notes["entropy"] = -(probabilities * logits.log_softmax(-1)).sum(-1).mean()

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes: Any = p.get("notes", {})
        terms = [t for own in self._each(p) if (t := self.expert.penalty(own, w)) is not None]
        if self.balance and "load" in notes:
            terms.append(self.balance * self.experts * (notes["load"] * notes["importance"]).sum())
        if self.z and "logits" in notes:
            terms.append(self.z * notes["logits"].logsumexp(-1).square().mean())
        return torch.stack([t.reshape(()) for t in terms]).sum() if terms else None


def _numbered(site: Site, number: int) -> Site:
    """The site under a name of its own, so that what experts draw from a seed differs."""
    one = copy.copy(site)
    object.__setattr__(one, "name", f"{site.name}.{number}")
    return one


def _pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over a row's tokens (rows, d), without those that the mask leaves out."""
    if x.dim() < 3:
        return x
    if mask is None or mask.shape != x.shape[:-1]:
        return x.flatten(1, -2).mean(1)
    share = mask.to(x.dtype)
    return torch.einsum("bl,bld->bd", share / share.sum(1, keepdim=True).clamp_min(1), x)


class _Seen(Base):
    """The base as an expert sees it: what it gives for the mixture's own input is computed once for all."""

    def __init__(self, base: Base, x: Tensor, y: Tensor) -> None:
        super().__init__(base.module, base.slots, base.entries, base.rest)
        self.x, self.y, self.factors = x, y, cast("tuple[Tensor, Tensor, Tensor, float] | None", None)

    def __call__(self, x: Tensor) -> Tensor:
        return self.y if x is self.x else super().__call__(x)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, low_rank_x: Tensor | None = None, biased: bool = True) -> Tensor:
        if x is not self.x:
            return super().low_rank(x, A, B, scale, low_rank_x, biased)
        a, b, bias = A.to(self.y.dtype), B.to(self.y.dtype), None if biased else self.bias
        y = self.y if bias is None else self.y - self.scale(bias.to(self.y.dtype), self.y.new_ones(()))
        result = y + scale * self.out(b, self.apply(a, x if low_rank_x is None else low_rank_x))
        if low_rank_x is None and bias is None:
            self.factors = result, a, b, scale
        return result

    def plus(self, x: Tensor, h: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        return self.added(self.y, h, B, scale) if x is self.x else super().plus(x, h, B, scale)


@register
@dataclass(frozen=True)
class Mixture(_Mixed, WeightMethod):
    r"""Mixes experts, each a shift of the same matrix: :math:`y = W x + \sum_e g_e(x) (F_e(x) - W x)`, where :math:`F_e` is the layer with expert e's shift.

    The layer itself runs once where the experts use it as it is; low-rank experts run as one product of their stacked factors. Routers:

    - ``"token"``: gates from each token, :math:`g = \mathrm{softmax}(R x_t)`; ``"instance"``: from the mean of a row's tokens (those that the call's
      ``attention_mask`` keeps), one set for the row (the sentence).
    - ``"task"``: learned logits for each task; the call gives ``task_ids`` (rows,). With one task (the default) nothing is asked for, and the mixture
      has a merged form. ``"fixed"``: task t has expert t.
    - ``"hash"``: a fixed random hash of each token's id (``input_ids``). ``"modality"``: a token of type m has expert m (``token_type_ids``).

    ``top_k`` or ``top_p`` choose experts for each gate, and each expert computes only what chose it, where that is cheaper (low-rank experts: from a
    rank of 32 with two of eight; not under ``torch.compile``). The loss of training gains :math:`\beta\, E \sum_e f_e P_e`, :math:`f_e` the
    share of tokens that use expert e (soft: whose largest gate it has) and :math:`P_e` its mean probability, and :math:`\zeta` times the mean square
    of the router's log-partition. ``exapt.noted(model)`` shows ``load`` (f), ``importance`` (P) and ``entropy`` of the last call.

    Args:
        expert: The expert, a method that changes a matrix.
        experts: Number :math:`E` of them.
        router: What the gates depend on.
        top_k: How many experts act; 0: all.
        top_p: As many act as hold this share of the probability; 1: all.
        normalise: Whether the softmax is over those that act (``"after"`` they are chosen) or all (``"before"``).
        tasks: Number of tasks of the router ``"task"``.
        balance: Weight :math:`\beta` of the load-balancing loss.
        z: Weight :math:`\zeta` of the router z-loss.
        train_experts: Whether the experts train, or the router alone.
        seed: Seed of the hash.

    Parameters per site:
        The expert's, stacked: ``expert_A`` (experts, ...) and so on; what it shares among sites its experts share too. ``router`` (experts, d_in), Kaiming
        uniform, or ``Z`` (tasks, experts), uniform in [-0.001, 0.001].

    References:
        Fedus, Zoph and Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity", JMLR 2022.
        Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models", 2022 (z-loss).
        Roller, Sukhbaatar, Szlam and Weston, "Hash Layers For Large Sparse Models", NeurIPS 2021.

    >>> import exapt
    >>> model = exapt.attach(nn.Linear(4, 3), Mixture(exapt.LoRA(rank=2), experts=4, router="token", top_k=2), where="all")
    >>> model(torch.zeros(5, 4)).shape, sorted(exapt.noted(model)[""])
    (torch.Size([5, 3]), ['entropy', 'importance', 'load', 'logits'])
    """

    key = "mixture"
    paper = PAPER
    equation = r"y = W x + \sum_e g_e(x)\, (F_e(x) - W x)"
    golden = "NumPy"

    expert: Method = field(default_factory=lambda: method("lora", rank=4))
    router: Literal["task", "fixed", "token", "instance", "hash", "modality"] = "task"

    def __post_init__(self) -> None:
        if not isinstance(self.expert, WeightMethod) or self.expert.bias_reads_weight:
            raise InputError(f"{self.key}.expert is {self.expert.key}; it must change a matrix, as lora does (activation_mixture takes changes of an output)")

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """With one task."""
        return self.router == "task" and self.tasks == 1 and cast(WeightMethod, self.expert).mergeable

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        """Whether an expert reads it, or runs by its definition."""
        return cast(WeightMethod, self.expert).reads_weight or not cast(WeightMethod, self.expert).has_fast_path()

    def needs_forward(self) -> bool:
        return self.router != "task" or self.tasks > 1 or cast(WeightMethod, self.expert).needs_forward()

    def check(self, site: Site) -> None:
        self._check(site)
        kind = site.layer.kind if site.layer else ""
        per_token = (*VECTORS, "embedding") if self.router in ("hash", "modality") else VECTORS
        if self.router not in ("task", "fixed") and kind not in per_token:
            raise InputError(
                f"{site.name or '(model)'}: {self.key} routes by {self.router} in layers with a vector for each token; leave it out of where=, or route by task"
            )
        if not cast(WeightMethod, self.expert).has_fast_path() and type(cast(WeightMethod, self.expert)).bias is not WeightMethod.bias and self.needs_forward():
            raise InputError(f"{self.key}: {self.expert.key} changes the bias and has no forward of its own; route it by one task, or choose another expert")

    def init(self, site: Site) -> Tensors:
        return self._made(site, site.shape[1] if self.router in ("token", "instance") else None)

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return self._constant(p, w, cast(WeightMethod, self.expert).weight)

    def bias(self, p: Tensors, b: Tensor) -> Tensor:
        return self._constant(p, b, cast(WeightMethod, self.expert).bias)

    def _constant(self, p: Tensors, old: Tensor, run: Callable[[Tensors, Tensor], Tensor]) -> Tensor:
        gates = select(p["Z"][0], self.top_k, self.top_p, self.normalise)
        shifts = [g * (run(own, old) - old) for own, g in zip(self._each(p, old.dtype), gates.unbind(), strict=True)]
        return (old + torch.stack(shifts).sum(0)).to(old.dtype)

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        shape = y.shape[:1] if base.kind not in (*VECTORS, "embedding") else y.shape[:-1]
        gates = self._gates(p, x, shape)
        each = self._each(p, y.dtype)
        factors = self._factors(each, x, y, base) if base.kind in VECTORS else None
        if factors is not None:
            a, b, scale = factors
            return torch.add(y, low_rank_experts(x.to(y.dtype), gates, a, b, 1 if self.router in ONE else self.top_k), alpha=scale)
        if self._sparse(gates):
            return y + dispatched(gates, (x, y), lambda e, x, y: self._expert(each[e], x, y, base) - y)
        gates = spread(gates, y)
        shifts = [gates[..., e, :] * (self._expert(each[e], x, y, base) - y) for e in range(self.experts)]
        return y + torch.stack(shifts).sum(0)

    def _fast(self, kind: str) -> bool:
        method = cast(WeightMethod, self.expert)
        return method.has_fast_path() and kind in (method.fast_kinds or (kind,))

    def _expert(self, own: Tensors, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """The layer's output with the shift of the expert that has these tensors."""
        if self._fast(base.kind):
            return cast(WeightMethod, self.expert).forward(own, x, _Seen(base, x, y))
        w = base.weight
        return y + base.apply((cast(WeightMethod, self.expert).weight(own, w) - w).to(y.dtype), x)

    def _factors(self, each: list[Tensors], x: Tensor, y: Tensor, base: Base) -> tuple[Tensor, Tensor, float] | None:
        """``A`` (experts, r, d_in), ``B`` (experts, d_out, r) and their scale if that is all that the experts add; seen on one token."""
        if not self._fast(base.kind) or cast(WeightMethod, self.expert).reads:
            return None
        found = []
        for own in each:
            seen = _Seen(base, x.reshape(-1, x.shape[-1])[:1], y.reshape(-1, y.shape[-1])[:1])
            result = cast(WeightMethod, self.expert).forward(own, seen.x, seen)
            if seen.factors is None or seen.factors[0] is not result:
                return None
            found.append(seen.factors[1:])
        return torch.stack([a for a, _, _ in found]), torch.stack([b for _, b, _ in found]), found[0][2]


@register
@dataclass(frozen=True)
class ActivationMixture(_Mixed, ActivationMethod):
    r"""Mixes experts, each a change of a module's output: :math:`h' = h + \sum_e g_e (f_e(x, h) - h)`.

    Args:
        expert: The expert, a method that changes a module's output.
        experts: Number of them.
        router: What the gates depend on, see :class:`Mixture`; the token is the module's output or input.
        top_k: How many experts act; 0: all.
        top_p: As many act as hold this share of the probability; 1: all.
        normalise: Whether the softmax is over those that act (``"after"`` they are chosen) or all (``"before"``).
        tasks: Number of tasks of the router ``"task"``.
        balance: Weight of the load-balancing loss.
        z: Weight of the router z-loss.
        train_experts: Whether the experts train, or the router alone.
        seed: Seed of the hash.
        sees: Whether the router sees the module's ``"output"`` or its ``"input"``.

    Parameters per site:
        The expert's, stacked: ``expert_W_down`` (experts, ...) and so on. ``router`` (experts, d), Kaiming uniform, or ``Z`` (tasks, experts).

    References:
        Fedus, Zoph and Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity", JMLR 2022.
    """

    key = "activation_mixture"
    paper = PAPER
    equation = r"h' = h + \sum_e g_e\, (f_e(x, h) - h)"
    golden = "NumPy"
    where = ("attention.output", "mlp.down")

    expert: Method = field(default_factory=lambda: method("adapter", bottleneck=16))
    top_k: int = 2
    sees: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        a = self.expert
        if not isinstance(a, ActivationMethod) or a.carries or type(a).enter is not ActivationMethod.enter:
            raise InputError(f"{self.key}.expert is {a.key}; it must change a module's output and no more, as adapter does (mixture takes shifts of a matrix)")

    def check(self, site: Site) -> None:
        self._check(site)
        if site.axis != -1 and self.router not in ("task", "fixed"):
            raise InputError(f"{site.name or '(model)'}: {self.key} routes by {self.router} where features come last; leave it out of where=, or route by task")
        if self.sees == "input" and site.layer is not None and site.layer.kind not in VECTORS:
            raise InputError(f"{site.name or '(model)'}: the input here is no vector for each token; set sees='output'")

    def init(self, site: Site) -> Tensors:
        routed = self.router in ("token", "instance")
        width = site.layer.shape[1] if self.sees == "input" and site.layer is not None else site.features
        return self._made(site, width if routed else None)

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        change = cast(ActivationMethod, self.expert).apply
        each = self._each(p, h.dtype)
        gates = self._gates(p, x if self.sees == "input" else h, h.shape[:-1])
        apart = gates.dim() == 2 < h.dim() or self.expert.key in PER_TOKEN
        if apart and x.shape[: gates.dim() - 1] == h.shape[: gates.dim() - 1] and self._sparse(gates):
            return h + dispatched(gates, (x, h), lambda e, x, h: change(each[e], x, h) - h)
        gates = spread(gates, h)
        shifts = [gates[..., e, :] * (change(each[e], x, h) - h) for e in range(self.experts)]
        return h + torch.stack(shifts).sum(0)
