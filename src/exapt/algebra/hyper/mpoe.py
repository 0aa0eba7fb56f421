"""MPOE: experts that share the central tensor of a matrix product operator (Gao et al., COLING 2022).

The paper's text and code could not be read here: the formulas are from the abstract and from memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError


def decompose(matrix: Tensor, rows: Sequence[int], columns: Sequence[int], bond: int = 0) -> list[Tensor]:
    r"""Writes a matrix as a product of small tensors, :math:`W_{i_1 \dots i_n, j_1 \dots j_n} = T^{(1)}[i_1, j_1] \cdots T^{(n)}[i_n, j_n]`.

    Singular value decompositions from the left; bonds grow towards the middle, so that the middle tensor holds most parameters (the central
    tensor), the others few (the auxiliary ones).

    Args:
        matrix: (d_out, d_in).
        rows: Factors of d_out.
        columns: Factors of d_in, as many.
        bond: Largest bond; 0: all, which is exact.

    Returns:
        Tensors (bond, i, j, next bond), the first and last bond being one.

    Raises:
        InputError: for factors that do not fit the matrix.

    >>> [tuple(t.shape) for t in decompose(torch.randn(4, 8), [2, 1, 2], [2, 2, 2])]
    [(1, 2, 2, 4), (4, 1, 2, 4), (4, 2, 2, 1)]
    """
    if len(rows) != len(columns) or math.prod(rows) != matrix.shape[0] or math.prod(columns) != matrix.shape[1]:
        raise InputError(f"decompose: {list(rows)} x {list(columns)} are no factors of a {matrix.shape[0]}x{matrix.shape[1]} matrix")
    n = len(rows)
    order = [k for pair in zip(range(n), range(n, 2 * n), strict=True) for k in pair]
    left = matrix.detach().reshape(*rows, *columns).permute(order).reshape(1, -1)
    tensors = []
    for i, j in zip(rows[:-1], columns[:-1], strict=True):
        before = len(left)
        u, s, v = torch.linalg.svd(left.reshape(before * i * j, -1), full_matrices=False)
        kept = min(bond, len(s)) if bond else len(s)
        tensors.append(u[:, :kept].reshape(before, i, j, kept))
        left = s[:kept, None] * v[:kept]
    return [*tensors, left.reshape(-1, rows[-1], columns[-1], 1)]


def compose(tensors: Sequence[Tensor]) -> Tensor:
    """The matrix of such tensors, the reverse of :func:`decompose`.

    >>> w = torch.randn(4, 8)
    >>> torch.allclose(compose(decompose(w, [2, 1, 2], [2, 2, 2])), w, atol=1e-5)
    True
    """
    whole = tensors[0][0]
    for t in tensors[1:]:
        whole = torch.einsum("abk,kijl->aibjl", whole, t).flatten(2, 3).flatten(0, 1)
    return whole[..., 0]


class _Matrix(nn.Module):
    """One layer of all experts: the central tensor is one parameter, auxiliary tensors have the experts first."""

    def __init__(self, layer: nn.Linear, experts: int, length: int, bond: int) -> None:
        super().__init__()
        parts = decompose(layer.weight, factors(layer.out_features, length), factors(layer.in_features, length), bond)
        self.middle = length // 2
        self.central = nn.Parameter(parts[self.middle].clone())
        self.auxiliary = nn.ParameterList([t.expand(experts, *t.shape).clone() for k, t in enumerate(parts) if k != self.middle])
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().expand(experts, -1).clone())

    def forward(self, x: Tensor, expert: int) -> Tensor:
        parts = [t[expert] for t in self.auxiliary]
        parts.insert(self.middle, self.central)
        return F.linear(x, compose(parts), None if self.bias is None else self.bias[expert])


@component("mpoe", kind="upcycling", paper="Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language Models")
class MPOExperts(nn.Module):
    r"""A feed-forward network made a mixture of experts of nearly its size: every expert's matrices are products of tensors, of which all
    experts share the central one, that with most of the parameters, and own the auxiliary ones:

    .. math:: y = p_i(x)\, E_i(x), \quad i = \operatorname{argmax} p(x), \quad p(x) = \mathrm{softmax}(R x)

    It starts from the dense network's own matrices, decomposed, all experts alike, and routes each token to one (Switch). The central tensors get
    gradients from all experts and would run ahead; their gradient is masked out at random with probability ``mask`` to balance them with the auxiliary
    ones. Put it into the model in the network's place, and add ``balance_weight`` times :attr:`balance` to the loss.

    Args:
        up: The first layer.
        down: The second layer.
        activation: The nonlinearity between them.
        experts: Number of experts.
        length: Tensors of a product, odd: the middle one is central.
        bond: Largest bond; 0: all, so that every expert starts equal to the dense network.
        mask: Probability of leaving out an update of a central tensor.
        seed: Of the masks.

    Attributes:
        balance: Switch's loss of the last call: E times the sum over experts of their share of tokens times their mean probability.
        load: Their share of tokens.

    Raises:
        InputError: for an even length, layers that do not follow one another, or a mask that is no probability.

    References:
        Gao, Liu, Zhao, Lu and Wen, "Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language Models", COLING 2022.

    >>> experts = MPOExperts(nn.Linear(8, 16), nn.Linear(16, 8), torch.relu, experts=4)
    >>> experts(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        up: nn.Linear,
        down: nn.Linear,
        activation: Callable[[Tensor], Tensor],
        experts: int = 4,
        *,
        length: int = 5,
        bond: int = 0,
        mask: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if length < 3 or length % 2 == 0:
            raise InputError(f"mpoe: length is {length}; the central tensor is the middle one of an odd number, 3 or more")
        if up.out_features != down.in_features:
            raise InputError(f"mpoe: the first layer gives {up.out_features} features, the second takes {down.in_features}")
        if not 0 <= mask < 1 or experts < 1:
            raise InputError(f"mpoe: mask is {mask} and experts {experts}; a probability below 1, and at least one expert")
        self.up, self.down = _Matrix(up, experts, length, bond), _Matrix(down, experts, length, bond)
        self.activation, self.experts, self.mask = activation, experts, mask
        generator = seeded(seed, "mpoe")
        self.router = nn.Parameter(up.weight.new_empty(experts, up.in_features).uniform_(-1, 1, generator=generator) * up.in_features**-0.5)
        for matrix in (self.up, self.down):
            matrix.central.register_hook(lambda grad: grad * float(torch.rand((), generator=generator) >= self.mask))
        self.balance, self.load = self.router.new_zeros(()), self.router.new_zeros(experts)

    def forward(self, x: Tensor) -> Tensor:
        """Runs every token (..., d) through its expert."""
        flat = x.reshape(-1, x.shape[-1])
        probability = (flat @ self.router.T).softmax(-1)
        best, index = probability.max(-1)
        y = flat.new_zeros(len(flat), x.shape[-1])
        for i in range(self.experts):
            rows = (index == i).nonzero()[:, 0]
            if len(rows):
                own = self.down(self.activation(self.up(flat[rows], i)), i)
                y = y.index_add(0, rows, own * best[rows, None])
        self.load = F.one_hot(index, self.experts).to(x.dtype).mean(0)
        self.balance = self.experts * (self.load * probability.mean(0)).sum()
        return y.view(x.shape)


def factors(n: int, length: int) -> list[int]:
    """Splits a number into ``length`` factors as equal as its prime factors allow, what is left over in the middle.

    >>> factors(24, 3), factors(7, 3)
    ([4, 3, 2], [1, 7, 1])
    """
    parts, primes, rest, p = [1] * length, [], n, 2
    while rest > 1:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    for prime in reversed(primes):
        least = min(range(length), key=lambda k: (parts[k], abs(k - length // 2)))
        parts[least] *= prime
    return parts
