"""Merging models in files: equal to merging them in memory, whole or not there, refusals before anything is written."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import exapt
from exapt.algebra import files, plan
from exapt.algebra.files import clear_leftovers, merge_files
from exapt.algebra.rules.average import averaged
from exapt.algebra.rules.task_arithmetic import summed
from exapt.algebra.shards import INDEX, SINGLE, Shards, laid_out, size_of
from exapt.algebra.tensors import merge_tensors

Tree = dict[str, Tensor]
SHAPES = {"b.weight": (6, 5), "a.weight": (4, 3, 2), "a.bias": (7,), "scale": ()}


def tree(seed: int, dtype: torch.dtype = torch.float32) -> Tree:
    g = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(s, generator=g).to(dtype) for n, s in SHAPES.items()}
    return made | {"norm": torch.randn(3, generator=g), "positions": torch.arange(3), "mask": torch.tensor([True, False]), "none": torch.empty(0, 3)}


def put(path: Path, tensors: Tree, **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("of the base")
    (path / "optimizer.pt").write_bytes(b"state")
    return path


def put_sharded(path: Path, tensors: Tree) -> Path:
    """Every tensor in a shard of its own."""
    path.mkdir()
    places = {}
    for i, (name, t) in enumerate(tensors.items()):
        places[name] = f"part-{i}.safetensors"
        save_file({name: t}, path / places[name])
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def whole(path: Path) -> Tree:
    return {n: t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()} if path.is_dir() else load_file(path)


def assert_same(a: Tree, b: Tree) -> None:
    assert set(a) == set(b)
    for n in a:
        assert a[n].dtype == b[n].dtype
        assert torch.equal(a[n], b[n]), n


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if ".merging-" in p.name]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """The base, a model in one file, one in shards, one that is a file."""
    save_file(tree(3), tmp_path / "three.safetensors")
    return [
        put(tmp_path / "base", tree(0), torch_dtype="float32"),
        put(tmp_path / "one", tree(1)),
        put_sharded(tmp_path / "two", tree(2)),
        tmp_path / "three.safetensors",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rule", "config"), [("average", {}), ("task_arithmetic", {"scale": 0.3})])
def test_equals_merging_in_memory(tmp_path: Path, rule: str, config: dict[str, float], dtype: torch.dtype) -> None:
    trees = [tree(i, dtype) for i in range(4)]
    paths = [put(tmp_path / f"m{i}", t) for i, t in enumerate(trees)]
    made = merge_files(rule, paths[1:], tmp_path / "out", base=paths[0], weights=[0.5, 0.2, 0.3], **config)
    assert_same(whole(tmp_path / "out"), merge_tensors(rule, trees[1:], trees[0], [0.5, 0.2, 0.3], **config))
    assert (made.path, made.tensors, made.shards) == (tmp_path / "out", len(trees[0]), 1)
    assert made.bytes == (tmp_path / "out" / SINGLE).stat().st_size


def test_forms_of_models_and_output(models: list[Path], tmp_path: Path) -> None:
    expected = merge_tensors("average", [tree(i) for i in range(1, 4)])
    made = merge_files("average", models[1:], tmp_path / "file.safetensors")
    assert_same(load_file(tmp_path / "file.safetensors"), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "file.safetensors", "one", "three.safetensors", "two"]
    made = merge_files("average", models[1:], tmp_path / "deep" / "folder", base=models[0], shard_size=130, weights=[1, 1, 1])
    names = sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir())
    shards = [f"model-{i:05d}-of-{made.shards:05d}.safetensors" for i in range(1, made.shards + 1)]
    assert made.shards > 1
    assert names == ["config.json", *shards, INDEX, "tokenizer.json"]  # no description, no optimizer's state
    assert_same(whole(tmp_path / "deep" / "folder"), expected)
    index = json.loads((tmp_path / "deep" / "folder" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "deep" / "folder" / shard)
    assert_same(dict(Shards(tmp_path / "deep" / "folder")), expected)  # it can be merged again


def test_files_are_as_any_other(models: list[Path], tmp_path: Path) -> None:
    """Aligned as the format asks, readable by everyone the user's mask lets, with a note of how they were made."""
    mask = os.umask(0o022)
    try:
        merge_files("average", models[1:], tmp_path / "out", seed=4)
    finally:
        os.umask(mask)
    file = tmp_path / "out" / SINGLE
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert file.stat().st_mode & 0o777 == 0o644
    with safe_open(file, "pt") as f:
        noted = f.metadata()
    assert noted["format"] == "pt"
    assert json.loads(noted["merged"]) | {"exapt": ""} == {
        "exapt": "", "rule": "averaged", "config": {"normalise": True}, "models": ["one", "two", "three.safetensors"], "base": None, "weights": None, "seed": 4,
    }  # fmt: skip
    layout = laid_out(tmp_path, {"i": (torch.uint8, (3,)), "h": (torch.bfloat16, (3,)), "d": (torch.float64, (3,))}, 1e9, {})
    assert len(layout.headers[0]) % 8 == 0
    assert all(s.start % s.dtype.itemsize == 0 for s in layout.shards[0].values())


def test_a_rule_that_works_entry_by_entry_is_given_parts(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def mean(models: Tensor, weights: Tensor | None = None) -> Tensor:
        sizes.append(models[0].numel())
        return averaged(models, weights)

    def sums(deltas: Tensor, weights: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        assert base is not None
        base.add_(0)  # what a rule is given can be written to, unlike the file's own pages
        return summed(deltas, weights)

    monkeypatch.setattr(plan, "BLOCK", 10)  # five entries of each of three models and the base
    expected = {r: merge_tensors(r, [tree(i) for i in range(1, 4)], tree(0), [0.5, 0.2, 0.3]) for r in ("average", "task_arithmetic")}
    for key, rule in (("average", mean), ("task_arithmetic", sums)):
        for parts in (False, True):
            rule.entrywise = parts  # type: ignore[attr-defined]
            out = tmp_path / f"{key}-{parts}.safetensors"
            sizes.clear()
            merge_files(rule, models[1:], out, base=models[0], weights=[0.5, 0.2, 0.3])
            assert_same(load_file(out), expected[key])
            if key == "average":
                assert max(sizes) == (5 if parts else 30)


def test_other_types_are_written(tmp_path: Path) -> None:
    a, b = tree(1, torch.bfloat16), tree(2, torch.float32)
    paths = [put(tmp_path / "a", a, torch_dtype="bfloat16"), put(tmp_path / "b", b)]
    with pytest.raises(exapt.InputError, match=r"a\.bias: .*b is torch.float32, .*a torch.bfloat16; give the type to write with dtype="):
        merge_files("average", paths, tmp_path / "out")
    merge_files("average", paths, tmp_path / "out", dtype="float16")
    expected = merge_tensors("average", [{n: t.float() if t.is_floating_point() else t for n, t in m.items()} for m in (a, b)])
    assert_same(whole(tmp_path / "out"), {n: t.half() if t.is_floating_point() else t for n, t in expected.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"
    with pytest.raises(exapt.InputError, match=r"dtype is 'int8'; it must be one of float32"):
        merge_files("average", paths, tmp_path / "more", dtype="int8")


def test_statistics_from_files(models: list[Path], tmp_path: Path) -> None:
    def weighted(models: Tensor, statistics: list[Tensor] | None = None) -> Tensor:
        s = torch.ones_like(models) if statistics is None else torch.stack(list(statistics))
        return (s * models).sum(0) / s.sum(0)

    stats = [{n: torch.rand(t.shape) + 1 for n, t in tree(i).items() if t.is_floating_point() and n != "norm"} for i in range(3)]
    for i, s in enumerate(stats):
        save_file(s, tmp_path / f"s{i}.safetensors")
    expected = merge_tensors(weighted, [tree(i) for i in range(1, 4)], statistics=stats)
    for name, parts in (("whole", False), ("parts", True)):
        weighted.entrywise = parts  # type: ignore[attr-defined]
        merge_files(weighted, models[1:], tmp_path / name, statistics=[tmp_path / f"s{i}.safetensors" for i in range(3)])
        assert_same(whole(tmp_path / name), expected)
    merge_files(weighted, models[1:], tmp_path / "mappings", statistics=stats)
    assert_same(whole(tmp_path / "mappings"), expected)


def test_unaligned_files_are_read(tmp_path: Path) -> None:
    """The format does not ask writers for alignment."""
    header = json.dumps({"i": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}).encode()
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x07" + data)
    assert_same(dict(Shards(tmp_path / "m.safetensors")), {"i": torch.tensor([7], dtype=torch.uint8), "w": torch.tensor([1.5, -2.0])})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a.bias": None}, r"one lacks a\.bias; models must hold the same tensors"),
        ({"new": torch.zeros(1)}, r"one has new besides"),
        ({"a.bias": torch.zeros(8)}, r"a\.bias: .*one has shape \(8,\), .*base \(7,\); only models of one architecture"),
        ({"a.bias": torch.zeros(7, dtype=torch.float16)}, r"a\.bias: .*one is torch.float16, .*base torch.float32; give the type to write"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, r"positions: .*one is torch.int32, .*base torch.int64; they must be of one type"),
        ({"w8": torch.zeros(2).to(torch.float8_e4m3fn)}, r"w8 is of type F8_E4M3; quantised weights cannot be merged"),
    ],
)
def test_refusals_from_the_headers(models: list[Path], tmp_path: Path, change: Tree, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_written_to", None)  # nothing is even begun
    save_file({n: t for n, t in (tree(1) | change).items() if t is not None}, models[1] / SINGLE)
    with pytest.raises(exapt.InputError, match=says):
        merge_files("average", models[1:], tmp_path / "out", base=models[0])


def test_nan_in_one_of_eight_models(models: list[Path], tmp_path: Path) -> None:
    bad = tree(1)
    bad["scale"] = torch.tensor(float("nan"))  # the last that is merged: others have been written by then
    save_file(bad, tmp_path / "bad.safetensors")
    eight = [*models[1:], models[1], tmp_path / "bad.safetensors", *models[1:]]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(exapt.InputError, match=r"scale: .*bad\.safetensors holds NaN or infinity"):
        merge_files("average", eight, tmp_path / "out")
    save_file(bad, models[0] / SINGLE)
    with pytest.raises(exapt.InputError, match=r"scale: "):
        merge_files("task_arithmetic", models[1:], tmp_path / "out", base=models[0])
    assert sorted(tmp_path.iterdir()) == before
    half = [{"w": torch.full((2,), 6e4, dtype=torch.float16)}] * 2
    for i, t in enumerate(half):
        save_file(t, tmp_path / f"h{i}.safetensors")
    with pytest.raises(exapt.InputError, match=r"w: merged by averaged it holds NaN or infinity in torch.float16; look at"):
        merge_files("average", [tmp_path / "h0.safetensors", tmp_path / "h1.safetensors"], tmp_path / "out", normalise=False)


def test_refused_arguments(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for says, arguments in (
        (r"there is no model", ("average", [], out)),
        (r"merges differences from the base; give base=", ("task_arithmetic", models[1:], out)),
        (r"2 weights \[1, 2\] for 3 models", ("average", models[1:], out, None, [1, 2])),
        (r"no merge rule \"averag\"; did you mean \"average\"", ("averag", models[1:], out)),
        (r"nothing: no such file or folder", ("average", [tmp_path / "nothing"], out)),
    ):
        with pytest.raises(exapt.InputError, match=says):
            merge_files(*arguments)  # type: ignore[arg-type]
    with pytest.raises(exapt.InputError, match='averaged has no "normalize"; did you mean "normalise"'):
        merge_files("average", models[1:], out, normalize=False)
    with pytest.raises(exapt.InputError, match="averaged: 3 statistics for 3 models; give them to none, which this rule does not use"):
        merge_files("average", models[1:], out, statistics=models[1:])
    with pytest.raises(exapt.InputError, match="fisher_weighted: 1 statistics for 3 models; give them for each of the models"):
        merge_files("fisher", models[1:], out, statistics=models[1:2])
    with pytest.raises(exapt.InputError, match="'5 apples' is no size"):
        merge_files("average", models[1:], out, shard_size="5 apples")
    assert not out.exists()
    assert size_of("1.5 GB") == 1_500_000_000


def test_refused_files(models: list[Path], tmp_path: Path) -> None:
    def refused(path: Path, says: str) -> None:
        with pytest.raises(exapt.InputError, match=says):
            merge_files("average", [models[1], path], tmp_path / "out")

    folder = tmp_path / "folder"
    folder.mkdir()
    refused(folder, "holds neither model.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    refused(folder, "holds only pytorch_model.bin, a pickle, which exapt never loads")
    refused(folder / "pytorch_model.bin", "a pickle")
    (folder / SINGLE).write_bytes((models[1] / SINGLE).read_bytes()[:-3])
    refused(folder, "not a whole safetensors file")
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text('{"weight_map": {"w": "../one/model.safetensors"}}')
    refused(folder, 'names the shard "../one/model.safetensors" outside its own folder')
    (folder / INDEX).write_text('{"weight_map": {"w": "gone.safetensors"}}')
    refused(folder, "names the shard gone.safetensors, which is missing")
    (folder / INDEX).write_text("[]")
    refused(folder, "cannot be read as an index")
    shutil.copy(models[1] / SINGLE, folder / "part.safetensors")
    (folder / INDEX).write_text('{"weight_map": {"w": "part.safetensors"}}')
    refused(folder, "holds no w, which the index says it does")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "an adapter, not a model; exapt merge-adapters merges those")
    model = exapt.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), exapt.LoRA(rank=1), where="all")
    refused(exapt.save(model, tmp_path / "shift"), "an exapt adapter, not a model")


def test_an_output_that_is_there(models: list[Path], tmp_path: Path) -> None:
    merge_files("average", models[1:], tmp_path / "out", shard_size=130)
    old = whole(tmp_path / "out")
    with pytest.raises(exapt.InputError, match="out: is there already; name another output, or pass overwrite=True"):
        merge_files("average", models[1:], tmp_path / "out")
    with pytest.raises(exapt.InputError, match="is, or holds, the model"):
        merge_files("average", models[1:], models[1], overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"")
    with pytest.raises(exapt.InputError, match="is no model that a merge wrote, and is not replaced"):
        merge_files("average", models[1:], tmp_path / "photos", overwrite=True)
    save_file(tree(3) | {"norm": torch.full((3,), float("inf"))}, tmp_path / "bad.safetensors")
    with pytest.raises(exapt.InputError, match="holds NaN"):
        merge_files("average", [models[1], tmp_path / "bad.safetensors"], tmp_path / "out", overwrite=True)
    assert_same(whole(tmp_path / "out"), old)
    merge_files("average", models[1:3], tmp_path / "out", overwrite=True)
    assert_same(whole(tmp_path / "out"), merge_tensors("average", [tree(1), tree(2)]))
    assert not (tmp_path / "out" / INDEX).exists()
    assert not leftovers(tmp_path)


def test_a_full_disk(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(exapt.InputError, match=r"the merged model takes 0\.00 GB, the disk has 0\.00 GB; make room"):
            merge_files("average", models[1:], tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(exapt.InputError, match=r"out: could not be written \(File too large\); nothing was left of it, make room"):
            merge_files("average", models[1:], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)


def slowly(target: Path, models: list[Path], seconds: float) -> tuple[Any, Any]:
    """Another process that merges, and says so at every tensor."""
    here, there = multiprocessing.Pipe()

    def slow(models: Tensor) -> Tensor:
        there.send(len(models))
        time.sleep(seconds)
        return models.mean(0)

    run = multiprocessing.get_context("fork").Process(target=merge_files, args=(slow, models, target), kwargs={"overwrite": True, "shard_size": 130})
    run.start()
    return run, here


def killed(target: Path, models: list[Path]) -> None:
    run, said = slowly(target, models, 0.1)
    for _ in range(3):  # two tensors have been written
        said.recv()
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL


def test_killed_half_way(models: list[Path], tmp_path: Path) -> None:
    killed(tmp_path / "out", models[1:])
    assert not (tmp_path / "out").exists()
    (left,) = leftovers(tmp_path)
    assert left.name.startswith(".out.merging-")
    assert any(f.stat().st_size for f in left.rglob("*.safetensors"))
    merge_files("average", models[1:], tmp_path / "out")
    assert not leftovers(tmp_path)
    old = whole(tmp_path / "out")
    assert_same(old, merge_tensors("average", [tree(i) for i in range(1, 4)]))
    killed(tmp_path / "out", models[1:])  # with an older output in place
    assert_same(whole(tmp_path / "out"), old)
    assert clear_leftovers(tmp_path / "out")
    assert not leftovers(tmp_path)


def test_a_run_that_is_alive_is_left_alone(models: list[Path], tmp_path: Path) -> None:
    run, said = slowly(tmp_path / "out", models[1:], 60)
    said.recv()
    (other,) = leftovers(tmp_path)
    assert clear_leftovers(tmp_path / "out") == []
    merge_files("average", models[1:], tmp_path / "out")
    assert leftovers(tmp_path) == [other]
    run.kill()
    run.join()
    assert clear_leftovers(tmp_path / "out") == [other]
    assert not leftovers(tmp_path)


def test_killed_between_the_two_steps_of_replacing_a_folder(models: list[Path], tmp_path: Path) -> None:
    merge_files("average", models[1:], tmp_path / "out")
    old = whole(tmp_path / "out")
    holder = tmp_path / ".out.merging-x"
    holder.mkdir()
    os.replace(tmp_path / "out", holder / "old")
    assert clear_leftovers(tmp_path / "out") == [holder]
    assert_same(whole(tmp_path / "out"), old)
