"""What one fresh process measures: ``python bench/_work.py '{"case": ..., "model": ...}' OUT.json``."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import sys
import tempfile
import unittest.mock
import warnings
from pathlib import Path
from typing import Any

import torch
from _models import attach, batch, build, saved_bytes, stepper, timed, unwrapped

ADAPTERS = 40


def memory(key: str) -> int:
    """A field of the kernel's record of this process, in bytes (VmRSS: now, VmHWM: the highest so far)."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def peak_of_steps(model: Any, steps: int) -> int:
    """The highest resident memory of training above that of the loaded model."""
    small = torch.nn.Linear(8, 8)  # loads what the first step of any training loads
    optimizer = torch.optim.AdamW(small.parameters())
    small(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    step = stepper(model)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(steps):
        step()
    return memory("VmHWM") - before


def save(side: str, model: Any, folder: Path) -> None:
    if side == "exapt":
        import exapt

        exapt.save(model, folder / "adapter.safetensors")
    else:
        model.save_pretrained(folder)


def load(side: str, model: Any, folder: Path, name: str) -> Any:
    """``model`` with one more adapter, from its file."""
    if side == "exapt":
        import exapt

        return exapt.load(model, folder / "adapter.safetensors", name=name)
    import peft

    if isinstance(model, peft.PeftModel):
        model.load_adapter(folder, name)
        model.set_adapter(name)
        return model
    return peft.PeftModel.from_pretrained(model, folder, adapter_name=name)


def life(side: str, kind: str, repeats: int) -> dict[str, Any]:
    """What depends on the state of the process: the first attach, peak memory, files, many adapters."""
    for package in ("exapt", "peft"):  # both on both sides: neither pays the other's import
        importlib.import_module(package)
    out: dict[str, Any] = {"side": side}
    model = build(kind).train()
    held: list[Any] = []
    if side in ("exapt", "peft"):
        out["attach"] = timed(lambda: held.append(attach(side, model, kind)))
        out["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    else:
        held.append(attach(side, model, kind))
    out["peak"] = peak_of_steps(held[0], 3)
    if side not in ("exapt", "peft"):
        return out
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out["save"] = [timed(lambda: save(side, held[0], folder)) for _ in range(repeats)]
        with unittest.mock.patch("os.fsync", return_value=None):
            out["save_unsynced"] = [timed(lambda: save(side, held[0], folder)) for _ in range(repeats)]
        out["file"] = sum(os.path.getsize(f) for f in folder.iterdir())
        fresh: Any = build(kind)
        loads = []
        for i in range(ADAPTERS):

            def one(i: int = i) -> None:
                nonlocal fresh
                fresh = load(side, fresh, folder, f"a{i}")

            loads.append(timed(one))
    out["load"], out["forty"] = loads[0], loads
    return out


def pair(kind: str, repeats: int) -> dict[str, Any]:
    """What can be interleaved in one process: steps, forwards and merging, side by side, round after round."""
    base = build(kind).train()
    sides = {side: attach(side, copy.deepcopy(base), kind) for side in ("frozen", "exapt", "peft", "full")}
    out: dict[str, Any] = {k: {s: [] for s in sides} for k in ("step", "forward_1", "forward_16", "attach_warm", "merge", "unmerge")}
    steps = {side: stepper(model) for side, model in sides.items() if side != "full"}
    for i in range(repeats + 1):
        for side, step in steps.items():
            seconds = timed(step)
            if i:
                out["step"][side].append(seconds)
    for rows in (1, 16):
        for i in range(repeats + 1):
            for side in ("full", "exapt", "peft"):
                model = sides[side].eval()
                inputs = {"input_ids": batch(unwrapped(model), rows)["input_ids"]}
                with torch.no_grad():
                    seconds = timed(lambda model=model, inputs=inputs: model(**inputs))
                if i:
                    out[f"forward_{rows}"]["frozen" if side == "full" else side].append(seconds)
    for _ in range(repeats):
        merging(sides, out)
        for side in ("exapt", "peft"):
            fresh = copy.deepcopy(base)
            out["attach_warm"][side].append(timed(lambda side=side, fresh=fresh: attach(side, fresh, kind)))
    return {k: {s: v for s, v in found.items() if v} for k, found in out.items()}


def merging(sides: dict[str, Any], out: dict[str, Any]) -> None:
    """Merges and unmerges once on each side; exapt hangs its adapter on again, as PEFT's stays."""
    import exapt

    model = sides["exapt"]
    tensors = {n: p.detach().clone() for n, p in exapt.trainable(model).items()}
    out["merge"]["exapt"].append(timed(lambda: exapt.merge(model)))
    out["unmerge"]["exapt"].append(timed(lambda: exapt.unmerge(model)))
    if not exapt.adapters(model):
        exapt.attach(model, exapt.LoRA(rank=8))
    with torch.no_grad():
        for n, p in exapt.trainable(model).items():
            p.copy_(tensors[n])
    out["merge"]["peft"].append(timed(sides["peft"].merge_adapter))
    out["unmerge"]["peft"].append(timed(sides["peft"].unmerge_adapter))


def saved(kind: str) -> dict[str, Any]:
    """Bytes kept for backward: LoRA by exapt and by PEFT, and full fine-tuning, in single precision and bfloat16."""
    out: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for side in ("exapt", "peft", "full"):
            model = attach(side, build(kind).to(dtype).train(), kind)
            out[f"{side} {str(dtype).removeprefix('torch.')}"] = saved_bytes(model, batch(unwrapped(model), 4))
    return out


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    case = job.pop("case")
    result = {"life": life, "pair": pair, "saved": saved}[case](**job)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
