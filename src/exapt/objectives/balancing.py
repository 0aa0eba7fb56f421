"""Mixing inputs with their generic-domain translations, around any objective (Kundu et al., ICML 2022)."""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.core.objective import Around, Objective, Seen, Step, task_loss


def edge_translation(x: Tensor) -> Tensor:
    r"""Images as their edges: the length of the Sobel gradient of the grey image, in every channel, with the range of the image itself.

    Args:
        x: Images (n, channels, h, w), floating point.

    Returns:
        (n, channels, h, w).

    >>> edge_translation(torch.tensor([[[[0.0, 0.0, 1.0, 1.0]] * 4]]))[0, 0, 1]
    tensor([0., 1., 1., 0.])
    """
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(x)
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    length = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).square().sum(1, keepdim=True).sqrt()
    top = length.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (low + (high - low) * length / top).expand_as(x)


@component("generic_mixup", kind="objective", paper="Balancing Discriminability and Transferability for Source-Free Domain Adaptation")
@dataclass(frozen=True)
class GenericMixup(Around):
    r"""Any objective on inputs mixed with a generic domain's: :math:`x_m = \lambda x + (1 - \lambda) g(x)`, :math:`g` the edges of the image.

    Without an inner objective it is the training on the source; around a source-free one (SHOT) it is the adaptation, on mixed target rows. The passes
    over the data that the inner objective asks for (pseudo-labels) see mixed rows too. The model answers plain rows afterwards. It needs images.

    The paper's abstract was followed; its method section, with the ratio it takes and its stylised translations, could not be read.

    Args:
        inner: The objective that sees the mixed rows, or its key; by default the labels' loss alone.
        ratio: :math:`\lambda`.

    References:
        Kundu, Kulkarni, Bhambri, Mehta, Kulkarni, Jampani and Babu, "Balancing Discriminability and Transferability for Source-Free Domain
        Adaptation", ICML 2022.

    >>> GenericMixup().setting
    'source'
    """

    setting = "source"
    equation = r"\mathcal{L}(\lambda x + (1 - \lambda) g(x))"

    inner: Objective | str | None = None
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise InputError(f"GenericMixup: ratio lies in [0, 1], not {self.ratio}")
        if self.objective is not None:
            for name in ("setting", "needs_features", "part_rate"):
                object.__setattr__(self, name, getattr(self.objective, name))

    def _seen(self, s: Step, seen: Seen | None) -> Seen | None:
        if seen is None:
            return None
        x = seen.batch.get("inputs")
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise InputError('GenericMixup mixes images with their edges: it needs batches whose "inputs" are (n, channels, height, width), floating point')
        mixed = s.run({**seen.batch, "inputs": self.ratio * x + (1 - self.ratio) * edge_translation(x)})
        return dataclasses.replace(mixed, labels=seen.labels, domains=seen.domains, index=seen.index)

    def seen_by_inner(self, s: Step) -> Step:
        sources, targets = s.sources, s.targets
        return dataclasses.replace(
            s, source=self._seen(s, s.source), target=self._seen(s, s.target),
            sources=lambda: (self._seen(s, x) for x in sources()), targets=lambda: (self._seen(s, x) for x in targets()),
        )  # fmt: skip

    def loss(self, s: Step) -> Tensor:
        inner, s = self.objective, self.seen_by_inner(s)
        return task_loss(s.s) if inner is None else inner.loss(s)

    def update(self, s: Step) -> Tensor:
        inner = self.objective
        return super().update(s) if inner is None else inner.update(self.seen_by_inner(s))
