"""A model under edit: where it is edited, what editors keep between edits, and the adapter that holds the edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exapt.algebra.edit.reading import called, hooked, read_at
from exapt.algebra.edit.request import Edit
from exapt.core.attach import attach, detach
from exapt.core.calibrate import run
from exapt.core.errors import InputError
from exapt.core.file import holders
from exapt.core.registry import method
from exapt.core.sites import Site, Sites, Where, choose
from exapt.core.sites import sites as all_sites
from exapt.core.state import adapters


@dataclass(eq=False)
class Editing:
    """A model and its edits. An edit is a parameter shift in one adapter, so that :func:`exapt.save` writes it and ``undo`` takes it off bit for bit.

    Args:
        model: The model, which returns logits; in evaluation mode.
        where: The sites to edit, as for :func:`exapt.attach`; linear layers.
        covariance: :math:`C = E[kk^T]` (d_in, d_in) of the inputs of each site, see :func:`key_covariance`, for the editors that need it.
        contexts: Token ids that are put before prompts, so that keys do not depend on what stands before them; for continuations only.
        name: The adapter's name.

    Attributes:
        memory: What editors keep between edits, by their key.
        sites: The sites.

    >>> editing = Editing(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), where="0")
    >>> editing.shift({"0": torch.ones(3, 2)}).undo()
    """

    model: nn.Module
    where: Where = "mlp.down"
    covariance: Mapping[str, Tensor] = field(default_factory=dict)
    contexts: tuple[Tensor, ...] = ()
    name: str = "edit"
    memory: dict[str, Any] = field(default_factory=dict)
    sites: Sites = field(init=False)

    def __post_init__(self) -> None:
        if self.name in adapters(self.model):
            raise InputError(f'an adapter "{self.name}" is on this model already; detach it, or give another name=')
        self.model.eval()
        self.sites = choose(all_sites(self.model), self.where, editable)

    def one(self, who: str) -> Site:
        """The site, for an editor of one layer.

        Raises:
            InputError: if there are several.
        """
        if len(self.sites) != 1:
            names = ", ".join(s.name for s in self.sites[:3])
            raise InputError(f'{who} edits one layer, but where= names {len(self.sites)} ({names}, ...); give one, such as where="{self.sites[-1].name}"')
        return self.sites[0]

    def keys_of(self, site: Site, who: str) -> Tensor:
        """The covariance of a site's inputs, in double precision.

        Raises:
            InputError: if it was not given, or is not finite or of another shape.
        """
        c = self.covariance.get(site.name)
        if c is None:
            raise InputError(f"{who} needs the covariance of the keys of {site.name}; pass Editing(..., covariance=key_covariance(model, batches, where))")
        if c.shape != (site.shape[1], site.shape[1]) or not bool(torch.isfinite(c).all()):
            raise InputError(f"{site.name}: its covariance has shape {tuple(c.shape)}, or is not finite; it must be {site.shape[1]} x {site.shape[1]}")
        return c.double()

    def placed(self, edit: Edit) -> list[tuple[Tensor, int]]:
        """The edit's prompt alone and behind every context, each with the place of its subject."""
        found = [(edit.prompt, edit.place)]
        if edit.language:
            found += [(torch.cat([c.to(edit.prompt), edit.prompt]), edit.place + len(c)) for c in self.contexts]
        return found

    @torch.no_grad()
    def shift(self, deltas: Mapping[str, Tensor]) -> Editing:
        """Adds matrices (d_out, d_in) to the sites' weights, by site name. The adapter holds the sums; the base keeps its own weights.

        Raises:
            InputError: for a matrix that is not finite or does not fit; nothing is changed then.
        """
        by_name = {s.name: s for s in self.sites}
        for name, delta in deltas.items():
            if name not in by_name or delta.shape != by_name[name].shape:
                raise InputError(f"{name}: a shift of shape {tuple(delta.shape)} does not belong to a site under edit")
            if not bool(torch.isfinite(delta).all()):
                raise InputError(f"{name}: the edit came out as NaN or infinity; the keys may be degenerate (try a larger ridge, or other edits)")
        if self.name not in adapters(self.model):
            chosen = {id(s.module) for s in self.sites}
            attach(self.model, method("full"), where=lambda s: s.role != "model" and id(s.module) in chosen, name=self.name, trainable=False)
        held = {path.partition(":")[2]: holder for path, holder in holders(self.model, self.name)}
        for name, delta in deltas.items():
            layer = by_name[name].layer
            assert layer is not None
            own = held[name].tensors()[layer.parameter]
            own.copy_((own.double() + layer.from_matrix(delta.to(own.device, torch.float64))).to(own.dtype))
        return self

    def undo(self) -> None:
        """Takes all edits off, bit for bit, and forgets what the editors kept."""
        if self.name in adapters(self.model):
            detach(self.model, self.name)
        self.memory.clear()


def editable(site: Site) -> bool:
    """Whether a site is a linear layer, whose outputs are a matrix times its inputs."""
    return site.layer is not None and site.layer.kind in ("linear", "conv1d_hf") and site.name == site.module_name and not site.quantised


@torch.no_grad()
def key_covariance(model: nn.Module, batches: Iterable[Any], where: Where = "mlp.down", place: int | None = None) -> dict[str, Tensor]:
    r"""Second moment :math:`C = E[kk^T]` of the inputs (keys) of sites, over all places of all rows, or one of each.

    Args:
        model: The model.
        batches: What it is called with: mappings, tuples, or tensors (token ids go in as ``input_ids`` where the model has a configuration). With an
            ``attention_mask`` among them, padding does not count.
        where: The sites.
        place: Only this place of each row: 0 for a classifier that reads [CLS], whose edits are made there.

    Returns:
        (d_in, d_in) for each site, in double precision.

    Raises:
        InputError: for no batches.

    >>> c = key_covariance(nn.Sequential(nn.Linear(2, 2)), [torch.eye(2)], where="0")
    >>> c["0"].tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    chosen = choose(all_sites(model), where, editable)
    sums = {s.name: torch.zeros(s.shape[1], s.shape[1], dtype=torch.float64, device=s.device) for s in chosen}
    counts = dict.fromkeys(sums, 0)
    masks: list[Tensor | None] = [None]

    def see(site: Site, x: Tensor, h: Tensor) -> None:
        kept = x[:, place] if place is not None and x.dim() == 3 else x.flatten(0, -2)
        if place is None and masks[0] is not None and masks[0].shape == x.shape[:-1]:
            kept = x[masks[0].bool()]
        sums[site.name] += (kept.T @ kept).double()
        counts[site.name] += len(kept)

    model.eval()
    with hooked(chosen, see):
        for batch in batches:
            masks[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(batch, Tensor):
                called(model, batch.to(chosen[0].device))
            else:
                run(model, batch)
    missing = [n for n, count in counts.items() if not count]
    if missing:
        raise InputError(f"{missing[0]}: no batch reached it, so its keys have no covariance; give batches of the model's usual inputs")
    return {n: s / counts[n] for n, s in sums.items()}


def ridged(c: Tensor, ridge: float) -> Tensor:
    r""":math:`C + \epsilon\, \frac{\mathrm{tr}\, C}{d} I`, so that a covariance of fewer keys than features can be inverted."""
    return c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)


def factored(editing: Editing, site: Site, who: str, ridge: float, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """A site's ridged covariance times a weight, and its lower Cholesky factor, computed for the first edit and kept for the others.

    Raises:
        InputError: as :meth:`Editing.keys_of`, and for a covariance that is not positive definite.
    """
    kept = editing.memory.setdefault("covariance", {})
    if (site.name, ridge, weight) not in kept:
        c = weight * ridged(editing.keys_of(site, who), ridge)
        factor, failed = torch.linalg.cholesky_ex(c)
        if int(failed):
            raise InputError(f"{site.name}: its covariance is not positive definite with a ridge of {ridge}; raise it, or give more keys")
        kept[site.name, ridge, weight] = c, factor
    found: tuple[Tensor, Tensor] = kept[site.name, ridge, weight]
    return found


def each_key(editing: Editing, sites: Sequence[Site], edits: Sequence[Edit]) -> dict[str, Tensor]:
    """The key of each edit at each site (n, d_in): the mean over the prompt alone and behind every context."""
    flat = [(i, row, place) for i, e in enumerate(edits) for row, place in editing.placed(e)]
    found = read_at(editing.model, sites, [row for _, row, _ in flat], [place for _, _, place in flat])
    owner = torch.tensor([i for i, _, _ in flat])
    return {n: torch.stack([x[owner.to(x.device) == i].mean(0) for i in range(len(edits))]) for n, (x, _) in found.items()}
