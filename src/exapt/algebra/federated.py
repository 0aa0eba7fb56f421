"""Federated averages of adapters: clients send tensors and how many rows they trained on, never rows.

The text and code of HetLoRA could not be read here: the formulas are from the abstract and from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from exapt.algebra.tensors import Tree, merge_tensors
from exapt.core.components import component
from exapt.core.errors import InputError


@component("fedavg", kind="federation", paper="Communication-Efficient Learning of Deep Networks from Decentralized Data")
def federated_average(clients: Sequence[Tree], rows: Sequence[float]) -> dict[str, Tensor]:
    r"""Mean of adapters by their rows: :math:`\sum_k \frac{n_k}{n} \theta_k`.

    Of LoRAs it averages the factors, whose product is not the mean of the products; :func:`federated_stack` is exact, and takes differing ranks.

    Args:
        clients: Tensors of every client's adapter, by the same names and of the same shapes.
        rows: Numbers of rows :math:`n_k`, one for each client.

    Raises:
        InputError: for rows that are no positive numbers; for adapters that differ, as :func:`exapt.algebra.tensors.merge_tensors`.

    References:
        McMahan, Moore, Ramage, Hampson and Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.

    >>> federated_average([{"w": torch.zeros(1)}, {"w": torch.ones(1)}], [30, 10])
    {'w': tensor([0.2500])}
    """
    return merge_tensors("average", clients, weights=_shares(clients, rows), names=[f"client {i}" for i in range(len(clients))])


@component(
    "flora", kind="federation", paper="FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", oracle="NumPy; exactness"
)
def federated_stack(clients: Sequence[Tree], rows: Sequence[float], scales: Sequence[float] | None = None, a: str = "A", b: str = "B") -> dict[str, Tensor]:
    r"""The exact mean of LoRAs of any ranks: :math:`\sum_k \frac{n_k}{n} s_k B_k A_k = B A` with factors stacked along the rank,
    :math:`A = [\tfrac{n_1}{n} s_1 A_1; \dots]`, :math:`B = [B_1, \dots]`.

    The result is a LoRA of rank :math:`\sum_k r_k` and factor one (``LoRA(rank=r, alpha=r)``). As in the paper the next round starts from a base
    with it merged in, and from fresh LoRAs.

    Args:
        clients: Tensors of every client's adapter; a site's pair of factors is named alike up to the ends ``a`` and ``b``.
        rows: Numbers of rows, one for each client.
        scales: The clients' factors :math:`s_k`, alpha / rank; 1 by default.
        a, b: How names of factors end: ``A`` (r, d_in) and ``B`` (d_out, r).

    Raises:
        InputError: for a tensor that is no factor, sites that are not the same, or shapes that do not fit.

    References:
        Wang, Shen, He, Sun, Wang, Lyu and Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
        NeurIPS 2024.

    >>> one = {"q/A": torch.ones(1, 3), "q/B": torch.ones(2, 1)}
    >>> two = {"q/A": torch.ones(2, 3), "q/B": torch.ones(2, 2)}
    >>> merged = federated_stack([one, two], [1, 1])
    >>> tuple(merged["q/A"].shape), float((merged["q/B"] @ merged["q/A"])[0, 0])
    ((3, 3), 1.5)
    """
    shares = _shares(clients, rows)
    given = [1.0] * len(clients) if scales is None else list(scales)
    if len(given) != len(clients):
        raise InputError(f"{len(given)} scales for {len(clients)} clients; give one for each")
    merged: dict[str, Tensor] = {}
    for site, pairs in _sites(clients, a, b):
        merged[site + a] = torch.cat([share * s * pair[0] for share, s, pair in zip(shares, given, pairs, strict=True)])
        merged[site + b] = torch.cat([pair[1] for pair in pairs], 1)
    return merged


@component("hetlora", kind="federation", paper="Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models")
def federated_pad(clients: Sequence[Tree], rows: Sequence[float] | None = None, a: str = "A", b: str = "B") -> dict[str, Tensor]:
    r"""Mean of the factors of LoRAs of differing ranks, padded with zeros to the largest.

    By default clients are weighted by how much their update holds, :math:`\lVert B_k A_k \rVert_F / \sum_j \lVert B_j A_j \rVert_F` over all sites
    together (the paper's sparsity-weighted aggregation), else by their rows. :func:`truncated` gives a client its rank of the result back,
    :func:`self_pruned` lowers a rank that a client does not need.

    Args:
        clients: Tensors of every client's adapter.
        rows: Numbers of rows, one for each client.
        a, b: How names of factors end.

    Raises:
        InputError: as :func:`federated_stack`.

    References:
        Cho, Liu, Xu, Fahrezi and Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024.

    >>> one = {"q/A": torch.ones(1, 3), "q/B": torch.ones(2, 1)}
    >>> two = {"q/A": torch.ones(2, 3), "q/B": torch.ones(2, 2)}
    >>> federated_pad([one, two], [1, 1])["q/B"]
    tensor([[1.0000, 0.5000],
            [1.0000, 0.5000]])
    """
    pairs = list(_sites(clients, a, b))
    if rows is None:
        squares = [sum(float((p[k][1] @ p[k][0]).square().sum()) for _, p in pairs) for k in range(len(clients))]
        rows = [s**0.5 for s in squares]
    shares = _shares(clients, rows)
    merged: dict[str, Tensor] = {}
    for site, own in pairs:
        rank = max(len(p[0]) for p in own)
        merged[site + a] = sum(w * torch.nn.functional.pad(p[0], (0, 0, 0, rank - len(p[0]))) for w, p in zip(shares, own, strict=True))  # type: ignore[assignment]
        merged[site + b] = sum(w * torch.nn.functional.pad(p[1], (0, rank - len(p[0]))) for w, p in zip(shares, own, strict=True))  # type: ignore[assignment]
    return merged


def truncated(adapter: Tree, rank: int, a: str = "A", b: str = "B") -> dict[str, Tensor]:
    """The first ``rank`` components of a LoRA, which is what a client of that rank gets.

    >>> {k: tuple(t.shape) for k, t in truncated({"q/A": torch.ones(4, 3), "q/B": torch.ones(2, 4)}, 2).items()}
    {'q/A': (2, 3), 'q/B': (2, 2)}
    """
    if rank < 1:
        raise InputError(f"truncated: rank is {rank}; it must be at least 1")
    return {name: t for site, [(left, right)] in _sites([adapter], a, b) for name, t in ((site + a, left[:rank]), (site + b, right[:, :rank]))}


def self_pruned(before: Tree, after: Tree, keep: float = 0.99, a: str = "A", b: str = "B") -> dict[str, Tensor]:
    r"""Takes a LoRA's last components away where training made them smaller (rank self-pruning).

    The tail is what lies behind the first ``keep`` of the rank (at least one component behind, one before). A site is cut where
    :math:`\lVert B_{tail} \rVert \lVert A_{tail} \rVert` fell from ``before`` local training to ``after``; the paper adds that product
    (:func:`tail_norm`), weighted, to the local loss.
    """
    if not 0 < keep < 1:
        raise InputError(f"self_pruned: keep is {keep}; it is a share of the rank, between 0 and 1")
    cut: dict[str, Tensor] = {}
    for site, [(a_0, b_0), (a_1, b_1)] in _sites([before, after], a, b):
        if a_0.shape != a_1.shape or b_0.shape != b_1.shape:
            raise InputError(f"{site}: the adapter has another shape before training than after")
        rank = _head(len(a_1), keep) if tail_norm(a_1, b_1, keep) < tail_norm(a_0, b_0, keep) else len(a_1)
        cut |= {site + a: a_1[:rank], site + b: b_1[:, :rank]}
    return cut


def tail_norm(a: Tensor, b: Tensor, keep: float = 0.99) -> Tensor:
    """Product of the norms of the last components of a (r, d_in) and b (d_out, r); differentiable.

    >>> tail_norm(torch.eye(2), 2 * torch.eye(2))
    tensor(2.)
    """
    head = _head(len(a), keep)
    return b[:, head:].norm() * a[head:].norm()


def _head(rank: int, keep: float) -> int:
    return max(1, min(int(rank * keep), rank - 1)) if rank > 1 else 1


def _shares(clients: Sequence[Tree], rows: Sequence[float]) -> list[float]:
    if not clients:
        raise InputError("there is no client to average")
    total = float(sum(rows))
    if len(rows) != len(clients) or min(rows) < 0 or not 0 < total < float("inf"):
        raise InputError(f"rows {list(rows)} for {len(clients)} clients; give one number for each, none negative, not all zero")
    return [float(n) / total for n in rows]


def _sites(clients: Sequence[Tree], a: str, b: str) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
    """The pairs of factors of every client, site by site."""
    found = [_names(c, a, b) for c in clients]
    for i, names in enumerate(found):
        if set(names) != set(found[0]):
            raise InputError(f"client {i} adapts {sorted(names)[:5]}, client 0 {sorted(found[0])[:5]}; adapters must have the same sites")
    for site in found[0] if found else ():
        pairs = [(c[site + a], c[site + b]) for c in clients]
        for i, (left, right) in enumerate(pairs):
            if left.dim() != 2 or right.dim() != 2 or len(left) != right.shape[1] or (left.shape[1], len(right)) != (pairs[0][0].shape[1], len(pairs[0][1])):
                raise InputError(f"{site}: client {i} has factors of shapes {tuple(left.shape)} and {tuple(right.shape)}, which do not fit together")
        yield site, pairs


def _names(client: Mapping[str, Tensor], a: str, b: str) -> list[str]:
    sites = [k.removesuffix(a) for k in client if k.endswith(a)]
    odd = set(client) - {s + end for s in sites for end in (a, b)}
    missing = [s + b for s in sites if s + b not in client]
    if odd or missing:
        what = f"{min(odd)} is no factor" if odd else f"{missing[0]} is missing"
        raise InputError(f"{what}: this takes LoRAs, whose tensors end in {a} and {b}")
    return sites
