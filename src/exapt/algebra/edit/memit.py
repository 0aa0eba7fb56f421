"""MEMIT: many facts at once, spread over layers (Meng et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.algebra.edit.closed_form import least_squares
from exapt.algebra.edit.editor import Editor
from exapt.algebra.edit.host import Editing, each_key, factored
from exapt.algebra.edit.reading import read_at
from exapt.algebra.edit.request import Edit, checked
from exapt.algebra.edit.value import Value
from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.sites import Site
from exapt.core.sites import sites as all_sites

VALUE = Value(steps=25, clamp=0.75)


@component("memit", kind="editor", paper="Mass-Editing Memory in a Transformer", oracle="NumPy")
@dataclass(frozen=True)
class MEMIT(Editor):
    r"""Writes many facts at once into a range of layers, each layer taking its share of what is still missing.

    .. math:: \Delta_l = R_l K_l^\top (\lambda C_l + K_l K_l^\top)^{-1}, \qquad R_l = \frac{z - h_L}{L - l + 1}

    :math:`z = h_L + \delta` is the hidden state after the last of the layers that gives each answer, :math:`h_L` the present one, after the layers
    before were changed. Editing anew adds to what is there; the paper keeps no cache over calls.

    Args:
        value: How the values are found.
        weight: :math:`\lambda`; 0 stands for the number of the layer's inputs (16384 in GPT-J, where the paper takes 15000).
        ridge: As in ROME.

    References:
        Meng, Sharma, Andonian, Belinkov and Bau, "Mass-Editing Memory in a Transformer", ICLR 2023.
    """

    value: Value = VALUE
    weight: float = 0.0
    ridge: float = 1e-3

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        if self.weight < 0:
            raise InputError(f"memit.weight is {self.weight}; it is positive, or 0 for the number of inputs")
        known = {s.name: factored(editing, s, "MEMIT", self.ridge, self.weight or s.shape[1]) for s in editing.sites}
        spread(editing, checked(edits), self.value, lambda site, residuals, keys: least_squares(residuals, keys, *known[site.name]))


def spread(editing: Editing, edits: Sequence[Edit], value: Value, update: Callable[[Site, Tensor, Tensor], Tensor]) -> None:
    """Finds the edits' values after the last site and lets every site, from the first on, take its share of what is missing.

    Args:
        editing: The model.
        edits: The edits.
        value: How the values are found.
        update: ``(site, residuals (n, d_out), keys (n, d_in))`` to a shift (d_out, d_in), in double precision.

    Raises:
        InputError: for several sites in a model that does not add them up in one stream.
    """
    last = editing.sites[-1]
    rows, places = [e.prompt for e in edits], [e.place for e in edits]
    seen = _stream(editing)
    before = read_at(editing.model, [seen], rows, places)[seen.name][1]
    # bound and decay are in norms of the stream here, as in the official code; ROME's are in those of the layer's output, which is much smaller
    found = [value.find(editing, last, e, norm=float(h.norm())) for e, h in zip(edits, before, strict=True)]
    z = before + torch.stack([delta for _, delta in found])
    for i, site in enumerate(editing.sites):
        keys = each_key(editing, [site], edits)[site.name].double()
        missing = (z - read_at(editing.model, [seen], rows, places)[seen.name][1]).double() / (len(editing.sites) - i)
        editing.shift({site.name: update(site, missing, keys)})


def _stream(editing: Editing) -> Site:
    """The block that ends with the last site: what its layers add up in. One site alone stands for itself where there is none."""
    last = editing.sites[-1]
    blocks = [s for s in all_sites(editing.model) if s.role == "block" and last.name.startswith(f"{s.name}.")]
    normed_after = any(p.role == "norm" and _after(p, last) for p in all_sites(editing.model) if blocks and p.name.startswith(f"{blocks[0].name}."))
    if blocks and not normed_after:
        return blocks[0]
    if len(editing.sites) > 1:
        why = "normalises its sum" if blocks else "has no blocks"
        raise InputError(f'edits are spread over layers that add up in one stream, but this model {why}; name one layer, such as where="{last.name}"')
    return last


def _after(norm: Site, last: Site) -> bool:
    """Whether a norm stands beside a feed-forward layer's output, as in BERT (``output.dense``, ``output.LayerNorm``)."""
    return norm.name.rpartition(".")[0] == last.name.rpartition(".")[0] and norm.name != last.name
