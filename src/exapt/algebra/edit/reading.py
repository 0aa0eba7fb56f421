"""How an edited model is called, and what is read inside it: logits of the answer, keys and values at the subject, gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.algebra.edit.request import Edit, Probe
from exapt.core.errors import InputError
from exapt.core.sites import Site
from exapt.core.slots import first_tensor, replace_first

ROWS = 32
"""Rows of one call; rows of different lengths go into different calls, so that nothing is padded."""


def called(model: nn.Module, rows: Tensor) -> Tensor:
    """The model's logits for rows of token ids (n, length) or of numbers (n, ...)."""
    by_name = not rows.is_floating_point() and hasattr(model, "config")
    try:
        out = model(input_ids=rows) if by_name else model(rows)
    except (RuntimeError, IndexError, TypeError) as e:
        if rows.is_floating_point() or int(rows.max()) >= _vocabulary(model):
            raise InputError(f"the model takes no input of shape {tuple(rows.shape[1:])} and type {rows.dtype} ({str(e).splitlines()[0]})") from e
        raise
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        raise InputError(f"{type(model).__name__} gives {type(out).__name__} without logits; edit a model that returns logits")
    return logits


def _vocabulary(model: nn.Module) -> int:
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)


def groups(rows: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of rows that can be stacked, in batches of at most :data:`ROWS`.

    >>> groups([torch.zeros(2), torch.zeros(3), torch.ones(2)])
    [[0, 2], [1]]
    """
    same: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        same.setdefault((tuple(row.shape), row.dtype), []).append(i)
    return [g[i : i + ROWS] for g in same.values() for i in range(0, len(g), ROWS)]


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def stacked(rows: Sequence[Tensor], model: nn.Module) -> Tensor:
    """Rows of one shape as a batch where the model is."""
    return torch.stack(list(rows)).to(device_of(model))


def answers(model: nn.Module, probes: Sequence[Probe]) -> list[Tensor]:
    """For each probe the logits that its answer is read from: (m, vocabulary) at the places that predict its tokens, or (1, classes).

    Raises:
        InputError: for an answer that the model cannot give.
    """
    found: dict[int, Tensor] = {}
    for group in groups([p.row for p in probes]):
        logits = called(model, stacked([probes[i].row for i in group], model))
        for i, own in zip(group, logits, strict=True):
            found[i] = _read(probes[i], own)
    return [found[i] for i in range(len(probes))]


def _read(probe: Probe, logits: Tensor) -> Tensor:
    """The logits of one row that tell its answer."""
    if probe.language != (logits.dim() == 2):
        kind = "one row of logits for each token" if logits.dim() == 2 else "one row of logits for each input"
        raise InputError(f"the model gives {kind}; the target must be {'token ids (m,)' if logits.dim() == 2 else 'a class (int)'}")
    if int(probe.answer.max()) >= logits.shape[-1]:
        raise InputError(f"the target {probe.answer.tolist()} is beyond the model's {logits.shape[-1]} logits")
    return logits[len(probe.prompt) - 1 :] if probe.language else logits[None]


def loss(model: nn.Module, probes: Sequence[Probe]) -> Tensor:
    """Mean over probes of the mean cross-entropy of their answers' tokens."""
    each = [F.cross_entropy(z.float(), p.answer.to(z.device)) for z, p in zip(answers(model, probes), probes, strict=True)]
    return torch.stack(each).mean()


@contextlib.contextmanager
def hooked(sites: Sequence[Site], see: Callable[[Site, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """While it lasts ``see(site, x, h)`` gets the input and output of each site, and may return another output."""

    def hook(site: Site) -> Callable[..., Any]:
        def run(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            new = see(site, first_tensor(args, kwargs), first_tensor((output,), {}))
            return None if new is None else replace_first(output, lambda _: new)

        return run

    handles = [s.module.register_forward_hook(hook(s), with_kwargs=True) for s in sites]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def at(t: Tensor, place: int) -> Tensor:
    """Features at one place of a row (length, d); of a row without places, itself."""
    return t[place] if t.dim() == 2 else t


@torch.no_grad()
def read_at(model: nn.Module, sites: Sequence[Site], rows: Sequence[Tensor], places: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs (n, d_in) and outputs (n, d_out) of sites, at one place of each row, by the site's name."""
    seen: dict[str, dict[int, tuple[Tensor, Tensor]]] = {s.name: {} for s in sites}
    for group in groups(rows):

        def see(site: Site, x: Tensor, h: Tensor, group: Sequence[int] = group) -> None:
            if len(x) != len(group):
                raise InputError(f"{site.name}: its input has {len(x)} rows for {len(group)} of the model; choose a site that keeps rows apart")
            for j, i in enumerate(group):
                seen[site.name][i] = at(x[j], places[i]).detach().float(), at(h[j], places[i]).detach().float()

        with hooked(sites, see):
            called(model, stacked([rows[i] for i in group], model))
    return {n: (torch.stack([s[i][0] for i in range(len(rows))]), torch.stack([s[i][1] for i in range(len(rows))])) for n, s in seen.items()}


def gradients(model: nn.Module, sites: Sequence[Site], edit: Edit, everywhere: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs (n, d_in) of sites and the loss's gradients at their outputs (n, d_out), for one edit.

    Args:
        model: The model.
        sites: The sites.
        edit: The edit; its loss is the mean cross-entropy of its answer.
        everywhere: Take all places. By default those that predict a continuation's tokens, and for a class the subject's.
    """
    xs: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}

    def see(site: Site, x: Tensor, h: Tensor) -> Tensor:
        xs[site.name] = x[0].detach().float()
        zeros[site.name] = torch.zeros_like(h, requires_grad=True)
        return h + zeros[site.name]

    with torch.enable_grad(), hooked(sites, see):
        found = torch.autograd.grad(loss(model, [edit]), [zeros[s.name] for s in sites])
    first, last = (len(edit.prompt) - 1, len(edit.row)) if edit.language else (edit.place, edit.place + 1)

    def chosen(t: Tensor) -> Tensor:
        return t[None] if t.dim() == 1 else t if everywhere else t[first:last]

    return {s.name: (chosen(xs[s.name]), chosen(g[0].float())) for s, g in zip(sites, found, strict=True)}


def added(shifts: Mapping[str, Tensor]) -> Callable[[Site, Tensor, Tensor], Tensor]:
    """For :func:`hooked`: adds matrices (d_out, d_in), which may have a graph, to the sites' own."""
    return lambda site, x, h: h + F.linear(x, shifts[site.name].to(x.dtype))
