"""Experts with a router for each task that become its modules (Chen et al.'s modular vision model, 2023, after Mod-Squad, CVPR 2023)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.checks import check_tasks
from exapt.core.contract import ActivationMethod, Tensors
from exapt.core.dispatch import dispatched, dispatches, select, spread
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class ModularExperts(ActivationMethod):
    r"""Experts beside a module, chosen for each token by the router of the row's task, under a loss that makes each task settle on few of them:

    .. math:: h' = h + \sum_{e \in \mathrm{top}_k} g_{t e}(x)\, U_e\, \mathrm{gelu}(D_e x + c_e), \quad g_t(x) = \mathrm{softmax}(R_t x),\qquad
        \mathcal{L} \mathrel{-}= \lambda\, I(T; E)

    The gates are those of the softmax over all experts, not made to sum to one again, as in Mod-Squad's code; the mutual information is that of the batch's
    tasks and the gates before the choice, so a batch should hold rows of several tasks. ``exapt.noted(model)`` shows ``load`` (n_tasks, experts), the
    share of a task's tokens that use each expert: by it :func:`exapt.algebra.hyper.modular.prune_experts` takes out what a task leaves unused, after
    :func:`~exapt.algebra.hyper.modular.of_task` has left the routers of the other tasks out; ``add_experts`` and ``only_new`` there serve tasks to come.

    A batch says which task each row belongs to, ``model(x, task_ids=ids)``; with one task nothing is asked for and the loss adds nothing.

    Args:
        n_tasks: Number of tasks.
        experts: Number of experts.
        top_k: How many act on a token.
        bottleneck: Width of an expert.
        information: The factor :math:`\lambda`.
        normalise: ``"after"`` makes the gates of those that act sum to one: pruning what is unused then changes nothing at all.

    Parameters per site:
        ``R`` (experts, n_tasks, d_in) and ``D`` (experts, bottleneck, d_in), Kaiming uniform; ``c`` (experts, bottleneck) and ``U`` (experts, d_out,
        bottleneck), zeros.

    References:
        Chen, Ding, Shen, Zhan, Tomizuka, Learned-Miller and Gan, "An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous
        Training", 2023. (Its code could not be read. This follows Mod-Squad's official code, but for the routers' start, which is zero there, and for
        what the experts are: there they are the network's own feed-forward layers and attention heads, trained with it.)
        Chen, Shen, Ding, Chen, Zhao, Learned-Miller and Gan, "Mod-Squad: Designing Mixtures of Experts As Modular Multi-Task Learners", CVPR 2023.

    >>> import exapt
    >>> model = exapt.attach(torch.nn.Linear(4, 3), ModularExperts(n_tasks=2, experts=3, top_k=2, bottleneck=2), where="all")
    >>> model(torch.zeros(2, 5, 4), task_ids=torch.tensor([0, 1])).shape, exapt.noted(model)[""]["load"].shape
    (torch.Size([2, 5, 3]), torch.Size([2, 3]))
    """

    key = "modular_experts"
    paper = "An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training"
    equation = r"h' = h + \sum_{e \in \mathrm{top}_k} g_{t e}(x)\, U_e\, \mathrm{gelu}(D_e x + c_e)"
    golden = "NumPy"
    where = ("mlp", "attention.output")
    full_precision = True
    notes: ClassVar[bool] = True

    n_tasks: int = 1
    experts: int = 16
    top_k: int = 4
    bottleneck: int = 16
    information: float = 0.005
    normalise: Literal["before", "after"] = "before"

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The rows' tasks, if there are several."""
        return ("task_ids",) if self.n_tasks > 1 else ()

    def check(self, site: Site) -> None:
        if min(self.n_tasks, self.bottleneck) < 1 or not 1 <= self.top_k <= self.experts or self.information < 0:
            raise InputError(
                f"modular_experts: n_tasks={self.n_tasks}, bottleneck={self.bottleneck}, top_k={self.top_k} of {self.experts} experts, "
                f"information={self.information}; numbers are at least 1, top_k at most the experts, information not negative"
            )
        if site.axis != -1 or (site.layer is not None and site.layer.kind not in ("linear", "conv1d_hf")):
            raise InputError(f"{site.name or '(model)'}: modular_experts needs features last, in input and output; choose mlp or linear sites")

    def init(self, site: Site) -> Tensors:
        d_in = site.layer.shape[1] if site.layer is not None else site.features
        e, b, limit = self.experts, self.bottleneck, d_in**-0.5
        router = torch.empty(e, self.n_tasks, d_in, device=site.device).uniform_(-limit, limit)
        down = router.new_empty(e, b, d_in).uniform_(-limit, limit)
        return {"R": router, "D": down, "c": down.new_zeros(e, b), "U": down.new_zeros(e, site.features, b)}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        logits = torch.einsum("...d,etd->...te", x.to(p["R"].dtype), p["R"])
        ids = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if self.n_tasks > 1:
            ids = check_tasks(self, p["call.task_ids"], len(x), self.n_tasks)
        tasks = ids.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
        logits = logits.take_along_dim(tasks[..., None, None], -2).squeeze(-2)
        gates = select(logits, self.top_k, 1.0, self.normalise)
        self._note(cast(Tensors, p["notes"]), logits.flatten(0, -2).softmax(-1), gates.flatten(0, -2), tasks.flatten())
        x, (down, shift, up) = x.to(h.dtype), (p[k].to(h.dtype) for k in ("D", "c", "U"))
        if self.top_k < self.experts and dispatches(gates):
            parts = [t.unbind() for t in (down, shift, up)]
            return h + dispatched(gates, (x,), lambda e, own: F.linear(F.gelu(F.linear(own, parts[0][e], parts[1][e])), parts[2][e]))
        inner = F.gelu(F.linear(x, down.flatten(0, 1), shift.flatten())).view(*x.shape[:-1], self.experts, -1) * spread(gates, x)
        return h + F.linear(inner.flatten(-2), up.transpose(0, 1).flatten(1))

    def _note(self, notes: Tensors, probabilities: Tensor, gates: Tensor, tasks: Tensor) -> None:
        member = F.one_hot(tasks, self.n_tasks).to(gates.dtype)
        notes["load"] = (member.T @ (gates > 0).to(gates.dtype) / member.sum(0).clamp(min=1)[:, None]).detach()
        notes["joint"] = member.T @ probabilities / len(tasks)

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes = cast(Tensors, p.get("notes", {}))
        return -self.information * mutual_information(notes["joint"]) if self.information and "joint" in notes and self.n_tasks > 1 else None


def mutual_information(joint: Tensor) -> Tensor:
    r"""Mutual information of a joint distribution (tasks, experts): :math:`I = \sum_{t, e} p(t, e) \log \frac{p(t, e)}{p(t)\, p(e)}`.

    >>> float(mutual_information(torch.eye(2) / 2).exp().round(decimals=4))
    2.0
    """
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.special.xlogy(joint, joint).sum() - torch.special.xlogy(joint, apart).sum()
