"""Polyhistor: decomposed hypernetworks and layer-wise scaling kernels for multi-task adapters (Liu et al., NeurIPS 2022)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.checks import check_tasks
from exapt.core.contract import ActivationMethod, Tensors
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site


@register
@dataclass(frozen=True)
class Polyhistor(ActivationMethod):
    r"""Emits adapters from task embeddings as products of low-rank factors, scaled up from one template to layers of any width:

    .. math:: h' = h + U_{lt}\, f(D_{lt} h), \quad D_{lt} = S_l \otimes (\alpha_t \beta_t^\top), \quad
        \alpha_t = H_\alpha z_t, \quad \beta_t = H_\beta z_t

    and :math:`U_{lt}` alike from networks of its own. The template :math:`\alpha\beta^\top` has the size of the narrowest layer's adapter; the
    scaling kernel :math:`S_l` (k, k) of a layer k times as wide is what the layer itself learns (hierarchical transformers double their width from stage
    to stage). A batch says which task each row belongs to: ``model(x, task_ids=ids)``; with one task nothing is asked for.

    The paper's text was not at hand: this follows its abstract and figures, and leaves the adapters without biases.

    Args:
        n_tasks: Number of tasks.
        reduction: The bottleneck is the features divided by this.
        rank: Columns of the factors :math:`\alpha` and :math:`\beta`.
        lite: Whether all sites share templates through scaling kernels (Polyhistor-Lite); otherwise each site has hypernetworks of its own
            width and no kernel (Polyhistor).
        embedding: Size of a task embedding.
        activation: Nonlinearity :math:`f`.

    Parameters per site:
        ``S_D`` and ``S_U`` (k, k), normal with variance 1 / k; without ``lite`` the hypernetworks instead.

    Parameters shared by all sites (narrowest width d, bottleneck m):
        ``z`` (n_tasks, embedding), standard normal; ``H_a_D`` (m rank, embedding), ``H_b_D`` (d rank, embedding), ``H_a_U`` (d rank, embedding),
        normal with variance 1 / embedding; ``H_b_U`` (m rank, embedding), zeros.

    References:
        Liu, Ma, Tian, He and Kira, "Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks", NeurIPS 2022.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16)), Polyhistor(n_tasks=2, reduction=4, rank=1), where="all")
    >>> model(torch.zeros(2, 4), task_ids=torch.tensor([0, 1])).shape
    torch.Size([2, 16])
    """

    key = "polyhistor"
    paper = "Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks"
    equation = r"h' = h + U_{lt}\, f(D_{lt} h),\; D_{lt} = S_l \otimes (\alpha_t \beta_t^\top)"
    golden = "NumPy"
    where = ("attention.output", "mlp.down")

    n_tasks: int = 1
    reduction: int = 8
    rank: int = 4
    lite: bool = True
    embedding: int = 64
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The rows' tasks, if there are several."""
        return ("task_ids",) if self.n_tasks > 1 else ()

    def check(self, site: Site) -> None:
        for field in ("n_tasks", "rank", "embedding"):
            if getattr(self, field) < 1:
                raise InputError(f"polyhistor.{field} is {getattr(self, field)}; it must be at least 1")
        if not 1 <= self.reduction <= site.features:
            where = f"{site.name or '(model)'}: polyhistor.reduction is {self.reduction}"
            raise InputError(f"{where}; its {site.features} features allow 1 to {site.features}")

    def shared(self, sites: Sequence[Site]) -> Tensors:
        least, device = min(s.features for s in sites), sites[0].device
        z = {"z": torch.randn(self.n_tasks, self.embedding, device=device)}
        if not self.lite:
            return z
        odd = next((s for s in sites if s.features % least), None)
        if odd is not None:
            raise InputError(
                f"{odd.name}: its {odd.features} features are no multiple of {least}, the narrowest site's; leave it out of where=, or use lite=False"
            )
        if least < self.reduction:
            raise InputError(f"polyhistor.reduction is {self.reduction}; the narrowest site allows 1 to {least}")
        return z | self._networks(least, device)

    def _networks(self, d: int, device: torch.device) -> Tensors:
        m, e = d // self.reduction, self.embedding
        sizes = {"H_a_D": m, "H_b_D": d, "H_a_U": d, "H_b_U": m}
        return {k: (k != "H_b_U") * e**-0.5 * torch.randn(n * self.rank, e, device=device) for k, n in sizes.items()}

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        least = min(s.features for s in sites)
        return {s.name: {"times": torch.tensor(max(s.features // least, 1))} for s in sites}

    def init(self, site: Site) -> Tensors:
        if not self.lite:
            return self._networks(site.features, site.device)
        k = int(site.statistics["times"])
        return {name: k**-0.5 * torch.randn(k, k, device=site.device) for name in ("S_D", "S_U")}

    def emitted(self, p: Tensors, which: str) -> Tensor:
        """The matrix of every task at this site: (n_tasks, d_out, d_in)."""
        a, b = (F.linear(p["z"], p[f"H_{k}_{which}"]).unflatten(-1, (-1, self.rank)) for k in ("a", "b"))
        template = a @ b.mT
        if not self.lite:
            return template
        return torch.einsum("ab,tij->taibj", p[f"S_{which}"], template).flatten(3).flatten(1, 2)

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        down, up = self.emitted(p, "D"), self.emitted(p, "U")
        if self.n_tasks == 1:
            return h + F.linear(getattr(F, self.activation)(F.linear(h, down[0])), up[0])
        ids = p["call.task_ids"]
        ids = check_tasks(self, ids, len(h), self.n_tasks)
        inner = getattr(F, self.activation)(torch.bmm(h.reshape(len(h), -1, h.shape[-1]), down[ids].mT))
        return h + torch.bmm(inner, up[ids].mT).view(h.shape)
