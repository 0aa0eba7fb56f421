"""Activated LoRA (Greenewald et al., 2025)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.checks import check_rank
from exapt.core.contract import ActivationMethod, Tensors
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class ActivatedLoRA(ActivationMethod):
    r"""LoRA that acts only from an invocation on: :math:`h_t' = h_t + [t \ge t_0]\, s B A x_t`, :math:`s = \alpha / r`, where :math:`t_0` is
    the start of the last place in a row's tokens that reads as the invocation.

    What comes before is the base model's own, so that its key-value cache serves any such adapter. A row without the invocation runs on
    the base model. Once invoked, all tokens generated after it are adapted, with a cache or without (not in beam search, which
    exchanges rows of the cache). Rows differ, so there is no merged form.

    Args:
        tokens: The invocation, as token ids.
        rank: Rank :math:`r` of the update.
        alpha: Scale of the update.

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``B`` (d_out, rank), zeros.

    References:
        Greenewald, Lastras, Parnell, Shah, Popa, Zizzo, Gunasekara, Rawat and Cox, "Activated LoRA: Fine-tuned LLMs for Intrinsics", 2025.
    """

    key = "alora"
    paper = "Activated LoRA: Fine-tuned LLMs for Intrinsics"
    equation = r"h_t' = h_t + [t \ge t_0] \frac{\alpha}{r} B A x_t"
    golden = "PEFT"
    where = "linear"
    reads = ("input_ids",)

    tokens: tuple[int, ...] = ()
    rank: int = 8
    alpha: float = 16.0

    @property
    def factor(self) -> float:
        """The scale :math:`s`."""
        return self.alpha / self.rank

    def check(self, site: Site) -> None:
        if not self.tokens:
            raise InputError("alora.tokens is empty; give the token ids of the invocation")
        if site.layer is None or site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: alora acts on linear layers that are called with their input; leave it out of where=")
        check_rank(self, site)

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        a = torch.empty(self.rank, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        return {"A": a, "B": a.new_zeros(d_out, self.rank)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        inner = F.linear(x.to(h.dtype), p["A"]) * (self.factor * self._active(p["call.input_ids"], h))[..., None]  # masked while it is narrow
        return torch.addmm(h.reshape(-1, h.shape[-1]), inner.reshape(-1, self.rank), p["B"].T).view(h.shape)

    def _active(self, ids: Tensor, h: Tensor) -> Tensor:
        """One where the update acts, in the shape of ``h`` without its features."""
        n, m = ids.shape[1], len(self.tokens)
        hits = torch.ones_like(ids[:, : max(n - m + 1, 0)], dtype=torch.bool)
        for i, token in enumerate(self.tokens):
            hits = hits & (ids[:, i : n - m + 1 + i] == token)
        places = torch.where(hits, torch.arange(hits.shape[1], device=ids.device), -1)
        start = F.pad(places, (1, 0), value=-1).amax(1, keepdim=True)
        active = (torch.arange(n, device=ids.device) >= start) & (start >= 0)
        if h.dim() == 3 and h.shape[1] <= n:
            return active[:, -h.shape[1] :].to(h)  # with a cache, h has the last positions alone
        if h.dim() == 2 and len(h) in (len(ids), ids.numel()):
            return (active.any(1) if len(h) == len(ids) else active.flatten()).to(h)
        raise InputError(f"alora: outputs of shape {tuple(h.shape)} do not follow the {tuple(ids.shape)} tokens; leave the site out of where=")
