"""What needs a process of its own: peak memory of training, the first attach, many adapters, and bytes kept for backward in bfloat16."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import speed_methods as methods
import torch
from speed_cell import ROWS_OF_A_STEP, placed
from speed_clock import saved_bytes, timed
from speed_models import batch, freeze
from torch import nn

import exapt

STEPS = 2


def forked(run: Callable[[], Any], limit: float = 300.0) -> Any:
    """The result of ``run`` in a forked process, where imports and base are there already; ``{"failed": why}`` where it has none,
    or used more than ``limit`` seconds of the processor."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        child = os.fork()
        if child == 0:
            try:
                torch.manual_seed(0)
                out.write_text(json.dumps(run()))
            except BaseException as e:
                out.write_text(json.dumps({"failed": f"{type(e).__name__}: {e}".split("\n")[0][:300]}))
            finally:
                os._exit(0)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if used(child) > limit:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return {"failed": f"not done in {limit:.0f} s"}
            time.sleep(0.05)
        return json.loads(out.read_text()) if out.exists() else {"failed": "the process died"}


def used(process: int) -> float:
    """Processor seconds that another process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(key: str) -> int:
    """A field of the kernel's record of this process, in bytes (VmRSS: now, VmHWM: the highest so far)."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def returned() -> None:
    """Gives back to the system what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def adapter(side: str, key: str, kind: str, base: nn.Module) -> Callable[[], nn.Module]:
    """What turns ``base`` itself into the model of one side; what that needs is made beforehand."""
    if side == "frozen":
        return lambda: freeze(kind, base)
    if side == "whole":
        return lambda: base
    found = methods.statistics(key, kind, base)
    if side == "exapt":
        return lambda: methods.attach(key, kind, base, found)
    import peft

    config = methods.configuration(methods.peer(key, kind, methods.attach(key, kind, copy.deepcopy(base), found)))
    return lambda: peft.get_peft_model(base, config)


def peak(side: str, key: str, kind: str, base: nn.Module, warm: bool = False) -> dict[str, float]:
    """The highest memory of training steps with AdamW above that of the loaded base, and the first attach of a process.

    With ``warm`` a copy is adapted first, so that the libraries a start imports count on neither side.
    """
    small = nn.Linear(8, 8)  # loads what the first step of any training loads
    optimiser = torch.optim.AdamW(small.parameters())
    small(torch.randn(2, 8)).sum().backward()
    optimiser.step()
    base = placed(base)
    on_gpu = torch.cuda.is_initialized()
    make = adapter(side, key, kind, base)
    if warm:
        adapter(side, key, kind, copy.deepcopy(base))()
    data = batch(kind, base, ROWS_OF_A_STEP, labels=True)
    data = data if side in ("frozen", "whole") else methods.inputs(key, kind, data)
    returned()
    before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    held: list[Any] = []
    attach = timed(lambda: held.append(make()))
    model = held[0].train()
    returned()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    own = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(own, lr=1e-4) if own else None  # type: ignore[assignment]
    for _ in range(STEPS):
        methods.loss(key if side == "exapt" else "", model, data).backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    highest = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    return {"peak": highest - before, "first_attach": attach}


def many(side: str, kind: str, base: nn.Module, count: int) -> dict[str, Any]:
    """Seconds of loading one adapter file after the other onto one model, under as many names."""
    import peft

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "ours.safetensors"
        model: Any = adapter(side, "lora", kind, copy.deepcopy(base))()
        exapt.save(model, path) if side == "exapt" else model.save_pretrained(name)
        model, seconds = base, []
        for i in range(count):

            def one(i: int = i) -> None:
                nonlocal model
                if side == "exapt":
                    exapt.load(model, path, name=f"a{i}")
                elif i == 0:
                    model = peft.PeftModel.from_pretrained(model, name, adapter_name="a0")
                else:
                    model.load_adapter(name, f"a{i}")
                    model.set_adapter(f"a{i}")

            seconds.append(timed(one))
    return {"loads": seconds}


def kept(side: str, kind: str, base: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Bytes kept for backward by LoRA, or by full fine-tuning ("whole")."""
    model = adapter(side, "lora", kind, base.to(dtype))().train()
    return saved_bytes(model, batch(kind, base, ROWS_OF_A_STEP, labels=True))


def whole(kind: str, base: nn.Module, repeats: int, count: int) -> dict[str, Any]:
    """What is measured of LoRA alone, in fresh processes that take turns."""
    out: dict[str, Any] = {"count": count, "kept": {}, "many": {"exapt": [], "peft": []}, "peak": {}, "first_attach": {}}
    for _ in range(repeats):
        for side in ("exapt", "peft", "frozen", "whole"):
            found = forked(partial(peak, side, "lora", kind, base))
            for row in ("peak", "first_attach") if side in ("exapt", "peft") else ("peak",):
                out[row].setdefault(side, []).append(found[row])
    for side in ("exapt", "peft"):
        out["many"][side] = forked(partial(many, side, kind, base, count), 900)["loads"]
    for dtype in (torch.float32, torch.bfloat16):
        for side in ("exapt", "peft", "whole"):
            out["kept"][f"{side} {str(dtype).removeprefix('torch.')}"] = forked(partial(kept, side, kind, base, dtype))
    return out
