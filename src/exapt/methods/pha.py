"""PHA: Prototype-based HyperAdapter (Zhao et al., EMNLP 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.checks import check_tasks
from exapt.core.contract import ActivationMethod, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class PHA(ActivationMethod):
    r"""Adapters beside the feed-forward networks, emitted from a learned prototype of the row's task and an embedding of the layer, while an
    instance-dense retriever draws instances to their task's prototype:

    .. math:: h' = h + U\, \mathrm{relu}(D x + b_D) + b_U, \quad (D, b_D, U, b_U) = H\, \mathrm{LN}\big(L_2\, \mathrm{relu}(L_1 [k_t; l])\big)

    The retriever embeds a row as :math:`z = R_2\, \mathrm{relu}(R_1 \bar x)`, :math:`\bar x` the mean over its tokens (those of ``attention_mask``, where
    the call has one) of what comes out of the site ``retriever``, where no adapter acts: an encoder's last norm, with adapters in the decoder, is the
    paper's. Without one it is what goes into the first site, which no task's adapter has touched. With cosines :math:`f` over the temperature, the loss gets
    :math:`\lambda (L_{ins} + L_{pro})`:

    .. math:: L_{ins} = -\operatorname*{mean}_{i,\, j \in P_i} \log \frac{e^{f(z_i, z_j)}}{\sum_{n \ne i} e^{f(z_i, z_n)}}, \quad
        L_{pro} = -\operatorname*{mean}_i \log \frac{e^{f(z_i, k_{t_i})}}{\sum_{s \ne t_i} e^{f(z_i, k_s)}}

    :math:`P_i` the other rows of its task. This follows the official code, whose sites are in T5's decoder and whose retriever sees the encoder's output
    (``PHA(retriever="encoder.final_layer_norm")``, that site among those of ``where``). For a new task, :func:`nearest_prototype` says of its instances,
    ``exapt.noted(model)[retriever's site]["instances"]``, from which task to start.

    A batch says which task each row belongs to: ``model(x, task_ids=ids)``. With one task nothing is asked for and there is no retriever.

    Args:
        n_tasks: Number of tasks.
        bottleneck: Width of an adapter.
        size: Size of prototypes, layer embeddings and instances.
        hidden: Width of hypernetwork and retriever.
        weight: The factor :math:`\lambda`.
        temperature: Of the cosines.
        gain: Size of the start of what emits the up-projection, in the units of the hyperfan-in start; the official code's is 0.001, as the
            down-projection's here. The default of 0 starts exactly at the base model.
        retriever: Pattern of the one chosen site whose output the retriever sees; empty: it sees the first site's input.

    Parameters per site:
        ``place`` (1,), which layer, not trained; at the retriever's site, with several tasks, ``R_1`` (hidden, d), ``R_2`` (size, hidden) and biases.

    Parameters shared by all sites:
        ``k`` (n_tasks, size), prototypes, and ``l`` (layers, size), standard normal; ``L_1`` (hidden, 2 size), ``L_2`` (size, hidden), ``c_1``, ``c_2``,
        as PyTorch starts linear layers; ``n``, ``m`` (size,), the norm's; ``D`` (bottleneck d, size), ``b_D`` (bottleneck, size), ``U``, ``b_U``
        alike, uniform, hyperfan-in, and their constants ``c_D`` ... ``c_b_U``, zeros.

    References:
        Zhao, Fu and He, "Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning", EMNLP 2023.

    >>> import exapt
    >>> model = exapt.attach(nn.Sequential(nn.Linear(4, 4)), PHA(n_tasks=2, bottleneck=2), where="0")
    >>> model(torch.zeros(2, 3, 4), task_ids=torch.tensor([0, 1])).shape
    torch.Size([2, 3, 4])
    """

    key = "pha"
    paper = "Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning"
    equation = r"h' = h + U_e\, \mathrm{relu}(D_e x),\; e = L(k_t, l)"
    golden = "NumPy"
    where = "mlp"
    notes: ClassVar = True

    n_tasks: int = 1
    bottleneck: int = 64
    size: int = 64
    hidden: int = 128
    weight: float = 0.1
    temperature: float = 0.1
    gain: float = 0.0
    retriever: str = ""

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The rows' tasks, if there are several, and which tokens are none."""
        return ("task_ids", "attention_mask") if self.n_tasks > 1 else ()

    def check(self, site: Site) -> None:
        for field in ("n_tasks", "bottleneck", "size", "hidden", "temperature"):
            if getattr(self, field) < (1 if field != "temperature" else 1e-6):
                raise InputError(f"pha.{field} is {getattr(self, field)}; it is too small")
        if self._retrieves(site) and site.axis == -1:
            return
        if site.axis != -1 or (site.layer is not None and site.layer.shape[0] != site.layer.shape[1]):
            raise InputError(f"{site.name or '(model)'}: pha needs features last, as many in the output as in the input; choose mlp sites")

    def _retrieves(self, site: Site) -> bool:
        return bool(self.retriever) and fnmatchcase(site.name, self.retriever)

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        seen, adapted = [s for s in sites if self._retrieves(s)], [s for s in sites if not self._retrieves(s)]
        if self.retriever and (len(seen) != 1 or self.n_tasks < 2 or not adapted):
            raise InputError(
                f"pha: retriever={self.retriever!r} names {len(seen)} of {len(sites)} sites and there are {self.n_tasks} tasks; it names one of the "
                "chosen sites, others are adapted, and one task has nothing to retrieve"
            )
        return {s.name: {"place": torch.tensor([i])} for i, s in enumerate((*adapted, *seen))}

    def shared(self, sites: Sequence[Site]) -> Tensors:
        sites = [s for s in sites if not self._retrieves(s)]
        widths = {s.features for s in sites}
        if len(widths) > 1:
            raise InputError(f"pha: one hypernetwork emits adapters of one width, not {sorted(widths)}; choose sites of one width")
        d, b, e, device = widths.pop(), self.bottleneck, self.size, sites[0].device
        first, second = nn.Linear(2 * e, self.hidden, device=device), nn.Linear(self.hidden, e, device=device)
        p = {"k": torch.randn(self.n_tasks, e, device=device), "l": torch.randn(len(sites), e, device=device)}
        p |= {"L_1": first.weight, "c_1": first.bias, "L_2": second.weight, "c_2": second.bias}
        p |= {"n": torch.ones(e, device=device), "m": torch.zeros(e, device=device)}
        for name, n, fan, gain in (("D", b * d, d, 1e-3), ("b_D", b, 1, 1e-3), ("U", d * b, b, self.gain), ("b_U", d, 1, self.gain)):
            p[name] = torch.empty(n, e, device=device).uniform_(-1, 1) * gain * (3 / (e * fan)) ** 0.5
            p[f"c_{name}"] = torch.zeros(n, device=device)
        return p

    def init(self, site: Site) -> Tensors:
        p: Tensors = {"place": frozen(site.statistics["place"].clone())}
        if self.n_tasks > 1 and (self._retrieves(site) if self.retriever else not int(site.statistics["place"])):
            first, second = nn.Linear(site.features, self.hidden, device=site.device), nn.Linear(self.hidden, self.size, device=site.device)
            p |= {"R_1": first.weight, "r_1": first.bias, "R_2": second.weight, "r_2": second.bias}
        return p

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        if self.retriever and "R_1" in p:
            self._note(p, h)
            return h
        x, d = x.to(h.dtype), h.shape[-1]
        joined = torch.cat([p["k"], p["l"].index_select(0, p["place"]).expand(self.n_tasks, -1)], -1)
        e = F.linear(F.linear(joined, p["L_1"], p["c_1"]).relu(), p["L_2"], p["c_2"])
        e = F.layer_norm(e, e.shape[-1:], p["n"], p["m"], 1e-6)
        down, b_down, up, b_up = (F.linear(e, p[k], p[f"c_{k}"]) for k in ("D", "b_D", "U", "b_U"))
        down, up = down.unflatten(-1, (-1, d)), up.unflatten(-1, (d, -1))
        if self.n_tasks == 1:
            return h + F.linear(F.linear(x, down[0], b_down[0]).relu(), up[0], b_up[0])
        ids = self._tasks(p, len(h))
        inner = torch.baddbmm(b_down[ids][:, None], x.reshape(len(h), -1, d), down[ids].mT).relu()
        y = h + torch.baddbmm(b_up[ids][:, None], inner, up[ids].mT).view(h.shape)
        if "R_1" in p:
            self._note(p, x)
        return y

    def _note(self, p: Tensors, seen: Tensor) -> None:
        mean = pooled(seen.reshape(len(seen), -1, seen.shape[-1]), p.get("call.attention_mask"))
        instances = F.linear(F.linear(mean, p["R_1"], p["r_1"]).relu(), p["R_2"], p["r_2"])
        cast(Tensors, p["notes"]).update({"instances": instances, "tasks": self._tasks(p, len(seen))})

    def _tasks(self, p: Tensors, rows: int) -> Tensor:
        ids = p["call.task_ids"]
        return check_tasks(self, ids, rows, self.n_tasks)

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        notes = cast(Tensors, p["notes"])
        if "instances" not in notes or not self.weight:
            return None
        z, k, ids = F.normalize(notes["instances"].float(), dim=-1), F.normalize(p["k"].float(), dim=-1), notes["tasks"]
        return self.weight * (instance_loss(z, ids, self.temperature) + prototype_loss(z, k, ids, self.temperature))


def pooled(h: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens (rows, n, d) that ``mask`` (rows, n) shows."""
    if mask is None or mask.shape != h.shape[:2]:
        return h.mean(1)
    seen = mask.to(h.dtype)[..., None]
    return (h * seen).sum(1) / seen.sum(1)


def instance_loss(z: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Contrast of rows (n, e) of length one with the other rows, those of their task (n,) being positive; rows without a positive are left out."""
    alone = torch.eye(len(z), dtype=torch.bool, device=z.device)
    f = (z @ z.T / temperature).masked_fill(alone, -torch.inf)
    positive = (ids[:, None] == ids) & ~alone
    log_share = (f - f.logsumexp(-1, keepdim=True)).masked_fill(~positive, 0.0)
    count = positive.sum(-1)
    return -(log_share.sum(-1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def prototype_loss(z: Tensor, k: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Contrast of rows (n, e) with the prototypes (tasks, e), both of length one; their own is not in the denominator, as in the official code."""
    f = z @ k.T / temperature
    own = F.one_hot(ids, len(k)).bool()
    return (f.masked_fill(own, -torch.inf).logsumexp(-1) - f[own]).mean()


def nearest_prototype(instances: Tensor, prototypes: Tensor) -> int:
    """The task whose prototype a new task starts from: that of the largest mean cosine with its instances.

    Args:
        instances: (n, size), as ``exapt.noted`` shows them.
        prototypes: (n_tasks, size), the method's tensor ``k``.

    >>> nearest_prototype(torch.tensor([[1.0, 0.1]]), torch.eye(2))
    0
    """
    return int((F.normalize(instances, dim=-1) @ F.normalize(prototypes, dim=-1).T).mean(0).argmax())
