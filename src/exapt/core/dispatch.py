"""Mixtures whose gates leave experts out: each expert computes what chose it, and no more.

Which tokens an expert gets depends on the data, so ``torch.compile`` and ``vmap`` take the dense computation, which gives the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def select(logits: Tensor, top_k: int, top_p: float, normalise: str) -> Tensor:
    """Gates from a router's logits, both (..., experts): the softmax of all or of those chosen (with ``top_k``, ``top_p`` and ``normalise`` as in
    :class:`exapt.Mixture`).

    >>> select(torch.tensor([0.0, 1.0, 0.0]), 1, 1.0, "after")
    tensor([0., 1., 0.])
    """
    probabilities = logits.softmax(-1)
    if not 0 < top_k < logits.shape[-1] and top_p >= 1:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ranked.cumsum(-1) - ranked < top_p  # what lies before an expert does not fill the share yet
    kept = kept & (torch.arange(logits.shape[-1], device=logits.device) < (top_k or logits.shape[-1]))
    kept = torch.zeros_like(kept).scatter(-1, order, kept)
    return probabilities * kept if normalise == "before" else logits.masked_fill(~kept, -torch.inf).softmax(-1)


def spread(gates: Tensor, y: Tensor) -> Tensor:
    """Gates (..., experts, 1) with as many dimensions before their last two as ``y`` has before its last."""
    return gates.to(y.dtype).view(*gates.shape[:-1], *[1] * (y.dim() - gates.dim()), gates.shape[-1], 1)


def dispatches(gates: Tensor) -> bool:
    """Whether these gates (..., experts) may be looked at: there is one set for each token or row, and nothing traces the computation."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or gates.is_meta
    return gates.dim() > 1 and gates.numel() > 0 and not traced


def dispatched(gates: Tensor, streams: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
    r"""Computes :math:`\sum_e g_e f_e(\dots)` from the tokens (or rows) whose gate is not zero, gathered for each expert.

    Args:
        gates: (..., experts).
        streams: What the experts see, each (..., d...) with the gates' dimensions first.
        run: From an expert's number and its part of every stream (n, d...) to its output (n, d_out...).

    Returns:
        (..., d_out...), equal to the dense sum, gradients too: a gate of zero that a choice made has none.

    >>> dispatched(torch.eye(2), (torch.ones(2, 3),), lambda e, x: (e + 1) * x)[:, 0].tolist()
    [1.0, 2.0]
    """
    flat, lead = gates.flatten(0, -2), gates.dim() - 1
    expert, token = flat.detach().ne(0).T.nonzero(as_tuple=True)
    counts = torch.bincount(expert, minlength=flat.shape[1]).tolist()
    chosen = torch.split(flat[token, expert], counts)
    parts = [torch.split(s.flatten(0, lead - 1).index_select(0, token), counts) for s in streams]
    outputs: list[Tensor] = []
    for e, (share, *own) in enumerate(zip(chosen, *parts, strict=True)):
        if len(share) or (e + 1 == len(counts) and not outputs):  # one runs in any case, for the shape
            result = run(e, *own)
            outputs.append(result * share.to(result.dtype).view(-1, *[1] * (result.dim() - 1)))
    found = torch.cat(outputs)
    return found.new_zeros(len(flat), *found.shape[1:]).index_add(0, token, found).view(*gates.shape[:-1], *found.shape[1:])


def low_rank_experts(x: Tensor, gates: Tensor, A: Tensor, B: Tensor, active: int = 0) -> Tensor:
    r"""Computes :math:`\sum_e g_e B_e A_e x`, as one product of the stacked factors or expert by expert, whichever is cheaper.

    Gathering tokens and adding up results costs as much as a rank of about 96 for every expert that acts: below that the stacked
    product is faster though it computes all of them.

    Args:
        x: (..., d_in).
        gates: (..., experts), with as many dimensions as ``x`` or fewer: the same for what follows.
        A: (experts, r, d_in), of the type of ``x``, as ``B``.
        B: (experts, d_out, r).
        active: How many experts act on a token; 0: all.

    Returns:
        (..., d_out).
    """
    count, rank = A.shape[:2]
    if active and (count - active) * rank >= 96 * active and x[..., 0].numel() >= 128 and dispatches(gates):
        a, b = A.unbind(), B.unbind()  # indexed one by one, each gradient would be as large as all
        return dispatched(gates, (x,), lambda e, own: F.linear(F.linear(own, a[e]), b[e]))
    low = F.linear(x, A.flatten(0, 1)).view(*x.shape[:-1], count, rank) * spread(gates, x)
    return F.linear(low.flatten(-2), B.transpose(0, 1).flatten(1))
