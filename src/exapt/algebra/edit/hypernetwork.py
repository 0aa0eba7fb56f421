"""The network that turns what an edit's gradient says into an update: of MEND and MALMEN, and how both are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.algebra.edit.editor import Editor
from exapt.algebra.edit.host import Editing
from exapt.algebra.edit.moments import Moments
from exapt.algebra.edit.reading import added, answers, gradients, hooked, loss
from exapt.algebra.edit.request import Edit, Probe, checked
from exapt.core.contract import seeded
from exapt.core.errors import InputError


class EditNetwork(nn.Module):
    """Maps keys and gradients to pseudo keys and gradients: normalised, then residual blocks of low rank that begin as the identity.

    Sites of one shape share it, told apart by a scale and a shift of their own in each block, and by a learning rate and a penalty of their own.

    Args:
        d_in, d_out: Sizes of keys and gradients.
        rank, blocks: Of the residual blocks.
        sites: How many sites share it.
        rate: The first learning rate.
        generator: Draws the blocks.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, blocks: int, sites: int, rate: float, generator: torch.Generator) -> None:
        super().__init__()
        d = d_in + d_out
        self.d_in, self.moments = d_in, Moments()
        self.A = nn.ParameterList([torch.randn(d, rank, generator=generator) for _ in range(blocks)])
        self.B = nn.ParameterList([torch.zeros(rank, d) for _ in range(blocks)])
        self.bias = nn.ParameterList([torch.zeros(d) for _ in range(blocks)])
        self.scale = nn.ParameterList([torch.ones(sites, d) for _ in range(blocks)])
        self.shift = nn.ParameterList([torch.zeros(sites, d) for _ in range(blocks)])
        self.rate = nn.Parameter(torch.full((sites,), rate))
        self.penalty = nn.Parameter(torch.zeros(sites))

    def forward(self, key: Tensor, gradient: Tensor, site: int) -> tuple[Tensor, Tensor]:
        x = self.moments.normalised(torch.cat([key, gradient], -1))
        for a, b, bias, scale, shift in zip(self.A, self.B, self.bias, self.scale, self.shift, strict=True):
            x = x + scale[site] * (x @ a @ b + bias).relu() + shift[site]
        return x[:, : self.d_in], x[:, self.d_in :]


@dataclass(frozen=True)
class Learned(Editor):
    """What MEND and MALMEN share: training on edits with rephrasings and locality probes.

    Args:
        rank: Of the network's blocks.
        blocks: How many.
        rate: First learning rate of the edits.
        seed: Of the network's blocks.
    """

    rank: int = 64
    blocks: int = 2
    rate: float = 1e-4
    seed: int = 0

    def update(self, network: EditNetwork, key: Tensor, gradient: Tensor, site: int) -> Tensor:
        """The update (d_out, d_in), with the network's graph, from keys (n, d_in) and gradients (n, d_out)."""
        raise NotImplementedError

    @property
    def _name(self) -> str:
        return type(self).__name__.lower()

    def _networks(self, editing: Editing) -> dict[str, EditNetwork]:
        if self._name not in editing.memory:
            shapes: dict[str, list[tuple[int, int]]] = {}
            for s in editing.sites:
                shapes.setdefault(str(s.shape), []).append(s.shape)
            device = editing.sites[0].device
            editing.memory[self._name] = {
                k: EditNetwork(v[0][1], v[0][0], self.rank, self.blocks, len(v), self.rate, seeded(self.seed, self._name, k)).to(device)
                for k, v in shapes.items()
            }
        found: dict[str, EditNetwork] = editing.memory[self._name]
        return found

    def _shifts(self, editing: Editing, edits: Sequence[Edit], learn: bool) -> dict[str, Tensor]:
        """The update of every site; ``learn`` takes the features into the moments."""
        networks, numbers = self._networks(editing), dict.fromkeys({str(s.shape) for s in editing.sites}, 0)
        found = [gradients(editing.model, editing.sites, e) for e in edits]
        shifts = {}
        for site in editing.sites:
            network, k = networks[str(site.shape)], str(site.shape)
            key, gradient = (torch.cat([f[site.name][part] for f in found]) for part in (0, 1))
            if learn:
                network.moments.update(torch.cat([key, gradient], -1))
            shifts[site.name] = self.update(network, key, gradient, numbers[k])
            numbers[k] += 1
        return shifts

    def train(self, editing: Editing, edits: Sequence[Edit], *, steps: int, batch: int, rate: float = 1e-3, locality: float = 1.0) -> list[float]:
        r"""Trains the network on edits other than those to be made.

        .. math:: \min\; -\log p_{W + \Delta}(y \mid x') + \lambda\, KL(p_W \| p_{W + \Delta})(x_{\mathrm{loc}})

        with rephrasings x' of the batch's edits (the prompt, where there is none) and its locality probes. The loss's gradient at the updates is
        found on the model, and only then sent through the network, so that the two backward passes do not share memory.

        Args:
            editing: The model; it is not edited.
            edits: Edits, with locality probes where they have some.
            steps: Steps of Adam.
            batch: Edits in one step: as many as will be made at once, for the sum of several shifts is larger than one.
            rate: Adam's learning rate; gradients are clipped to norm 1.
            locality: :math:`\lambda`.

        Returns:
            The losses.
        """
        found = checked(edits)
        if steps < 1 or not 1 <= batch <= len(found):
            raise InputError(f"{self._name}: {steps} steps of {batch} edits out of {len(found)}; give at least one step, and a batch no larger than that")
        parameters = [p for n in self._networks(editing).values() for p in n.parameters()]
        if batch == 1:  # one row has no deviation: the normalisation sees all edits first
            self._shifts(editing, found, learn=True)
        adam, generator, losses = torch.optim.Adam(parameters, rate), seeded(self.seed, self._name, "batches"), []
        for _ in range(steps):
            chosen = [found[i] for i in torch.randperm(len(found), generator=generator)[:batch].tolist()]
            with torch.enable_grad():
                shifts = self._shifts(editing, chosen, learn=True)
                leaves = {k: v.detach().requires_grad_() for k, v in shifts.items()}
                total = self._meta_loss(editing, chosen, leaves, locality)
                at_shifts = torch.autograd.grad(total, list(leaves.values()))
                adam.zero_grad()
                torch.autograd.backward(list(shifts.values()), at_shifts)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            losses.append(float(total.detach()))
        return losses

    def _meta_loss(self, editing: Editing, edits: Sequence[Edit], shifts: dict[str, Tensor], factor: float) -> Tensor:
        with hooked(editing.sites, added(shifts)):
            total = loss(editing.model, [Probe(r, e.target) for e in edits for r in (e.rephrasings or (e.prompt,))])
        kept = [p for e in edits for p in e.locality]
        if not kept or not factor:
            return total
        with torch.no_grad():
            before = answers(editing.model, kept)
        with hooked(editing.sites, added(shifts)):
            after = answers(editing.model, kept)
        apart = [
            F.kl_div(a.float().log_softmax(-1), b.float().log_softmax(-1), log_target=True, reduction="batchmean") for a, b in zip(after, before, strict=True)
        ]
        return total + factor * torch.stack(apart).mean()

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        found = checked(edits)
        if self._name not in editing.memory:
            raise InputError(f"{self._name} has not learnt to edit this model; call {type(self).__name__}(...).train(editing, other_edits, ...) first")
        editing.shift({k: v.detach() for k, v in self._shifts(editing, found, learn=False).items()})
