"""Upcycling with enforced routing: one copy of every feed-forward network for each known domain (Hallee, Kapur, Patel, Gleghorn and Khomtchouk, 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_tasks
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class Upcycled(WeightMethod):
    r"""Makes a matrix one expert for each domain, all starting as copies of it: :math:`W'_n = W + \Delta_n`, :math:`b'_n = b + \delta_n`.

    A row's domain is known and picks its expert (enforced routing): ``model(x, task_ids=ids)``, ids (rows,). With one domain nothing is asked for.
    By default in the feed-forward networks, all other weights being shared; where those train too, as in the paper, add
    ``FullTuning()`` for them. The paper marks a domain by a token of its own in each text as well, which is the tokenizer's part, and fine-tunes by a
    contrastive loss with co-cited texts as pairs (the objectives for retrieval).

    Args:
        experts: Number of domains.

    Parameters per site:
        ``D`` (experts, d_out, d_in), and ``d`` (experts, d_out) where the layer has a bias, zeros.

    References:
        Hallee, Kapur, Patel, Gleghorn and Khomtchouk, "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings", 2024.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), Upcycled(experts=2), where="all")
    >>> model(torch.zeros(2, 4), task_ids=torch.tensor([0, 1])).shape
    torch.Size([2, 3])
    """

    key = "upcycled"
    paper = "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings"
    equation = r"W'_n = W + \Delta_n"
    golden = "NumPy"
    where = ("mlp.up", "mlp.gate", "mlp.down")

    experts: int = 1

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The rows' domains, if there are several."""
        return ("task_ids",) if self.experts > 1 else ()

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """With one domain."""
        return self.experts == 1

    def needs_forward(self) -> bool:
        return self.experts > 1

    def check(self, site: Site) -> None:
        if self.experts < 1:
            raise InputError(f"upcycled.experts is {self.experts}; it must be at least 1")
        if self.experts > 1 and site.layer and site.layer.kind not in ("linear", "conv1d_hf"):
            raise InputError(f"{site.name or '(model)'}: upcycled routes rows in linear layers only; leave it out of where=, or use experts=1")

    def init(self, site: Site) -> Tensors:
        zeros = torch.zeros(self.experts, *site.shape, device=site.device)
        return {"D": zeros} if site.bias is None else {"D": zeros, "d": zeros[..., 0].clone()}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return w + p["D"][0].to(w.dtype)

    def bias(self, p: Tensors, b: Tensor) -> Tensor:
        return b + p["d"][0].to(b.dtype) if "d" in p else b

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        if self.experts == 1:
            y = y + base.apply(p["D"][0].to(y.dtype), x)
            return y if "d" not in p else y + base.scale(p["d"][0].to(y.dtype), torch.ones_like(y))
        ids = self._domains(p["call.task_ids"], x)
        own = torch.bmm(x.to(y.dtype).reshape(len(x), -1, x.shape[-1]), p["D"][ids].mT)
        own = own + p["d"][ids][:, None] if "d" in p else own
        return y + own.view(y.shape)

    def _domains(self, ids: Tensor, x: Tensor) -> Tensor:
        return check_tasks(self, ids, len(x), self.experts, "experts")
