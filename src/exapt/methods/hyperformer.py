"""HyperFormer: adapters emitted by shared hypernetworks (Karimi Mahabadi et al., ACL 2021)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.checks import check_tasks
from exapt.core.contract import ActivationMethod, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class HyperFormer(ActivationMethod):
    r"""Lets a small shared network emit every adapter and its layer norm from embeddings of task, layer and position:

    .. math:: h' = h + \gamma \odot \mathrm{LN}\big(U f(D h + b_D) + b_U\big) + \beta, \quad
        (D, b_D, U, b_U, \gamma, \beta) = H\, e + c, \quad e = \mathrm{LN}\big(I_2\, \mathrm{relu}(I_1 [z_t; l; s])\big)

    A batch says which task each row belongs to: ``model(x, task_ids=ids)``, ids (rows,). With one task nothing is asked for. The
    authors train the model's norms too: ``{"norm": FullTuning(), ("attention.output", "mlp.down"): HyperFormer(n_tasks=8)}``.

    Layers are numbered by the first number in the sites' names, positions by what follows it (attention, feed-forward).

    Args:
        n_tasks: Number of tasks.
        reduction: The bottleneck is the features divided by this; the official code's 32.
        share: What emits: ``"all"``, one hypernetwork for all layers and positions (HyperFormer++); ``"position"``, one for each
            position, given task and layer (the official configuration of HyperFormer); ``"none"``, one for each site, given the
            task alone and without the norm of :math:`e` (the paper's text on HyperFormer).
        embedding: Size of the embeddings of task, layer and position.
        hidden: Width of the network that joins them.
        projected: Size of :math:`e`.
        activation: Nonlinearity :math:`f`; the official runs have ``"gelu_new"``, GELU with tanh.
        std: Standard deviation of the start of what emits :math:`\gamma`; the official code's is 0.01. The default of 0 starts
            exactly at the base model.

    Parameters per site:
        ``place`` (2,), layer and position, not trained; with ``share="none"`` the generators too.

    Parameters shared by all sites (G hypernetworks, bottleneck m):
        ``z`` (n_tasks, embedding), ``l`` (layers, embedding), ``s`` (positions, embedding), standard normal; ``I_1``, ``I_2`` and their
        biases, the norm's ``n_e`` and ``m_e``; the generators :math:`H`: ``D`` (G, m d, projected), ``b_D`` (G, m, projected), ``U``, ``b_U``,
        ``gamma``, ``beta`` (G, d, projected), normal with deviation 0.01, and their constants ``c_D`` ... ``c_beta``, zeros.

    References:
        Karimi Mahabadi, Ruder, Dehghani and Henderson, "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared
        Hypernetworks", ACL 2021.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), HyperFormer(n_tasks=2, reduction=4), where="all")
    >>> model(torch.zeros(2, 4), task_ids=torch.tensor([0, 1])).shape
    torch.Size([2, 8])
    """

    key = "hyperformer"
    paper = "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks"
    equation = r"h' = h + \gamma_e \odot \mathrm{LN}(U_e f(D_e h)) + \beta_e,\; e = I(z_t, l, s)"
    golden = "NumPy"
    where = ("attention.output", "mlp.down")

    n_tasks: int = 1
    reduction: int = 32
    share: Literal["all", "position", "none"] = "all"
    embedding: int = 64
    hidden: int = 128
    projected: int = 64
    activation: Literal["gelu_new", "gelu", "relu", "silu", "tanh"] = "gelu_new"
    std: float = 0.0

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The rows' tasks, if there are several."""
        return ("task_ids",) if self.n_tasks > 1 else ()

    def check(self, site: Site) -> None:
        where = site.name or "(model)"
        for field in ("n_tasks", "embedding", "hidden", "projected"):
            if getattr(self, field) < 1:
                raise InputError(f"hyperformer.{field} is {getattr(self, field)}; it must be at least 1")
        if not 1 <= self.reduction <= site.features:
            raise InputError(f"{where}: hyperformer.reduction is {self.reduction}; its {site.features} features allow 1 to {site.features}")

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        return {s.name: {"place": torch.tensor(place)} for s, place in zip(sites, places([s.name for s in sites]), strict=True)}

    def shared(self, sites: Sequence[Site]) -> Tensors:
        widths = {s.features for s in sites}
        if len(widths) > 1:
            raise InputError(f"hyperformer: one hypernetwork emits adapters of one width, not {sorted(widths)}; choose sites of one width")
        t, device = self.embedding, sites[0].device
        layers, positions = (max(n) + 1 for n in zip(*places([s.name for s in sites]), strict=True))
        inputs = {"z": self.n_tasks, "l": layers, "s": positions}
        if self.share != "all":
            del inputs["s"]
        if self.share == "none":
            del inputs["l"]
        p = {k: torch.randn(n, t, device=device) for k, n in inputs.items()}
        p |= {"I_1": 0.01 * torch.randn(self.hidden, len(inputs) * t, device=device), "c_1": torch.zeros(self.hidden, device=device)}
        p |= {"I_2": 0.01 * torch.randn(self.projected, self.hidden, device=device), "c_2": torch.zeros(self.projected, device=device)}
        if self.share == "none":
            return p
        p |= {"n_e": torch.ones(self.projected, device=device), "m_e": torch.zeros(self.projected, device=device)}
        return p | self._generators(1 if self.share == "all" else positions, widths.pop(), device)

    def _generators(self, groups: int, d: int, device: torch.device) -> Tensors:
        m = d // self.reduction
        sizes = {"D": m * d, "b_D": m, "U": d * m, "b_U": d, "gamma": d, "beta": d}
        deviations = {k: self.std if k in ("gamma", "beta") else 0.01 for k in sizes}
        made = {k: deviations[k] * torch.randn(groups, n, self.projected, device=device) for k, n in sizes.items()}
        return made | {f"c_{k}": torch.zeros(groups, n, device=device) for k, n in sizes.items()}

    def init(self, site: Site) -> Tensors:
        own = self._generators(1, site.features, site.device) if self.share == "none" else {}
        return {**own, "place": frozen(site.statistics["place"].clone())}

    def emitted(self, p: Tensors) -> Tensors:
        """The adapter of every task: ``D`` (n_tasks, m d), ``b_D`` (n_tasks, m) and so on."""
        e = p["z"]
        for i, name in enumerate(k for k in ("l", "s") if k in p):
            e = torch.cat([e, p[name].index_select(0, p["place"][i : i + 1]).expand(self.n_tasks, -1)], -1)
        e = F.linear(F.linear(e, p["I_1"], p["c_1"]).relu(), p["I_2"], p["c_2"])
        if "n_e" in p:
            e = F.layer_norm(e, e.shape[-1:], p["n_e"], p["m_e"], 1e-6)
        group = p["place"][1:] if self.share == "position" else torch.zeros_like(p["place"][1:])
        pick = {k: p[k].index_select(0, group)[0] for k in p if k.removeprefix("c_") in ("D", "b_D", "U", "b_U", "gamma", "beta")}
        return {k: F.linear(e, t, pick[f"c_{k}"]) for k, t in pick.items() if not k.startswith("c_")}

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        w = self.emitted(p)
        if self.n_tasks > 1:
            ids = check_tasks(self, p["call.task_ids"], len(h), self.n_tasks)
            w = {k: t[ids] for k, t in w.items()}
        d = h.shape[-1]
        inner = affine(h.reshape(len(h), -1, d), w["D"].unflatten(-1, (-1, d)), w["b_D"])
        inner = F.gelu(inner, approximate="tanh") if self.activation == "gelu_new" else getattr(F, self.activation)(inner)
        out = affine(inner, w["U"].unflatten(-1, (d, -1)), w["b_U"])
        return h + torch.addcmul(w["beta"][:, None], w["gamma"][:, None], F.layer_norm(out, (d,))).view(h.shape)


def places(names: Sequence[str]) -> list[tuple[int, int]]:
    """Layer and position of each site: the first number of its name, and what follows it, both counted in order.

    >>> places(["layer.0.attention.output", "layer.0.output", "layer.1.attention.output"])
    [(0, 0), (0, 1), (1, 0)]
    """
    cut = [re.match(r"((?:.*?\.)?\d+)(?:\.|$)(.*)", n) for n in names]
    split = [(m[1], m[2]) if m else (n, "") for m, n in zip(cut, names, strict=True)]
    orders = [list(dict.fromkeys(part)) for part in zip(*split, strict=True)]
    return [(orders[0].index(layer), orders[1].index(position)) for layer, position in split]


def affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """A linear layer of its own for each row, or one for all: x (rows, n, d_in), w (rows or 1, d_out, d_in), b (rows or 1, d_out)."""
    return F.linear(x, w[0], b[0]) if len(w) == 1 else torch.baddbmm(b[:, None], x, w.mT)
