"""MonteCLoRA: Monte Carlo low-rank adaptation (Sengupta et al., 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.registry import register
from exapt.core.sites import Site

FLOOR = 1e-3  # smallest variance that is drawn


@register
@dataclass(frozen=True)
class MonteCLoRA(WeightMethod):
    r"""LoRA whose :math:`A` is, in training, a mixture of Gaussian draws around its mean: :math:`y = W x + s B (A + \epsilon) x`.

    .. math::

        \epsilon = c \sum_{n=1}^N \pi_n\, \mathrm{diag}(\sqrt{v})\, Z_n, \qquad v_i = e^{2 \tau_i} \chi_i, \qquad
        \pi = \mathrm{softmax}(\mu + \sqrt{\lambda}\, z)

    :math:`Z_n` and :math:`z` are standard normal; :math:`\chi_i`, the diagonal of a Wishart matrix, is chi-squared with :math:`r`
    degrees of freedom; :math:`\mu` and :math:`\lambda` are the Laplace approximation of a Dirichlet distribution with the parameters
    :math:`a = e^\rho`. Divergences from the priors join the loss through the penalty. Outside training there is no noise, and it is LoRA.

    Followed are PEFT and the authors' code, except that the divergence between Dirichlet distributions is the true one (both
    code bases add the sum of :math:`\ln \Gamma(a_n)` where it is subtracted), that the penalty draws its own :math:`v` and
    :math:`\pi` rather than reusing those of the last forward pass, and that it is a sum over sites (PEFT's is their mean).

    Args:
        rank: Rank :math:`r`.
        alpha: Scale of the update; :math:`s = \alpha / r`.
        num_samples: Number :math:`N` of draws that are mixed.
        sample_scaler: Size :math:`c` of the noise; 0: none, and no penalty.
        dirichlet_prior: Parameter of the symmetric Dirichlet prior of :math:`\pi`.
        kl_loss_weight: Weight of the three divergences in the loss.
        use_entropy: Whether :math:`\sum \pi_n^2` joins the loss, against a mixture of one draw.

    Parameters per site:
        ``A`` (rank, d_in), Kaiming uniform; ``B`` (d_out, rank), zeros; ``std_prior`` (rank,), :math:`\tau`, and
        ``expert_weights_prior`` (num_samples,), :math:`\rho`, both uniform in [0, 1).

    References:
        Sengupta, Seth, Pathak et al., "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
        Adaptation", TMLR 2025.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), MonteCLoRA(rank=2), where="all")
    >>> [tuple(p.shape) for p in exapt.trainable(model).values()]
    [(2, 4), (3, 2), (2,), (8,)]
    """

    key = "monteclora"
    paper = "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation"
    equation = r"W' = W + \frac{\alpha}{r} B \Bigl(A + c \sum_n \pi_n \mathrm{diag}(\sqrt{v}) Z_n\Bigr)"
    golden = "PEFT"
    full_precision = True
    exceptions: ClassVar = {"gradient": "the parameters of the noise act in training alone; the suite runs in evaluation mode"}

    rank: int = 8
    alpha: float = 16.0
    num_samples: int = 8
    sample_scaler: float = 1e-4
    dirichlet_prior: float = 0.1
    kl_loss_weight: float = 1e-5
    use_entropy: bool = False

    def check(self, site: Site) -> None:
        check_rank(self, site)
        if self.num_samples < 1 or self.dirichlet_prior <= 0:
            raise InputError(f"monteclora: num_samples={self.num_samples}, dirichlet_prior={self.dirichlet_prior}; both must be positive")
        if self.needs_forward() and site.layer and not site.layer.operates:
            raise InputError(
                f"{site.name or '(model)'}: monteclora has no noise where the weight is read as a parameter; set sample_scaler=0 or leave it out of where="
            )

    def init(self, site: Site) -> Tensors:
        d_out, d_in = site.shape
        a = torch.empty(self.rank, d_in, device=site.device).uniform_(-(d_in**-0.5), d_in**-0.5)
        return {"A": a, "B": a.new_zeros(d_out, self.rank), "std_prior": torch.rand(self.rank), "expert_weights_prior": torch.rand(self.num_samples)}

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        return torch.addmm(w, p["B"].to(w.dtype), p["A"].to(w.dtype), alpha=self.alpha / self.rank)

    def needs_forward(self) -> bool:
        return self.sample_scaler > 0

    def low_rank(self, p: Tensors, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return p["A"], self.alpha / self.rank * p["B"]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        a = p["A"]
        if base.training and self.sample_scaler:
            deviation = self.variance(p, torch.randn(self.rank, self.rank, device=a.device, dtype=a.dtype)).sqrt()
            shares = self.shares(p, torch.randn(self.num_samples, device=a.device, dtype=a.dtype))
            draws = torch.randn(self.num_samples, *a.shape, device=a.device, dtype=a.dtype)
            a = a + self.sample_scaler * deviation[:, None] * torch.tensordot(shares, draws, 1)
        return base.low_rank(x, a, p["B"], self.alpha / self.rank)

    def variance(self, p: Tensors, z: Tensor) -> Tensor:
        """The variances ``v`` (rank,) from standard normal ``z`` (rank, rank), whose rows' squares sum to chi-squared numbers."""
        return ((2 * p["std_prior"]).exp() * z.square().sum(1)).clamp(min=FLOOR)

    def shares(self, p: Tensors, z: Tensor) -> Tensor:
        """The weights of the mixture (num_samples,) from standard normal ``z`` of that shape."""
        log, n = p["expert_weights_prior"], self.num_samples
        spread = (-log).exp() * (1 - 2 / n) + (-log).exp().sum() / n**2
        return (log - log.mean() + spread.clamp(min=1e-6).sqrt() * z).softmax(0)

    def divergence(self, p: Tensors, v: Tensor) -> Tensor:
        """The sum of the divergences of the mixture's weights, the covariance and the draws from their priors."""
        n, r, prior = self.num_samples, self.rank, torch.tensor(self.dirichlet_prior)
        a, s = p["expert_weights_prior"].exp(), (2 * p["std_prior"]).exp()
        dirichlet = a.sum().lgamma() - a.lgamma().sum() - (n * prior).lgamma() + n * prior.lgamma()
        dirichlet = dirichlet + ((a - prior) * (a.digamma() - a.sum().digamma())).sum()
        wishart = r / 2 * (s - s.log() - 1).sum()
        return dirichlet + wishart + n / 2 * (v - v.log() - 1).sum()

    def penalty(self, p: Tensors, w: Tensor) -> Tensor | None:
        """The weighted divergences; without noise nothing."""
        if not self.sample_scaler:
            return None
        noise = p["std_prior"].new_empty(self.rank, self.rank).normal_()
        total = self.kl_loss_weight * self.divergence(p, self.variance(p, noise))
        if self.use_entropy:
            total = total + self.shares(p, torch.randn_like(p["expert_weights_prior"])).square().sum()
        return total
