"""GLoRA: generalized LoRA (Chavan et al., 2023)."""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from exapt.core.base import Base
from exapt.core.checks import check_rank
from exapt.core.contract import Tensors, WeightMethod
from exapt.core.errors import InputError
from exapt.core.products import plus_product
from exapt.core.registry import register
from exapt.core.sites import Site

Matrix = Literal["lora", "vector", "constant", "none"]
Column = Literal["lora", "vector", "none"]
Vector = Literal["vector", "constant", "none"]


@register
@dataclass(frozen=True)
class GLoRA(WeightMethod):
    r"""Scales and shifts weight and bias and feeds one into the other by five support tensors:
    :math:`W' = W + W \odot A + B` and :math:`b' = b + b \odot D + E + W C`.

    Each support is a product of low rank, a vector (one number for each output, of ``C`` for each input), one number, or
    left out. The paper chooses the supports of every layer by evolution over a network trained with all of them, which
    :class:`exapt.search.glora.GLoRASearch` does; here they are fields. A layer without bias gets ``A`` and ``B`` only, as in PEFT.

    Args:
        rank: Rank of the supports of low rank.
        A: Support that scales the weight.
        B: Support that shifts the weight.
        C: Support that turns the weight into a shift of the bias.
        D: Support that scales the bias.
        E: Support that shifts the bias.

    Parameters per site:
        For a support X of low rank ``X_d`` (d_out, rank), zeros, and ``X_u`` (rank, d_in), Kaiming uniform (``C_d`` (d_in, rank), ``C_u``
        (rank, 1)); else ``A``, ``B`` (d_out, 1), ``C`` (d_in, 1), ``D``, ``E`` (d_out,), or all (1,), zeros.

    References:
        Chavan, Liu, Gupta, Xing, Shen, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023.

    >>> import exapt
    >>> from torch import nn
    >>> model = exapt.attach(nn.Linear(4, 3), GLoRA(A="none", B="constant", C="vector", D="none", E="vector"), where="all")
    >>> {n.split(".")[-1]: tuple(p.shape) for n, p in exapt.trainable(model).items()}
    {'B': (1,), 'C': (4, 1), 'E': (3,)}
    """

    key = "glora"
    paper = "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning"
    equation = r"W' = W + W \odot A + B,\; b' = b + b \odot D + E + W C"
    golden = "PEFT"
    reads_weight = True
    bias_reads_weight = True
    full_precision = True

    rank: int = 8
    A: Matrix = "lora"
    B: Matrix = "lora"
    C: Column = "lora"
    D: Vector = "constant"
    E: Vector = "constant"

    def check(self, site: Site) -> None:
        check_rank(self, site, most=prod(site.shape))
        if not any(how != "none" for how, _ in self._supports(site).values()):
            raise InputError(f"{site.name or '(model)'}: glora has no support to train here; choose one of A, B (C, D and E need a bias)")

    def _supports(self, site: Site) -> dict[str, tuple[str, tuple[int, int]]]:
        """Every support that the site takes: its form, and the shape of its product."""
        d_out, d_in = site.shape
        found: dict[str, tuple[str, tuple[int, int]]] = {"A": (self.A, (d_out, d_in)), "B": (self.B, (d_out, d_in))}
        if site.bias is not None:
            found |= {"C": (self.C, (d_in, 1)), "D": (self.D, (d_out, 0)), "E": (self.E, (d_out, 0))}
        return found

    def init(self, site: Site) -> Tensors:
        p: Tensors = {}
        for name, (how, (rows, columns)) in self._supports(site).items():
            if how == "lora":
                p[f"{name}_d"] = torch.zeros(rows, self.rank, device=site.device)
                p[f"{name}_u"] = nn.init.kaiming_uniform_(torch.empty(self.rank, columns, device=site.device), a=5**0.5)
            elif how != "none":
                p[name] = torch.zeros(1 if how == "constant" else (rows, 1) if columns else rows, device=site.device)
        return p

    def weight(self, p: Tensors, w: Tensor) -> Tensor:
        a = _support(p, "A")
        w = w if a is None else torch.addcmul(w, w, a)
        return plus_product(w, p["B_d"], p["B_u"]) if "B_d" in p else w + p["B"] if "B" in p else w

    def bias(self, p: Tensors, b: Tensor) -> Tensor:
        c, d, e = (_support(p, name) for name in "CDE")
        new = b if d is None else b + b * d
        new = new if e is None else new + e
        return new if c is None else new + (p["W"].to(c.dtype) @ c)[:, 0]

    def forward(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        b = base.bias
        shift = None if b is None else self.bias({**p, "W": base.weight} if self.C != "none" else p, b)
        if self.A == "lora":
            w = base.weight
            y = base.apply(self.weight(p, w).to(w.dtype), x)
        else:
            y = base(x)
            p = {k: t.to(y.dtype) for k, t in p.items()}
            if "A" in p:
                gain = (1 + p["A"]).flatten().expand(base.shape[0])
                y = base.scale(gain, y)
                shift = None if b is None or shift is None else shift - gain * b
            elif b is not None and shift is not None:
                shift = shift - b
            y = y + self._added(p, x, base) if self.B != "none" else y
        return y if shift is None else y + base.scale(shift.to(y.dtype), y.new_ones(()))

    def _added(self, p: Tensors, x: Tensor, base: Base) -> Tensor:
        """What ``B`` adds to the output."""
        d_out, d_in = base.shape
        if "B_d" in p:
            return base.out(p["B_d"], base.apply(p["B_u"], x))
        return base.out(p["B"].reshape(-1, 1).expand(d_out, 1), base.apply(p["B"].new_ones(1, d_in), x))


def _support(p: Tensors, name: str) -> Tensor | None:
    return p[f"{name}_d"] @ p[f"{name}_u"] if f"{name}_d" in p else p.get(name)
