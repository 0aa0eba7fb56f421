"""RegMean: linear layers whose outputs are nearest to every model's own (Jin et al., ICLR 2023), and RegMean++, block after block."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exapt.algebra.rule import rule
from exapt.algebra.rules.average import averaged
from exapt.algebra.statistics import Grams, at_rest
from exapt.algebra.tensors import merge_tensors
from exapt.core.calibrate import run
from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.sites import sites


@rule("regmean", paper="Dataless Knowledge Fusion by Merging Weights of Language Models")
def regression_mean(
    models: Tensor, weights: Tensor | None = None, statistics: Sequence[Tensor | Mapping[str, Tensor]] | None = None, *, shrink: float = 0.9
) -> Tensor:
    r"""The least-squares fit to all models' outputs, :math:`W^\top = (\sum_i w_i \tilde G_i)^{-1} \sum_i w_i \tilde G_i W_i^\top`.

    :math:`G_i = E[x x^\top]` over model i's own inputs (:func:`exapt.algebra.statistics.gram_matrices`), and
    :math:`\tilde G = \alpha G + (1 - \alpha)\,\mathrm{diag}(G)`. Tensors without Gram matrices (biases, norms, embeddings) are averaged. Where the
    sum cannot be inverted, as for inputs that are always zero, it is the solution nearest to the average (the official code inverts, and fails).

    Args:
        models: (m, d_out, ...); with convolutions' patches as inputs, all but the first dimension are one.
        weights: (m,), not negative; by default 1 each.
        statistics: :math:`G` (d_in, d_in) of every model, or ``{"transposed": G}`` for weights (d_in, d_out).
        shrink: The factor :math:`\alpha` of what is off the diagonal, from 0 to 1.

    Returns:
        (d_out, ...).

    Raises:
        InputError: for a shrink that is not in [0, 1], negative weights, or Gram matrices of another size than the inputs.

    References:
        Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023.

    >>> regression_mean(torch.tensor([[[1.0]], [[4.0]]]), statistics=[torch.tensor([[2.0]]), torch.tensor([[1.0]])])
    tensor([[2.]])
    """
    if not 0 <= shrink <= 1:
        raise InputError(f"regmean: shrink {shrink} is not between 0 and 1")
    mean = averaged(models, weights)
    if statistics is None:
        return mean
    grams = [s["transposed"] if isinstance(s, Mapping) else s for s in statistics]
    turned = isinstance(statistics[0], Mapping)
    flat = (models.mT if turned else models.flatten(2)).double()
    if any(g.shape != (flat.shape[2], flat.shape[2]) for g in grams):
        raise InputError(f"regmean: Gram matrices {[tuple(g.shape) for g in grams]} for {flat.shape[2]} inputs; each must be square and of that size")
    w = flat.new_ones(len(flat)) if weights is None else weights.double()
    if bool((w < 0).any()):
        raise InputError(f"regmean: weights {w.tolist()} must not be negative")
    stacked = torch.stack([g.to(flat) for g in grams])
    eye = torch.eye(flat.shape[2], dtype=torch.bool, device=flat.device)
    stacked = w[:, None, None] * torch.where(eye, stacked, shrink * stacked)
    start = (mean.mT if turned else mean.flatten(1)).double()
    moved = solved(stacked.sum(0), ((flat - start) @ stacked).sum(0).mT).mT  # from the average on, so that what no input sees stays there
    merged = (start + moved).to(models.dtype)
    return merged.mT if turned else merged.reshape(models.shape[1:])


def solved(a: Tensor, b: Tensor) -> Tensor:
    """x with a x = b, for a symmetric matrix without negative eigenvalues; the shortest such x where there are many."""
    factor, failed = torch.linalg.cholesky_ex(a)
    diagonal = factor.diagonal().square()
    if not int(failed) and float(diagonal.min()) > a.shape[0] * torch.finfo(a.dtype).eps * float(diagonal.max()):
        return torch.cholesky_solve(b, factor)
    return torch.linalg.pinv(a, hermitian=True) @ b


class _Reached(Exception):
    """Ends a forward pass where it has come to a block."""


@component("regmean_plusplus", kind="merge", paper="RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging")
def regression_mean_in_depth(
    models: Sequence[nn.Module], batches: Sequence[Iterable[Any]], *, blocks: Sequence[str] | None = None, shrink: float = 0.9,
    weights: Sequence[float] | None = None, dtype: torch.dtype = torch.float32,
) -> nn.Module:  # fmt: skip
    r"""RegMean block after block: every block's Gram matrices are of what reaches it in the model that is merged so far.

    For each block and model i, the inputs are those that the merged model's earlier blocks give for model i's data, and run through model i's own
    block; the block is then merged by :func:`regression_mean`. All that is in no block is averaged.

    Args:
        models: Models of one architecture; left as they are.
        batches: Inputs of each model's task, as for :func:`exapt.calibrate`.
        blocks: Module names in the order of the forward pass; by default those with the role "block", or all linear layers where there is none.
            List a head or pooler too, to have it merged likewise.
        shrink: As for :func:`regression_mean`.
        weights: One for each model.
        dtype: Of the Gram matrices.

    Returns:
        A new model, like the first.

    Raises:
        InputError: for another number of lists of batches than models, an unknown block, or one that no batch reaches.

    References:
        Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging", 2025.

    >>> one, two = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    >>> regression_mean_in_depth([one, two], [[torch.randn(8, 2)], [torch.randn(8, 2)]])
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    if not models or len(models) != len(batches):
        raise InputError(f"regmean_plusplus: {len(models)} models, {len(batches)} lists of batches; give one for each")
    merged, kept = copy.deepcopy(models[0]), [list(b) for b in batches]
    if blocks is None:
        found = sites(merged)
        blocks = [s.name for s in found if s.role == "block"] or [n for n, m in merged.named_modules() if isinstance(m, nn.Linear)]
    known = dict(merged.named_modules())
    for name in blocks:
        if name not in known:
            raise InputError(f'regmean_plusplus: the model has no module "{name}"; blocks are names of modules')
    _load(merged, merge_tensors(averaged, [_tensors(m) for m in models], weights=weights))
    for name in blocks:
        own = [m.get_submodule(name) for m in models]
        grams = [_grams(merged, name, block, task, dtype) for block, task in zip(own, kept, strict=True)]
        trees = [_tensors(block) for block in own]
        _load(known[name], merge_tensors(regression_mean, trees, weights=weights, statistics=grams, shrink=shrink))
    return merged


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]  # a tied tensor once
    return {n: t.detach() for n, t in named if t.is_floating_point()}


def _load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for n, t in _tensors(module).items():
            t.copy_(tensors[n])


def _grams(merged: nn.Module, name: str, block: nn.Module, batches: Sequence[Any], dtype: torch.dtype) -> dict[str, Any]:
    """Gram matrices in one model's block, of what the merged model gives it."""
    reached: list[tuple[Any, Any]] = []

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        reached.append((args, kwargs))
        raise _Reached

    hook = merged.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with at_rest(merged), at_rest(block), torch.no_grad(), Grams(block, dtype) as grams:
            for batch in batches:
                try:
                    run(merged, batch)
                except _Reached:
                    args, kwargs = reached.pop()
                    block(*args, **kwargs)
    finally:
        hook.remove()
    if not grams.sums:
        raise InputError(f'regmean_plusplus: no batch reaches a linear layer of "{name}"; leave it out of blocks=, or give batches that do')
    return grams.means()
