"""fit, evaluate and predict on small models: what trains, what stays, and what every setting means."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, Transformer, model_of
from torch import Tensor, nn
from words import Encoder, Language, Words, reviews, sentences

import exapt
from exapt.core.contract import WeightMethod
from exapt.train import (
    CausalLM,
    Classifier,
    Custom,
    FitConfig,
    ImageClassification,
    Regression,
    TextClassification,
    TokenClassification,
    evaluate,
    fit,
    predict,
)
from exapt.train.loop import rate

LABELS = ("bad", "good")
QUIET: dict[str, Any] = {"progress": False}


def ids(n: int = 32, seed: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(3, 40, (n, 6), generator=generator)
    return [{"x": x[i], "label": x[i, 0] % CLASSES} for i in range(n)]


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["label"])


PLAIN = Custom(mean_loss, lambda m, b: {"accuracy": (m(b["x"]).argmax(-1) == b["label"]).float().mean()}, "accuracy", True)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in exapt.trainable(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], **near: float) -> None:
    assert a.keys() == b.keys()
    for n in a:
        torch.testing.assert_close(a[n], b[n], **(near or {"rtol": 0, "atol": 0}), msg=lambda m, n=n: f"{n}: {m}")


def test_text_classification_trains_adapter_and_head_and_the_file_holds_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Encoder()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    task = TextClassification(LABELS, Words())
    result = fit(base, task, reviews(), exapt.LoRA(4), validation=reviews(12), config=FitConfig(epochs=8, lr=1e-2, batch_size=8, folder=str(tmp_path), **QUIET))
    assert isinstance(result.model, Classifier)
    assert result.model.backbone is base
    assert result.metrics["accuracy"] == 1.0
    assert result.steps == 8 * 5
    assert result.stopped == "all 40 steps done"
    assert result.seconds > 0
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in before.items())
    trained = set(exapt.trainable(result.model))
    assert any(".A" in n for n in trained)
    assert any(n.startswith("head.") for n in trained)
    torch.manual_seed(99)  # another head
    again = task.prepare(Encoder())
    again.load_state_dict({**again.state_dict(), **{f"backbone.{k}": v for k, v in before.items()}})
    exapt.load(again, tmp_path / "adapter.safetensors")
    assert evaluate(again, task, reviews(12)) == pytest.approx(result.metrics)
    noted = exapt.read(tmp_path / "adapter.safetensors")
    assert noted.metrics == result.metrics
    assert noted.provenance["train"]["lr"] == 1e-2


def test_predict_needs_no_labels_and_agrees_with_evaluate() -> None:
    task = TextClassification(LABELS, Words())
    model = fit(Encoder(), task, reviews(), exapt.LoRA(4), config=FitConfig(epochs=6, lr=1e-2, **QUIET)).model
    rows = reviews(10)
    found = predict(model, task, [{"text": r["text"]} for r in rows])
    assert found == [r["label"] for r in rows]
    assert evaluate(model, task, rows, batch_size=3)["accuracy"] == 1.0
    assert not model.training


def test_token_classification_scores_entities_and_pads_truncated_words() -> None:
    task = TokenClassification(("O", "B-person", "B-place", "I-place"), Words())
    result = fit(Encoder(), task, sentences(), exapt.LoRA(8), validation=sentences(6), config=FitConfig(epochs=20, lr=2e-2, batch_size=8, **QUIET))
    assert result.metrics["f1"] == 1.0
    assert predict(result.model, task, [{"tokens": ["so", "Anna", "went", "to", "old", "Paris"]}]) == [["O", "B-person", "O", "O", "B-place", "I-place"]]
    short = TokenClassification(task.labels, Words(), max_length=6)
    cut = predict(result.model, short, sentences(1))[0]
    assert len(cut) == 6
    assert cut[-2:] == ["O", "O"]
    assert evaluate(result.model, short, sentences(6))["recall"] < 1.0


def test_language_model_packs_blocks_and_improves() -> None:
    task = CausalLM(Words(), block=8)
    rows = [{"text": "the cat sat on the mat and"} for _ in range(20)]
    blocks = task.rows(rows)
    assert {len(b["input_ids"]) for b in blocks} == {8}
    stream = [i for r in rows for i in [*Words()(r["text"], add_special_tokens=False)["input_ids"], 2]][:-1]
    assert [i for b in blocks for i in b["input_ids"]] == stream[: 8 * (len(stream) // 8)]
    model = Language()
    before = evaluate(model, task, rows)
    result = fit(model, task, rows, exapt.LoRA(4), "linear", validation=rows, config=FitConfig(steps=40, lr=3e-2, **QUIET))
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]))
    assert result.metrics["loss"] < 0.6 * before["loss"]
    assert predict(model, task, rows)[0] > 1


def test_image_and_regression_tasks() -> None:
    generator = torch.Generator().manual_seed(0)
    bright = [{"image": (torch.rand(8, 8, 3, generator=generator) * 80 + 170 * (i % 2)).to(torch.uint8).numpy(), "label": LABELS[i % 2]} for i in range(24)]
    images = ImageClassification(LABELS, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    running = net[1].running_mean.clone()
    result = fit(net, images, bright, {"conv": exapt.LoRA(2), "head": exapt.method("full")}, config=FitConfig(epochs=10, lr=2e-2, **QUIET))
    assert evaluate(net, images, bright)["accuracy"] == 1.0
    assert torch.equal(running, net[1].running_mean), "an adapter's file does not hold running statistics, so they must not move"
    assert result.metrics == {}
    lines = [{"features": [x / 10, 1.0], "label": 2 * x / 10 - 1} for x in range(20)]
    task = Regression()
    fit(line := nn.Linear(2, 1), task, lines, config=FitConfig(epochs=80, lr=5e-2, batch_size=20, **QUIET))
    found = evaluate(line, task, lines)
    assert found["r2"] > 0.95
    assert predict(line, task, lines)[0] == pytest.approx(-1, abs=0.4)


def test_accumulation_equals_one_large_batch() -> None:
    """Also where the batches hold different numbers of targets: sentences of different lengths, the last batch a short one."""
    rows = sentences(22)
    for i, r in enumerate(rows):
        r["tokens"], r["tags"] = r["tokens"][: 2 + i % 5], r["tags"][: 2 + i % 5]
    task = TokenClassification(("O", "B-person", "B-place", "I-place"), Words())
    found = []
    torch.manual_seed(5)
    state = Encoder().state_dict()
    for size, accumulate in ((8, 1), (2, 4)):
        model = Encoder()
        model.load_state_dict(state)
        result = fit(model, task, rows, exapt.LoRA(4), config=FitConfig(steps=6, lr=1e-2, batch_size=size, accumulate=accumulate, **QUIET))
        found.append((tensors(result.model), [e["loss"] for e in result.history]))
    same(found[0][0], found[1][0], rtol=1e-4, atol=2e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_one_step_is_adamw_on_the_clipped_gradient_plus_the_penalty() -> None:
    class Pulled(exapt.LoRA):
        key = "pulled"

        def penalty(self, p: Any, w: Tensor) -> Tensor:
            return 0.3 * p["A"].square().sum()

        calls: list[tuple[int, int]] = []  # noqa: RUF012

        def on_step(self, tensors: Any, step: int, total: int) -> None:
            self.calls.append((step, total))

    rows = ids(8)
    config = FitConfig(steps=1, batch_size=8, lr=0.01, warmup=0.0, clip=0.05, weight_decay=0.1, schedule="constant", **QUIET)
    ours = model_of("text")
    fit(ours, PLAIN, rows, Pulled(2), "linear", config=config)
    assert Pulled.calls == [(1, 1)]
    plain = model_of("text")
    exapt.attach(plain, exapt.LoRA(2), "linear", seed=0)
    batch = torch.utils.data.default_collate(rows)
    named = exapt.trainable(plain)
    loss = mean_loss(plain.train(), batch) + 0.3 * sum(p.square().sum() for n, p in named.items() if n.endswith(".A"))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(named.values(), 0.05)
    torch.optim.AdamW(named.values(), lr=0.01, weight_decay=0.1).step()
    same(tensors(ours), tensors(plain), rtol=1e-4, atol=1e-6)


def test_schedules() -> None:
    cosine = [rate(s, 100, FitConfig(lr=2.0, warmup=0.1)) for s in range(100)]
    assert cosine[0] == pytest.approx(0.2)
    assert max(cosine) == cosine[9] == cosine[10] == 2.0
    assert cosine[55] == pytest.approx(1.0)
    assert cosine[-1] < 0.01
    assert rate(99, 100, FitConfig(lr=2.0, schedule="constant")) == 2.0
    assert rate(55, 100, FitConfig(lr=2.0, warmup=0.1, schedule="linear")) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["text", "bert"])
def test_recomputed_blocks_give_equal_gradients(kind: str) -> None:
    pytest.importorskip("transformers") if kind == "bert" else None
    model = model_of(kind)
    exapt.attach(model, exapt.LoRA(4), seed=0)
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.add_(0.1)
    x = torch.randint(3, 40, (4, 6))
    classes = {n: type(m) for n, m in model.named_modules()}

    def gradients(wanted: bool) -> tuple[dict[str, Tensor], int]:
        calls = []
        block = next(m for n, m in model.named_modules() if type(m).__name__ in ("Block", "BertLayer"))
        hook = next(m for m in block.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *a: calls.append(1))
        model.train()
        torch.manual_seed(1)  # dropout
        with exapt.recomputed(model, wanted):
            y = model(x)
            (y if isinstance(y, Tensor) else y.logits).square().sum().backward()
        hook.remove()
        found = {n: p.grad.clone() for n, p in exapt.trainable(model).items() if p.grad is not None}
        model.zero_grad()
        return found, len(calls)

    plain, once = gradients(False)
    again, twice = gradients(True)
    assert (once, twice) == (1, 2)
    assert plain
    same(plain, again)
    assert classes == {n: type(m) for n, m in model.named_modules()}
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("key", ["lora", "prefix_tuning"])
def test_recomputing_leaves_a_causal_models_cache_alone(key: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    model = exapt.attach(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), exapt.method(key), seed=0)
    parameters = exapt.trainable(model)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1)
    x = torch.randint(3, 40, (3, 6))
    mask = torch.tensor([[0] * n + [1] * (6 - n) for n in (0, 2, 3)])  # padding in front: what the cache would hold twice is not masked
    found = []
    for wanted in (False, True):
        with exapt.recomputed(model.train(), wanted):
            loss = model(input_ids=x, attention_mask=mask, labels=x).loss
            found.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    same(*found)


def test_a_foreign_checkpoint_is_refused_where_sites_pass_something_on() -> None:
    from torch.utils.checkpoint import checkpoint

    model = model_of("text")
    exapt.attach(model, exapt.method("connected_adapter"))
    first, second = (functools.partial(type(b).forward, b) for b in model.layers)
    for b, forward in zip(model.layers, (first, second), strict=True):
        b.forward = functools.partial(checkpoint, forward, use_reentrant=False)
    y = model(torch.randint(3, 40, (4, 6)))
    with pytest.raises(exapt.InputError, match=r"use exapt\.recomputed"):
        y.sum().backward()


def test_recomputing_serves_sites_that_run_in_another_order_than_they_are_listed() -> None:
    model = model_of("text")
    exapt.attach(model, exapt.method("stream_adapter"))
    model.layers = nn.ModuleList(reversed(model.layers))
    with exapt.recomputed(model.train()):
        model(torch.randint(3, 40, (4, 6))).sum().backward()
    assert all(p.grad is not None for p in exapt.trainable(model).values())


def test_checkpointing_trains_the_same() -> None:
    found = []
    for checkpointing in (False, True):
        model = model_of("text")
        fit(model, PLAIN, ids(), exapt.LoRA(4), config=FitConfig(steps=4, checkpointing=checkpointing, **QUIET))
        found.append(tensors(model))
    same(*found)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_follows_single_precision(precision: str) -> None:
    losses = []
    for p in ("32-true", precision):
        model = model_of("text")
        result = fit(model, PLAIN, ids(), exapt.LoRA(4), config=FitConfig(steps=30, lr=1e-2, precision=p, log_every=1, **QUIET))
        losses.append([e["loss"] for e in result.history])
        assert {t.dtype for t in exapt.trainable(model).values()} == {torch.float32}
        base = model.layers[0].mlp.fc1.weight.dtype
        assert base == (torch.bfloat16 if p == "bf16-true" else torch.float32)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.05)
    assert losses[1][-1] < 0.8 * losses[1][0]


def test_early_stopping_goes_back_to_the_best_weights() -> None:
    noise = [{"x": r["x"], "label": torch.tensor((i * 7) % CLASSES)} for i, r in enumerate(ids(32, 4))]
    model = model_of("text")
    config = FitConfig(epochs=60, lr=2e-2, patience=2, eval_every=2, **QUIET)
    result = fit(model, Custom(mean_loss), ids(), exapt.LoRA(4), validation=noise, config=config)
    assert result.stopped.startswith("no better loss in 2 evaluations")
    assert result.steps < 120
    seen = [e["validation_loss"] for e in result.history if "validation_loss" in e]
    assert result.metrics["loss"] == min(seen) < seen[-1]
    assert evaluate(model, Custom(mean_loss), noise, batch_size=16)["loss"] == pytest.approx(min(seen))


def test_a_loss_that_is_not_finite_stops_before_it_changes_anything(tmp_path: Path) -> None:
    rows = ids(32)
    rows[17]["label"] = torch.tensor(-1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        y = mean_loss(model, {**batch, "label": batch["label"].clamp_min(0)})
        return y * math.nan if (batch["label"] < 0).any() else y

    config = FitConfig(steps=8, batch_size=4, folder=str(tmp_path), save_every=1, **QUIET)
    model = model_of("text")
    with pytest.raises(exapt.InputError, match=r"step \d: the loss is nan \(epoch 0, rows .*\b17\b.*last good checkpoint is .*step-00000000\d") as e:
        fit(model, Custom(loss), rows, exapt.LoRA(4), config=config)
    assert all(t.isfinite().all() for t in exapt.trainable(model).values())
    step = int(str(e.value).split()[1].rstrip(":"))
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert 1 <= len(kept) <= 2
    assert f"{step - 1:09d}" in kept[-1].name


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    class Root(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) * 0).sqrt()

    with pytest.raises(exapt.InputError, match="norm of the gradient is nan"):
        fit(Root(2, 1), Custom(lambda m, b: m(b).sum()), torch.ones(4, 2), config=FitConfig(steps=1, clip=None, **QUIET))


def test_loader_gives_the_same_as_rows_and_reports_its_batches() -> None:
    rows = ids(16)
    loader = torch.utils.data.DataLoader(rows, batch_size=16)  # type: ignore[arg-type]
    found = []
    for data in (rows, loader):
        model = model_of("text")
        fit(model, PLAIN, data, exapt.LoRA(4), config=FitConfig(epochs=3, batch_size=16, **QUIET))
        found.append(tensors(model))
    same(*found, rtol=1e-4, atol=1e-6)  # one batch an epoch: only the order of its rows differs
    assert evaluate(model, PLAIN, loader)["loss"] == pytest.approx(evaluate(model, PLAIN, rows, batch_size=16)["loss"])


def test_seed_decides_everything_and_workers_change_nothing() -> None:
    found = []
    for seed, workers in ((0, 0), (0, 2), (1, 0)):
        torch.manual_seed(int(torch.randint(1000, ())))
        model = model_of("text")
        fit(model, PLAIN, ids(), exapt.LoRA(4, dropout=0.1), config=FitConfig(steps=4, seed=seed, workers=workers, **QUIET))
        found.append(tensors(model))
    same(found[0], found[1])
    assert any(not torch.equal(found[0][n], found[2][n]) for n in found[0])


def test_full_fine_tuning_and_its_folder(tmp_path: Path) -> None:
    import safetensors.torch

    model = model_of("text")
    before = model.head.weight.detach().clone()
    result = fit(model, PLAIN, ids(), validation=ids(16), config=FitConfig(epochs=2, log_every=1, folder=str(tmp_path / "run"), **QUIET))
    assert not torch.equal(before, model.head.weight)
    written = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert set(written) == {n for n, _ in model.named_parameters()}
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [e["step"] for e in lines if "loss" in e] == [1, 2, 3, 4]
    assert [e["step"] for e in lines if "validation_accuracy" in e] == [2, 4]
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_attached_adapters_are_what_trains() -> None:
    model = model_of("text")
    exapt.attach(model, exapt.LoRA(2), name="first")
    exapt.attach(model, exapt.LoRA(2), name="second", trainable=True)
    first = {n: p.detach().clone() for n, p in model.named_parameters() if "first" in n}
    fit(model, PLAIN, ids(), config=FitConfig(steps=2, **QUIET))
    now = dict(model.named_parameters())
    assert all(torch.equal(t, now[n]) for n, t in first.items())
    assert all("second" in n for n in exapt.trainable(model))


def test_statistics_are_collected_where_a_method_needs_them() -> None:
    needy = [cls for cls in exapt.methods().values() if cls.needs and issubclass(cls, WeightMethod)] or [c for c in exapt.methods().values() if c.needs]
    for cls in needy[:2]:
        model = Transformer()
        result = fit(model, PLAIN, ids(), cls(), config=FitConfig(steps=2, **QUIET))
        assert result.steps == 2
        assert exapt.adapters(model) == ("default",)
    assert needy, "no registered method declares a need"


def test_bootstrap_interval_covers_the_accuracy() -> None:
    task = TextClassification(LABELS, Words())
    model = task.prepare(Encoder())
    found = evaluate(model, task, reviews(40), bootstrap=500, seed=1)
    low, high = found["accuracy_interval"]
    assert 0 <= low <= found["accuracy"] <= high <= 1
    assert low < high
    assert evaluate(model, task, reviews(40), bootstrap=500, seed=1) == found
    wide = [(i % 2, 1.0) for i in range(400)]
    from exapt.train.metrics import bootstrap

    low, high = bootstrap(wide, 4000)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)


def test_progress_is_shown_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    model = model_of("text")
    fit(model, PLAIN, ids(), exapt.LoRA(2), config=FitConfig(steps=3))
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert shown.out == ""
    evaluate(model, PLAIN, ids(), progress=True)
    assert "100%" in capsys.readouterr().err


def test_a_head_of_the_library_is_trained_too_and_a_mapping_is_taken_at_its_word() -> None:
    pytest.importorskip("transformers")
    from tiny import CLASSES as n

    task = TextClassification(tuple("abcde"[:n]), Words())
    rows = [{"text": w, "label": "abcde"[i % n]} for i, w in enumerate(["a", "film", "so", "went", "old"] * 2)]
    for method, expected in ((exapt.LoRA(2), True), ({"linear": exapt.LoRA(2)}, False), ({"all": exapt.method("bitfit")}, True)):
        model = model_of("bert")
        fit(model, task, rows, method, config=FitConfig(steps=1, **QUIET))
        assert any(name.startswith("classifier") for name in exapt.trainable(model)) == expected
    classifier = task.prepare(Encoder())
    fit(classifier, task, rows, {"linear": exapt.LoRA(2), "all": exapt.method("bitfit")}, config=FitConfig(steps=1, **QUIET))
    assert {name for name in exapt.trainable(classifier) if name.startswith("head")} == {"head.exapt.default.weight", "head.exapt.default.bias"}
