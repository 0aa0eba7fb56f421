"""How the cost of the verbs grows, in calls of functions rather than seconds: linear in sites, and not at all in the number of other adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import exapt
from exapt.core.attach import uncollected
from exapt.core.file import holders


class Block(nn.Module):
    """Named as a transformer's, so that the feed-forward network of two layers is a site of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.fc1, self.fc2, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)


def model_of(blocks: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(blocks)), "head": nn.Linear(8, 2)})


def calls(run: Callable[[], Any]) -> int:
    """How many functions a call runs, Python's and C's."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    with uncollected():  # what the collector's callbacks do is not the verb's
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(before)
    return count


def counted(model: nn.Module, path: Path, method: Any = None) -> dict[str, int]:
    """The calls of each verb on one more adapter, the second time: the first pays for what is cached."""
    method = method or exapt.LoRA(rank=1)
    resident = exapt.adapters(model)[:1]
    found: dict[str, int] = {}
    for _ in range(2):
        found["attach"] = calls(lambda: exapt.attach(model, method, name="one"))
        found["save"] = calls(lambda: exapt.save(model, path, "one"))
        found["holders"] = calls(lambda: holders(model, "one"))
        exapt.activate(model, *resident)
        found["activate"] = calls(lambda: exapt.activate(model, "one"))
        if method.mergeable:
            found["merge"] = calls(lambda: exapt.merge(model, "one"))
            found["unmerge"] = calls(lambda: exapt.unmerge(model))
        found["detach"] = calls(lambda: exapt.detach(model, "one"))
        found["load"] = calls(lambda: exapt.load(model, path, "one"))
        exapt.detach(model, "one")
        found["sites"] = calls(lambda: exapt.sites(model))
    return found


@pytest.mark.parametrize("method", ["lora", "adapter", "vera", "bitfit"])
def test_linear_in_sites(tmp_path: Path, method: str) -> None:
    small, large = (counted(model_of(n), tmp_path / "a.safetensors", exapt.method(method)) for n in (12, 48))
    slow = {verb: round(large[verb] / small[verb], 2) for verb in small if large[verb] > 4.15 * small[verb]}
    assert not slow, f"four times the sites took so many times the calls: {slow}"


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_one_adapter_costs_the_same_beside_many(tmp_path: Path, method: str) -> None:
    found = []
    for resident in (10, 200):
        model = model_of(2)
        for i in range(resident):
            exapt.attach(model, exapt.method(method), name=f"r{i}")
        found.append(counted(model, tmp_path / "a.safetensors", exapt.method(method)))
    few, many = found
    slow = {verb: (few[verb], many[verb]) for verb in few if many[verb] > 1.1 * few[verb] + 20}
    assert not slow, f"calls with 10 and with 200 other adapters: {slow}"


def test_all_adapters_go_in_one_pass() -> None:
    found = []
    for resident in (10, 160):
        model = model_of(2)
        for i in range(resident):
            exapt.attach(model, exapt.LoRA(rank=1), name=f"r{i}")
        found.append(calls(lambda model=model: exapt.detach(model)))
        assert not exapt.adapters(model)
    assert found[1] < 20 * found[0]  # one after the other would be about 16 * 16


def test_adapters_of_like_names_go_alone() -> None:
    """Names that core makes of an adapter's name, and that another adapter has."""
    model = model_of(1)
    names = ("a", "a_", "a_shared_0", "a_shared_0_", "b")
    for name in names:
        exapt.attach(model, {"*q_proj": exapt.VeRA(rank=1), "*fc1": exapt.LoRA(rank=1), "model": exapt.method("adapter", bottleneck=1)}, name=name)
    before = {n: {path for path, _ in holders(model, n)} for n in names}
    exapt.detach(model, "a_", "a_shared_0")
    for name in ("a", "a_shared_0_", "b"):
        assert {path for path, _ in holders(model, name)} == before[name]
    exapt.detach(model, "a")
    exapt.detach(model)
    assert not any("exapt" in k for k in model.state_dict())


def test_a_name_that_is_not_there_removes_nothing() -> None:
    model = exapt.attach(model_of(1), exapt.LoRA(rank=1), name="a")
    with pytest.raises(exapt.InputError, match='no adapter "b"'):
        exapt.detach(model, "a", "b")
    assert exapt.adapters(model) == ("a",)


def test_loaded_tensors_have_memory_and_versions_of_their_own(tmp_path: Path) -> None:
    """Parts of one map of the file would share both: a write into one would look to autograd like a write into all."""
    path = exapt.save(exapt.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), exapt.LoRA(rank=2), "all"), tmp_path / "a")
    first, *others = exapt.read(path).tensors.values()
    versions = [t._version for t in others]
    first.zero_()
    assert [t._version for t in others] == versions
    assert len({t.untyped_storage().data_ptr() for t in (first, *others)}) == 1 + len(others)
