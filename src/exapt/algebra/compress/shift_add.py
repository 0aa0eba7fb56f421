"""ShiftAddLLM: a base weight as signs and powers of two (You et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.errors import InputError


@dataclass(frozen=True)
class ShiftAdd:
    """A weight as a sum of scaled signs.

    Attributes:
        signs: (bits, d_out, d_in) int8, -1 or 1.
        scales: (bits, groups, d_in): one for each group of outputs of a column.
        weight: (d_out, d_in), what they stand for.
        error: Relative error of the weight, Frobenius.
        output_error: Relative error of the outputs on the calibration data; ``None`` without.
    """

    signs: Tensor
    scales: Tensor
    weight: Tensor
    error: float
    output_error: float | None


@component(
    "shift_add", kind="compression", oracle="NumPy",
    paper="ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization",
)  # fmt: skip
def shift_added(
    weight: Tensor, bits: int = 3, *, moment: Tensor | None = None, group: int = -1, rounds: int = 15, terms: int = 3, damping: float = 0.01,
    ordered: bool = True,
) -> ShiftAdd:  # fmt: skip
    r"""Replaces a matrix by signs and shifts: :math:`W \approx \sum_{i=1}^{b} \alpha_i b_i`, :math:`b_i \in \{-1, 1\}`, :math:`\alpha_i` sums of few
    powers of two, so that a product needs shifts and additions only.

    Scales are of each column (the paper's form for accuracy). Signs and scales are fitted in turn: least squares for the scales, which are then
    rounded; the nearest of the :math:`2^b` sums for the signs. With the inputs' second moment the columns are coded one after the other,
    and each one's error is made good by those that follow, as GPTQ does: the fit of each column looks at the weights, the correction at the
    outputs, whose error is lower then and that of the weights higher. The authors' kernels, which are what is fast, and their block-wise
    scales for these are not here.

    Args:
        weight: (d_out, d_in).
        bits: Number :math:`b` of sign matrices.
        moment: :math:`X^\top X` of the inputs (d_in, d_in).
        group: Outputs that share a scale; -1: all of a column. It divides d_out.
        rounds: Passes over scales and signs.
        terms: Powers of two in a scale; 1 gives plain shifts, the authors' code takes 3.
        damping: Added to the moment's diagonal, times its mean.
        ordered: Whether the columns of the largest inputs come first, where there is a moment.

    Raises:
        InputError: for shapes that do not fit, or settings that are none.

    References:
        You, Guo, Fu, Zhou, Huang, Zhang, Kundu, Yazdanbakhsh, Lin, "ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training
        Multiplication-Less Reparameterization", NeurIPS 2024.
        Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023.

    >>> shift_added(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), bits=1).weight
    tensor([[ 1.,  2.],
            [-1., -2.]])
    """
    size = weight.shape[0] if group == -1 and weight.dim() == 2 else group
    if weight.dim() != 2 or size < 1 or weight.shape[0] % size:
        raise InputError(f"shift_add: a weight of shape {tuple(weight.shape)} in groups of {group} outputs; give a matrix, and a group that divides d_out")
    if not (1 <= bits <= 8 and rounds >= 0 and terms >= 1 and damping >= 0) or not bool(torch.isfinite(weight).all()):
        raise InputError(f"shift_add: bits={bits} (1 to 8), rounds={rounds}, terms={terms}, damping={damping}, or a weight that is not finite")
    if moment is not None and tuple(moment.shape) != (weight.shape[1],) * 2:
        raise InputError(f"shift_add: the moment has shape {tuple(moment.shape)}; the inputs' is {(weight.shape[1],) * 2}")
    w = weight.detach().double()
    if moment is None:
        signs, scales = binary_coded(w.T.reshape(-1, size), bits, rounds, terms)
    else:
        wide = moment.detach().double()
        order = wide.diagonal().argsort(descending=True, stable=True) if ordered else torch.arange(len(wide))
        parts, left, inverse = [], w[:, order], _inverse_root(wide[order][:, order], damping)
        for j in range(w.shape[1]):
            parts.append(binary_coded(left[:, j].reshape(-1, size), bits, rounds, terms))
            missed = (left[:, j] - _value(*parts[-1]).reshape(-1)) / inverse[j, j]
            left[:, j:] -= missed[:, None] * inverse[j, j:]
        signs, scales = (torch.cat([p[i] for i in order.argsort()]) for p in zip(*parts, strict=True))
    coded = _value(signs, scales).reshape(w.shape[1], w.shape[0]).T
    apart = coded - w
    output = None if moment is None else float(_energy(apart, moment.double()) / _energy(w, moment.double()).clamp_min(1e-300))
    return ShiftAdd(
        signs.reshape(w.shape[1], w.shape[0], bits).permute(2, 1, 0).to(torch.int8).contiguous(),
        scales.reshape(w.shape[1], -1, bits).permute(2, 1, 0).to(weight.dtype).contiguous(),
        coded.to(weight.dtype).contiguous(), float(apart.norm() / w.norm().clamp_min(1e-300)), output,
    )  # fmt: skip


def binary_coded(w: Tensor, bits: int, rounds: int = 15, terms: int = 3) -> tuple[Tensor, Tensor]:
    """Signs (m, n, bits) and scales (m, bits) of each row of ``w`` (m, n); with ``terms`` 0 scales are any numbers."""
    left, signs, scales = w.clone(), [], []
    for _ in range(bits):  # greedy: the sign of what is left, and its mean size
        signs.append(torch.where(left < 0, -1.0, 1.0).to(w))
        scales.append(left.abs().mean(1))
        left = left - signs[-1] * scales[-1][:, None]
    b, alpha = torch.stack(signs, -1), powers(torch.stack(scales, -1), terms)
    patterns = w.new_tensor(list(product((1.0, -1.0), repeat=bits)))
    best, error = (b, alpha), (w - _value(b, alpha)).square().sum(1)
    for _ in range(rounds):
        alpha = (torch.linalg.pinv(b.mT @ b, hermitian=True) @ (b.mT @ w[..., None]))[..., 0]
        alpha = powers(alpha.abs().sort(-1, descending=True).values, terms)
        sums, order = (alpha @ patterns.T).sort(-1)
        b = patterns[order.gather(1, torch.searchsorted((sums[:, 1:] + sums[:, :-1]) / 2, w.contiguous()))]
        now = (w - _value(b, alpha)).square().sum(1)
        better = now < error  # rounded scales need not improve; a row keeps the best it had
        best = (torch.where(better[:, None, None], b, best[0]), torch.where(better[:, None], alpha, best[1]))
        error = torch.minimum(error, now)
    return best


def powers(x: Tensor, terms: int) -> Tensor:
    """Each number as the sum of ``terms`` signed powers of two, nearest in their logarithm first; 0 terms leave it as it is.

    >>> powers(torch.tensor([0.7, 3.0]), 1), powers(torch.tensor([0.7]), 2)
    (tensor([0.5000, 4.0000]), tensor([0.7500]))
    """
    if not terms:
        return x
    made = torch.zeros_like(x)
    for _ in range(terms):
        left = x - made
        made = made + torch.where(left == 0, 0.0, left.sign() * torch.exp2(left.abs().clamp_min(1e-300).log2().round()))
    return made


def sensitivity(weight: Tensor, moment: Tensor, damping: float = 0.01) -> float:
    r"""How much a layer suffers from coding: :math:`\lVert \tilde W \rVert_F\, \mathrm{std}(\tilde W)^2`, :math:`\tilde W_{ij} = W_{ij} / U_{jj}`
    with :math:`U` the upper Cholesky factor of the moment's inverse, as in the authors' code."""
    scaled = weight.double() / _inverse_root(moment.double(), damping).diagonal()
    return float(scaled.norm() * scaled.std().square())


def allocated_bits(errors: Sequence[Sequence[float]], sizes: Sequence[int], choices: Sequence[int], budget: float) -> list[int]:
    r"""Chooses each layer's bits under a mean: the integer program :math:`\min \sum_l e_{l b_l}`, :math:`\sum_l n_l b_l \le B \sum_l n_l`.

    Args:
        errors: For each layer its error for each choice: measured (:func:`shift_added`), or :func:`sensitivity` over :math:`4^b`.
        sizes: Numbers :math:`n_l` of weights.
        choices: Numbers of bits, such as (2, 3, 4).
        budget: Mean bits :math:`B` of a weight.

    Raises:
        InputError: where no choice fits the budget.

    >>> allocated_bits([[9.0, 1.0], [2.0, 1.5]], [10, 10], [2, 4], 3)
    [4, 2]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    cost, n, k = np.asarray(errors, dtype=float), len(sizes), len(choices)
    if cost.shape != (n, k) or not np.isfinite(cost).all() or min(choices, default=0) > budget:
        raise InputError(f"allocated_bits: errors of shape {cost.shape} for {n} layers and choices {list(choices)} within {budget} bits; nothing fits")
    one, used = np.kron(np.eye(n), np.ones(k)), np.kron(np.asarray(sizes, dtype=float), np.asarray(choices, dtype=float))
    rows = [LinearConstraint(one, 1, 1), LinearConstraint(used[None], -np.inf, budget * float(np.sum(sizes)))]
    found = milp(cost.ravel(), constraints=rows, integrality=np.ones(n * k), bounds=Bounds(0, 1))
    return [choices[int(i)] for i in found.x.reshape(n, k).argmax(1)]


def _value(signs: Tensor, scales: Tensor) -> Tensor:
    return (signs @ scales[..., None])[..., 0]


def _energy(w: Tensor, moment: Tensor) -> Tensor:
    """Norm of the outputs."""
    return ((w @ moment) * w).sum().clamp_min(0).sqrt()


def _inverse_root(moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped moment's inverse."""
    diagonal = moment.diagonal()
    dead = (diagonal == 0).to(moment)  # inputs that never were anything
    damped = moment + torch.diag(dead + damping * diagonal.mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
