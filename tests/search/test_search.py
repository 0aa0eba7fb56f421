"""The verb search: every cell once, whatever happens to the processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from killed_search import GRID, Slow, run, same
from torch import nn

import exapt
from exapt.search import study
from exapt.search.cells import Cell, pareto
from exapt.search.space import Choice, Invalid, Places, Real, Whole, resolve, rules_of
from exapt.search.study import collected, search

PROGRAM = Path(__file__).with_name("killed_search.py")


def begun(folder: Path) -> dict[str, int]:
    """How often each cell was begun."""
    return {f.parent.name: len(f.read_text().splitlines()) for f in folder.glob("cells/*/begun")}


def finished(folder: Path) -> set[str]:
    return {f.parent.name for f in folder.glob("cells/*/metrics.json")}


def start(folder: Path, sampler: str, trials: int, seconds: float, processes: int = 1) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(PROGRAM), str(folder), sampler, str(trials), str(seconds), str(processes)]
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def wait_for(folder: Path, cells: int) -> None:
    for _ in range(1200):
        if len(finished(folder)) >= cells and len(begun(folder)) > len(finished(folder)):
            return
        time.sleep(0.05)
    raise AssertionError(f"{finished(folder)} after a minute")


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_killed_search_goes_on_where_it_was(tmp_path: Path, sampler: str) -> None:
    straight = run(tmp_path / "straight", sampler, 16, 0.0)
    broken = tmp_path / "broken"
    process = start(broken, sampler, 16, 0.3)
    wait_for(broken, 6)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before, under_way = finished(broken), set(begun(broken)) - finished(broken)
    assert len(under_way) == 1
    found = run(broken, sampler, 16, 0.0)
    assert [c.values for c in found.cells] == [c.values for c in straight.cells]
    assert [c.metrics for c in found.cells] == [c.metrics for c in straight.cells]
    assert len(found.cells) == 16
    times = begun(broken)
    assert {k for k, n in times.items() if n == 2} == under_way  # the one that was running was measured again, no other was
    assert all(times[k] == 1 for k in before)
    assert run(broken, sampler, 16, 0.0) == found
    assert begun(broken) == times


@pytest.mark.slow
def test_several_processes_share_a_folder_and_do_the_work_of_one_that_dies(tmp_path: Path) -> None:
    other = start(tmp_path, "grid", 16, 0.4)
    wait_for(tmp_path, 1)
    victim = start(tmp_path, "grid", 16, 30.0)
    for _ in range(600):
        if any(str(victim.pid) in f.read_text() for f in tmp_path.glob("cells/*/begun")):
            break
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert other.wait(60) == 0
    times = begun(tmp_path)
    assert len(finished(tmp_path)) == 16
    assert sorted(times.values()) == [1] * 15 + [2]


@pytest.mark.slow
def test_processes_of_one_call(tmp_path: Path) -> None:
    found = run(tmp_path, "grid", 16, 0.5, processes=2)
    workers = {p for f in tmp_path.glob("cells/*/begun") for p in f.read_text().split()}
    assert len(found.cells) == 16
    assert set(begun(tmp_path).values()) == {1}
    assert len(workers) == 2
    assert str(os.getpid()) not in workers


def test_a_cell_just_measured_is_not_taken_for_a_dead_processs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two searches in one folder, each slow between writing a cell's file and telling the study."""
    tell = study._tell

    def late(*args: Any) -> None:
        time.sleep(0.05)
        tell(*args)

    monkeypatch.setattr(study, "_tell", late)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run, tmp_path, "grid", 16, 0.05) for _ in range(2)]
        assert [len(f.result().cells) for f in both] == [16, 16]
    assert set(begun(tmp_path).values()) == {1}


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "gp"])
def test_samplers_measure_no_cell_twice(tmp_path: Path, sampler: str) -> None:
    """A space of 16 cells, of which a sampler left to itself repeats many."""
    calls: list[Any] = []

    def measure(values: Any, folder: Path) -> dict[str, float]:
        calls.append(json.dumps(values, sort_keys=True))
        return Slow(0)(values, folder)

    names = {"loss": "min", "size": "min"}
    few = 6 if sampler == "gp" else 14
    found = search(same, GRID, measure, tmp_path, objectives=names, trials=few, sampler=sampler)
    assert len(found.cells) == len(calls) == len(set(calls)) == few
    everything = search(same, GRID, measure, tmp_path, objectives=names, trials=50, sampler="random")
    assert len(everything.cells) == len(calls) == len(set(calls)) == 16
    front = everything.front
    assert all(not (o.metrics["loss"] <= c.metrics["loss"] and o.metrics["size"] < c.metrics["size"]) for c in front for o in everything.cells)
    assert front[0] == everything.best
    assert everything.best.metrics["loss"] == min(c.metrics["loss"] for c in everything.cells)
    assert collected(tmp_path) == everything


@pytest.mark.slow
def test_tpe_finds_better_cells_than_chance(tmp_path: Path) -> None:
    space = {f"x{i}": Whole(0, 20) for i in range(3)}

    def measure(values: Any, folder: Path) -> float:
        return float(sum((x - 13) ** 2 for x in values.values()))

    mean = {}
    for sampler in ("random", "tpe"):
        bests = [
            search(same, space, measure, tmp_path / f"{sampler}{seed}", objectives={"loss": "min"}, trials=40, sampler=sampler, seed=seed).best.metrics["loss"]
            for seed in range(3)
        ]
        mean[sampler] = sum(bests) / 3
    assert mean["tpe"] < mean["random"]


def test_cells_that_fail(tmp_path: Path) -> None:
    said: list[str] = []
    broken = True

    def measure(values: Any, folder: Path) -> dict[str, float]:
        if values["x"] == 1:
            raise exapt.InputError("x is 1")
        if values["x"] == 2 and broken:
            raise ZeroDivisionError
        return {"accuracy": float("nan") if values["x"] == 3 else 0.5}

    def go() -> Any:
        return search(same, {"x": Whole(0, 4)}, measure, tmp_path, sampler="grid", show=said.append)

    with pytest.raises(ZeroDivisionError):
        go()
    assert [c.error for c in collected(tmp_path).failed] == ["x is 1"]
    broken = False
    found = go()
    assert [c.values["x"] for c in found.cells] == [0, 2, 4]
    assert [c.error for c in found.failed] == ["x is 1", "accuracy is nan"]
    assert len(said) == 5
    assert json.loads((found.cells[0].folder / "metrics.json").read_text())["metrics"] == {"accuracy": 0.5}
    (found.failed[0].folder / "failure.json").unlink()
    assert go().failed[0].error == "x is 1"  # tried again


def test_invalid_proposals_do_not_count(tmp_path: Path) -> None:
    def build(values: Any) -> Any:
        if values["x"] % 2:
            raise Invalid("odd")
        return values

    found = search(build, {"x": Whole(0, 9)}, lambda v, _: v["x"], tmp_path, trials=5)
    assert sorted(c.values["x"] for c in found.cells) == [0, 2, 4, 6, 8]
    assert not found.failed


def test_methods_fields_and_places_become_rules() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]), "head": nn.Linear(4, 2)})
    places = Places.by_block(model)
    assert [g for g, _ in places.groups] == ["layers.0", "layers.1", "layers.2"]
    space = {"method": Choice([exapt.LoRA(rank=Choice([1, 2])), {"method": "ssf"}]), "where": places}  # type: ignore[arg-type]

    class Fixed:
        def __init__(self, **chosen: Any) -> None:
            self.chosen = chosen

        def suggest_categorical(self, name: str, choices: Any) -> Any:
            return next((c for c in choices if str(c).startswith(str(self.chosen.get(name)))), choices[0])

        def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
            return self.chosen.get(name, low)

        suggest_float = suggest_int

    chosen = {"where[layers.0]": 1, "where[layers.2]": 1}
    rules = rules_of(resolve(space, Fixed(method="lora", **chosen)))
    assert rules == {("layers.0.0", "layers.2.0"): exapt.LoRA(rank=1)}
    assert exapt.parameter_count(exapt.attach(model, rules)).trainable == 2 * 8
    assert rules_of(resolve(space, Fixed(method="ssf", **chosen))) == {("layers.0.0", "layers.2.0"): exapt.SSF()}
    with pytest.raises(Invalid):
        resolve(space, Fixed(method="ssf"))
    assert rules_of({"method": [{"where": "head", "method": "full"}, {"where": [], "method": "ssf"}]}) == {"head": exapt.FullTuning()}


def test_the_pareto_set_of_three_objectives() -> None:
    points = [(1, 2, 3), (2, 1, 3), (1, 2, 4), (3, 3, 1), (3, 3, 2)]
    cells = [Cell(str(i), {}, Path("."), dict(zip("abc", map(float, p), strict=True))) for i, p in enumerate(points)]
    assert {c.name for c in pareto(cells, {"a": "min", "b": "min", "c": "min"})} == {"0", "1", "3"}
    assert [c.name for c in pareto(cells, {"c": "max"})] == ["2"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sampler": "tpee"}, 'did you mean "tpe"'),
        ({"objectives": {"accuracy": "maximum"}}, '"max"'),
        ({"trials": 0}, "at least 1"),
        ({"space": {"x": Real(0, 1)}}, "no finite grid"),
        ({"space": {"x": object()}}, "is no plain data"),
        ({"space": {"y": Whole(0, 1)}}, "another space"),
        ({"context": {"data": "b"}}, "another context"),
        ({"objectives": "f1"}, "another objectives"),
        ({"processes": 2}, "must be importable"),
    ],
)
def test_what_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    def go(space: Any = None, **more: Any) -> Any:
        return search(same, space or {"x": Whole(0, 1)}, lambda v, _: 1.0, tmp_path, **{"context": {"data": "a"}, "sampler": "grid", **more})

    if said.startswith("another"):
        go()
    with pytest.raises(exapt.InputError, match=said.replace("(", r"\(")):
        go(**changed)


def test_values_that_cannot_be() -> None:
    for wrong in (lambda: Choice([]), lambda: Choice([1, 1]), lambda: Whole(2, 1), lambda: Real(0, 1, log=True), lambda: Places({})):
        with pytest.raises(exapt.InputError):
            wrong()
    with pytest.raises(exapt.InputError, match="name no method"):
        rules_of({"rank": 2})
    with pytest.raises(exapt.InputError, match="all empty"):
        rules_of({"method": {"method": "lora"}, "where": []})


def test_a_measure_without_the_objective(tmp_path: Path) -> None:
    found = search(same, {"x": Whole(0, 0)}, lambda v, _: {"f1": 1.0}, tmp_path, sampler="grid")
    assert 'gave no "accuracy"' in found.failed[0].error
    with pytest.raises(exapt.InputError, match="no cell could be measured"):
        _ = found.best
    with pytest.raises(exapt.InputError, match="no search in this folder"):
        collected(tmp_path / "elsewhere")
