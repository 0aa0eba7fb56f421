"""Peak memory of a process and a digest of a model, for claims that can be checked."""

from __future__ import annotations

import hashlib
import resource
import sys
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the most memory this process holds within a block.

    On Linux the kernel's own high-water mark is read, after setting it back at the start of the block, so that what came
    earlier (imports, reading the weights) counts only as far as it is still held. Elsewhere the mark cannot be set back
    and ``since_start`` is true: the peak is the process's since it began.

    >>> with PeakMemory() as memory:
    ...     _ = bytearray(50_000_000)
    >>> memory.peak >= memory.before > 0
    True
    """

    def __init__(self) -> None:
        self.before = self.peak = 0
        self.since_start = True

    def __enter__(self) -> PeakMemory:
        try:
            _CLEAR.write_text("5")
            self.since_start = False
        except OSError:
            self.since_start = True
        self.before = _status("VmRSS") or _usage()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.peak = max(_status("VmHWM") or _usage(), self.before)


def _status(field: str) -> int:
    try:
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def _usage() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def digest(model: nn.Module) -> str:
    """Returns the SHA-256 over names, types, shapes and every bit of all parameters and buffers.

    >>> layer = nn.Linear(2, 2)
    >>> before = digest(layer)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> digest(layer) == before
    False
    """
    total = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
