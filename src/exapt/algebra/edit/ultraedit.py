"""UltraEdit: lifelong editing by one pass and one linear system (Gu et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.algebra.edit.closed_form import regularised
from exapt.algebra.edit.editor import Editor
from exapt.algebra.edit.host import Editing
from exapt.algebra.edit.moments import Moments
from exapt.algebra.edit.reading import gradients
from exapt.algebra.edit.request import Edit, checked
from exapt.core.components import component
from exapt.core.errors import InputError


@component("ultraedit", kind="editor", paper="UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language Models", oracle="NumPy")
@dataclass(frozen=True)
class UltraEdit(Editor):
    r"""Turns the edits' hidden states and gradients into value shifts by a lifelong normalisation, and solves for the update.

    .. math:: v_i = -\eta\, \|\tilde h_i\|^2\, \tilde\nabla_i, \qquad \Delta^\top = (H^\top H + I)^{-1} H^\top V

    :math:`h_i` is a site's input at a token of the answer, :math:`\nabla_i` the loss's gradient at its output there; the tilde is normalisation by
    mean and deviation over all edits so far (this batch included). No subject, no training, no memory but those moments. Sites of one shape share
    moments, as in the official code; its batches are of a hundred edits, and the first one needs two rows at least.

    Args:
        rate: :math:`\eta`, 1e-6 for the 7B models of the paper; it grows with smaller layers, since the squared norm is about their width.
        everywhere: Take all places of the input, and not only those that answer.

    References:
        Gu, Zhang, Zhou, Chen, Lai, Wang et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language Models", 2025.
    """

    rate: float = 1e-6
    everywhere: bool = False

    def observe(self, editing: Editing, edits: Sequence[Edit]) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Takes the features of edits into the moments, without editing."""
        moments: dict[str, Moments] = editing.memory.setdefault("ultraedit", {})
        found = []
        for edit in checked(edits):
            found.append(gradients(editing.model, editing.sites, edit, self.everywhere))
            for site in editing.sites:
                moments.setdefault(str(site.shape), Moments()).update(torch.cat(found[-1][site.name], -1).double())
        return found

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        if self.rate <= 0:
            raise InputError(f"ultraedit.rate is {self.rate}; it is positive")
        found = self.observe(editing, edits)
        deltas = {}
        for site in editing.sites:
            h, g = (torch.cat([f[site.name][part] for f in found]).double() for part in (0, 1))
            deltas[site.name] = solved(h, g, editing.memory["ultraedit"][str(site.shape)], self.rate)
        editing.shift(deltas)


def solved(h: Tensor, g: Tensor, moments: Moments, rate: float) -> Tensor:
    """The update (d_out, d_in) of one matrix from hidden states (n, d_in) and gradients (n, d_out)."""
    normal = moments.normalised(torch.cat([h, g], -1))
    key, gradient = normal[:, : h.shape[1]], normal[:, h.shape[1] :]
    return regularised(h, -rate * key.square().sum(-1, keepdim=True) * gradient, torch.ones((), dtype=h.dtype, device=h.device))
