"""The highest memory of a piece of work is seen while it runs."""

from __future__ import annotations

import torch

from exapt.train.memory import Peak


def test_what_is_allocated_and_freed_is_seen() -> None:
    peak = Peak()
    with peak.measured():
        held = torch.ones(200 << 18)  # 200 MB, beyond what any allocator keeps for later
        assert held.sum() > 0
        peak.sample()
        del held
    assert 150 << 20 < peak.bytes < 400 << 20
