"""One cell: one method on one model, both libraries and the bare base side by side in a process forked for it."""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import speed_methods as methods
import torch
from speed_clock import repeated, saved_bytes, timed, timed_result
from speed_models import KINDS, batch, freeze
from torch import nn

import exapt

REPEATS, FEW, SLOW = 7, 3, 2.0
ROWS_OF_A_STEP = 4
FORWARDS = {"forward_1": (1, 64), "forward_16": (16, 32), "token": (1, 1)}
"""Rows and tokens of the forward passes."""
Runs = dict[str, Callable[[], Any]]


class Cell:
    """The adapted models of both sides and the frozen one, and what has been measured of them.

    ``out[row][side]`` holds seconds (or bytes); those of one position were measured one after the other. ``out["refused"][side][row]`` says why
    a side has none.
    """

    def __init__(self, key: str, kind: str, base: nn.Module, repeats: int) -> None:
        self.key, self.kind, self.repeats, self.base = key, kind, repeats, base
        self.out: dict[str, Any] = {"refused": {}, "trainable": {}, "file": {}}
        self.models: dict[str, Any] = {}
        self.sides = ["exapt"]
        self.statistics = methods.statistics(key, kind, base)
        first = methods.attach(key, kind, copy.deepcopy(base), self.statistics)
        try:
            self.fields = methods.peer(key, kind, first)
            self.config = methods.configuration(self.fields)
            self.sides.append("peft")
            self.out["peer"] = self.fields["peft_type"]
        except Exception as e:
            self.refuse("peft", "all", e)

    def refuse(self, side: str, row: str, error: object) -> None:
        """Notes why a side has no number in a row."""
        text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
        self.out["refused"].setdefault(side, {})[row] = text.split("\n")[0][:300]

    def attached(self, side: str, model: nn.Module, name: str = "default") -> nn.Module:
        """``model`` with a fresh adapter of one side."""
        if side == "exapt":
            return methods.attach(self.key, self.kind, model, self.statistics, name)
        import peft

        return peft.get_peft_model(model, copy.deepcopy(self.config))

    def data(self, side: str, rows: int, length: int = 64, labels: bool = False) -> dict[str, Any]:
        found = batch(self.kind, self.base, rows, length, labels)
        return found if side == "frozen" else methods.inputs(self.key, self.kind, found)

    def take(self, row: str, runs: Runs, times: int = 1) -> None:
        """Interleaved repetitions of one row, its order turned round every time; a side that raises is left out with its reason."""
        found: dict[str, list[float]] = {side: [] for side in runs}
        wanted = self.repeats
        for i in range(-1, self.repeats):  # the first is not counted
            if i >= wanted:
                break
            gc.collect()
            for side in list(found) if i % 2 else list(found)[::-1]:
                try:
                    seconds = timed(partial(repeated, runs[side], times)) / times
                except Exception as e:
                    self.refuse(side, row, e)
                    del found[side]
                    continue
                if i >= 0:
                    found[side].append(seconds)
                elif seconds * times > SLOW:
                    wanted = FEW
        self.out[row] = found

    def built(self, row: str, sides: list[str], make: Callable[[str, nn.Module], nn.Module], fatal: str) -> dict[str, nn.Module]:
        """Times what turns a copy of the base into an adapted model; once where that takes seconds. Returns the first of each side."""
        found: dict[str, list[float]] = {side: [] for side in sides}
        first: dict[str, nn.Module] = {}
        for _ in range(self.repeats + 1):
            for side in list(found):
                model = copy.deepcopy(self.base)
                gc.collect()
                try:
                    seconds, made = timed_result(partial(make, side, model))
                except Exception as e:
                    self.refuse(side, fatal, e)
                    del found[side]
                    continue
                first.setdefault(side, made)
                found[side].append(seconds)
            if any(v[-1] > SLOW for v in found.values()):
                break
        else:
            found = {side: v[1:] for side, v in found.items()}  # the first is not counted, unless it is the only one
        self.out[row] = {side: v for side, v in found.items() if v}
        return first

    def attaching(self) -> None:
        self.models = dict(self.built("attach", self.sides, self.attached, "all"))
        self.sides = [s for s in self.sides if s in self.models]
        if self.key in methods.UNSTARTED and "peft" in self.sides:
            self.out["attach"].pop("peft", None)
            self.refuse("peft", "attach", methods.UNSTARTED[self.key])
        for side in self.sides:
            self.out["trainable"][side] = sum(p.numel() for p in self.models[side].parameters() if p.requires_grad)
        self.models["frozen"] = freeze(self.kind, copy.deepcopy(self.base))

    def passing(self) -> None:
        """Forward and backward (the optimiser is torch's on both sides and not counted), and forwards alone."""
        data = {side: self.data(side, ROWS_OF_A_STEP, labels=True) for side in self.models}

        def step(side: str) -> None:
            methods.loss(self.key if side == "exapt" else "", self.models[side], data[side]).backward()
            for p in self.models[side].parameters():
                p.grad = None

        for m in self.models.values():
            m.train()
        self.take("step", {side: partial(step, side) for side in self.models})
        for m in self.models.values():
            m.eval()
        with torch.no_grad():
            for row, (rows, length) in FORWARDS.items():
                if row == "token" and KINDS[self.kind].image:
                    continue
                given = {side: self.data(side, rows, length) for side in self.models}
                self.take(row, {s: partial(self.models[s], **given[s]) for s in self.models}, 3 if row == "token" else 1)

    def saving_for_backward(self) -> None:
        self.out["saved"] = {}
        for side, model in self.models.items():
            try:
                self.out["saved"][side] = [saved_bytes(model.train(), self.data(side, ROWS_OF_A_STEP, labels=True))["activations"]]
            except Exception as e:
                self.refuse(side, "saved", e)

    def files(self) -> None:
        """Saving, and loading onto a fresh base."""
        import peft

        with tempfile.TemporaryDirectory() as name:
            ours, theirs = Path(name) / "ours.safetensors", Path(name) / "theirs"
            runs: Runs = {"exapt": lambda: exapt.save(self.models["exapt"], ours), "peft": lambda: self.models["peft"].save_pretrained(theirs)}
            self.take("save", {s: runs[s] for s in self.sides})
            for side in list(self.out["save"]):
                files = [ours] if side == "exapt" else [f for f in theirs.rglob("*") if f.is_file()]
                self.out["file"][side] = sum(f.stat().st_size for f in files)

            def load(side: str, model: nn.Module) -> nn.Module:
                return exapt.load(model, ours) if side == "exapt" else peft.PeftModel.from_pretrained(model, theirs)

            self.built("load", list(self.out["save"]), load, "load")

    def merging(self) -> None:
        """Merge and unmerge in turn."""
        rows: dict[str, dict[str, list[float]]] = {row: {s: [] for s in self.sides} for row in ("merge", "unmerge", "merge_unmerge")}
        pairs = {
            "exapt": (lambda: exapt.merge(self.models["exapt"]), lambda: exapt.unmerge(self.models["exapt"])),
            "peft": (lambda: self.models["peft"].merge_adapter(), lambda: self.models["peft"].unmerge_adapter()),
        }
        for i in range(-1, self.repeats):
            gc.collect()
            for side in list(rows["merge"]):
                try:
                    seconds = [timed(run) for run in pairs[side]]
                except Exception as e:
                    self.refuse(side, "merge", e)
                    for v in rows.values():
                        del v[side]
                    continue
                if i >= 0:
                    for row, s in zip(rows, [*seconds, sum(seconds)], strict=True):
                        rows[row][side].append(s)
            if i + 1 >= FEW and any(v[-1] > SLOW for v in rows["merge_unmerge"].values() if v):
                break
        self.out |= rows

    def switching(self) -> None:
        """From one of two adapters to the other, ten times a repetition."""
        runs: Runs = {}
        turns = {side: iter(("second", "default") * 10_000) for side in self.sides}
        ours, theirs = self.models["exapt"], self.models.get("peft", nn.Identity())
        change: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "exapt": (lambda: self.attached("exapt", ours, "second"), lambda: exapt.activate(ours, next(turns["exapt"]))),
            "peft": (lambda: theirs.add_adapter("second", copy.deepcopy(self.config)), lambda: theirs.set_adapter(next(turns["peft"]))),
        }
        for side in self.sides:
            if max(self.out["attach"].get(side, [0.0])) > SLOW:
                self.refuse(side, "switch", "a second adapter takes seconds to start")
                continue
            try:
                change[side][0]()
                runs[side] = change[side][1]
            except Exception as e:
                self.refuse(side, "switch", e)
        self.take("switch", runs, 10)


def placed(base: nn.Module) -> nn.Module:
    """The base on the GPU in bfloat16, where there is one. Only ever called in a forked process: CUDA does not survive a fork."""
    if torch.cuda.is_available():
        torch.cuda.init()
        return base.to("cuda", torch.bfloat16)
    return base


def pair(key: str, kind: str, base: nn.Module, repeats: int = REPEATS) -> dict[str, Any]:
    """All that is measured side by side in one process."""
    gc.collect()
    gc.freeze()  # so that a collection looks only at what the cell makes
    cell = Cell(key, kind, placed(base), repeats)
    cell.out["lap"] = {}
    for part in (cell.attaching, cell.passing, cell.saving_for_backward, cell.files, cell.merging, cell.switching):
        start = time.perf_counter()
        try:
            part()
        except Exception as e:
            cell.refuse("exapt", part.__name__, e)
        cell.out["lap"][part.__name__] = round(time.perf_counter() - start, 1)
    return cell.out
