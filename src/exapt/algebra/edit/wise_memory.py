"""WISE: edits in a side memory that is asked only about what was edited (Wang et al., NeurIPS 2024)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.algebra.edit.editor import Editor
from exapt.algebra.edit.grace_codebook import held
from exapt.algebra.edit.host import Editing
from exapt.algebra.edit.reading import added, called, hooked, loss, stacked
from exapt.algebra.edit.request import Edit, checked
from exapt.algebra.rule import rule_of
from exapt.core.attach import attach, detach
from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError
from exapt.core.registry import method
from exapt.core.sites import Site
from exapt.core.state import adapters, disabled


@component(
    "wise_memory", kind="editor", paper="WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models",
    oracle="NumPy",
)  # fmt: skip
@dataclass(frozen=True)
class WISE(Editor):
    r"""Trains edits into a copy of one layer's weight, within a random mask, so that the copy reacts to them and not to other inputs.

    .. math:: \ell = -\log p(y \mid x) + [a(x_o) - \alpha]_+ + [\beta - a(x_e)]_+ + [\gamma + a(x_o) - a(x_e)]_+, \qquad a(x) = \mathrm{mean}_t \|D x_t\|

    :math:`x_e` is the edit, :math:`x_o` its first locality prompt. The copy is taken where :math:`a(x) \ge \epsilon`, :math:`\epsilon` a share of the least
    :math:`a(x_e)` of its edits. After ``shard`` edits the copy is put aside and another mask is drawn; after ``merge`` edits the shards since the last merge
    become one by TIES. The adapter is the method ``side_memory``. Of the official code's two readings this is "retrieve", without replay.

    Args:
        ratio: Share of entries that a mask lets train.
        rate: Learning rate (stochastic gradient descent).
        steps: Steps for one edit.
        bound: Largest change of an entry.
        alpha, beta, gamma: The margins; they are in the scale of the layer's output.
        share: Of the least reaction that is the threshold.
        shard: Edits in one shard.
        merge: Edits between merges, a multiple of ``shard``; 0 never merges.
        density: Of TIES.
        seed: Of the masks.

    References:
        Wang, Li, Zhang, Xu, Yao, Jiang, Xie, Huang and Chen, "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models",
        NeurIPS 2024.
    """

    ratio: float = 0.2
    rate: float = 1.0
    steps: int = 70
    bound: float = 1.0
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    share: float = 0.88
    shard: int = 500
    merge: int = 1000
    density: float = 0.53
    seed: int = 0

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        site, found = editing.one("WISE"), checked(edits)
        if not 0 < self.ratio <= 1 or self.shard < 1 or self.merge % self.shard:
            raise InputError(f"wise_memory: ratio {self.ratio} lies in (0, 1], and merge {self.merge} is a multiple of shard {self.shard}")
        lacking = next((i for i, e in enumerate(found) if not e.locality), None)
        if lacking is not None:
            raise InputError(f"edit {lacking}: wise_memory needs an input that is not to react, and the edit has no locality probe; see with_locality")
        if editing.name in adapters(editing.model) and "wise" not in editing.memory:
            raise InputError(f'wise_memory: the adapter "{editing.name}" holds another editor\'s edits; use an Editing of its own')
        memory: dict[str, Any] = editing.memory.setdefault("wise", {"shards": [], "eps": [], "merged": 0, "count": 0})
        for e in found:
            if memory["count"] % self.shard == 0:
                memory["shards"].append(torch.zeros(site.shape, device=site.device))
                memory["eps"].append(float("inf"))
                drawn = torch.rand(site.shape, generator=seeded(self.seed, str(memory["count"])))
                memory["mask"] = (drawn < self.ratio).float().to(site.device)
            strength = self._train(editing, site, e, memory)
            memory["eps"][-1] = min(memory["eps"][-1], self.share * strength)
            memory["count"] += 1
            if self.merge and memory["count"] % self.merge == 0:
                self._merge(memory)
        self._write(editing, site, memory)

    def _train(self, editing: Editing, site: Site, edit: Edit, memory: dict[str, Any]) -> float:
        """Trains the present shard, for one edit, on the bare layer; returns how strongly it reacts in the end."""
        d = memory["shards"][-1].requires_grad_(True)
        optimiser = torch.optim.SGD([d], lr=self.rate)
        bare = disabled(editing.model) if adapters(editing.model) else contextlib.nullcontext()
        with torch.enable_grad(), bare:
            own, other = (self._input(editing, site, row) for row in (edit.row, edit.locality[0].row))
            for step in range(self.steps + 1):
                with hooked([site], added({site.name: d})):
                    total = loss(editing.model, [edit])
                inside, outside = (F.linear(x.to(d.dtype), d).norm(dim=-1).mean() for x in (own, other))
                total = total + F.relu(outside - self.alpha) + F.relu(self.beta - inside) + F.relu(self.gamma + outside - inside)
                if not bool(torch.isfinite(total)):
                    raise InputError(f"{site.name}: wise_memory came out as NaN or infinity; lower the rate ({self.rate})")
                if step == self.steps or float(total.detach()) < 1e-2:
                    break
                (gradient,) = torch.autograd.grad(total, d)
                d.grad = gradient * memory["mask"]
                optimiser.step()
                with torch.no_grad():
                    d.clamp_(-self.bound, self.bound)
        memory["shards"][-1] = d.detach()
        return float(inside.detach())

    def _input(self, editing: Editing, site: Site, row: Tensor) -> Tensor:
        """The layer's input for one row; the side memory itself does not change it."""
        seen: list[Tensor] = []
        with torch.no_grad(), hooked([site], lambda s, x, h: seen.append(x[0])):
            called(editing.model, stacked([row], editing.model))
        return seen[0]

    def _merge(self, memory: dict[str, Any]) -> None:
        """Makes one of the shards since the last merge; the least of their thresholds stays."""
        done = memory["merged"]
        new = torch.stack(memory["shards"][done:])
        memory["shards"][done:] = [rule_of("ties").function(new, density=self.density)]
        memory["eps"][done:] = [min(memory["eps"][done:])]
        memory["merged"] = done + 1

    def _write(self, editing: Editing, site: Site, memory: dict[str, Any]) -> None:
        if editing.name in adapters(editing.model):
            if len(held(editing)["eps"]) != len(memory["shards"]):
                detach(editing.model, editing.name)
        if editing.name not in adapters(editing.model):
            chosen = method("side_memory", memories=len(memory["shards"]))
            attach(editing.model, chosen, where=lambda s: s.name == site.name, name=editing.name, trainable=False)
        p = held(editing)
        with torch.no_grad():
            p["D"].copy_(torch.stack(memory["shards"]))
            p["eps"].copy_(torch.tensor(memory["eps"]))
