"""LoRAs of lower rank, with a certified error: truncated singular value decomposition of each site's update."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.contract import as_dict
from exapt.core.errors import InputError
from exapt.core.file import AdapterFile
from exapt.core.registry import from_dict, method


@component("svd_truncation", kind="compression", oracle="NumPy")
def svd_truncated(file: AdapterFile, *, error: float = 0.05, rank: int | None = None) -> tuple[AdapterFile, dict[str, float]]:
    r"""Gives every site of an adapter's LoRAs the lowest rank whose update is within an error: :math:`\min \{r : \lVert \Delta - \Delta_r \rVert_F \le
    \epsilon \lVert \Delta \rVert_F \}`.

    :math:`\Delta_r` is the best approximation of its rank. It is found from the factors (QR of each, then the decomposition of a small matrix), so
    that :math:`\Delta` is never formed. What is returned is a LoRA again, with one rule for each rank; the scale stays.

    Args:
        file: The adapter; rules other than LoRA's stay as they are.
        error: Largest relative error :math:`\epsilon` at a site.
        rank: Largest rank; a site then takes it even where its error is above ``error``.

    Returns:
        The adapter, and for every changed site the relative error, computed in double precision from the factors as they are stored.

    Raises:
        InputError: where there is no LoRA, or for a rank or an error that is none.

    References:
        Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936.
    """
    if not 0 <= error < 1 or (rank is not None and rank < 1):
        raise InputError(f"svd_truncation: error={error}, rank={rank}; the error is from 0 to below 1, the rank at least 1")
    if not any(rule["method"].get("method") == "lora" for rule in file.rules):
        keys = ", ".join(str(rule["method"].get("method")) for rule in file.rules)
        raise InputError(f"svd_truncation lowers the rank of LoRAs, and this adapter has none ({keys}); use a codec")
    made = AdapterFile([], file.fingerprint, file.base, file.versions, file.provenance, file.metrics)
    errors: dict[str, float] = {}
    for number, rule in enumerate(file.rules):
        if rule["method"].get("method") != "lora":
            _keep(file, number, made)
            continue
        old = cast(Any, from_dict(rule["method"]))
        parts: dict[int, list[tuple[str, Any, Tensor, Tensor]]] = {}
        for site, shape in zip(rule["sites"], rule["shapes"], strict=True):
            a, b = (file.tensors[f"{number}:{site}/{k}"] for k in ("A", "B"))
            new_a, new_b = _truncated(a, b, error, rank)
            errors[site] = distance(b, a, new_b, new_a)
            parts.setdefault(new_a.shape[-2], []).append((site, shape, new_a, new_b))
        for r, members in sorted(parts.items()):
            alpha = old.factor * (r**0.5 if old.scaling == "rs" else r)
            fields = {k: v for k, v in as_dict(old).items() if k != "method"} | {"rank": r, "alpha": alpha, "start": "kaiming"}
            place = len(made.rules)
            made.rules.append({"method": as_dict(method("lora", **fields)), "sites": [m[0] for m in members], "shapes": [m[1] for m in members]})
            for site, _, a, b in members:
                for k, t in (("A", a), ("B", b)):
                    made.tensors[f"{place}:{site}/{k}"] = t
                    made.manifest[f"{place}:{site}/{k}"] = [list(t.shape), file.manifest[f"{number}:{site}/{k}"][1]]
    return made, errors


def _keep(file: AdapterFile, number: int, made: AdapterFile) -> None:
    """Takes a rule over as it is, under its new number."""
    place = len(made.rules)
    made.rules.append(file.rules[number])
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [(file.tensors, made.tensors), (file.manifest, made.manifest), (file.checksums, made.checksums)]
    for source, target in pairs:
        target |= {f"{place}:{k.partition(':')[2]}": v for k, v in source.items() if k.partition(":")[0] == str(number)}


def _truncated(a: Tensor, b: Tensor, error: float, rank: int | None) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of ``b @ a``, (..., r, d_in) and (..., d_out, r); experts share the highest rank among them."""
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    tail = s.square().flip(-1).cumsum(-1).flip(-1)  # what is lost below each rank, from rank 0 on
    allowed = tail <= (error**2) * tail[..., :1]
    need = torch.where(allowed.any(-1), allowed.int().argmax(-1), s.shape[-1])
    r = max(int(need.max()), 1)
    r = min(r, rank) if rank is not None else r
    root = s[..., :r].sqrt()
    return ((root[..., None] * vh[..., :r, :]) @ qa.mT).to(a.dtype).contiguous(), ((qb @ u[..., :r]) * root[..., None, :]).to(b.dtype).contiguous()


def distance(b: Tensor, a: Tensor, other_b: Tensor, other_a: Tensor) -> float:
    r"""Relative distance of two products: :math:`\lVert B A - B' A' \rVert_F / \lVert B A \rVert_F`, from the factors; 0 where both are zero.

    >>> round(distance(torch.eye(2), torch.eye(2), torch.eye(2), torch.zeros(2, 2)), 6)
    1.0
    """
    left, right = torch.cat([b.double(), -other_b.double()], -1), torch.cat([a.double(), other_a.double()], -2)
    total = float((b.double().mT @ b.double() * (a.double() @ a.double().mT)).sum().clamp_min(0).sqrt())
    _, rl = torch.linalg.qr(left)
    _, rr = torch.linalg.qr(right.mT)
    apart = float(torch.linalg.norm(rl @ rr.mT))
    return apart / total if total else float(apart > 0)
