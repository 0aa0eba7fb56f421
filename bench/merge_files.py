"""Merging models in files: time and peak memory of exapt, and of mergekit where it is installed, on the same models, round after round.

``python bench/merge_files.py --rules linear task_arithmetic ties --models 8`` makes models of Llama's shape with random weights (a base and small
differences from it), merges them in processes of their own, the sides in turns, and prints a table, and adds it to a JSON file with ``--json``. ``--other
PYTHON`` names another interpreter that has mergekit and exapt. What is timed is the call, after imports and a merge of two small models; exapt's includes
syncing to the disk, which mergekit does not do (``exapt_unsynced`` is without). exapt computes in single precision whatever the files' type is; mergekit
in the files' type, and as ``mergekit_float32`` as exapt does. CPU seconds are there because wall-clock time means little on a busy machine. Memory is the
highest resident size above that before the call, pages of mapped files included, over the size of one model's only file. ``ratio`` is mergekit's time over
exapt's (synced) in the same round: median, least and greatest; above 1 exapt is faster. Outputs may differ where sizes are equal at TIES's threshold
(mergekit sorts, and takes any), and DARE draws other masks on the two sides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SIDES = ("exapt", "exapt_unsynced", "mergekit", "mergekit_float32")
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # mergekit's name: exapt's key, its settings, mergekit's
    "linear": ("average", {}, {}),
    "task_arithmetic": ("task_arithmetic", {}, {}),
    "ties": ("ties", {"density": 0.2}, {"density": 0.2}),
    "dare_linear": ("dare", {"density": 0.5, "rescale": "l1"}, {"density": 0.5, "rescale": True}),
    "slerp": ("slerp", {"t": 0.3}, {"t": 0.3}),
}
WITHOUT_BASE = ("linear", "slerp")


def tensors(width: int, layers: int, words: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama."""
    inner, shapes = 8 * width // 3 // 16 * 16, {"model.embed_tokens.weight": (words, width)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,)}


def make(folder: Path, width: int, layers: int, words: int, dtype: torch.dtype, seed: int) -> None:
    """Writes one model: the base's weights for seed 0, others a little off it."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": 8 * width // 3 // 16 * 16,
        "num_hidden_layers": layers, "num_attention_heads": max(1, width // 64), "num_key_value_heads": max(1, width // 64), "vocab_size": words,
        "tie_word_embeddings": True, "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    made = {}
    for i, (name, shape) in enumerate(tensors(width, layers, words).items()):
        base = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        off = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + i))
        made[name] = (base + (0.02 * off if seed else 0)).to(dtype)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})


def memory(key: str) -> int:
    """A field of the kernel's record of this process, in bytes."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def processor() -> str:
    """The processor's name."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def version_of(python: str) -> str | None:
    """mergekit's version in an interpreter's environment."""
    asked = "from importlib import metadata; print(metadata.version('mergekit'))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True)
    return done.stdout.strip() or None


def ours(side: str, rule: str, models: list[str], base: str | None, output: str, dtype: str) -> None:
    from exapt.algebra.files import merge_files

    key, settings, _ = SETTINGS[rule]
    merge_files(key, models[:2] if rule == "slerp" else models, output, base=base, **settings)


def theirs(side: str, rule: str, models: list[str], base: str | None, output: str, dtype: str) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    settings = SETTINGS[rule][2]
    two = {"models": [{"model": m} for m in models[:2]], "base_model": models[0], "parameters": settings}
    listed = {"models": [{"model": m, "parameters": {"weight": 1.0, **settings}} for m in models]}
    types = {"dtype": "float32", "out_dtype": dtype} if side == "mergekit_float32" else {"dtype": dtype}
    config = {"merge_method": rule, **(two if rule == "slerp" else listed), **types} | ({"base_model": base} if base else {})
    run_merge(MergeConfiguration.model_validate(config), output, MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, lazy_unpickle=True))


def work(side: str, rule: str, models: list[str], base: str | None, folder: str, dtype: str) -> dict[str, Any]:
    """One merge in this process, after one of small models."""
    torch.set_num_threads(1)
    run = theirs if side.startswith("mergekit") else ours
    for i in range(3):
        make(Path(folder) / f"warm{i}", 64, 1, 16384, getattr(torch, dtype), i)
    warm = [str(Path(folder) / f"warm{i}") for i in range(3)]
    run(side, rule, warm[1:], warm[0] if base else None, str(Path(folder) / "warm"), dtype)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    started, cpu = time.perf_counter(), time.process_time()
    run(side, rule, models, base, str(Path(folder) / "out"), dtype)
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "peak": memory("VmHWM") - before}


def server(python: str) -> subprocess.Popen[str]:
    """A process that has imported everything, and merges in children of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def serve() -> None:
    """Takes one job a line, until there are no more."""
    if util.find_spec("mergekit") is not None:
        import mergekit.merge  # noqa: F401
    for line in sys.stdin:
        if os.fork() == 0:
            job = json.loads(line)
            if "unsynced" in job["side"]:
                os.fsync = lambda fd: None
            print("\n" + json.dumps(work(**job)), flush=True)
            os._exit(0)
        if os.wait()[1]:
            return


def round_of(servers: dict[str, subprocess.Popen[str]], args: argparse.Namespace, models: list[Path], rule: str, place: Path) -> dict[str, Any]:
    """Every side once, each merge in a process of its own; and by how much the outputs differ."""
    found: dict[str, Any] = {}
    base = None if rule in WITHOUT_BASE else str(models[0])
    merged = {}
    for side, running in servers.items():
        with tempfile.TemporaryDirectory(dir=place) as folder:
            job = {"side": side, "rule": rule, "models": [str(m) for m in models[1:]], "base": base, "folder": folder, "dtype": args.dtype}
            assert running.stdin is not None
            assert running.stdout is not None
            print(json.dumps(job), file=running.stdin, flush=True)
            found[side] = json.loads(next((line for line in running.stdout if line.startswith("{")), "null"))
            if found[side] is None:
                raise SystemExit(f"{side} has failed")
            merged[side] = {n: t for f in sorted((Path(folder) / "out").glob("*.safetensors")) for n, t in load_file(f).items()}
    if "mergekit_float32" in merged and rule != "dare_linear":
        a, b = merged["exapt"], merged["mergekit_float32"]
        found["difference"] = max(float((a[n].double() - b[n].double()).abs().max()) for n in a)
    return found


def row_of(rounds: list[dict[str, Any]], python: dict[str, str], rule: str, shard: int) -> dict[str, Any]:
    """What the rounds of one rule came to, which is printed too."""
    row: dict[str, Any] = {s: {k: [r[s][k] for r in rounds] for k in ("seconds", "cpu", "peak")} for s in python}
    row["difference"] = rounds[0].get("difference")
    for side in python:
        row[side]["shards"] = max(row[side]["peak"]) / shard
        seconds, cpu = row[side]["seconds"], statistics.median(row[side]["cpu"])
        said = f"{rule:16} {side:17} {statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), CPU {cpu:.2f} s"
        said += f", peak {row[side]['shards']:.2f} shards"
        if side.startswith("mergekit"):
            for what in ("seconds", "cpu"):
                ratios = [r[side][what] / r["exapt"][what] for r in rounds]
                row[side][f"ratio_{what}"] = [statistics.median(ratios), min(ratios), max(ratios)]
            said += ", over exapt {:.2f} ({:.2f} to {:.2f})".format(*row[side]["ratio_seconds"])
        print(said, flush=True)
    if row["difference"] is not None:
        print(f"{rule:16} largest difference {row['difference']:.2g}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rules", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=3, default=(576, 12, 16384), metavar=("WIDTH", "LAYERS", "WORDS"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--other")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    python = {side: sys.executable for side in SIDES if side.startswith("exapt")}
    if args.other or util.find_spec("mergekit") is not None:
        python |= {side: args.other or sys.executable for side in SIDES if side not in python}
    before = json.loads(args.json.read_text())["runs"] if args.json and args.json.exists() else []
    python = {side: python[side] for side in args.sides if side in python}
    with tempfile.TemporaryDirectory(dir=args.folder) as place, contextlib.ExitStack() as closing:
        servers = {side: closing.enter_context(server(interpreter)) for side, interpreter in python.items()}
        models = [Path(place) / f"m{i}" for i in range(args.models + 1)]
        for i, model in enumerate(models):
            make(model, *args.shape, getattr(torch, args.dtype), i)
        shard = (models[0] / "model.safetensors").stat().st_size
        result: dict[str, Any] = {"models": args.models, "shape": list(args.shape), "dtype": args.dtype, "shard": shard, "rounds": args.rounds, "rules": {}}
        largest = max(torch.Size(s).numel() for s in tensors(*args.shape).values()) * getattr(torch, args.dtype).itemsize
        result |= {"largest_tensor": largest, "torch": torch.__version__, "exapt": metadata.version("exapt"), "python": platform.python_version()}
        result |= {"mergekit": version_of(args.other or sys.executable), "processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        for rule in args.rules:
            rounds = [round_of(servers, args, models, rule, Path(place)) for _ in range(args.rounds)]
            result["rules"][rule] = row_of(rounds, python, rule, shard)
            if args.json:  # after every rule: a long run that is stopped has not been for nothing
                args.json.write_text(json.dumps({"runs": [*before, result]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
