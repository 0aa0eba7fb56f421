"""GRACE's codebook, kept: when a key is added, when its ball grows, when two balls split (Hartvigsen et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from exapt.algebra.edit.editor import Editor
from exapt.algebra.edit.host import Editing
from exapt.algebra.edit.reading import loss, read_at
from exapt.algebra.edit.request import Edit, checked
from exapt.core.attach import attach, detach
from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError
from exapt.core.file import holders
from exapt.core.registry import method
from exapt.core.sites import Site
from exapt.core.state import adapters


@component("grace_codebook", kind="editor", paper="Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", oracle="NumPy")
@dataclass(frozen=True)
class Codebook(Editor):
    r"""Adds an edit's hidden state as a key with a value that gives its answer; weights are never changed.

    With :math:`d` the distance of the new key to the nearest, of radius :math:`\epsilon`: a new entry where :math:`d > \epsilon_0 + \epsilon`; else the
    radius grows to :math:`d` where the wanted answer is the same, and where it is not a new entry is made and both radii become :math:`d / 2`.
    The value is then trained by Adam. The adapter is the method ``grace``; room doubles when it is used up.

    Args:
        radius: :math:`\epsilon_0`, the first radius.
        steps: Of Adam.
        rate: Adam's learning rate.
        start: New values begin at random (``"cold"``) or at the layer's output (``"warm"``).
        places: Which places of a row ask, see :class:`exapt.GRACE`.
        seed: Of cold values.

    References:
        Hartvigsen, Sankaranarayanan, Palangi, Kim and Ghassemi, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", NeurIPS 2023.
    """

    radius: float = 1.0
    steps: int = 50
    rate: float = 1.0
    start: Literal["cold", "warm"] = "cold"
    places: Literal["all", "first", "last"] = "all"
    seed: int = 0

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        if self.radius <= 0 or self.steps < 1:
            raise InputError(f"grace_codebook: radius {self.radius} and {self.steps} steps; both are positive")
        site, found = editing.one("GRACE"), checked(edits)
        if editing.name in adapters(editing.model) and "grace" not in editing.memory:
            raise InputError(f'grace_codebook: the adapter "{editing.name}" holds another editor\'s edits; use an Editing of its own')
        labels: list[list[int]] = editing.memory.setdefault("grace", [])
        for edit in found:
            p = self._room(editing, site)
            answer = edit.answer.tolist()
            label = labels.index(answer) if answer in labels else len(labels)
            labels += [answer] if label == len(labels) else []
            query, value = (t[0] for t in read_at(editing.model, [site], [edit.prompt], [edit.place])[site.name])
            if self.start == "cold":
                value = torch.rand(value.shape, generator=seeded(self.seed, str(int((p["eps"] >= 0).sum())))).to(value)
            chosen = place(p["k"], p["eps"], p["label"], query, label, self.radius)
            if chosen < 0:
                chosen = int((p["eps"] >= 0).sum()) - 1
                with torch.no_grad():
                    p["v"][chosen] = value
            self._train(editing, edit, p["v"])

    def _train(self, editing: Editing, edit: Edit, v: Tensor) -> None:
        adam = torch.optim.Adam([v], lr=self.rate)
        with torch.enable_grad():
            v.requires_grad_(True)
            for _ in range(self.steps):
                (v.grad,) = torch.autograd.grad(loss(editing.model, [edit]), v)
                adam.step()
        v.grad = None
        v.requires_grad_(False)

    def _room(self, editing: Editing, site: Site) -> dict[str, Tensor]:
        """The codebook's tensors, with a free place at least."""
        name, before = editing.name, {}
        if name in adapters(editing.model):
            before = held(editing)
            if bool((before["eps"] < 0).any()):
                return before
            before = {k: t.detach().clone() for k, t in before.items()}
            detach(editing.model, name)
        entries = 2 * len(before["eps"]) if before else 16
        attach(editing.model, method("grace", entries=entries, places=self.places), where=lambda s: s.name == site.name, name=name, trainable=False)
        p = held(editing)
        with torch.no_grad():
            for k, t in before.items():
                p[k][: len(t)] = t
        return p


def held(editing: Editing) -> dict[str, Tensor]:
    """The tensors of an adapter at its one site."""
    ((_, holder),) = holders(editing.model, editing.name)
    return holder.tensors()


@torch.no_grad()
def place(keys: Tensor, eps: Tensor, labels: Tensor, query: Tensor, label: int, radius: float) -> int:
    """Puts a query into a codebook, in place: a new entry, a larger ball, or two split ones.

    Args:
        keys: (n, d).
        eps: (n,), negative where an entry is empty; the entries in use come first.
        labels: (n,) int64.
        query: (d,).
        label: Number of the wanted answer.
        radius: The first radius.

    Returns:
        The entry whose value is to be trained further, or -1 for a new one (the last in use).
    """
    used = int((eps >= 0).sum())
    first = radius
    if used:
        distance = (keys[:used] - query).norm(dim=-1)
        i = int(distance.argmin())
        d = float(distance[i])
        if d <= radius + float(eps[i]):
            if int(labels[i]) == label:
                eps[i] = max(float(eps[i]), d)
                return i
            eps[i], first = max(d / 2 - 1e-5, 0.0), d / 2
    keys[used], eps[used], labels[used] = query, first, label
    return -1
