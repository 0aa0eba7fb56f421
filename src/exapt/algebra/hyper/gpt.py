"""G.pt: a diffusion transformer over checkpoints that updates a network's weights in one step (Peebles et al., 2022).

The paper's text and code could not be read here: the formulas are from the abstract and from memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError


@component("g_pt", kind="hypernetwork", paper="Learning to Learn with Generative Models of Neural Network Checkpoints")
class CheckpointDiffusion(nn.Module):
    r"""Samples the parameters :math:`\theta^*` that a network would have at a wanted loss :math:`\ell^*`, given the present ones :math:`\theta` and their
    loss :math:`\ell`: a diffusion model :math:`p(\theta^* \mid \theta, \ell, \ell^*)` learned from checkpoints of many training runs.

    A transformer sees as tokens the noised :math:`\theta^*_t` and the present :math:`\theta`, each parameter tensor cut to pieces of at most ``piece`` entries
    with a linear map of its own, and the two losses and the time :math:`t` as Fourier features. It predicts the clean
    :math:`\theta^*` as a change of :math:`\theta`, :math:`\hat\theta^* = \theta + D(\theta^*_t, \theta, \ell, \ell^*, t)`, and learns by
    :math:`\lVert \hat\theta^* - \theta^* \rVert^2`. Parameters are brought to unit scale for this and back. In training, hidden units may be
    permuted (:func:`permuted`), which leaves the networks the same functions.

    Args:
        sizes: Numbers of entries of the networks' tensors, in the order in which they are flattened to one vector.
        width: Features of a token.
        layers: Layers of the transformer.
        heads: Its heads.
        steps: Steps of the diffusion (linear schedule).
        piece: Largest number of entries of one token.
        scale: Standard deviation of parameters, by which they are divided.
        frequencies: Fourier features of each scalar.

    References:
        Peebles, Radosavovic, Brooks, Efros and Malik, "Learning to Learn with Generative Models of Neural Network Checkpoints", 2022.

    >>> model = CheckpointDiffusion([4, 2], width=16, layers=1, heads=2, steps=10)
    >>> model.sample(torch.zeros(3, 6), torch.ones(3), torch.zeros(3)).shape
    torch.Size([3, 6])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        *,
        steps: int = 200,
        piece: int = 64,
        scale: float = 1.0,
        frequencies: int = 16,
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1 or piece < 1 or steps < 2:
            raise InputError(f"g_pt: sizes {list(sizes)}, piece {piece} and steps {steps}; sizes and piece are at least 1, steps 2")
        self.pieces = [min(piece, n - i) for n in sizes for i in range(0, n, piece)]
        self.scale, self.steps, self.frequencies = scale, steps, frequencies
        self.noised, self.present = (nn.ModuleList([nn.Linear(n, width) for n in self.pieces]) for _ in range(2))
        self.scalars = nn.ModuleList([nn.Linear(2 * frequencies + 1, width) for _ in range(3)])
        self.place = nn.Parameter(0.02 * torch.randn(2 * len(self.pieces) + 3, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.ModuleList([nn.Linear(width, n) for n in self.pieces])
        for p in self.out.parameters():
            nn.init.zeros_(p)
        beta = torch.linspace(1e-4, 0.02, steps) * (1000 / steps)
        self.alpha_bar: Tensor
        self.register_buffer("alpha_bar", torch.cumprod(1 - beta.clamp(max=0.999), 0))

    def forward(self, noised: Tensor, theta: Tensor, loss: Tensor, wanted: Tensor, t: Tensor) -> Tensor:
        """Predicts the clean parameters.

        Args:
            noised: Noised parameters (n, P), at unit scale.
            theta: Present ones (n, P), at unit scale.
            loss: Their losses (n,).
            wanted: Wanted losses (n,).
            t: Steps (n,), whole numbers.
        """
        tokens = [m(x) for parts, own in ((noised, self.noised), (theta, self.present)) for m, x in zip(own, parts.split(self.pieces, -1), strict=True)]
        tokens += [m(self._features(s)) for m, s in zip(self.scalars, (loss, wanted, t / self.steps), strict=True)]
        h = self.body(torch.stack(tokens, 1) + self.place)
        return theta + torch.cat([m(h[:, i]) for i, m in enumerate(self.out)], -1)

    def _features(self, s: Tensor) -> Tensor:
        phase = s[:, None] * math.pi * 2.0 ** torch.linspace(-2, 6, self.frequencies, device=s.device)
        return torch.cat([s[:, None], phase.sin(), phase.cos()], -1)

    def objective(self, theta: Tensor, loss: Tensor, later: Tensor, later_loss: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What it trains on: pairs of checkpoints of one run.

        Args:
            theta: Checkpoints (n, P).
            loss: Their losses (n,).
            later: Other checkpoints of the same runs (n, P), later or earlier.
            later_loss: Their losses (n,), which are the prompts.
            generator: Of noise and steps.

        Returns:
            The mean squared error of the predicted clean parameters, at unit scale.
        """
        clean, theta = later / self.scale, theta / self.scale
        t = torch.randint(self.steps, (len(clean),), generator=generator, device=clean.device)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        a = self.alpha_bar[t][:, None]
        return F.mse_loss(self(a.sqrt() * clean + (1 - a).sqrt() * noise, theta, loss, later_loss, t), clean)

    @torch.no_grad()
    def sample(self, theta: Tensor, loss: Tensor, wanted: Tensor, *, steps: int = 0, seed: int = 0) -> Tensor:
        """One update: parameters for the wanted losses, by ancestral sampling (with ``steps``: by as many deterministic steps instead).

        Args:
            theta: Present parameters (n, P).
            loss: Their losses (n,).
            wanted: Wanted losses (n,).
            steps: Steps of the deterministic sampler (DDIM); 0: all steps, ancestral (DDPM).
            seed: Of the noise.
        """
        generator = seeded(seed, "g_pt")
        theta = theta / self.scale
        x = torch.randn(theta.shape, generator=generator).to(theta)
        times = torch.linspace(self.steps - 1, 0, steps or self.steps).round().long()
        for i, t in enumerate(times.tolist()):
            clean = self(x, theta, loss, wanted, torch.full((len(theta),), t, device=theta.device))
            if i == len(times) - 1:
                x = clean
                continue
            a, before = self.alpha_bar[t], self.alpha_bar[int(times[i + 1])]
            if steps:
                noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
                x = before.sqrt() * clean + (1 - before).sqrt() * noise
            else:
                step = a / before
                mean = before.sqrt() * (1 - step) / (1 - a) * clean + step.sqrt() * (1 - before) / (1 - a) * x
                spread = ((1 - before) / (1 - a) * (1 - step)).sqrt()
                x = mean + spread * torch.randn(x.shape, generator=generator).to(x)
        return x * self.scale


def permuted(up: Tensor, bias: Tensor, down: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reorders a hidden layer's units: the network stays the same function, its parameters do not (an augmentation of checkpoints).

    Args:
        up: Weights into the units (units, d_in).
        bias: Their biases (units,).
        down: Weights out of them (d_out, units).
        order: A permutation (units,).

    >>> permuted(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 4.0]), torch.tensor([[5.0, 6.0]]), torch.tensor([1, 0]))
    (tensor([[2.],
            [1.]]), tensor([4., 3.]), tensor([[6., 5.]]))
    """
    return up[order], bias[order], down[:, order]
