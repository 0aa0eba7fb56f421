"""Test-time methods on streams of corrupted CIFAR-10 images, with and without the guard; and batch statistics on every corruption and severity.

``python bench/shift_streams.py --seeds 5 --worker 0/2`` computes cells (each is kept in ``runs/shift/streams``, so that a run can be stopped and
continued, and shared out), ``--collect`` writes ``bench/results/shift_streams.json`` and prints the tables.

Every seed draws its own reference (500 labelled images) and its own stream from the rest of the test set. Nothing is tuned here: methods run at their
defaults, and what the guard's defaults were chosen on is said in LOG.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shift_data import cache, cifar10
from shift_models import cifar_input, cifar_resnet
from torch import Tensor

import exapt
from exapt.shift.simulate import streams
from exapt.shift.simulate.corruptions import corrupt

HERE = Path(__file__).resolve().parent
ALL = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
DOMAINS = ("shot_noise", "motion_blur", "snow", "pixelate", "jpeg_compression")
"""One corruption of each family and one more of the digital ones, at severity 5; the guard's settings were chosen on others."""
ROWS, SORTED, BATCH = 60, 300, 30
STREAMS = ("iid", "label sorted", "one by one", "mixed", "cyclic", "long", "dirichlet")
METHODS = {
    "norm": exapt.BatchStatistics, "tent": exapt.Tent, "eata": exapt.EATA, "sar": exapt.SAR, "rdumb": exapt.RDumb, "rotta": exapt.RoTTA,
    "t3a": exapt.T3A, "lame": exapt.OnlineLAME, "oasis": exapt.OASIS,
}  # fmt: skip


def stream_of(name: str, every: np.ndarray, seed: int) -> streams.Stream:
    """A stream over the first images per domain; ``every`` holds the labels of all."""
    labels, some = every[:ROWS], every[:20]  # the streams that would be too long for two cores see fewer images, more often
    return {
        "iid": lambda: streams.continual(labels, DOMAINS, BATCH, "iid", seed),
        "label sorted": lambda: streams.continual(every, DOMAINS[:2], BATCH, "label_sorted", seed),  # so many rows that a batch is of one class
        "one by one": lambda: streams.continual(some, DOMAINS, 1, "iid", seed),
        "mixed": lambda: streams.mixed_domains(labels, DOMAINS, BATCH, seed),
        "cyclic": lambda: streams.cyclic(labels[:30], DOMAINS, 3, BATCH, "iid", seed),
        "long": lambda: streams.long(labels, 20, BATCH, "iid", seed),
        "dirichlet": lambda: streams.continual(labels, DOMAINS, BATCH, "dirichlet", seed),
    }[name]()  # fmt: skip


class Data:
    """The images of one seed: a reference, and the stream's images under every corruption."""

    def __init__(self, seed: int) -> None:
        data, rng = cifar10(), np.random.default_rng(seed)
        order = rng.permutation(len(data.y))
        held, rest = order[:500], order[500:]
        self.reference = [(cifar_input(data.x[i]), torch.as_tensor(data.y[i]).long()) for i in np.split(held, 5)]
        by_class = np.stack([rest[data.y[rest] == c][: SORTED // 10] for c in range(10)])
        chosen = np.concatenate([rng.permutation(by_class[:, : ROWS // 10].ravel()), rng.permutation(by_class[:, ROWS // 10 :].ravel())])
        self.labels = data.y[chosen]
        self.images = {n: cifar_input(corrupt(data.x[chosen], n, 5, seed)) for n in DOMAINS}
        self.seed = seed

    def batches(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Inputs and labels of every batch; the long stream is of one corruption."""
        stream = stream_of(name, self.labels, self.seed)
        names = DOMAINS[: len(stream.domains)]
        found = []
        for b in stream:
            x = torch.stack([self.images[names[d]][i] for i, d in zip(b.index.tolist(), b.domain.tolist(), strict=True)])
            found.append((x, torch.as_tensor(self.labels[b.index]).long()))
        return found


def cell(model: torch.nn.Module, data: Data, stream: str, method: str, guarded: bool, learned: dict[str, Tensor]) -> dict[str, Any]:
    """Runs one method on one stream; ``learned`` is what a guard has learned of this seed's reference for the same statistics."""
    batches = data.batches(stream)
    started = time.perf_counter()
    right: list[int] = []
    actions: dict[str, int] = {}
    if method == "none":
        with torch.no_grad():
            for x, y in batches:
                right += (model(x).argmax(1) == y).int().tolist()
        return {"right": right, "seconds": time.perf_counter() - started}
    o = exapt.online(model, METHODS[method](), exapt.Guard() if guarded else None, reference=data.reference, seed=data.seed)
    if guarded:
        o.host.memory.update({k: v.clone() for k, v in learned.items()})
    started = time.perf_counter()
    for x, y in batches:
        right += (o(x).argmax(1) == y).int().tolist()
    for d in o.diagnostics:
        actions[d["action"]] = actions.get(d["action"], 0) + 1
    if guarded:
        learned.update({k: v for k, v in o.host.memory.items() if k.startswith("guard/gain_")})
    found = {"right": right, "seconds": time.perf_counter() - started, "actions": actions, "milliseconds": float(np.mean([d["ms"] for d in o.diagnostics]))}
    o.close()
    return found


def work(folder: Path, seeds: int, worker: tuple[int, int], budget: float, only: tuple[str, ...] = STREAMS, methods: tuple[str, ...] = tuple(METHODS)) -> None:
    """Computes the cells of one worker that are not there yet."""
    ended = time.monotonic() + budget
    model = cifar_resnet(20).eval()
    plan = [(s, st, m, g) for s in range(seeds) for st in only for m in ("none", *methods) for g in ((False,) if m == "none" else (False, True))]
    data: dict[int, Data] = {}
    learned: dict[tuple[int, str], dict[str, Tensor]] = {}
    for number, (seed, stream, method, guarded) in enumerate(plan):
        path = folder / f"{seed}-{stream.replace(' ', '_')}-{method}-{int(guarded)}.json"
        if seed % worker[1] != worker[0] or path.exists() or time.monotonic() > ended:
            continue
        data.setdefault(seed, Data(seed))
        alike = "batch" if method in ("norm", "tent", "eata", "sar", "rdumb") else method
        try:
            found = cell(model, data[seed], stream, method, guarded, learned.setdefault((seed, alike), {}))
        except exapt.InputError as e:
            found = {"refused": str(e)}
        path.write_text(json.dumps({"seed": seed, "stream": stream, "method": method, "guard": guarded, **found}))
        said = found.get("refused") or f"{100 * np.mean(found['right']):.1f} % in {found['seconds']:.0f} s"
        print(f"[{number + 1}/{len(plan)}] {path.stem}: {said}", flush=True)


def corruptions(folder: Path, seeds: int, worker: tuple[int, int], budget: float) -> None:
    """Accuracy of every network under every corruption and severity, frozen and with the batch's statistics (200 images)."""
    ended, data = time.monotonic() + budget, cifar10()
    plan = [(20, n, s) for n in ALL for s in (1, 2, 3, 4, 5)] + [(d, n, 5) for d in (32, 56) for n in ALL]
    for number, ((depth, name, severity), seed) in enumerate(itertools.product(plan, range(seeds))):
        path = folder / f"c-{depth}-{name}-{severity}-{seed}.json"
        if number % worker[1] != worker[0] or path.exists() or time.monotonic() > ended:
            continue
        chosen = np.random.default_rng(seed).permutation(len(data.y))[:200]
        model, x, y = cifar_resnet(depth).eval(), cifar_input(corrupt(data.x[chosen], name, severity, seed)), torch.as_tensor(data.y[chosen]).long()
        with torch.no_grad():
            frozen = (model(x).argmax(1) == y).int().tolist()
            batch = (exapt.online(model, exapt.BatchStatistics())(x).argmax(1) == y).int().tolist()
        row = {"depth": depth, "corruption": name, "severity": severity, "seed": seed, "frozen": frozen, "batch statistics": batch}
        path.write_text(json.dumps(row))


def difference(first: np.ndarray, second: np.ndarray, seed: int = 0, draws: int = 4000) -> tuple[float, float, float]:
    """Mean paired difference in points with a 95 % bootstrap interval over rows and seeds together."""
    d = 100.0 * (first.astype(float) - second.astype(float))
    rng = np.random.default_rng(seed)
    means = d[rng.integers(0, len(d), (draws, len(d)))].mean(1) if len(d) < 4000 else rng.normal(d.mean(), d.std() / np.sqrt(len(d)), draws)
    low, high = np.quantile(means, [0.025, 0.975])
    return round(float(d.mean()), 2), round(float(low), 2), round(float(high), 2)


def collect(folder: Path) -> None:
    """Writes the results and prints the tables."""
    rows = [json.loads(p.read_text()) for p in sorted(folder.glob("[0-9]*.json"))]
    none = {(r["seed"], r["stream"]): np.array(r["right"]) for r in rows if r["method"] == "none"}
    table: list[dict[str, Any]] = []
    for stream in STREAMS:
        for method, guarded in itertools.product(("none", *METHODS), (False, True)):
            mine = [r for r in rows if (r["stream"], r["method"], r["guard"]) == (stream, method, guarded) and (r["seed"], stream) in none]
            refused = [r["refused"] for r in mine if "refused" in r]
            mine = [r for r in mine if "right" in r]
            if refused and not mine:
                table.append({"stream": stream, "method": method, "guard": guarded, "refused": refused[0]})
            if not mine:
                continue
            right = np.concatenate([np.array(r["right"]) for r in mine])
            base = np.concatenate([none[r["seed"], stream] for r in mine])
            gain, low, high = difference(right, base)
            times = [r["milliseconds"] for r in mine if "milliseconds" in r]
            table.append({
                "stream": stream, "method": method, "guard": guarded, "accuracy": round(100 * float(right.mean()), 2), "gain": gain, "low": low, "high": high,
                "rows": len(right), "seeds": sorted({r["seed"] for r in mine}), "milliseconds": round(float(np.mean(times)), 1) if times else None,
            })  # fmt: skip
    cells = [json.loads(p.read_text()) for p in sorted(folder.glob("c-*.json"))]
    by: dict[tuple[int, str, int], list[Any]] = {}
    for c in cells:
        by.setdefault((c["depth"], c["corruption"], c["severity"]), []).append(c)
    corrupted = []
    for (depth, name, severity), found in sorted(by.items()):
        frozen, batch = (np.concatenate([np.array(c[k]) for c in found]) for k in ("frozen", "batch statistics"))
        gain, low, high = difference(batch, frozen)
        corrupted.append({
            "depth": depth, "corruption": name, "severity": severity, "frozen": round(100 * float(frozen.mean()), 2),
            "batch statistics": round(100 * float(batch.mean()), 2), "gain": gain, "low": low, "high": high, "rows": len(frozen), "seeds": len(found),
        })  # fmt: skip
    about = {
        "command": "python bench/shift_streams.py --seeds 5 [--corruptions] [--worker i/n]; --collect",
        "version": exapt.__version__, "torch": torch.__version__,
        "machine": f"{platform.machine()}, 2 shared cores, one thread a process", "domains": DOMAINS, "severity": 5, "batch": BATCH, "model": "ResNet-20",
    }  # fmt: skip
    out = HERE / "results" / "shift_streams.json"
    out.write_text(json.dumps({"about": about, "streams": table, "corruptions": corrupted}, indent=1) + "\n")
    for t in table:
        said = f"refused: {t['refused'][:60]}" if "refused" in t else f"{t['accuracy']} | {t['gain']:+} [{t['low']}, {t['high']}] | {t['rows']}"
        print(f"| {t['stream']} | {t['method']} | {'on' if t['guard'] else 'off'} | {said} |")
    print(f"wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--worker", default="0/1", help="i/n: the i-th of n processes")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no cell after this long")
    parser.add_argument("--corruptions", action="store_true", help="the table of corruptions instead of the streams")
    parser.add_argument("--streams", default=",".join(STREAMS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = cache() / "streams"
    folder.mkdir(exist_ok=True)
    i, n = (int(v) for v in given.worker.split("/"))
    if given.collect:
        collect(folder)
    elif given.corruptions:
        corruptions(folder, given.seeds, (i, n), 60 * given.minutes)
    else:
        work(folder, given.seeds, (i, n), 60 * given.minutes, tuple(given.streams.split(",")), tuple(given.methods.split(",")))


if __name__ == "__main__":
    main()
