"""LoRAs as coefficients of seeded random matrices: NOLA's form, fitted to an adapter that is there already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from exapt.algebra.compress.svd import _keep, distance
from exapt.core.components import component
from exapt.core.contract import as_dict
from exapt.core.errors import InputError
from exapt.core.file import AdapterFile, _digest
from exapt.core.registry import from_dict, method


@component("seeded_bases", kind="compression", paper="NOLA: Compressing LoRA using Linear Combination of Random Basis", oracle="NumPy")
def seeds_fitted(file: AdapterFile, *, num_basis: int = 256, rounds: int = 10, seed: int = 0) -> tuple[AdapterFile, dict[str, float]]:
    r"""Fits to each LoRA of an adapter coefficients of random matrices that a seed makes again:

    .. math:: \min_{\alpha, \beta} \Bigl\lVert B A - \Bigl(\sum_j \beta_j B_j\Bigr) \Bigl(A_0 + \sum_i \alpha_i A_i\Bigr) \Bigr\rVert_F^2 .

    Least squares for :math:`\beta` and :math:`\alpha` in turn. The file then holds two vectors for each site and is an adapter of
    :class:`exapt.NOLA`. An update has rank times (d_out + d_in) numbers, so the error is large unless ``num_basis`` comes near these, or the update
    is close to what few matrices span: training in that form (:class:`exapt.NOLA`) is the paper's way; this fit says what it costs afterwards.

    Args:
        file: The adapter; rules other than LoRA's stay as they are.
        num_basis: Number of matrices :math:`A_i`, and of :math:`B_j`.
        rounds: Passes over both vectors.
        seed: Seed of the matrices.

    Returns:
        The adapter, and the relative error of each site's update.

    Raises:
        InputError: where there is no LoRA, or for stacked experts, which NOLA's fit does not serve.

    References:
        Koohpayegani, Navaneet, Nooralinejad, Kolouri, Pirsiavash, "NOLA: Compressing LoRA using Linear Combination of Random Basis", ICLR 2024.
    """
    if num_basis < 1 or rounds < 1:
        raise InputError(f"seeded_bases: num_basis={num_basis}, rounds={rounds}; both are at least 1")
    if not any(rule["method"].get("method") == "lora" for rule in file.rules):
        raise InputError("seeded_bases re-expresses LoRAs, and this adapter has none; use a codec")
    made = AdapterFile([], file.fingerprint, file.base, file.versions, file.provenance, file.metrics)
    errors: dict[str, float] = {}
    again: dict[str, Tensor] = {}
    for number, rule in enumerate(file.rules):
        if rule["method"].get("method") != "lora":
            _keep(file, number, made)
            continue
        old = cast(Any, from_dict(rule["method"]))
        nola = cast(Any, method("nola", rank=old.rank, alpha=old.factor * old.rank, num_basis=num_basis, seed=seed))
        sites = [SimpleNamespace(name=name, shape=tuple(shape)) for name, shape in zip(rule["sites"], rule["shapes"], strict=True)]
        bases, place = nola.shared(sites), len(made.rules)
        again |= {f"{place}:*/{k}": t for k, t in bases.items()}
        for site in sites:
            a, b = (file.tensors[f"{number}:{site.name}/{k}"] for k in ("A", "B"))
            if a.dim() != 2:
                raise InputError(f"{site.name}: seeded_bases does not serve stacked experts; use a codec")
            start = nola.init(site)["A0"].detach()
            vectors, errors[site.name] = _fitted(a, b, start, bases["basis_A"][: a.shape[1]], bases["basis_B"][: b.shape[0]], rounds)
            again[f"{place}:{site.name}/A0"] = start
            for k, t in vectors.items():
                made.tensors[f"{place}:{site.name}/{k}"] = t
                made.manifest[f"{place}:{site.name}/{k}"] = [list(t.shape), True]
        made.rules.append({"method": as_dict(nola), "sites": rule["sites"], "shapes": rule["shapes"]})
    made.tensors = {k: made.tensors[k] for k in sorted(made.tensors)}
    kind = next(t.dtype for t in made.tensors.values() if t.is_floating_point())  # the type in which a reader makes them again
    made.checksums |= {k: _digest(t.detach().to(kind).contiguous()) for k, t in again.items()}
    return made, errors


def _fitted(a: Tensor, b: Tensor, start: Tensor, basis_a: Tensor, basis_b: Tensor, rounds: int) -> tuple[dict[str, Tensor], float]:
    """``alpha`` and ``beta`` by alternating least squares, float32, and the relative error."""
    wide_a, wide_b, a0 = a.double(), b.double(), start.double()
    many_a, many_b = basis_a.detach().double(), basis_b.detach().double()  # (d_in, r, k), (d_out, r, k)
    alpha = torch.zeros(many_a.shape[-1], dtype=torch.double)
    beta = torch.zeros_like(alpha)
    for _ in range(rounds):
        q, low = torch.linalg.qr((a0 + (many_a @ alpha).T).T)  # the factor A is low^T q^T
        x = torch.einsum("ork,sr->osk", many_b, low).flatten(0, 1)
        beta = _solved(x, (wide_b @ (wide_a @ q)).flatten())
        q, low = torch.linalg.qr(many_b @ beta)  # the factor B is q low
        x = torch.einsum("sr,irk->sik", low, many_a).flatten(0, 1)
        alpha = _solved(x, ((q.T @ wide_b) @ wide_a - low @ a0).flatten())
    alpha, beta = alpha.float(), beta.float()
    return {"alpha": alpha, "beta": beta}, distance(b, a, many_b @ beta.double(), a0 + (many_a @ alpha.double()).T)


def _solved(x: Tensor, y: Tensor) -> Tensor:
    """The least-squares solution of least norm, whatever the rank of ``x``."""
    return cast(Tensor, torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0])
