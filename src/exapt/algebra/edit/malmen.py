"""MALMEN: MEND's shifts of many edits, brought together by least squares (Tan et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from exapt.algebra.edit.closed_form import regularised
from exapt.algebra.edit.hypernetwork import EditNetwork, Learned
from exapt.core.components import component


@component("malmen", kind="editor", paper="Massive Editing for Large Language Models via Meta Learning", oracle="NumPy")
@dataclass(frozen=True)
class MALMEN(Learned):
    r"""Asks each edit's network output for the shift of its value, and takes the update that gives all of them at once in least squares.

    .. math:: d_i = -\eta\,(k_i^\top \tilde k_i)\, \tilde\nabla_i, \qquad \Delta^\top = (K^\top K + e^{\lambda} I)^{-1} K^\top D

    so that shifts of many edits do not cancel, as MEND's sums do. Call ``train`` before ``edit``.

    Args:
        rank: Of the network's blocks.
        blocks: How many.
        rate: First :math:`\eta`; it is learnt, as is :math:`\lambda`, one for each site.
        seed: Of the network.

    References:
        Tan, Zhang and Fu, "Massive Editing for Large Language Models via Meta Learning", ICLR 2024.
    """

    def update(self, network: EditNetwork, key: Tensor, gradient: Tensor, site: int) -> Tensor:
        pseudo_key, pseudo_gradient = network(key, gradient, site)
        d = -network.rate[site] * (key * pseudo_key).sum(-1, keepdim=True) * pseudo_gradient
        return regularised(key, d, network.penalty[site].exp())
