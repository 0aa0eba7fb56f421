"""Frozen LoRAs composed by one small network for the whole input: DLP-LoRA (Zhang et al., 2024) and PSEC (Liu et al., ICLR 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.checks import check_rank
from exapt.core.contract import ActivationMethod, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site

EMPTY = {"gradient": "its experts are trained LoRAs from files; until they are there the network has nothing to weigh"}


@dataclass(frozen=True)
class _Composed(ActivationMethod):
    """The network runs at the site that runs first, on the mean of each row's inputs there; the other sites get its weights."""

    carries: ClassVar[bool] = True
    notes: ClassVar[bool] = True

    experts: int = 4
    rank: int = 8
    alpha: float = 16.0
    width: int = 64
    depth: int = 2

    def check(self, site: Site) -> None:
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: {self.key} acts on linear layers that are called with their input; leave it out of where=")
        check_rank(self, site)
        if min(self.experts, self.width, self.depth) < 1:
            raise InputError(f"{self.key}: experts={self.experts}, width={self.width}, depth={self.depth}; all are at least 1")

    def shared(self, sites: Sequence[Site]) -> Tensors:
        sizes = [sites[0].shape[1], *[self.width] * (self.depth - 1), self.experts]
        p: Tensors = {}
        for i in range(self.depth):
            p[f"M_{i}"] = torch.empty(sizes[i + 1], sizes[i], device=sites[0].device).uniform_(-(sizes[i] ** -0.5), sizes[i] ** -0.5)
            p[f"c_{i}"] = torch.zeros(sizes[i + 1], device=sites[0].device)
        return p

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        a = torch.empty(self.experts, self.rank, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        return {"A": frozen(a), "B": frozen(a.new_zeros(self.experts, d_out, self.rank))}

    def _network(self, p: Tensors, x: Tensor) -> Tensor:
        """(rows, experts) from the first site's input."""
        if x.shape[-1] != p["M_0"].shape[1]:
            raise InputError(
                f"{self.key}: the layer that runs first has {x.shape[-1]} inputs, the first in the model {p['M_0'].shape[1]}; leave one out of where="
            )
        mask, z = p.get("call.attention_mask"), x.to(p["M_0"].dtype)
        if z.dim() > 2:
            share = mask.to(z.dtype) if mask is not None and mask.shape == z.shape[:-1] else z.new_ones(z.shape[:-1])
            z = torch.einsum("b...,b...d->bd", share / share.flatten(1).sum(1).clamp_min(1).view(-1, *[1] * (share.dim() - 1)), z)
        for i in range(self.depth):
            z = F.linear(z.relu() if i else z, p[f"M_{i}"], p[f"c_{i}"])
        return z

    def _weights(self, p: Tensors, z: Tensor) -> Tensor:
        """The LoRAs' weights from what the network gives."""
        raise NotImplementedError

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Any:
        if p["carried"]:
            weights = p["carried"][0]
        else:
            weights = self._weights(p, self._network(p, x))
            p["notes"]["weights"] = weights  # type: ignore[index,call-overload]
        if len(weights) != len(h):
            raise InputError(f"{self.key}: a layer sees {len(h)} rows, the first saw {len(weights)}; leave it out of where=")
        low = F.linear(x.to(h.dtype), p["A"].flatten(0, 1)).unflatten(-1, (self.experts, self.rank))
        low = low * weights.to(h.dtype).view(len(h), *[1] * (h.dim() - 2), self.experts, 1)
        return h + self.alpha / self.rank * F.linear(low.flatten(-2), p["B"].transpose(0, 1).flatten(1)), weights


@register
@dataclass(frozen=True)
class DLPLoRA(_Composed):
    r"""Fuses frozen LoRAs once for each sentence: :math:`h' = h + s \sum_{k \in \mathrm{top}_p} w_k B_k A_k x`, w a small classifier's probabilities over the
    tasks, renormalised over the fewest that hold the share p.

    The LoRAs come from files (:func:`exapt.algebra.compose.experts.from_adapters`). The classifier is one for the whole model, on the mean of a row's
    inputs to the layer that runs first, without those that ``attention_mask`` leaves out; the paper's is a separate network of 5 million parameters over
    the sentence, of which only a transformer is in the official code. It trains through the task's loss, or, with ``supervised``, by cross-entropy to the
    rows' tasks, ``model(x, task_ids=ids)``, which training adds. ``exapt.noted(model)`` shows the last call's ``weights`` (rows, experts).

    Args:
        experts: Number of LoRAs.
        rank: Their rank.
        alpha: Their scale; :math:`s = \alpha / r`.
        width: Width of the classifier's inner layers.
        depth: Number of its layers.
        top_p: The share p.
        supervised: Whether calls tell the rows' tasks, to learn from.

    Parameters per site:
        Not trained: ``A`` (experts, rank, d_in), ``B`` (experts, d_out, rank), empty until they are filled. Once for all: ``M_i`` and ``c_i``, the classifier's
        layers, Kaiming uniform and zeros.

    References:
        Zhang, Liu, Zhang and others, "DLP-LoRA: Efficient Task-Specific LoRA Fusion with a Dynamic, Lightweight Plugin for Large Language Models", 2024.
    """

    key = "dlp_lora"
    paper = "DLP-LoRA: Efficient Task-Specific LoRA Fusion with a Dynamic, Lightweight Plugin for Large Language Models"
    equation = r"h' = h + \frac{\alpha}{r} \sum_{k \in \mathrm{top}_p} w_k\, B_k A_k x"
    golden = "NumPy"
    where = "linear"
    exceptions: ClassVar = EMPTY

    top_p: float = 0.9
    supervised: bool = False

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The mask, and the rows' tasks to learn from."""
        return ("attention_mask", "task_ids") if self.supervised else ("attention_mask",)

    def check(self, site: Site) -> None:
        super().check(site)
        if not 0 < self.top_p <= 1:
            raise InputError(f"dlp_lora.top_p is {self.top_p}; it is above 0 and at most 1")

    def _weights(self, p: Tensors, z: Tensor) -> Tensor:
        notes: Any = p["notes"]
        if self.supervised:
            notes["loss"] = F.cross_entropy(z, p["call.task_ids"].long())
        ranked, order = z.softmax(-1).sort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, ranked.cumsum(-1) - ranked < self.top_p)
        return z.masked_fill(~kept, -torch.inf).softmax(-1)

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes: Any = p.get("notes", {})
        return notes.get("loss")


@register
@dataclass(frozen=True)
class PSEC(_Composed):
    r"""Composes a library of frozen skills in parameter space as the state asks: :math:`W' = W + s \sum_i \alpha_i(s_t) B_i A_i`.

    The skills come from files (:func:`exapt.algebra.compose.experts.from_adapters`); a library grows by attaching the composition anew over one more. The
    context-aware network that gives :math:`\alpha`, free numbers, is one for the whole model, on the mean of a row's inputs to the layer that
    runs first: a policy's state, or what its first layer sees of it. The official code could not be read; depth and width are free here.
    ``exapt.noted(model)`` shows the last call's ``weights`` (rows, experts).

    Args:
        experts: Number of skills.
        rank: Their rank.
        alpha: Their scale; :math:`s = \alpha / r`.
        width: Width of the network's inner layers.
        depth: Number of its layers.

    Parameters per site:
        Not trained: ``A`` (experts, rank, d_in), ``B`` (experts, d_out, rank), empty until they are filled. Once for all: ``M_i`` and ``c_i``, the network's
        layers, Kaiming uniform and zeros.

    References:
        Liu, Li, Zheng, Niu, Wang, Xu, Zhu, Zhu and Zhan, "Skill Expansion and Composition in Parameter Space", ICLR 2025.
    """

    key = "psec"
    paper = "Skill Expansion and Composition in Parameter Space"
    equation = r"W' = W + \frac{\alpha}{r} \sum_i \alpha_i(s)\, B_i A_i"
    golden = "NumPy"
    where = "linear"
    exceptions: ClassVar = EMPTY

    def _weights(self, p: Tensors, z: Tensor) -> Tensor:
        return z
