"""The sections of docs/speed.md beside the matrix: floors, a GPU, many adapters at once, compiling, growth. :mod:`speed_results` calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from shift_results import ROOT, table

RESULTS = ROOT / "bench" / "results"


def ratio(found: dict[str, float] | None) -> str:
    """A median with its interval."""
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else ""


def floors(found: dict[str, Any]) -> Iterator[str]:
    """Where a step's time goes beyond the base's."""
    yield "A training step under torch's profiler beside the frozen base's, in turn, in shares of the base's step: what the method adds in products"
    yield "(matrices, batches of them, Fourier transforms), in other operations (element by element, copies) and outside torch's operations (Python,"
    yield "autograd). The **floor** is 1 and the products: what would be left of this way to compute it if all else were fused away. `bench/speed_profile.py`,"
    yield f"{found['model']}, medians of {found['repeats']} repetitions by the wall, load {min(found['loads']):g} to {max(found['loads']):g}; another run"
    yield "differed by up to 0.14 in a share (LOG.md), so they say what is large, not more."
    yield ""
    rows = [
        [f"`{k}`", m["rank"] or "", f"{m['step']:.2f}", f"{m['floor']:.2f}", f"{m['products']:+.2f}", f"{m['other']:+.2f}", f"{m['outside']:+.2f}"]
        for k, m in found["methods"].items() if "failed" not in m
    ]  # fmt: skip
    yield from table(["method", "rank", "step / frozen", "floor", "products", "other operations", "outside"], rows)


def many(found: dict[str, Any]) -> Iterator[str]:
    """Mixed batches, switching, residents, loading."""
    yield f"One forward of a batch whose rows use different LoRAs (ranks 4, 8 and 16), over the bare base's ({found['model']}; `bench/many.py`,"
    yield f"{found['repeats']} repetitions in turn):"
    yield ""
    rows = [[name, *(ratio(m["ratio_to_base"].get(side)) for side in ("exapt", "peft"))] for name, m in found["mixed"].items()]
    yield from table(["batch: rows x tokens, order of the adapters", "exapt", "PEFT"], rows)
    kinds = found["kinds"]["ratio_to_base"]
    switch, resident, loading = found["switching_us"], found["resident"], found["loading_ms"]
    yield f"- Six kinds of method in one batch: {ratio(kinds['all'])} of the base; those of them that are products: {ratio(kinds['products'])}."
    yield f"- Switching: {switch['exapt']['median']:.1f} µs (adapters that train: {switch['exapt, adapters that train']['median']:.0f} µs);"
    yield f"  PEFT {switch['peft']['median'] / 1e3:.0f} ms."
    yield f"- {resident['adapters']} resident adapters: attaching the last tenth took {resident['attach, last tenth / first']:.2f} times the first's, a"
    yield f"  forward {resident['forward, all / a tenth']:.2f} times that with a tenth of them; {resident['python bytes per adapter and site'] / 1e3:.1f} kB of"
    yield "  Python objects for each adapter and site beside the tensors."
    yield f"- Loading a file of {loading['bytes'] / 2**20:.1f} MiB from the system's cache: {ratio(loading['exapt'])} ms, PEFT {ratio(loading['peft'])} ms."
    yield ""


def compiled(found: dict[str, Any]) -> Iterator[str]:
    """What torch.compile gains."""
    yield "Compiled over eager, by method (`bench/compiled.py`): a training step of 4 rows of 64 tokens, and one token without gradients."
    yield ""
    rows = [
        [k if k == "frozen" else f"`{k}`", *(ratio(m[row]["compiled_over_eager"]) for row in ("step", "token")), f"{m['compiling_seconds']:.0f} s"]
        for k, m in found["methods"].items()
    ]
    yield from table(["method", "step", "one token", "compiling"], rows)


def growth(found: dict[str, Any]) -> Iterator[str]:
    """The fitted exponents."""
    yield "A LoRA's verbs against the number of sites, the rank, the width and the adapters that are resident, fitted as size ** exponent over the"
    yield "larger half of the sizes (`bench/growth.py`); what the maths asks at most stands behind."
    yield ""
    verbs = list(dict.fromkeys(r["verb"] for r in found["summary"]))
    axes = list(dict.fromkeys(r["axis"] for r in found["summary"]))
    cells = {(r["axis"], r["verb"]): r for r in found["summary"]}

    def text(axis: str, verb: str) -> str:
        r = cells.get((axis, verb))
        return "" if r is None else f"{r['exponent']:.2f} [{r['low']:.2f}, {r['high']:.2f}] of {r['asked']:g}{'' if r['passed'] else ' (above)'}"

    yield from table(["", *axes], [[verb, *(text(axis, verb) for axis in axes)] for verb in verbs])
    yield "![Seconds of every verb against sites, rank, width and resident adapters](images/growth.png)"
    yield ""


def gpu(found: dict[str, Any]) -> Iterator[str]:
    """LoRA on one GPU."""
    yield f"{found['model']}, on one {found['machine']['gpu']}, between CUDA events, the sides in turn (`bench/gpu.py`). Peak memory of a step with"
    yield "AdamW, its state among it, above that of the adapted model."
    yield ""
    rows = [
        [k, f"{m['tokens_per_second']:,}", ratio(m["over_frozen"]), ratio(found["token"][k]["over_frozen"]), f"{(found['peak_bytes'][k] or 0) / 2**30:.2f} GiB"]
        for k, m in found["step"].items()
    ]
    yield from table(["", "tokens per second", "step / frozen", "one token / frozen", "peak memory"], rows)
    yield from (f"- {k}: {why}" for k, why in found["refused"].items())
    yield ""


PARTS = (
    ("profile.json", "Where a step's time goes, and the floor", floors), ("gpu.json", "On a GPU", gpu), ("many.json", "Many adapters at once", many),
    ("compiled.json", "torch.compile", compiled), ("growth.json", "How cost grows", growth),
)  # fmt: skip


def sections() -> Iterator[str]:
    """All of them that were measured."""
    for name, title, part in PARTS:
        path = RESULTS / name
        if path.is_file():
            yield from (f"## {title}", "")
            yield from part(json.loads(path.read_text(encoding="utf-8")))
