"""The closed loop over a simulated day of CIFAR-10 images: segments without shift, with label shift and with covariate shift, the truth known.

``python bench/shift_day.py --seeds 5 --worker 0/2`` computes cells (kept in ``runs/shift/day``), ``--collect`` writes ``bench/results/shift_day.json``.
Compared with the loop on the same stream: never adapting, TENT on every batch, the batch's statistics on every batch. Rows and images of a seed are the
same for all. ``--alarms`` counts on how many of 200 days without any shift the loop's alarm rings at all.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shift_data import cache, cifar10
from shift_models import cifar_input, cifar_resnet
from shift_streams import difference
from torch import Tensor

import exapt
from exapt.loop import Policy
from exapt.loop.runner import Runner
from exapt.loop.watch import Watch
from exapt.online.method import Batch
from exapt.shift.simulate.corruptions import corrupt
from exapt.shift.simulate.streams import Stream, day_long

HERE = Path(__file__).resolve().parent
DOMAINS = ("clean", "shot_noise", "motion_blur", "snow", "pixelate")
SEVERITY, SEGMENTS, BATCHES, BATCH, REFERENCE = 5, 6, 32, 50, 1000
POLICIES = ("never", "norm", "loop", "tent")
RUNS = 200


class Day:
    """One seed's reference and stream, of all other images: with few of them a segment would be a shift from their population."""

    def __init__(self, seed: int) -> None:
        data, order = cifar10(), np.random.default_rng(seed).permutation(10_000)
        held, rest = order[:REFERENCE], order[REFERENCE:]
        self.seed, self.pictures, self.labels = seed, data.x[rest], data.y[rest]
        self.reference = (cifar_input(data.x[held]), torch.as_tensor(data.y[held]).long())
        self.stream: Stream = day_long(self.labels, DOMAINS, SEGMENTS, BATCHES, BATCH, seed=seed)

    def batches(self) -> Iterator[tuple[Tensor, np.ndarray, str, int]]:
        """Inputs, labels, true type and segment of every batch; of one domain each."""
        for b in self.stream:
            name, pictures = DOMAINS[int(b.domain[0])], self.pictures[b.index]
            seen = pictures if name == "clean" else corrupt(pictures, name, SEVERITY, np.random.default_rng([self.seed, int(b.index[0])]))
            yield cifar_input(seen), self.labels[b.index], b.kind or "none", b.segment


def looped(model: torch.nn.Module, day: Day, seed: int) -> dict[str, Any]:
    """The loop's answers, and what it decided."""
    right, events, seconds = [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        loop = exapt.Loop(model, day.reference, Policy(), Path(folder) / "day.db", seed=seed)
        for number, (x, y, kind, segment) in enumerate(day.batches()):
            started = time.perf_counter()
            outcome = loop.step(x)
            seconds += time.perf_counter() - started
            assert outcome.logits is not None
            right += (outcome.logits.argmax(1).numpy() == y).astype(int).tolist()
            d = dataclasses.asdict(outcome.decision)
            said = {k: d.get(k) for k in ("alarm", "kind", "action", "reason", "serving", "p_values")}
            events.append({"batch": number, "true": kind, "segment": segment, **said})
        loop.close()
    return {"right": right, "events": events, "seconds": seconds}


def cell(policy: str, seed: int) -> dict[str, Any]:
    """One policy on one seed's day."""
    day, model = Day(seed), cifar_resnet(20).eval()
    if policy == "loop":
        return looped(model, day, seed)
    answers = {"never": lambda: model, "tent": lambda: exapt.online(model, exapt.Tent()), "norm": lambda: exapt.online(model, exapt.BatchStatistics())}[
        policy
    ]()
    started, right = time.perf_counter(), []
    with torch.no_grad():
        for x, y, _, _ in day.batches():
            right += (answers(x).argmax(1).numpy() == y).astype(int).tolist()
    return {"right": right, "kinds": [k for x, _, k, _ in day.batches() for _ in range(len(x))], "seconds": time.perf_counter() - started}


def alarms(folder: Path) -> None:
    """On how many days without a shift the alarm rings: new references and orders each time, of images that the model has not seen."""
    data, model = cifar10(), cifar_resnet(20).eval()
    chosen = np.random.default_rng(0).permutation(len(data.y))[:4000]
    runner = Runner(model, None, 250)
    answer = runner([Batch((cifar_input(data.x[c]),), {}) for c in np.split(chosen, 16)])
    labels, rang = data.y[chosen], []
    for run in range(RUNS):
        order = np.random.default_rng(run).permutation(len(chosen))
        held, rest = order[:REFERENCE], order[REFERENCE:]
        watch = Watch(answer.rows(held), labels[held], Policy().alpha, Policy().bins, run)
        rang.append(any(watch.update(answer.rows(rest[i : i + BATCH]), i) for i in range(0, len(rest), BATCH)))
    (folder / "alarms.txt").write_text(json.dumps({"runs": RUNS, "rang": int(sum(rang)), "rows": len(rest), "promised": Policy().alpha}))
    print(f"the alarm rang on {sum(rang)} of {RUNS} days of {len(rest)} rows; promised: at most {100 * Policy().alpha:.0f} %")


def named(events: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Per true type: in how many of its segments the loop's last diagnosis was of that type (no alarm at all counts as "none"), and of how many."""
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    before = "none"
    for segment in sorted({e["segment"] for e in events}):
        mine = [e for e in events if e["segment"] == segment]
        said = [e["kind"] for e in mine if e["kind"]]
        before = said[-1] if said else before
        found[mine[0]["true"]][0] += before == mine[0]["true"]
        found[mine[0]["true"]][1] += 1
    return dict(found)


def collect(folder: Path) -> None:
    """Writes the results and prints them."""
    cells = {(c["policy"], c["seed"]): c for c in (json.loads(p.read_text()) for p in sorted(folder.glob("*.json")))}
    seeds = sorted({s for p, s in cells if p == "loop"} & {s for p, s in cells if p == "never"})
    loop = np.concatenate([np.array(cells["loop", s]["right"]) for s in seeds])
    rows = []
    for policy in ("never", "tent", "norm", "loop"):
        own = [s for s in seeds if (policy, s) in cells]
        right = np.concatenate([np.array(cells[policy, s]["right"]) for s in own])
        kinds = np.concatenate([np.array(cells["never", s]["kinds"]) for s in own])
        mine = np.concatenate([np.array(cells["loop", s]["right"]) for s in own])
        by = {k: round(100 * float(right[kinds == k].mean()), 2) for k in ("none", "label", "covariate")}
        rows.append(
            {"policy": policy, "accuracy": round(100 * float(right.mean()), 2), "by type": by, "loop is ahead by": difference(mine, right), "seeds": own}
        )
    segments: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for s in seeds:
        for kind, (good, total) in named(cells["loop", s]["events"]).items():
            segments[kind] = [segments[kind][0] + good, segments[kind][1] + total]
    quiet = folder / "alarms.txt"
    actions = collections.Counter(f"{e['true']}: {e['action']}" for s in seeds for e in cells["loop", s]["events"] if e["action"])
    result = {
        "about": {
            "command": "python bench/shift_day.py --seeds 5; --collect", "version": exapt.__version__, "torch": torch.__version__, "model": "ResNet-20",
            "machine": f"{platform.machine()}, 2 shared cores, one thread a process", "domains": DOMAINS, "severity": SEVERITY, "segments": SEGMENTS,
            "batches": BATCHES, "batch": BATCH, "policy": Policy().as_dict(),
        },
        "accuracy": rows, "segments named right": {k: {"right": a, "of": b} for k, (a, b) in segments.items()},
        "days without shift": json.loads(quiet.read_text()) if quiet.exists() else None, "decisions": dict(actions), "rows": len(loop),
    }  # fmt: skip
    out = HERE / "results" / "shift_day.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "about"}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--worker", default="0/1", help="i/n: the i-th of n processes")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--alarms", action="store_true", help="count false alarms instead")
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = cache() / "day"
    folder.mkdir(exist_ok=True)
    if given.collect:
        collect(folder)
        return
    if given.alarms:
        alarms(folder)
        return
    i, n = (int(v) for v in given.worker.split("/"))
    for seed in range(i, given.seeds, n):
        for policy in given.policies.split(","):
            path = folder / f"{policy}-{seed}.json"
            if not path.exists():
                found = {"policy": policy, "seed": seed, **cell(policy, seed)}
                path.write_text(json.dumps(found))
                print(f"{policy} {seed}: {100 * np.mean(found['right']):.1f} % in {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
