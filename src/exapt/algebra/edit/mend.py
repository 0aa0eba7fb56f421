"""MEND: a network that edits gradients (Mitchell et al., ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from exapt.algebra.edit.hypernetwork import EditNetwork, Learned
from exapt.core.components import component


@component("mend", kind="editor", paper="Fast Model Editing at Scale", oracle="NumPy")
@dataclass(frozen=True)
class MEND(Learned):
    r"""Sums rank-one updates of pseudo keys and pseudo gradients that a trained network makes of an edit's own.

    .. math:: \Delta = -\eta \sum_i \tilde\nabla_i\, \tilde k_i^\top, \qquad (\tilde k_i, \tilde\nabla_i) = g(k_i, \nabla_i)

    Call ``train`` before ``edit``. The network is that of MALMEN's official code, which holds both methods (one normalisation for key and gradient,
    residual blocks that begin at zero); MEND's own differs in how its first block starts.

    Args:
        rank: Of the network's blocks.
        blocks: How many.
        rate: First :math:`\eta`; it is learnt, one for each site.
        seed: Of the network.

    References:
        Mitchell, Lin, Bosselut, Finn and Manning, "Fast Model Editing at Scale", ICLR 2022.
    """

    def update(self, network: EditNetwork, key: Tensor, gradient: Tensor, site: int) -> Tensor:
        pseudo_key, pseudo_gradient = network(key, gradient, site)
        return -network.rate[site] * pseudo_gradient.T @ pseudo_key
