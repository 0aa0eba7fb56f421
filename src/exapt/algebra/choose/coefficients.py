"""Coefficients of task vectors found by descent: what AdaMerging and aTLAS share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exapt.algebra.choose.rows import Tree
from exapt.algebra.rule import Described
from exapt.algebra.tensors import check_trees
from exapt.core.contract import seeded
from exapt.core.errors import InputError


@dataclass(frozen=True)
class LearnedMerge:
    """A merge whose coefficients were learned.

    Attributes:
        tensors: The merged model, in the base's dtypes.
        coefficients: (m, groups, blocks): for each model, group of tensors and block of entries.
        groups: What the groups are called.
        losses: The objective before every step (steps,).
    """

    tensors: dict[str, Tensor]
    coefficients: Tensor
    groups: tuple[str, ...]
    losses: Tensor


class TaskVectors:
    r"""Task vectors :math:`\tau_t`, and :math:`\theta_0 + \sum_t \Lambda_t \tau_t` for coefficients (m, groups, blocks) that carry a gradient.

    Args:
        base: The base's tensors by name.
        models: Those of every model.
        group: Which group a tensor is in, by its name.
        who: What messages call the caller.
        blocks: Into how many parts the entries of every tensor are divided at random, each with a coefficient of its own.
        seed: Of the parts.

    Raises:
        InputError: for models that do not fit the base, whole numbers that differ, NaN or infinity.
    """

    def __init__(self, base: Tree, models: Sequence[Tree], group: Callable[[str], str], who: str, blocks: int = 1, seed: int = 0) -> None:
        if blocks < 1:
            raise InputError(f"{who}: the entries cannot be divided into {blocks} blocks; give at least 1")
        check_trees(Described(_named(who), True, (), {}), models, base, None, [f"model {i}" for i in range(len(models))])
        self.base, self.deltas, self.parts, self.place = dict(base), {}, {}, {}
        names: dict[str, int] = {}
        for name, still in base.items():
            stacked = [_checked(name, i, m[name], still) for i, m in enumerate(models)]
            if still.is_floating_point():
                wide = torch.promote_types(still.dtype, torch.float32)
                self.deltas[name] = torch.stack([t.detach().to(wide) - still.detach().to(wide) for t in stacked])
                self.place[name] = names.setdefault(group(name), len(names))
                if blocks > 1:
                    self.parts[name] = torch.randint(blocks, still.shape, generator=seeded(seed, who, name)).to(still.device)
        self.groups, self.blocks, self.count = tuple(names), blocks, len(models)

    def merged(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The model of these coefficients, with their graph."""
        found = dict(self.base)
        for name, deltas in self.deltas.items():
            own = coefficients[:, self.place[name]].to(deltas)
            sized = own[:, self.parts[name]] if self.blocks > 1 else own.view(-1, *[1] * (deltas.ndim - 1))
            still = self.base[name].detach()
            found[name] = (still.to(deltas.dtype) + (sized * deltas).sum(0)).to(still.dtype)
        return found

    def learned(
        self, model: nn.Module, loss: Callable[[dict[str, Tensor], int], Tensor], optimiser: Callable[[Tensor], torch.optim.Optimizer], *,
        start: float, steps: int, bounds: tuple[float, float] | None = None, clip: float | None = None, cosine: bool = False,
        better: Callable[[dict[str, Tensor]], float] | None = None, every: int = 1,
    ) -> LearnedMerge:  # fmt: skip
        """Descends on the coefficients; the model is run in evaluation mode.

        Args:
            model: Put in evaluation mode meanwhile.
            loss: Of the merged tensors and the step's number.
            optimiser: Makes the optimiser of the coefficients.
            start: Their first value.
            steps: Number of steps.
            bounds: Coefficients are clamped to these where they are used.
            clip: Largest norm of the gradient.
            cosine: Whether the learning rate falls to zero along a cosine.
            better: Scores tensors, higher better: the best coefficients seen are returned, asked before the first step and then every so often.
            every: After how many steps.
        """
        raw = torch.full((self.count, len(self.groups), self.blocks), start, requires_grad=True)
        found, losses = optimiser(raw), []
        rates = [g["lr"] for g in found.param_groups]
        modes = {m: m.training for m in model.modules()}

        def used() -> Tensor:
            return raw if bounds is None else raw.clamp(*bounds)

        def kept() -> Tensor:
            return used().detach().clone()

        model.eval()
        try:
            best = (better(self.merged(kept())), kept()) if better else None
            for step in range(steps):
                if cosine:
                    factor = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps, dtype=torch.float64))))
                    for g, rate in zip(found.param_groups, rates, strict=True):
                        g["lr"] = factor * rate
                value = loss(self.merged(used()), step)
                (raw.grad,) = torch.autograd.grad(value, [raw])  # and no gradient is left on the model's own parameters
                if clip is not None:
                    nn.utils.clip_grad_norm_([raw], clip)
                found.step()
                losses.append(value.detach().float().cpu())
                if better and best is not None and ((step + 1) % every == 0 or step + 1 == steps):
                    score = better(self.merged(kept()))
                    best = (score, kept()) if score > best[0] else best
        finally:
            for module, was in modes.items():
                module.training = was
        final = best[1] if best else kept()
        with torch.no_grad():
            merged = {k: t.detach().clone() for k, t in self.merged(final).items()}
        return LearnedMerge(merged, final, self.groups, torch.stack(losses) if losses else torch.zeros(0))


def _checked(name: str, i: int, t: Tensor, still: Tensor) -> Tensor:
    if t.shape != still.shape or t.dtype != still.dtype:
        raise InputError(f"{name}: model {i} has {tuple(t.shape)} of {t.dtype}, the base {tuple(still.shape)} of {still.dtype}")
    if still.is_floating_point() and not bool(torch.isfinite(t).all()):
        raise InputError(f"{name}: model {i} holds NaN or infinity")
    if not still.is_floating_point() and not torch.equal(t, still):
        raise InputError(f"{name}: whole numbers that differ between models (model {i}) cannot be merged")
    return t


def _named(who: str) -> Callable[..., Tensor]:
    """A function of that name: what the check of trees calls a rule."""

    def stand_in(deltas: Tensor) -> Tensor:
        return deltas

    stand_in.__name__ = who
    return stand_in
