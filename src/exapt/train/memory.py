"""How much memory a piece of work took at its highest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from exapt.core.resources import resident

_INTERVAL = 0.01


class Peak:
    """Highest memory above the start: of the CUDA allocator on a GPU (its own maximum, start included), else resident
    memory of the process (from ``/proc/self/statm`` every 10 ms; where that does not exist, growth of ``ru_maxrss``)."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.bytes, self._ended = device, 0, threading.Event()
        self._cuda = device is not None and device.type == "cuda"
        self._start = 0 if self._cuda else resident()

    def sample(self) -> None:
        """Takes the present value into account."""
        now = torch.cuda.max_memory_allocated(self.device) if self._cuda else resident() - self._start
        self.bytes = max(self.bytes, now)

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self.sample()

    @contextlib.contextmanager
    def measured(self) -> Iterator[Peak]:
        """Measures within the block."""
        thread = threading.Thread(target=self._watch, daemon=True)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            if thread.ident is not None:
                thread.join()
            self.sample()
