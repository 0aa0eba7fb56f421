"""The highest memory of a piece of work is seen while it runs."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from exapt.train import Custom, FitConfig, fit
from exapt.train.memory import Peak


def test_what_is_allocated_and_freed_is_seen() -> None:
    peak = Peak()
    with peak.measured():
        held = torch.ones(200 << 18)  # 200 MB, beyond what any allocator keeps for later
        assert held.sum() > 0
        peak.sample()
        del held
    assert 150 << 20 < peak.bytes < 400 << 20


class Greedy(nn.Module):
    """A layer that needs 200 MB for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        held = torch.ones(200 << 18)
        time.sleep(0.1)  # ten times the interval at which memory is looked at
        return self.layer(x) * held[0]


def test_fit_reports_it() -> None:
    task = Custom(lambda m, b: m(b).sum())
    result = fit(Greedy(), task, torch.ones(4, 2), config=FitConfig(steps=2, batch_size=2, progress=False))
    assert 150 << 20 < result.peak_bytes < 600 << 20
