"""The value that a key must get so that the model gives a wanted answer: a small optimisation of one hidden vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.algebra.edit.host import Editing
from exapt.algebra.edit.reading import at, called, groups, hooked, stacked
from exapt.algebra.edit.request import Edit
from exapt.core.errors import InputError
from exapt.core.sites import Site


@dataclass(frozen=True)
class Value:
    r"""Finds :math:`\delta` so that the layer's output :math:`m + \delta` at the subject gives the answer.

    .. math:: \min_\delta \frac1N \sum_j -\log p(y \mid x_j, m + \delta) + \lambda_{KL}\, KL(p_0 \| p_\delta) + \lambda_w \frac{\|\delta\|}{\|m\|^2},
              \quad \|\delta\| \le c \|m\|

    by Adam, over the contexts :math:`x_j`; it stops where the loss is small enough. The divergence is of the next token after the subject, where the
    prompt goes on behind it: a causal model sees no more of the prompt "SUBJECT is a", which the papers add, than those tokens.

    Args:
        steps: Steps at most.
        rate: Adam's learning rate.
        divergence: :math:`\lambda_{KL}`.
        decay: :math:`\lambda_w`.
        clamp: Largest norm :math:`c`, in norms of :math:`m`.
        enough: Loss below which it stops, 0.05 in the official code; a larger one leaves more of the rest as it was.
    """

    steps: int = 20
    rate: float = 0.5
    divergence: float = 0.0625
    decay: float = 0.5
    clamp: float = 4.0
    enough: float = 0.05

    def find(self, editing: Editing, site: Site, edit: Edit, norm: float | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``m`` at the edit's own prompt and ``delta``, both (d_out,) and detached; ``norm`` stands for that of ``m`` in bound and decay."""
        placed = editing.placed(edit)
        rows = [torch.cat([row, edit.target[:-1].to(row)]) if isinstance(edit.target, Tensor) else row for row, _ in placed]
        delta = torch.zeros(site.shape[0], device=site.device, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.rate)
        start: list[Tensor] = []
        before: dict[int, Tensor] = {}
        with torch.enable_grad():
            for step in range(self.steps):
                loss = self._loss(editing, site, edit, placed, rows, delta, start, before)
                size = start[0].norm() if norm is None else start[0].new_tensor(norm)
                loss = loss + self.decay * delta.norm() / size.square().clamp_min(1e-12) if step else loss
                if not bool(torch.isfinite(loss)):
                    raise InputError(f"{site.name}: the value of an edit came out as NaN or infinity; lower the rate ({self.rate})")
                if float(loss.detach()) < self.enough or step == self.steps - 1:
                    break
                (delta.grad,) = torch.autograd.grad(loss, delta)
                adam.step()
                with torch.no_grad():
                    delta.mul_((self.clamp * size / delta.norm().clamp_min(1e-12)).clamp_max(1))
        return start[0], delta.detach()

    def _loss(
        self, editing: Editing, site: Site, edit: Edit, placed: Sequence[tuple[Tensor, int]], rows: Sequence[Tensor], delta: Tensor,
        start: list[Tensor], before: dict[int, Tensor],
    ) -> Tensor:  # fmt: skip
        total, apart = [], []
        for group in groups(rows):

            def see(_: Site, x: Tensor, h: Tensor, group: Sequence[int] = group) -> Tensor:
                if not start:
                    start.append(at(h[0], placed[0][1]).detach().float())  # the prompt alone is the first row of all
                if h.dim() == 2:
                    return h + delta.to(h.dtype)
                marks = torch.zeros(h.shape[:2], dtype=h.dtype, device=h.device)
                marks[torch.arange(len(group)), torch.tensor([placed[i][1] for i in group])] = 1
                return h + marks[..., None] * delta.to(h.dtype)

            with hooked([site], see):
                logits = called(editing.model, stacked([rows[i] for i in group], editing.model)).float()
            for i, own in zip(group, logits, strict=True):
                if not isinstance(edit.target, Tensor):
                    total.append(F.cross_entropy(own[None], edit.answer.to(own.device)))
                    continue
                last, place = len(placed[i][0]) - 1, placed[i][1]
                total.append(F.cross_entropy(own[last:], edit.target.to(own.device)))
                if place < last and self.divergence:
                    now = own[place].log_softmax(-1)
                    apart.append(F.kl_div(now, before.setdefault(i, now.detach()), log_target=True, reduction="sum"))
        loss = torch.stack(total).mean()
        return loss + self.divergence * torch.stack(apart).mean() if apart else loss
