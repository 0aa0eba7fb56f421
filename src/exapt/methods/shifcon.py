"""ShifCon: shift-based multilingual contrastive framework (Zhang et al., ACL 2025)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.calibrate import calibrate
from exapt.core.checks import check_tasks
from exapt.core.contract import ActivationMethod, Tensors, frozen
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site, Where


@register
@dataclass(frozen=True)
class ShifCon(ActivationMethod):
    r"""Lets a row of another language pass an area of blocks in the dominant language's subspace: before the first block
    :math:`h' = h - \mu^{in}_l + \mu^{in}_0`, behind the last :math:`h' = h - \mu^{out}_0 + \mu^{out}_l`.

    ``where`` names the area, consecutive blocks. A batch says which language each row is in: ``model(x, task_ids=ids)``, ids (rows,),
    0 the dominant one. :math:`\mu_l` is the mean hidden state of language :math:`l` at that place::

        means = language_means(model, [english, swahili], area)
        attach(model, {area: ShifCon(languages=2), "linear": LoRA()}, statistics=means)

    The means do not train; what does is attached beside, as the model itself in the paper. Its second part is a loss on
    translations, :func:`contrastive_loss`; :func:`subspace_distance` compares languages at a layer to choose the area.

    Args:
        languages: Number of languages, the dominant one included; with 1 there is nothing to shift.

    Parameters per site:
        None that train. ``toward`` (languages, d) at the first site, ``back`` (languages, d) at the last: the means.

    References:
        Zhang et al., "ShifCon: Enhancing Non-Dominant Language Capabilities with a Shift-based Contrastive Framework", ACL 2025.
    """

    key = "shifcon"
    paper = "ShifCon: Enhancing Non-Dominant Language Capabilities with a Shift-based Contrastive Framework"
    equation = r"h' = f(h - \mu^{in}_l + \mu^{in}_0) - \mu^{out}_0 + \mu^{out}_l"
    golden = "NumPy"
    exceptions: ClassVar = {"gradient": "the means of languages are statistics; what trains is attached beside them"}

    languages: int = 1

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """The rows' languages, if there are several."""
        return ("task_ids",) if self.languages > 1 else ()

    def check(self, site: Site) -> None:
        if site.axis != -1 or self.languages < 1:
            raise InputError(f"{site.name}: shifcon needs features last and 1 or more languages, not {self.languages}")

    def plan(self, sites: Sequence[Site]) -> Mapping[str, Tensors]:
        if self.languages == 1:
            return {}
        ends: dict[str, Tensors] = {}
        for place, site, side in (("toward", sites[0], "input"), ("back", sites[-1], "output")):
            means = site.statistics.get(f"{side}_means")
            if means is None or means.shape[0] != self.languages:
                given = "none" if means is None else str(means.shape[0])
                raise InputError(f"{site.name}: shifcon needs the means of {self.languages} languages, not {given}; pass statistics=language_means(...)")
            ends.setdefault(site.name, {})[place] = means
        return ends

    def init(self, site: Site) -> Tensors:
        return {k: frozen(site.statistics[k].clone()) for k in ("toward", "back") if k in site.statistics}

    def enter(self, p: Tensors, x: Tensor) -> Tensor:
        if "toward" not in p:
            return x
        return x + (p["toward"][0] - p["toward"][self._ids(p, x)])[:, None]

    def apply(self, p: Tensors, x: Tensor, h: Tensor) -> Tensor:
        if "back" not in p:
            return h
        return h + (p["back"][self._ids(p, h)] - p["back"][0])[:, None]

    def _ids(self, p: Tensors, x: Tensor) -> Tensor:
        ids = p["call.task_ids"].to(x.device)
        return check_tasks(self, ids, len(x), self.languages, "languages", "language")


@dataclass(frozen=True)
class _Probe(ActivationMethod):
    """Asks for the means of inputs and outputs."""

    needs = ("input_mean", "output_mean")


def language_means(model: nn.Module, batches: Sequence[Iterable[Any]], where: Where = "block") -> dict[str, dict[str, Tensor]]:
    """Mean hidden states before and behind blocks for each language, as :class:`ShifCon` takes them.

    Args:
        model: The base model.
        batches: For each language, the dominant one first, its batches as for :func:`exapt.calibrate`. Padding counts as any token does.
        where: The area of blocks.

    Returns:
        ``{site: {"input_means": (languages, d), "output_means": (languages, d)}}``.
    """
    found = [calibrate(model, own, _Probe(), where) for own in batches]
    return {site: {f"{k}s": torch.stack([f[site][k] for f in found]) for k in _Probe.needs} for site in found[0]}


def contrastive_loss(h: Tensor, translated: Tensor, temperature: float = 0.05) -> Tensor:
    r"""Pulls sentences to their translations and away from the others of the batch: the mean of
    :math:`-\log \frac{e^{\cos(h_i, t_i) / \tau}}{\sum_j e^{\cos(h_i, t_j) / \tau}}`.

    Args:
        h: Sentences of other languages, one vector each (n, d), in the dominant language's subspace.
        translated: The same sentences in the dominant language (n, d).
        temperature: :math:`\tau`.
    """
    scores = F.normalize(h, dim=-1) @ F.normalize(translated, dim=-1).T / temperature
    return F.cross_entropy(scores, torch.arange(len(h), device=h.device))


def subspace_distance(first: Tensor, second: Tensor) -> Tensor:
    r"""How far two languages' clouds of hidden states are apart after centring: :math:`\sqrt{\sum_i \log^2 \lambda_i}` with the eigenvalues
    :math:`\lambda_i` of :math:`K_1^{-1} K_2` (Chang, Tu and Bergen, "The Geometry of Multilingual Language Model Representations", 2022).

    Args:
        first: Covariance :math:`K_1` (d, d), positive definite.
        second: :math:`K_2` (d, d).
    """
    root = torch.linalg.cholesky(first.double())
    whitened = torch.linalg.solve_triangular(root, second.double(), upper=False)
    whitened = torch.linalg.solve_triangular(root, whitened.mT, upper=False)
    return torch.linalg.eigvalsh((whitened + whitened.mT) / 2).log().square().sum().sqrt()
