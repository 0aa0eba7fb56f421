"""exapt beside AdapterHub's ``adapters``, which needs an older transformers and so an environment of its own: two processes take turns.

``python bench/speed_adapters.py --adapters-python PATH`` writes ``bench/results/speed_adapters.json``. PATH is an interpreter with ``adapters`` 1.3.0
and transformers 4.57. ``adapters`` makes and saves each adapter, exapt loads its folder: the same method on the same layers. As the two run on different
versions of transformers, each side's bare frozen base is measured in its own process too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
HERE = Path(__file__).parent
KIND = "bert"
METHODS = {
    "adapter": ("DoubleSeqBnConfig", {}), "pfeiffer_adapter": ("SeqBnConfig", {}), "compacter": ("CompacterConfig", {}), "lora": ("LoRAConfig", {}),
    "prefix_tuning": ("PrefixTuningConfig", {"flat": True, "prefix_length": 20}), "ia3": ("IA3Config", {}),
}  # fmt: skip
ROWS = ("frozen_step", "step", "frozen_16", "forward_1", "forward_16", "token", "load", "save", "saved")


class Side:
    """One library's models in this process, and the rows it can measure."""

    def __init__(self, side: str, key: str, folder: Path) -> None:
        import speed_models
        import torch

        self.model: Any

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        self.side, self.folder, self.models, self.torch = side, folder, speed_models, torch
        self.base = speed_models.build(KIND)
        self.frozen = speed_models.freeze(KIND, copy.deepcopy(self.base))
        self.model = self.made(METHODS[key]) if side == "adapters" else self.loaded(self.ready())
        gc.collect()
        gc.freeze()

    def made(self, config: tuple[str, dict[str, Any]]) -> Any:
        """A fresh adapter of ``adapters``, saved where exapt finds it (whose pickle it does not read; not every adapter is saved otherwise)."""
        import adapters
        from safetensors.torch import save_file

        model: Any = copy.deepcopy(self.base)
        adapters.init(model)
        model.add_adapter("a", config=getattr(adapters, config[0])(**config[1]))
        model.train_adapter("a")
        model.save_adapter(str(self.folder), "a", with_head=False)
        tensors = self.torch.load(self.folder / "pytorch_adapter.bin", weights_only=True)
        save_file({k: t.clone().contiguous() for k, t in tensors.items()}, self.folder / "adapter.safetensors")
        return model

    def ready(self) -> Any:
        """A copy of the base that an adapter can be loaded onto: ``adapters`` has prepared its."""
        model = copy.deepcopy(self.base)
        if self.side == "adapters":
            import adapters

            adapters.init(model)
        return model

    def loaded(self, model: Any) -> Any:
        """``model`` with the adapter in the folder, trainable."""
        if self.side == "exapt":
            import exapt

            return exapt.load(model, self.folder, trainable=True)
        model.load_adapter(str(self.folder), load_as="a", with_head=False)
        model.train_adapter("a")
        return model

    def saved(self) -> None:
        if self.side == "exapt":
            import exapt

            exapt.save(self.model, self.folder.parent / "ours.safetensors")
        else:
            self.model.save_adapter(str(self.folder.parent / "theirs"), "a", with_head=False)

    def measure(self, row: str) -> float:
        """Seconds, or bytes, of one row."""
        from speed_clock import repeated, saved_bytes, timed

        model: Any = self.frozen if row.startswith("frozen") else self.model
        batch = partial(self.models.batch, KIND, self.base)
        gc.collect()
        if row == "saved":
            return saved_bytes(model.train(), batch(4, labels=True))["activations"]
        if row == "save":
            return timed(self.saved)
        if row == "load":
            return timed(partial(self.loaded, self.ready()))
        if row.endswith("step"):
            data = batch(4, labels=True)
            seconds = timed(lambda: model.train()(**data).loss.backward())
            for p in model.parameters():
                p.grad = None
            return seconds
        rows, length, times = {"forward_1": (1, 64, 1), "forward_16": (16, 32, 1), "frozen_16": (16, 32, 1), "token": (1, 1, 3)}[row]
        data = batch(rows, length)
        with self.torch.no_grad():
            return timed(partial(repeated, partial(model.eval(), **data), times)) / times

    def serve(self) -> None:
        """Answers one row after the other."""
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        print(json.dumps({"trainable": count}), flush=True)
        for line in sys.stdin:
            try:
                answer: Any = self.measure(line.strip())
            except Exception as e:
                answer = f"{type(e).__name__}: {e}".split("\n")[0][:300]
            print(json.dumps(answer), flush=True)


def started(python: str, side: str, key: str, folder: Path) -> subprocess.Popen[str]:
    command = [python, str(HERE / "speed_adapters.py"), "--serve", side, key, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE)


def told(process: subprocess.Popen[str]) -> Any:
    """The next line that is JSON (a library may print too)."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            return json.loads(line)
        except ValueError:
            continue
    raise RuntimeError("the process ended")


def asked(process: subprocess.Popen[str], row: str) -> Any:
    assert process.stdin is not None
    process.stdin.write(row + "\n")
    process.stdin.flush()
    return told(process)


def method(python: str, key: str, rounds: int) -> dict[str, Any]:
    """One method: both processes take turns, row by row."""
    from speed_table import ratio, significant

    out: dict[str, Any] = {"refused": {}, "trainable": {}}
    with tempfile.TemporaryDirectory() as name:
        processes = {}
        try:
            for side, interpreter in (("adapters", python), ("exapt", sys.executable)):
                processes[side] = started(interpreter, side, key, Path(name) / "made")
                out["trainable"][side] = told(processes[side])["trainable"]
            found: dict[str, Any] = {row: {side: [] for side in processes} for row in ROWS}
            for row in ROWS:
                for i in range(-1, 1 if row == "saved" else rounds):
                    for side in list(processes) if i % 2 else list(processes)[::-1]:
                        answer = asked(processes[side], row)
                        if isinstance(answer, str):
                            out["refused"].setdefault(side, {})[row] = answer
                        elif i >= 0:
                            found[row][side].append(answer)
        except (RuntimeError, OSError) as e:
            return {**out, "failed": f"{side}: {e}"}
        finally:
            for p in processes.values():
                p.kill()
                p.wait()
    out["rows"] = {}
    for row, v in found.items():
        medians = {side: significant(sorted(s)[len(s) // 2]) for side, s in v.items() if s}
        out["rows"][row] = {"median": medians, "adapters": ratio(v, "exapt", "adapters")}
    for side in processes:
        pairs = {"a": found["step"][side], "b": found["frozen_step"][side]}
        out["rows"]["step"][f"{side}_frozen"] = ratio(pairs, "a", "b")
    return out


def main() -> None:
    """Measures and writes; or, with ``--serve``, is one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters-python", help="an interpreter that has adapters 1.3.0; without it nothing is measured")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--serve", nargs=3, metavar=("SIDE", "METHOD", "FOLDER"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        Side(a.serve[0], a.serve[1], Path(a.serve[2])).serve()
        return
    if not a.adapters_python:
        print("no --adapters-python: nothing is measured beside adapters")
        return
    from speed import machine, source
    from speed_models import KINDS

    versions = "import json, torch, adapters, transformers; print(json.dumps([adapters.__version__, torch.__version__, transformers.__version__]))"
    said = subprocess.run([a.adapters_python, "-c", versions], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    load = [os.getloadavg()[0]]
    methods = {}
    for key in a.methods:
        methods[key] = method(a.adapters_python, key, a.rounds)
        load.append(os.getloadavg()[0])
        print(key, methods[key].get("failed") or "done", file=sys.stderr, flush=True)
    result = {
        "model": "adapters", "text": KINDS[KIND].text, "machine": machine(), "source": source(), "load": {"lowest": min(load), "highest": max(load)},
        "theirs": dict(zip(("adapters", "torch", "transformers"), json.loads(said), strict=True)), "methods": methods,
    }  # fmt: skip
    (a.out / "speed_adapters.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
