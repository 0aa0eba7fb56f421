"""ViDA (Liu et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.registry import method as method_of
from exapt.online.method import Batch, Host, Space, TestTime
from exapt.online.teacher import average, restore, taught


def _wide(rank: int) -> Callable[[Any], bool]:
    skipped = ("norm", "embedding", "head")
    return lambda site: site.layer is not None and site.role.partition(".")[0] not in skipped and len(site.shape) == 2 and min(site.shape) >= rank


@component("vida", kind="test-time", paper="ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation", oracle="torch by hand")
@dataclass(frozen=True)
class ViDA(TestTime):
    r"""Trains a low-rank and a high-rank adapter beside every layer, weighed against each other by how unsure the teacher is.

    .. math:: h = W x + \lambda_h U_h D_h x + \lambda_l U_l D_l x, \quad (\lambda_h, \lambda_l) = (1 \pm u, 1 \mp u)

    with the upper signs where the uncertainty :math:`u \ge \Theta`: the variance of the teacher's logits over views of the batch, averaged
    over rows and classes, times 0.1. The student learns the averaged teacher's prediction and single weights are restored, as in CoTTA. The
    answer is the teacher's before its update. Both adapters are one LoRA of rank ``low + high``, whose columns of ``B`` they share out; in
    another space, tensors that start at zero are weighed in the same way (columns beyond ``low``, and tensors of one dimension, as high).

    As in the official code :math:`u` is one number a batch, from views in place of dropout. That code also trains all weights of the base;
    here the adapters alone. The paper has ranks 1 and 128 in ViT-B; layers narrower than the ranks' sum are left out.

    Args:
        lr: Learning rate of Adam.
        low, high: The two ranks.
        momentum: Of the teacher.
        restored: Probability of restoring a weight.
        threshold: :math:`\Theta`.
        views: Views to measure the uncertainty with.

    References:
        Liu, Yang, Jia, Zhang, Guo, Xue and Zhang, "ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation", ICLR 2024.
    """

    equation = r"h = W x + \lambda_h U_h D_h x + \lambda_l U_l D_l x"
    needs = ("space",)

    lr: float = 1e-4
    low: int = 1
    high: int = 4
    momentum: float = 0.999
    restored: float = 0.1
    threshold: float = 0.2
    views: int = 10

    def space(self) -> Space:
        rank = self.low + self.high
        return {_wide(rank): method_of("lora", rank=rank, alpha=float(rank))}

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr)

    def start(self, host: Host) -> None:
        host.keep("teacher", host.parameters)

    def scales(self, host: Host, unsure: float) -> dict[str, Tensor]:
        """What every tensor of the space is multiplied by."""
        up = unsure if unsure >= self.threshold else -unsure
        found = {}
        for k, t in host.source.items():
            found[k] = torch.ones_like(t)
            if not bool(t.any()):
                found[k] = found[k] * (1 + up)
                if t.dim() == 2:
                    found[k][:, : self.low] = 1 - up
        return found

    def step(self, host: Host, batch: Batch) -> Tensor:
        teacher = host.kept("teacher")
        with host.values(teacher):
            seen = [host.run(batch.replaced(host.augment(batch.inputs, host.generator))).logits for _ in range(self.views)]
        unsure = 0.1 * float(torch.stack(seen).var(0).mean()) if self.views > 1 else 0.0
        by = self.scales(host, unsure)
        with host.values({k: by[k] * t for k, t in teacher.items()}):
            answer = host.run(batch)
        with host.values({k: by[k] * p.detach() for k, p in host.parameters.items()}):
            loss = taught(host.run(batch, grad=True).logits, answer.logits).mean()
            if loss.requires_grad:
                host.gradients(loss)
        host.notes |= {"pass": answer, "used": len(batch), "uncertainty": unsure}
        slopes = {k: p.grad for k, p in host.parameters.items() if p.grad is not None}
        if host.optimizer is None or not loss.requires_grad or not all(bool(torch.isfinite(g).all()) for g in slopes.values()):
            host.notes["used"] = 0
            return answer.logits
        for k, g in slopes.items():
            g.mul_(by[k])  # the chain rule through the scales
        host.optimizer.step()
        average(host, "teacher", self.momentum)
        restore(host, self.restored)
        return answer.logits
