"""ROME: rank-one model editing (Meng et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exapt.algebra.edit.closed_form import rank_one
from exapt.algebra.edit.editor import Editor
from exapt.algebra.edit.host import Editing, each_key, factored
from exapt.algebra.edit.reading import read_at
from exapt.algebra.edit.request import Edit, checked
from exapt.algebra.edit.value import Value
from exapt.core.components import component

VALUE = Value()


@component("rome", kind="editor", paper="Locating and Editing Factual Associations in GPT", oracle="NumPy")
@dataclass(frozen=True)
class ROME(Editor):
    r"""Writes one fact into one layer by an update of rank one that leaves its usual keys as they are as far as it can.

    .. math:: W' = W + \frac{(v_* - Wk)\,(C^{-1}\bar k)^\top}{(C^{-1}\bar k)^\top k}

    :math:`k` is the layer's input at the subject's last token, :math:`\bar k` its mean over contexts, :math:`v_*` the output that gives the answer.
    Several edits are made one after the other. Follows the official code; random text that it generates as contexts is ``Editing(contexts=...)`` here.

    Args:
        value: How the value is found.
        ridge: Share of the mean eigenvalue that is added to C, which few calibration tokens leave singular.

    References:
        Meng, Bau, Andonian and Belinkov, "Locating and Editing Factual Associations in GPT", NeurIPS 2022.
    """

    value: Value = VALUE
    ridge: float = 1e-3

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        site = editing.one("ROME")
        c, factor = factored(editing, site, "ROME", self.ridge)
        for edit in checked(edits):
            start, delta = self.value.find(editing, site, edit)
            key, now = (t[0].double() for t in read_at(editing.model, [site], [edit.prompt], [edit.place])[site.name])
            mean_key = each_key(editing, [site], [edit])[site.name][0].double()
            editing.shift({site.name: rank_one((start + delta).double() - now, key, c, mean_key, factor)})
