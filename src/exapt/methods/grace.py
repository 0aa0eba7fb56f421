"""GRACE: a codebook of hidden states for lifelong editing (Hartvigsen et al., NeurIPS 2023)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exapt.core.contract import ActivationMethod, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class GRACE(ActivationMethod):
    r"""Replaces a layer's output by a stored value where its input lies in the ball of a stored key; elsewhere the layer is untouched.

    .. math:: h' = v_{i} \ \text{if}\ \|x - k_{i}\| \le \epsilon_{i}, \quad i = \arg\min_j \|x - k_j\|, \qquad h' = h \ \text{otherwise}

    The codebook starts empty (no :math:`\epsilon` is positive); the editor of :mod:`exapt.algebra.edit.grace_codebook` fills it. The official code asks
    at one place only, that of the prompt's last token, whose index it must be told; here every place asks for itself, which needs no such index and is
    the same wherever no other place comes near a key.

    Args:
        entries: Room in the codebook.
        places: Which places ask: ``"all"``, the ``"first"`` ([CLS]) or the ``"last"`` of each row.

    Parameters per site:
        ``v`` (entries, d_out), zeros. Not trained: ``k`` (entries, d_in), zeros; ``eps`` (entries,), -1, an empty place; ``label`` (entries,) int64.

    References:
        Hartvigsen, Sankaranarayanan, Palangi, Kim and Ghassemi, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", NeurIPS 2023.

    >>> import exapt
    >>> model = exapt.attach(torch.nn.Sequential(torch.nn.Linear(3, 2)), GRACE(entries=4), where="0")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(4, 2)]
    """

    key = "grace"
    paper = "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors"
    equation = r"h' = v_i \text{ if } \|x - k_i\| \le \epsilon_i \text{ else } h"
    golden = "NumPy"
    where = "mlp.down"
    full_precision = True
    exceptions: ClassVar = {"gradient": "the codebook starts empty, and a value gets a gradient only where an input lies in its key's ball"}

    entries: int = 16
    places: Literal["all", "first", "last"] = "all"

    def check(self, site: Site) -> None:
        if self.entries < 1:
            raise InputError(f"grace.entries is {self.entries}; a codebook has room for one entry at least")
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: grace looks inputs of a linear layer up; choose such a site, as mlp.down")

    def init(self, site: Site) -> Tensors:
        (d_out, d_in), n, device = site.shape, self.entries, site.device
        return {
            "v": torch.zeros(n, d_out, device=device), "k": frozen(torch.zeros(n, d_in, device=device)),
            "eps": frozen(torch.full((n,), -1.0, device=device)), "label": frozen(torch.zeros(n, dtype=torch.int64, device=device)),
        }  # fmt: skip

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        distance = torch.cdist(x.to(p["k"].dtype), p["k"], compute_mode="donot_use_mm_for_euclid_dist")
        nearest, i = torch.where(p["eps"] >= 0, distance, torch.inf).min(-1)
        inside = nearest <= p["eps"][i]
        if self.places != "all" and x.dim() > 2:
            inside = inside & (torch.arange(x.shape[-2], device=x.device) == (0 if self.places == "first" else x.shape[-2] - 1))
        return torch.where(inside[..., None], p["v"][i].to(h.dtype), h)
