"""Many adapters on one model: ``python bench/many.py`` measures and writes ``bench/results/many.json``.

Mixed batches, switching, what resident adapters cost, loading a file of 1 MB, and decoding one token, beside the bare base and PEFT where it
has the same. Ratios are of neighbours in one process (A B A B), of processor time on one thread, with a bootstrap interval of the
median. ``--quick`` does it all once on a tiny model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from speed import machine
from speed_models import build
from speed_table import interval
from torch import nn

import exapt

RANKS = (4, 8, 16)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The names that make PEFT take the sites that exapt takes by default."""
MIXED = ("lora", "lora_fa", "lora_xs", "dora", "ia3", "adapter")


def interleaved(sides: dict[str, Callable[[], Any]], repeats: int, below: str = "base") -> dict[str, Any]:
    """Processor seconds of every side, round by round, and the intervals of their ratios to one."""
    seconds: dict[str, list[float]] = {k: [] for k in sides}
    for i in range(repeats + 1):
        for name, run in sides.items():
            gc.collect()
            gc.disable()
            start = time.process_time()
            run()
            if i:  # the first round warms up
                seconds[name].append(time.process_time() - start)
            gc.enable()
    ratios = {k: interval([a / b for a, b in zip(v, seconds[below], strict=True)]) for k, v in seconds.items() if k != below}
    return {"seconds": seconds, "ratio_to_" + below: ratios}


def lora_pair(base: nn.Module, n: int) -> tuple[nn.Module, Any]:
    """The model with ``n`` LoRAs of mixed ranks, by exapt and by PEFT."""
    import peft

    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    wrapped: Any = None
    for i in range(n):
        r = RANKS[i % len(RANKS)]
        exapt.attach(ours, exapt.LoRA(rank=r), name=f"a{i}", trainable=False)
        config = peft.LoraConfig(r=r, target_modules=TARGETS, init_lora_weights=False)
        if wrapped is None:
            wrapped = peft.get_peft_model(theirs, config, adapter_name="a0")
        else:
            wrapped.add_adapter(f"a{i}", config)
    return ours.eval(), wrapped.eval()


def mixed(base: nn.Module, shapes: list[tuple[int, int, int, str]], repeats: int) -> dict[str, Any]:
    """Batches of ``rows`` x ``length`` tokens whose rows use ``n`` adapters, in turn or at random; equal to PEFT's in what is done, not in values."""
    found: dict[str, Any] = {}
    ours, theirs = lora_pair(base, max(n for n, *_ in shapes))
    for n, rows, length, order in shapes:
        ids = torch.randint(0, base.config.vocab_size, (rows, length))  # type: ignore[union-attr]
        names = [f"a{i * n // rows}" if order == "in turn" else f"a{random.randrange(n)}" for i in range(rows)]

        def routed(names: list[str] = names, ids: Any = ids) -> None:
            with exapt.routed(ours, names):
                ours(ids, use_cache=False)

        with torch.no_grad():
            sides = {
                "base": lambda ids=ids: base(ids, use_cache=False),
                "exapt": routed,
                "peft": lambda ids=ids, names=names: theirs(input_ids=ids, adapter_names=names, use_cache=False),
            }
            found[f"{n} adapters, {rows} x {length}, {order}"] = interleaved(sides, repeats)
    return found


def kinds(base: nn.Module, rows: int, length: int, repeats: int) -> dict[str, Any]:
    """A batch whose rows use adapters of several methods, some of them no low-rank products."""
    model = copy.deepcopy(base)
    for key in MIXED:
        exapt.attach(model, exapt.method(key), name=key, trainable=False)
    ids, names = torch.randint(0, base.config.vocab_size, (rows, length)), [MIXED[i % len(MIXED)] for i in range(rows)]  # type: ignore[union-attr]

    def routed(names: list[str]) -> None:
        with exapt.routed(model, names):
            model(ids, use_cache=False)

    with torch.no_grad():
        sides = {"base": lambda: base(ids, use_cache=False), "all": lambda: routed(names), "products": lambda: routed([MIXED[i % 3] for i in range(rows)])}
        return interleaved(sides, repeats)


def switching(base: nn.Module, times: int) -> dict[str, Any]:
    """Microseconds of making another of four adapters the active one, by the wall, warm."""
    found: dict[str, Any] = {}
    ours, theirs = lora_pair(base, 4)

    def measure(switch: Callable[[str], Any]) -> list[float]:
        taken = []
        for i in range(times + 8):
            start = time.perf_counter()
            switch(f"a{i % 4}")
            taken.append((time.perf_counter() - start) * 1e6)
        return taken[8:]

    found["exapt"] = interval(measure(lambda n: exapt.activate(ours, n)))
    for a in exapt.core.state.state_of(ours).adapters.values():
        a.trainable = True
    found["exapt, adapters that train"] = interval(measure(lambda n: exapt.activate(ours, n)))
    found["peft"] = interval(measure(theirs.set_adapter))
    return found


def resident(n: int) -> dict[str, Any]:
    """What the last of ``n`` adapters costs: seconds to attach, and of a forward and a switch, early and late; bytes of Python objects."""
    model, x = nn.Sequential(*[nn.Linear(32, 32) for _ in range(12)]), torch.randn(4, 32)
    taken: list[float] = []
    found: dict[str, Any] = {"sites": 12, "adapters": n}

    def add(first: int, last: int) -> None:
        for i in range(first, last):
            start = time.process_time()
            exapt.attach(model, exapt.LoRA(rank=4), where="all", name=f"a{i}", trainable=False)
            taken.append(time.process_time() - start)

    def forward() -> float:
        with torch.no_grad():
            taken = []
            for _ in range(200):
                start = time.perf_counter()
                model(x)
                taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    tenth = n // 10
    add(0, tenth)
    early = forward()
    tracemalloc.start()
    add(tenth, 2 * tenth)
    found["python bytes per adapter and site"] = tracemalloc.get_traced_memory()[0] / tenth / 12
    tracemalloc.stop()
    add(2 * tenth, n)
    found["attach, last tenth / first"] = statistics.median(taken[-tenth:]) / statistics.median(taken[:tenth])
    found["forward, all / a tenth"] = forward() / early
    return found


def loading(base: nn.Module, repeats: int) -> dict[str, Any]:
    """Milliseconds, by the wall, to load a file of about 1 MB that the system holds in its cache: exapt's and PEFT's."""
    import peft

    def measure(load: Callable[[str], Any]) -> list[float]:
        taken = []
        for i in range(repeats + 2):
            gc.collect()
            start = time.perf_counter()
            load(f"a{i}")
            taken.append((time.perf_counter() - start) * 1e3)
        return taken[2:]

    with tempfile.TemporaryDirectory() as folder:
        ours = exapt.attach(copy.deepcopy(base), exapt.LoRA(rank=8), where="attention.{query,value}")
        path = exapt.save(ours, Path(folder) / "adapter")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        theirs.save_pretrained(folder + "/peft")
        found: dict[str, Any] = {"bytes": path.stat().st_size}
        found["exapt"] = interval(measure(lambda name: exapt.load(ours, path, name=name)))
        found["peft"] = interval(measure(lambda name: theirs.load_adapter(folder + "/peft", name)))
    return found


def decoding(base: nn.Module, repeats: int) -> dict[str, Any]:
    """One token of one row, LoRA and DoRA, by exapt and by PEFT."""
    import peft

    models: dict[str, Any] = {"base": base}
    for key, dora in (("lora", False), ("dora", True)):
        models[f"exapt {key}"] = exapt.attach(copy.deepcopy(base), exapt.method(key), trainable=False)
        models[f"peft {key}"] = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, use_dora=dora)).eval()
    ids = torch.randint(0, base.config.vocab_size, (1, 1))  # type: ignore[union-attr]
    with torch.no_grad():
        return interleaved({k: lambda m=m: m(input_ids=ids, use_cache=False) for k, m in models.items()}, repeats)


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes; see the module's own text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="once, on a tiny model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    parser.add_argument("--cases", default="", help="only these of decoding, switching_us, loading_ms, resident, kinds, mixed; the file keeps the others")
    a = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    kind, repeats = ("tiny", 2) if a.quick else ("llama_12", 5)
    shapes = [(2, 4, 4, "in turn")] if a.quick else [(8, 16, 16, "in turn"), (64, 64, 16, "in turn"), (64, 64, 16, "at random"), (64, 64, 1, "in turn")]
    result: dict[str, Any] = {
        "model": kind,
        "repeats": repeats,
        "machine": machine(),
    }
    a.out.mkdir(parents=True, exist_ok=True)
    if a.cases and (a.out / "many.json").is_file():
        result = {**json.loads((a.out / "many.json").read_text()), **result}
    base = build(kind).eval().requires_grad_(False)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "decoding": lambda: decoding(base, 3 * repeats),
        "switching_us": lambda: switching(base, 40 if a.quick else 400),
        "loading_ms": lambda: loading(base, repeats),
        "resident": lambda: resident(50 if a.quick else 1000),
        "kinds": lambda: kinds(base, 6 if a.quick else 24, 4 if a.quick else 16, repeats),
        "mixed": lambda: mixed(base, shapes, repeats),
    }
    for name in a.cases.split(",") if a.cases else cases:
        case = cases[name]
        print(name, file=sys.stderr)
        result[name] = case()
        gc.collect()
        result["machine"]["load_after"] = round(os.getloadavg()[0], 1)
        (a.out / "many.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))


if __name__ == "__main__":
    main()
