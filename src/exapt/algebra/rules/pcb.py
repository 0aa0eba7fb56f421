"""PCB-Merging: parameters compete over a whole model, within their task and between tasks (Du et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from exapt.algebra.tensors import merge_tensors
from exapt.core.components import component
from exapt.core.errors import InputError

Tree = Mapping[str, Tensor]


@component("pcb", kind="merge", paper="Parameter Competition Balancing for Model Merging")
def competition_balanced(
    models: Sequence[Tree], base: Tree, weights: Sequence[float] | None = None, *, density: float = 0.1, scale: float = 1.0, clip: float = 1e-4,
    inter: Literal["sum", "pairs"] = "sum", names: Sequence[str] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    r"""Mean of task vectors weighted by the outcome of a competition: :math:`\theta_0 + \lambda \sum_i \hat\beta_i \odot w_i \tau_i / \sum_i \hat\beta_i`.

    :math:`\tau_i` is model i's whole task vector, so ranks and ranges are over all its entries; no rule for one tensor can do that. With N the
    map of a row to [0, 1] by its least and greatest entry: intra-balancing :math:`\exp(m\,N(|\tau_i|)^2)`, inter-balancing
    :math:`\tanh(\tau_i \odot \sum_j \tau_j)`, :math:`\beta_i` their product; :math:`\hat\beta_i` is N of :math:`\beta_i` with all but its
    greatest ``density`` raised to the least of those, so 0 for what is dropped (and for a model whose scores are all equal, where the official
    code divides by zero). Followed: the key steps as officially released; the paper writes softmax for both activations. The official
    evolutionary search of :math:`w` is not here.

    Args:
        models: Tensors of every model, by name.
        base: The base's.
        weights: (m,), factors of the task vectors in the mean; by default 1 each.
        density: Share of entries that each model keeps.
        scale: The factor :math:`\lambda`.
        clip: Share of each task vector's least, and of its greatest, absolute values that are clipped to the rest's (officially 1e-4, or 0.01).
        inter: "sum", as above, or "pairs": :math:`\sum_j \tanh(\mathrm{sign}(\tau_i \tau_j)\,N(|\tau_i|)\,N(|\tau_j|))`, as in the official search.
        names: What messages call the models.

    Returns:
        Merged tensors in the base's order and dtypes.

    Raises:
        InputError: as :func:`exapt.algebra.tensors.merge_tensors`; for a density that is not in (0, 1], or a clip that is not in [0, 0.5).

    References:
        Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024.

    >>> base = {"w": torch.zeros(4)}
    >>> competition_balanced([{"w": torch.tensor([4.0, 0.0, 1.0, -1.0])}, {"w": torch.tensor([0.0, 3.0, 1.0, 1.0])}], base, density=0.5, clip=0)
    {'w': tensor([4., 3., 0., 0.])}
    """
    if not 0 < density <= 1 or not 0 <= clip < 0.5 or inter not in ("sum", "pairs"):
        raise InputError(f'pcb: density {density} must be in (0, 1], clip {clip} in [0, 0.5), inter "{inter}" one of "sum" and "pairs"')
    kept: dict[str, Tensor] = {}

    def gather(deltas: Tensor, name: str = "") -> Tensor:
        kept[name] = deltas
        return deltas[0]

    merge_tensors(gather, models, base, weights, names=names)  # checks all, and leaves whole numbers out
    if not kept:
        return {name: t.clone() for name, t in base.items()}
    tau = torch.cat([d.flatten(1) for d in kept.values()], 1)
    clipped, beta = _competition(tau, density, clip, inter)
    w = tau.new_ones(len(tau)) if weights is None else torch.tensor(weights).to(tau)
    merged = scale * (w[:, None] * clipped * beta).sum(0) / beta.sum(0).clamp(min=1e-12)
    parts = dict(zip(kept, merged.split([d[0].numel() for d in kept.values()]), strict=True))

    def part(deltas: Tensor, name: str = "") -> Tensor:
        return parts[name].reshape(deltas.shape[1:]).to(deltas)

    return merge_tensors(part, models, base)


def _competition(tau: Tensor, density: float, clip: float, inter: str) -> tuple[Tensor, Tensor]:
    r"""Clipped task vectors and :math:`\hat\beta`, (m, n) both."""
    m, n = tau.shape
    size = tau.abs().sort(1).values
    size = tau.abs().clamp(size[:, int(n * clip), None], size[:, max(int(n * (1 - clip) - 1), 0), None])
    ranged = _ranged(size)
    if inter == "sum":
        between = (tau * tau.sum(0)).tanh()
    else:
        signed = tau.sign() * ranged
        between = torch.stack([(row * signed).tanh().sum(0) for row in signed])
    beta = (m * ranged.square()).exp() * between
    least = beta.sort(1).values[:, min(int(n * (1 - density)), n - 1), None]
    return tau.sign() * size, _ranged(beta.maximum(least))


def _ranged(x: Tensor) -> Tensor:
    """Each row mapped to [0, 1] by its least and greatest entry; 0 where they are the same."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return (x - low) / (high - low).where(high > low, 1)
