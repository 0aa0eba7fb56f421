"""Switching between adapters, and what those cost that only wait."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import Transformer, attach_example, inputs_of, perturb
from torch import Tensor, nn

import exapt
from exapt.core.slots import slots_of
from exapt.core.state import state_of


# torch's own tracer makes an instance of autograd functions and warns itself about it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("key", ["lora", *(pytest.param(k, marks=pytest.mark.slow) for k in ("dora", "adapter", "boft"))])
def test_switching_compiles_nothing_anew(key: str) -> None:
    from torch._dynamo.utils import counters

    model, x = Transformer().eval(), inputs_of("text", 3)
    for name in "ab":
        attach_example(model, exapt.method(key), "text", name=name)
        perturb(model, seed=ord(name))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for name in "abab":
            exapt.activate(model, name)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
            if name == "a":
                first = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == first


def test_every_switch_leaves_what_a_fresh_model_has() -> None:
    """Chains, classes and flags after switching among all kinds of adapters, twice through every pair."""
    kinds = {"a": exapt.LoRA(rank=2), "b": exapt.DoRA(rank=2), "d": exapt.BitFit(), "o": exapt.method("boft"), "i": exapt.method("adapter")}
    model = Transformer().eval()
    for name, method in kinds.items():
        exapt.attach(model, method, name=name, where="attention.query" if name == "a" else None)
        perturb(model)
    x = inputs_of("text", 2)

    def seen() -> Any:
        classes = [type(m) for m in model.modules()]
        return classes, [s.chain for _, s in slots_of(model)], [p.requires_grad for p in model.parameters()], model(x).detach()

    known = {}
    choices = [(), ("a",), ("b",), ("d",), ("o",), ("i",), ("a", "i"), ("o", "b")]
    for names in choices:
        state_of(model).ready.forget()
        exapt.activate(model, *names)
        known[names] = seen()
        assert {n.split(".exapt.")[1][0] for n in exapt.trainable(model)} == set(names)
    for one in choices:
        for two in choices:
            exapt.activate(model, *one)
            exapt.activate(model, *two)
            found = seen()
            assert found[:3] == known[two][:3]
            assert torch.equal(found[3], known[two][3])


class Wide(nn.Module):
    """84 small linear layers, as a decoder of 12 layers has."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d, d) for _ in range(84)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def processor(run: Callable[[], Any], times: int) -> float:
    """The median of processor seconds."""
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


def test_a_switch_does_not_walk_the_model() -> None:
    model = Wide()
    for name in "ab":
        exapt.attach(model, exapt.LoRA(rank=1), where="all", name=name)
    for name in "abab":
        exapt.activate(model, name)
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        exapt.activate(model, "b")
        exapt.activate(model, "a")
    finally:
        sys.setprofile(None)
    assert calls < 50  # not one for each of 84 layers


@pytest.mark.slow
def test_a_thousand_adapters_cost_only_their_own() -> None:
    """Attaching the thousandth takes as long as the tenth, and neither a forward nor a switch sees the others."""
    import tracemalloc

    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    x = torch.randn(2, 8)

    def attach(i: int) -> None:
        exapt.attach(model, exapt.LoRA(rank=1), where="all", name=f"a{i}", trainable=bool(i % 2))

    def measured(first: int, n: int) -> tuple[float, float, float]:
        taken = []
        for i in range(first, first + n):
            start = time.process_time()
            attach(i)
            taken.append(time.process_time() - start)
        with torch.no_grad():
            forward = processor(lambda: model(x), 200)
        names = [f"a{i}" for i in range(first, first + 10)]
        for name in names * 2:
            exapt.activate(model, name)
        switch = processor(lambda: [exapt.activate(model, n) for n in names], 50)
        return statistics.median(taken), forward, switch

    early = measured(0, 30)
    for i in range(30, 500):
        attach(i)
    tracemalloc.start()
    for i in range(500, 900):
        attach(i)
    held = tracemalloc.get_traced_memory()[0] / 400 / 4
    tracemalloc.stop()
    late = measured(900, 100)
    assert len(exapt.adapters(model)) == 1000
    assert all(b < 2 * a for a, b in zip(early, late, strict=True)), (early, late)
    assert held < 6_000, held  # bytes of Python objects for an adapter at a site
