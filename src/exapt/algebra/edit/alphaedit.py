"""AlphaEdit: edits in the null space of what the model knows (Fang et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from exapt.algebra.edit.closed_form import null_space, projected
from exapt.algebra.edit.editor import Editor
from exapt.algebra.edit.host import Editing, each_key
from exapt.algebra.edit.memit import spread
from exapt.algebra.edit.request import Edit, checked
from exapt.algebra.edit.value import Value
from exapt.core.components import component
from exapt.core.sites import Site

VALUE = Value(steps=25, rate=0.1, clamp=0.75)


@component("alphaedit", kind="editor", paper="AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", oracle="NumPy")
@dataclass(frozen=True)
class AlphaEdit(Editor):
    r"""MEMIT with the update projected on the null space of old knowledge, so that its keys keep their outputs whatever is edited.

    .. math:: \Delta = R K^\top P\,(K_p K_p^\top P + K K^\top P + \beta I)^{-1}

    :math:`P` projects on the eigenvectors of :math:`C = E[kk^\top]` with next to no eigenvalue, :math:`K_p` are the keys of the edits before.

    Args:
        value: How the values are found.
        threshold: Share of the mean eigenvalue below which a direction is free.
        ridge: :math:`\beta`.

    References:
        Fang, Jiang, Wang, Ma, Shi, Wang, He and Chua, "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", ICLR 2025.
    """

    value: Value = VALUE
    threshold: float = 0.02
    ridge: float = 1.0

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        found = checked(edits)
        kept: dict[str, dict[str, Tensor]] = editing.memory.setdefault("alphaedit", {})
        for s in editing.sites:
            if s.name not in kept:
                basis = null_space(editing.keys_of(s, "AlphaEdit"), self.threshold)
                kept[s.name] = {"U": basis, "past": basis.new_zeros(basis.shape[1], basis.shape[1])}

        def update(site: Site, residuals: Tensor, keys: Tensor) -> Tensor:
            return projected(residuals, keys, kept[site.name]["U"], kept[site.name]["past"], self.ridge)

        spread(editing, found, self.value, update)
        for name, keys in each_key(editing, editing.sites, found).items():
            free = keys.double() @ kept[name]["U"]
            kept[name]["past"] += free.T @ free
