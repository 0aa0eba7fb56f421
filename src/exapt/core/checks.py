"""What several methods refuse, in one wording: a field's value that does not fit a site."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exapt.core.contract import Method
from exapt.core.errors import InputError

if TYPE_CHECKING:
    from exapt.core.sites import Site


def check_fields(method: Method) -> None:
    """Refuses what no method can mean: a number that is none, a dropout that is no probability."""
    for f in fields(method):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"{method.key}.{f.name} is nan; give a number")
        if f.name == "dropout" and not 0 <= value <= 1:
            raise InputError(f"{method.key}.dropout is {value}; it is a probability, from 0 to 1")


def check_rank(method: Method, site: Site, field: str = "rank", most: int | None = None) -> None:
    """Refuses a rank below 1 or above ``most``, by default the smaller side of the site's matrix."""
    rank = getattr(method, field)
    limit = min(site.shape) if most is None else most
    if not 1 <= rank <= limit:
        shape = f" ({site.shape[0]}x{site.shape[1]})" if site.layer else ""
        raise InputError(
            f"{site.name or '(model)'}: {method.key}.{field} is {rank}; this site{shape} takes 1 to {limit}; change it or leave the site out of where="
        )


def check_divides(method: Method, site: Site, field: str, size: int, of: str) -> None:
    """Refuses a block size that does not divide ``size``, the number of ``of``."""
    block = getattr(method, field)
    if block < 1 or size % block:
        raise InputError(f"{site.name or '(model)'}: {method.key}.{field} is {block}, which does not divide the {size} {of}; choose a divisor of {size}")


def check_finite(method: Method, site: Site, tensor: Tensor, what: str = "weight") -> None:
    """Refuses to decompose a tensor that holds NaN or infinity."""
    if not (torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):  # the sum is finite only if all are, and one pass
        raise InputError(f"{site.name or '(model)'}: its {what} holds NaN or infinite values; {method.key} cannot start from it")


def check_tasks(method: Method, ids: Tensor, rows: int, count: int, what: str = "tasks", one: str = "id") -> Tensor:
    """Returns the rows' ``task_ids`` (rows,), after refusing those of another batch and numbers of none of the ``count`` tasks."""
    if ids.shape != (rows,):
        raise InputError(f"{method.key} was given task_ids of shape {tuple(ids.shape)} for a batch of {rows} rows; give one {one} per row")
    if not torch.compiler.is_compiling() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise InputError(f"{method.key} was given task_ids from {int(ids.min())} to {int(ids.max())}; it has {count} {what}, from 0")
    return ids
