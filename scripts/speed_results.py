"""Writes docs/speed.md, docs/images/speed.png and bench/results/README.md from bench/results/speed_*.json.

python scripts/speed_results.py            rewrites them
python scripts/speed_results.py --check    changes nothing; exit status 1 if a page is out of date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from shift_results import ROOT, table
from speed_more import sections

RESULTS, PAGE, PICTURE = ROOT / "bench" / "results", ROOT / "docs" / "speed.md", ROOT / "docs" / "images" / "speed.png"
ORDER = ("llama", "bert", "llama_12", "bert_12", "minilm", "vit", "smollm", "resnet")
HEADS = {
    "attach": "attach", "step": "step", "forward_1": "forward, 1 row", "forward_16": "forward, 16 rows", "token": "one token", "peak": "peak memory",
    "saved": "kept for backward", "save": "save", "load": "load", "merge": "merge", "unmerge": "unmerge", "merge_unmerge": "merge and unmerge",
    "switch": "switch",
}  # fmt: skip
TARGETS = (  # (what it says, row, against, limit, only light methods)
    ("attach", "attach", "peft", 0.1, False),
    ("training step", "step", "peft", 1.0, False),
    ("training step, rank 16 or less, scale and shift", "step", "frozen", 1.15, True),
    ("peak memory of training", "peak", "peft", 1.0, False),
    ("merge and unmerge", "merge_unmerge", "peft", 0.5, False),
)

MANY = 0.2


def results() -> list[dict[str, Any]]:
    """What was measured of each model."""
    found = {k: RESULTS / f"speed_{k}.json" for k in ORDER}
    return [json.loads(f.read_text(encoding="utf-8")) for f in found.values() if f.exists()]


def short(value: float) -> str:
    """Three digits.

    >>> short(0.98765), short(12.345), short(0.00123)
    ('0.99', '12.3', '0.001')
    """
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else f"{value:.3f}"


def spread(found: dict[str, float] | None) -> str:
    """A ratio with its interval; one measurement has none."""
    if found is None:
        return ""
    low, high = found["low"], found["high"]
    return short(found["median"]) if found["n"] == 1 else f"{short(found['median'])} [{short(low)}, {short(high)}]"


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def targets(found: list[dict[str, Any]]) -> Iterator[str]:
    body = []
    for text, row, against, limit, light in TARGETS:
        measured = [
            (v[against], f"{key} on {r['model']}")
            for r in found
            for key, m in r["methods"].items()
            if (v := m.get("rows", {}).get(row)) and against in v and (m["light"] or not light)
        ]
        if not measured:
            continue
        missed = sorted(((v["median"], name) for v, name in measured if v["median"] > limit), reverse=True)
        surely = sum(v["low"] > limit for v, _ in measured)
        worst = ", ".join(f"{name} {short(value)}" for value, name in missed[:4])
        whose = {"peft": "PEFT's", "frozen": "the frozen base's"}[against]
        body.append([text, f"at most {limit:g} of {whose}", len(measured), len(measured) - len(missed), len(missed), surely, worst])
    for r in found:
        w = r["methods"].get("lora", {}).get("whole")
        if w:
            value = w["many"]["seconds"]["exapt"] / w["many"]["seconds"]["peft"]
            missed = f"lora on {r['model']} {short(value)}" if value > MANY else ""
            body.append([f"load {w['count']} LoRA files, {r['model']}", f"at most {MANY:g} of PEFT's", 1, int(value <= MANY), int(value > MANY), "", missed])
    yield "## Targets"
    yield ""
    yield "Cells are a method on a model. Surely missed: the whole interval lies above the limit."
    yield ""
    yield from table(["", "target", "cells", "met", "missed", "surely missed", "worst"], body)


def about(r: dict[str, Any]) -> str:
    m, load = r["machine"], r["load"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items())
    place = f"{m['gpu']}, bfloat16" if m.get("gpu") else f"{m['processor']}, {m['cores']} cores, one thread, single precision"
    counts = [v["step"]["peft"]["n"] for m in r["methods"].values() if "peft" in (v := m.get("rows", {})).get("step", {})]
    often = f" {min(counts)} to {max(counts)} repetitions of a step." if counts else ""
    changed = f" The cells are of {len(r['sources'])} states of the library's source." if len(r["sources"]) > 1 else ""
    return f"{place}; {versions}; load {load['lowest']:g} to {load['highest']:g}, median {load['median']:g}; {', '.join(r['made'])}.{often}{changed}"


def model(r: dict[str, Any]) -> Iterator[str]:
    """The tables of one model."""
    measured = {k: m for k, m in r["methods"].items() if m.get("rows")}
    yield f"## {r['text']}"
    yield ""
    yield about(r)
    yield ""
    both = {k: m for k, m in measured.items() if any("peft" in v for v in m["rows"].values())}
    rows = [h for h in HEADS if any(h in m["rows"] for m in both.values())]
    body = [[f"`{k}`", *(spread(m["rows"].get(row, {}).get("peft")) for row in rows)] for k, m in both.items()]
    yield "exapt's over PEFT's:"
    yield ""
    yield from table(["method", *(HEADS[row] for row in rows)], body)
    body = []
    for k, m in measured.items():
        v = m["rows"]
        cells = [spread(v.get(row, {}).get(side)) for row in ("step", "forward_16", "token") for side in ("frozen", "peft_frozen")]
        medians = [v.get(row, {}).get("median", {}).get("exapt") for row in ("attach", "step", "switch")]
        saved = v.get("saved", {}).get("median", {})
        body.append([f"`{k}`", *cells, *(seconds(s) for s in medians), f"{saved['exapt'] / 2**20:.1f} MiB" if "exapt" in saved else ""])
    yield "Over the bare frozen base's, and exapt's own medians:"
    yield ""
    head = ["method", "step", "PEFT's step", "forward, 16 rows", "PEFT's", "one token", "PEFT's", "attach", "step, 4 rows", "switch", "kept for backward"]
    yield from table(head, body)
    yield from refusals(r)


def refusals(r: dict[str, Any]) -> Iterator[str]:
    """Why a side has no number."""
    lines = []
    for key, m in r["methods"].items():
        if "failed" in m:
            lines.append(f"- `{key}`: {plain(m['failed'])}")
        for side, rows in m.get("refused", {}).items():
            name = {"exapt": "exapt", "peft": "PEFT"}[side]
            for reason in dict.fromkeys(rows.values()):
                which = ", ".join(HEADS.get(row, row) for row, why in rows.items() if why == reason)
                lines.append(f"- `{key}`, {name}, {which}: {plain(reason)}")
    if lines:
        yield "What a side refused, in its words:"
        yield ""
        yield from lines
        yield ""


def beside_adapters(r: dict[str, Any]) -> Iterator[str]:
    """The table beside AdapterHub's library."""
    rows = ("step", "forward_1", "forward_16", "token", "load", "save")
    theirs = ", ".join(f"{name} {v}" for name, v in r["theirs"].items())
    yield "## Beside AdapterHub's adapters"
    yield ""
    yield f"{r['text']}. `adapters` needs an older transformers, so two processes take turns; it makes each adapter, exapt loads its folder. Theirs: {theirs};"
    yield f"load {r['load']['lowest']:.1f} to {r['load']['highest']:.1f}. exapt's over theirs, and each side's step over the frozen base's in its own process."
    yield ""
    body = []
    for key, m in r["methods"].items():
        if "failed" in m:
            continue
        v = m["rows"]
        kept = [f"{v['saved']['median'][side] / 2**20:.1f}" for side in ("exapt", "adapters") if side in v["saved"]["median"]]
        cells = [spread(v[row].get("adapters")) for row in rows]
        body.append([f"`{key}`", *cells, spread(v["step"].get("exapt_frozen")), spread(v["step"].get("adapters_frozen")), ", ".join(kept)])
    head = ["method", *(HEADS[row] for row in rows), "step / frozen", "theirs / frozen", "kept for backward, MiB: exapt, theirs"]
    yield from table(head, body)
    for key, m in r["methods"].items():
        if "failed" in m:
            yield f"- `{key}`: {plain(m['failed'])}"
    yield ""


def plain(text: str) -> str:
    """Text that Markdown takes as it is."""
    return "`" + text.replace("`", "'").strip() + "`"


def whole(found: list[dict[str, Any]]) -> Iterator[str]:
    """LoRA on whole models: files, many adapters, memory."""
    body = []
    for r in found:
        w = r["methods"].get("lora", {}).get("whole")
        if not w:
            continue
        s = w["many"]["seconds"]
        growth = w["many"]["growth"]
        body.append(
            [
                r["text"], spread(w["first_attach"]), spread(w["peak"]["peft"]), spread(w["peak"]["frozen"]), spread(w["peak"]["whole"]),
                f"{w['count']}: {s['exapt']:.2f} s, {s['peft']:.2f} s, {short(s['exapt'] / s['peft'])}",
                f"{growth['exapt']:.2f}, {growth['peft']:.2f}" if growth else "",
            ]
        )  # fmt: skip
    if not body:
        return
    yield "## LoRA: fresh processes, many adapters, memory"
    yield ""
    yield "The first attach of a process; peak memory of training above the loaded base, over PEFT's, the frozen base's and full fine-tuning's; loading"
    yield "many adapter files one after the other (exapt, PEFT, ratio); the last five of these loads over the second to sixth (exapt, PEFT)."
    yield ""
    yield from table(["model", "first attach", "peak / PEFT", "peak / frozen", "peak / full", "many adapters", "growth"], body)
    yield "Kept for the backward pass in MiB, without the model's own tensors:"
    yield ""
    body = []
    for r in found:
        w = r["methods"].get("lora", {}).get("whole")
        for dtype in ("float32", "bfloat16") if w else ():
            body.append([r["text"], dtype, *(f"{w['kept'][f'{side} {dtype}']['activations'] / 2**20:.1f}" for side in ("exapt", "peft", "whole"))])
    yield from table(["model", "", "LoRA, exapt", "LoRA, PEFT", "full fine-tuning"], body)


INTRO = """# Speed and memory

Written by `scripts/speed_results.py` from `bench/results/speed_*.json`, which `make bench` makes.

Every number is a ratio of two measurements made in turn in one process, on one thread, of processor time: below 1 is faster or smaller. Medians
with the 95 % bootstrap interval of the median. The order of the sides is turned round at every repetition. The same method with the same fields acts
on the same layers on both sides: PEFT's configuration is read from what `exapt.export` writes. The frozen base runs in the same turn: its forward,
and its backward down to the first hidden state, without a gradient of any parameter; that is what training an adapter costs at least.

- **attach**: the method onto a loaded model, later in a process. **step**: forward and backward of 4 rows of 64 tokens (4 images), without the
  optimiser, which is torch's for both. **forward**: without gradients, one row of 64 tokens, 16 rows of 32, or one token.
- **peak memory**: the highest resident memory of two steps with AdamW, in a process of their own, above that of the loaded base. **kept for
  backward**: bytes that autograd holds after the forward of a step, each storage once, without the model's own tensors.
- **save** and **load**: an adapter's file; exapt syncs it to the disk, PEFT does not. **merge** and **unmerge**: exapt's unmerge is exact, PEFT's
  subtracts. **switch**: from one of two adapters to the other.

The matrices of methods run on 3 of 12 layers at full width (the Llama with a quarter of the vocabulary, so that the head keeps its share), LoRA
on the whole models too. Where a start takes seconds it is measured once, where a step does, three times. Where there is a GPU the same command
measures between CUDA events, in bfloat16; `bench/gpu.py` does LoRA on a Llama of 1.2 billion parameters there. Neither has been run on a GPU
yet: the numbers here are of a CPU. Peaks of ViT and SmolLM2, and of those ResNet cells that were not measured again, are from before a copy was
adapted first, which keeps imports out of them.
"""


def page(found: list[dict[str, Any]], beside: dict[str, Any] | None = None) -> str:
    lines = [INTRO.rstrip(), "", "![Training step of every method over PEFT's and over the frozen base's](images/speed.png)", ""]
    lines += [*targets(found), *whole(found), *sections()]
    for r in found:
        lines += model(r)
    if beside is not None:
        lines += beside_adapters(beside)
    return "\n".join(lines).rstrip() + "\n"


def readme(found: list[dict[str, Any]]) -> str:
    lines = [
        "# Results", "", "Written by `scripts/speed_results.py`; do not edit. What `make bench` and its relatives measured; the documentation's pages",
        "are made from these files.", "",
    ]  # fmt: skip
    lines += ["- `speed_*.json`: exapt beside PEFT and the frozen base, [docs/speed.md](../../docs/speed.md)"]
    lines += [f"  - `speed_{r['model']}.json`: {r['text']}, {len(r['methods'])} methods" for r in found]
    lines += ["  - `speed_adapters.json`: beside AdapterHub's `adapters`"] if (RESULTS / "speed_adapters.json").exists() else []
    others = {
        "many.json": "many adapters at once: mixed batches, switching, residents, loading, one token (`bench/many.py`)",
        "growth.json": "how cost grows (`bench/growth.py`), [the plot](../../docs/images/growth.png)",
        "compiled.json": "what `torch.compile` gains (`bench/compiled.py`)", "saved.json": "docs/saved.md",
        "profile.json": "where a step's time goes (`bench/speed_profile.py`)", "gpu.json": "LoRA on a GPU (`bench/gpu.py`)",
        "methods.json": "every method on one real task", "shift_*.json": "docs/shift_results.md", "algebra.json": "docs/algebra_results.md",
    }  # fmt: skip
    lines += [f"- `{name}`: {text}" for name, text in others.items() if list(RESULTS.glob(name))]
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]]) -> None:
    """The training step of every method, over PEFT's and over the frozen base's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    models = [r for r in found if r["model"] in ("llama", "bert")]
    steps = {r["model"]: {k: m["rows"]["step"] for k, m in r["methods"].items() if "step" in m.get("rows", {})} for r in models}
    everyone = {k: v for s in steps.values() for k, v in s.items()}
    keys = sorted(everyone, key=lambda k: everyone[k].get("frozen", {}).get("median", 0.0))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.19 * len(keys) + 1.5), sharey=True)
    places = {k: i for i, k in enumerate(keys)}
    colours = {"llama": "#1f77b4", "bert": "#ff7f0e"}
    for axis, sides in zip(axes, (("peft",), ("frozen", "peft_frozen")), strict=True):
        for name, rows in steps.items():
            for side in sides:
                dots = [(v[side], places[k] + (0.18 if name == "bert" else -0.18)) for k, v in rows.items() if side in v]
                if not dots:
                    continue
                x = [d["median"] for d, _ in dots]
                bars = [[d["median"] - d["low"] for d, _ in dots], [d["high"] - d["median"] for d, _ in dots]]
                filled = colours[name] if side != "peft_frozen" else "white"
                label = f"{'PEFT' if side == 'peft_frozen' else 'exapt'}, {name}"
                axis.errorbar(x, [y for _, y in dots], xerr=bars, fmt="o", ms=4, color=colours[name], mfc=filled, lw=0.8, label=label)
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.grid(axis="x", which="both", alpha=0.25)
        axis.axvline(1.0, color="black", lw=0.8)
        axis.legend(fontsize=7)
    axes[1].axvline(1.15, color="green", lw=0.8, ls=":")
    axes[0].set_yticks(range(len(keys)), keys, fontsize=7)
    axes[0].set_ylim(-1, len(keys))
    axes[0].set_title("training step: exapt's over PEFT's", fontsize=9)
    axes[1].set_title("training step over the frozen base's", fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    found = results()
    for r in found:
        r["methods"] = {k: r["methods"][k] for k in sorted(r["methods"], key=lambda k: (k != "lora", k))}
    path = RESULTS / "speed_adapters.json"
    beside = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    wanted = {PAGE: page(found, beside), RESULTS / "README.md": readme(found)}
    old = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        for path in [*old, *([] if PICTURE.is_file() else [PICTURE])]:
            print(f"{path.relative_to(ROOT)} is out of date: run python scripts/speed_results.py", file=sys.stderr)
        return int(bool(old) or not PICTURE.is_file())
    for path in old:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    if found:
        draw(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
