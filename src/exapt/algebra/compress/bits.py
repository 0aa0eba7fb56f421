"""Numbers in as few bits as they need: fixed width, and Golomb codes of sparse positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from exapt.core.errors import InputError


def pack(values: Tensor, width: int) -> Tensor:
    """Packs whole numbers, each in ``width`` bits, the highest bit first.

    Args:
        values: (n,) integers from 0 to ``2**width - 1``.
        width: 0 to 63.

    Returns:
        (ceil(n * width / 8),) uint8.

    >>> pack(torch.tensor([1, 0, 3, 2]), 2)
    tensor([78], dtype=torch.uint8)
    """
    v = values.reshape(-1).numpy().astype(np.uint64)
    bits = (v[:, None] >> np.arange(width - 1, -1, -1, dtype=np.uint64)) & np.uint64(1)
    return torch.from_numpy(np.packbits(bits.astype(np.uint8)))


def unpack(stream: Tensor, width: int, count: int) -> Tensor:
    """The numbers that :func:`pack` packed: (count,) int64.

    Raises:
        InputError: for a stream of another length.

    >>> unpack(torch.tensor([78], dtype=torch.uint8), 2, 4)
    tensor([1, 0, 3, 2])
    """
    if stream.dtype != torch.uint8 or not 0 <= width <= 63 or count < 0 or stream.numel() != -(-count * width // 8):
        raise InputError(f"a stream of {stream.numel()} bytes does not hold {count} numbers of {width} bits; it is damaged, fetch or make it again")
    bits = np.unpackbits(stream.numpy(), count=count * width).reshape(count, width).astype(np.int64)
    return torch.from_numpy(bits @ (np.int64(1) << np.arange(width - 1, -1, -1, dtype=np.int64)))


def golomb(positions: Tensor) -> dict[str, Tensor]:
    r"""Golomb-codes increasing positions: each gap :math:`g` as :math:`\lfloor g / 2^b \rfloor` in unary and the rest in :math:`b` bits.

    For positions that are each taken with probability :math:`p` a position costs about :math:`b + 1 / (1 - (1 - p)^{2^b})` bits, close to
    the entropy. :math:`b` is the one that makes this stream shortest. Unary parts and rests are in streams of their own.

    Args:
        positions: (n,) int64, increasing, from 0.

    Returns:
        ``unary`` and ``rest``, uint8, and ``golomb`` (2,) int64: :math:`n` and :math:`b`.

    References:
        Golomb, "Run-length encodings", IEEE Transactions on Information Theory 1966.
        Rice and Plaunt, "Adaptive Variable-Length Coding for Efficient Compression of Spacecraft Television Data", IEEE Transactions on
        Communication Technology 1971.

    >>> positions_of(golomb(torch.tensor([3, 4, 90])))
    tensor([ 3,  4, 90])
    """
    gaps = np.diff(positions.numpy(), prepend=-1) - 1
    if len(gaps) and gaps.min() < 0:
        raise InputError("Golomb codes are of increasing positions from 0; sort them and drop repeated ones")
    b = min(range(40), key=lambda b: int((gaps >> b).sum()) + len(gaps) * (1 + b))
    ends = np.cumsum((gaps >> b) + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    unary[ends - 1] = 1
    return {
        "unary": torch.from_numpy(np.packbits(unary)),
        "rest": pack(torch.from_numpy(gaps & ((1 << b) - 1)), b),
        "golomb": torch.tensor([len(gaps), b]),
    }


def positions_of(coded: dict[str, Tensor]) -> Tensor:
    """The positions that :func:`golomb` coded: (n,) int64.

    Raises:
        InputError: for streams that are not sound.
    """
    n, b = (int(v) for v in coded["golomb"].tolist())
    ends = np.flatnonzero(np.unpackbits(coded["unary"].numpy()))
    if len(ends) != n or not 0 <= b < 40:
        raise InputError(f"a stream of positions holds {len(ends)} of {n}; it is damaged, fetch or make it again")
    quotients = np.diff(ends, prepend=-1) - 1
    return torch.from_numpy(np.cumsum((quotients << b) + unpack(coded["rest"], b, n).numpy() + 1) - 1)
