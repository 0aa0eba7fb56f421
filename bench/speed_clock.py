"""How one call is timed, and what a forward pass keeps for the backward. Needs torch alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call: of the processor; on a GPU, between its events."""
    if torch.cuda.is_initialized():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.process_time()
    run()
    return time.process_time() - start


def timed_result(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    held: list[Any] = []
    seconds = timed(lambda: held.append(run()))
    return seconds, held[0]


def repeated(run: Callable[[], Any], times: int) -> None:
    """Calls several times, for what is too short for the clock."""
    for _ in range(times):
        run()


def saved_bytes(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """Bytes kept for backward by one forward pass, each storage once: all, and without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(t: Any) -> Any:
        for part in (t._indices(), t._values()) if t.is_sparse else (t,):
            seen[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**inputs).loss
    del loss
    return {"all": sum(seen.values()), "activations": sum(n for k, n in seen.items() if k not in own)}
