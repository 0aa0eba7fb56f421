"""MLDG: Learning to Generalize (Li et al., AAAI 2018)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.objective import Objective, Step, task_loss


@component("mldg", kind="objective", paper="Learning to Generalize: Meta-Learning for Domain Generalization", oracle="finite differences")
@dataclass(frozen=True)
class MLDG(Objective):
    r"""A step on some domains should also help on the others: :math:`F(\theta) + \beta\, G(\theta - \alpha \nabla F(\theta))`.

    At each step the domains of the batch are divided at random; :math:`F` is the risk on the meta-train domains, :math:`G` on the
    meta-test domains. The gradient is exact, :math:`\nabla F + \beta (I - \alpha \nabla^2 F) \nabla G(\theta')`, with one product of the
    Hessian and a vector; ``first_order`` leaves the Hessian out.

    Args:
        alpha: Size :math:`\alpha` of the inner step.
        beta: Weight :math:`\beta` of the meta-test risk.
        test_domains: How many domains are held out at each step; at least one stays.
        first_order: Leave the Hessian out, as DomainBed does (whose inner step is one of Adam).

    References:
        Li, Yang, Song and Hospedales, "Learning to Generalize: Meta-Learning for Domain Generalization", AAAI 2018.

    >>> MLDG(first_order=True).beta
    1.0
    """

    equation = r"F(\theta) + \beta\, G(\theta - \alpha \nabla F(\theta))"
    setting = "generalisation"

    alpha: float = 0.01
    beta: float = 1.0
    test_domains: int = 1
    first_order: bool = False

    def update(self, s: Step) -> Tensor:
        domains = s.s.domains.unique()
        order = domains[torch.randperm(len(domains), generator=s.generator).to(domains.device)]
        test = torch.isin(s.s.domains, order[: min(self.test_domains, len(order) - 1)]).float()
        tensors = list(s.parameters.values())
        if self.first_order:
            train = task_loss(s.s, 1 - test)
        else:
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
                train = task_loss(s.run(s.s.batch), 1 - test)
        if not test.any():
            s.backward(train)
            return train.detach()
        inner = _gradients(train, tensors, create_graph=not self.first_order)
        here = [t.data for t in tensors]
        for t, g in zip(tensors, inner, strict=True):
            t.data = t.data - self.alpha * g.detach()
        try:
            held_out = task_loss(s.run(s.s.batch), test)
            outer = _gradients(held_out, tensors)
        finally:
            for t, value in zip(tensors, here, strict=True):
                t.data = value
        total = [g.detach() + self.beta * o for g, o in zip(inner, outer, strict=True)]
        if not self.first_order:
            moved = torch.stack([(g * o).sum() for g, o in zip(inner, outer, strict=True)]).sum()
            total = [t - self.alpha * self.beta * h for t, h in zip(total, _gradients(moved, tensors), strict=True)]
        if s.noting:
            s.run(s.s.batch)  # the pass that penalties read: the one before was at the moved parameters, and its graph is gone
        s.backward(torch.stack([(t * g).sum() for t, g in zip(tensors, total, strict=True)]).sum())  # whose gradients these are
        return (train + self.beta * held_out).detach()


def _gradients(loss: Tensor, tensors: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Gradients, zero where a tensor takes no part."""
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in tensors]
    try:
        found = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True)
    except NotImplementedError as e:
        raise InputError(f"MLDG: an operation of this model or method has no second derivative ({e}); use MLDG(first_order=True)") from e
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]
