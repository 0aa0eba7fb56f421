"""Every editor on a language model and a classifier: what it promises of its edits, undo bit for bit, files, bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edit_models import classifier, language_model, sequences, vectors
from torch import Tensor, nn

import exapt
from exapt.algebra.edit.canonical import best_within
from exapt.algebra.edit.editor import Editor, editor, editors
from exapt.algebra.edit.host import Editing, key_covariance
from exapt.algebra.edit.hypernetwork import Learned
from exapt.algebra.edit.reading import added, answers, gradients, hooked, loss, read_at
from exapt.algebra.edit.request import Edit, Probe
from exapt.algebra.edit.score import edit_score, unchanged, with_locality
from exapt.algebra.edit.surgery import behaviour_probe, modulated
from exapt.algebra.edit.value import Value

SITE = "layers.1.mlp.down_proj"
DATA = sequences(60)
STRONG = {"clamp": 1000.0, "steps": 15, "decay": 0.0}
WISE = {"rate": 0.1, "steps": 60, "ratio": 0.8, "bound": 3.0, "alpha": 0.1, "beta": 1.0, "gamma": 0.5}
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rome": (SITE, STRONG), "memit": (["layers.1.mlp.down_proj", "layers.2.mlp.down_proj"], {**STRONG, "weight": 1e-3}),
    "alphaedit": (SITE, {**STRONG, "rate": 0.5, "threshold": 0.3, "ridge": 1e-3}), "ultraedit": ("mlp.down", {"rate": 0.02}),
    "grace_codebook": (SITE, {"radius": 0.05, "steps": 15}), "wise_memory": (SITE, WISE),
    "mend": ("mlp.down", {"rate": 1e-2, "rank": 8}), "malmen": ("mlp.down", {"rate": 0.1, "rank": 8}),
}  # fmt: skip


def make(i: int, model: nn.Module, length: int = 1) -> Edit:
    now = unchanged(model, [DATA[i, :5]], length)[0].answer
    return Edit(DATA[i, :5], (now + 7 + i) % 40, rephrasings=(torch.cat([DATA[i, 1:2], DATA[i, 1:5]]),))


def start(key: str) -> tuple[nn.Module, Editing, Editor, list[Edit]]:
    model = language_model()
    where, settings = SETTINGS[key]
    edits = with_locality(model, [make(i, model) for i in range(3)], [r[:5] for r in DATA[20:30]])
    editing = Editing(model, where, key_covariance(model, [DATA[20:, :5]], where))
    made = editor(key, **settings)
    others = with_locality(model, [make(i, model) for i in range(40, 52)], [r[:5] for r in DATA[52:54]])
    if hasattr(made, "observe"):
        made.observe(editing, others)
    if hasattr(made, "train"):
        losses = made.train(editing, others, steps=15, batch=3, rate=1e-2)
        assert np.mean(losses[-3:]) < np.mean(losses[:3]), "the network learns to edit"
    return model, editing, made, edits


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_edits_are_made_saved_and_undone(key: str, tmp_path: Path) -> None:
    model, editing, made, edits = start(key)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    before, reach = edit_score(model, edits), loss(model, edits).item()
    untouched = model(DATA)
    assert before == {"reliability": 0.0, "generalisation": before["generalisation"], "locality": 1.0}
    for edit in edits:  # one after the other
        made.edit(editing, [edit])
        if key not in ("ultraedit", "mend", "malmen"):
            assert edit_score(model, [edit])["reliability"] == 1.0
    assert loss(model, edits).item() < reach - 0.5
    if key not in ("ultraedit", "mend", "malmen", "wise_memory"):  # WISE's later edits move what the earlier ones share with them
        assert edit_score(model, edits)["reliability"] == 1.0
    after = model(DATA)
    file = exapt.save(model, tmp_path / "edits.safetensors", "edit")
    editing.undo()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    assert list(base) == list(model.state_dict())
    assert torch.equal(model(DATA), untouched)
    exapt.load(model, file, "edit")
    assert torch.equal(model(DATA), after)


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_a_classifier_of_vectors(key: str) -> None:
    model = classifier()
    x, y = vectors(60, seed=1)
    editing = Editing(model, "2", key_covariance(model, [x[30:]], "2"))
    edits = with_locality(model, [Edit(x[i], int(y[i] + 1) % 4) for i in range(2)], list(x[10:20]))
    made, other = editor(key, **SETTINGS[key][1]), [Edit(x[i], int(y[i] + 1) % 4) for i in range(40, 50)]
    if hasattr(made, "observe"):
        made.observe(editing, other)
    if hasattr(made, "train"):
        made.train(editing, other, steps=3, batch=5)
    before = loss(model, edits).item()
    made.edit(editing, edits[:1])
    made.edit(editing, edits[1:])
    assert loss(model, edits).item() < before
    if key in ("rome", "memit", "grace_codebook", "wise_memory"):
        assert edit_score(model, edits[1:])["reliability"] == 1.0
    editing.undo()
    assert edit_score(model, edits)["locality"] == 1.0


def test_rome_gives_the_layer_its_value() -> None:
    model, editing, _, _ = start("rome")
    edit = replace(make(0, model, 2), subject=3)
    editing.contexts = (DATA[5, :3], DATA[6, :3])
    site = editing.sites[0]
    m, delta = Value(**STRONG).find(editing, site, edit)
    (old,) = read_at(model, [site], [edit.prompt], [3])[SITE][1]
    torch.testing.assert_close(m, old)
    editor("rome", **STRONG).edit(editing, [edit])
    (new,) = read_at(model, [site], [edit.prompt], [3])[SITE][1]
    torch.testing.assert_close(new, m + delta, rtol=1e-4, atol=1e-4)
    held = [p for n, p in model.named_parameters() if "exapt.edit" in n]
    change = held[0] - model.layers[1].mlp.down_proj._parameters["weight"]  # type: ignore[index,union-attr]
    assert np.linalg.svd(change.detach().numpy())[1][1] < 1e-4 * np.linalg.svd(change.detach().numpy())[1][0]


def test_memit_brings_the_stream_near_its_goal_and_shares_the_work() -> None:
    model, editing, made, edits = start("memit")
    rows, places = [e.prompt for e in edits], [e.place for e in edits]
    last, block = editing.sites[-1], next(s for s in exapt.sites(model) if s.name == "layers.2")
    goal = read_at(model, [block], rows, places)["layers.2"][1] + torch.stack([made.value.find(editing, last, e)[1] for e in edits])
    far = (goal - read_at(model, [block], rows, places)["layers.2"][1]).norm()
    made.edit(editing, edits)
    assert (goal - read_at(model, [block], rows, places)["layers.2"][1]).norm() < 0.05 * far
    changed = [n for n, p in model.named_parameters() if "exapt.edit" in n]
    assert len(changed) == 2


@pytest.mark.parametrize("key", ["memit", "alphaedit"])
def test_the_bound_of_values_is_in_norms_of_the_stream(key: str) -> None:
    model, editing, _, edits = start(key)
    settings = {**SETTINGS[key][1], "clamp": 0.02, "steps": 5, "weight": 1e-6} if key == "memit" else {**SETTINGS[key][1], "clamp": 0.02, "ridge": 1e-6}
    block = next(s for s in exapt.sites(model) if s.name == editing.sites[-1].name.rpartition(".mlp")[0])
    rows, places = [edits[0].prompt], [edits[0].place]
    before = read_at(model, [block], rows, places)[block.name][1]
    editor(key, **settings).edit(editing, edits[:1])
    moved = (read_at(model, [block], rows, places)[block.name][1] - before).norm()
    assert abs(float(moved / before.norm()) - 0.02) < 2e-3


def test_a_value_stops_where_its_loss_is_small_enough() -> None:
    model, editing, _, _ = start("rome")
    edit = make(0, model)
    reached = []
    for enough in (1.0, 0.01):
        start_, delta = Value(clamp=1000.0, steps=40, decay=0.0, rate=0.1, enough=enough).find(editing, editing.sites[0], edit)
        with hooked(editing.sites, lambda s, x, h, new=start_ + delta: torch.cat([h[:, :-1], new[None, None]], 1)):  # type: ignore[misc]
            reached.append(loss(model, [edit]).item())
    assert 0.3 < reached[0] < 1.0
    assert reached[1] < 0.01


@pytest.mark.parametrize("key", ["mend", "malmen"])
def test_learning_to_make_one_edit_at_a_time(key: str) -> None:
    model = language_model()
    where, settings = SETTINGS[key]
    editing, made = Editing(model, where), editor(key, **settings)
    assert isinstance(made, Learned)
    losses = made.train(editing, [make(i, model) for i in range(40, 52)], steps=40, batch=1, rate=1e-2)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_alphaedit_keeps_a_null_space_over_edits() -> None:
    model, _, _, edits = start("alphaedit")
    kept = DATA[30:34, :4]  # few enough keys to leave a null space
    editing = Editing(model, SITE, key_covariance(model, [kept], SITE))
    seen: list[Tensor] = []
    with hooked(editing.sites, lambda s, x, h: seen.append(h.detach())):
        model(kept)
        for e in edits:
            editor("alphaedit", **{**SETTINGS["alphaedit"][1], "threshold": 1e-6}).edit(editing, [e])
        seen = seen[:1]
        model(kept)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    assert edit_score(model, edits)["reliability"] == 1.0


def test_wise_puts_shards_aside_and_merges_them() -> None:
    model, _, _, edits = start("wise_memory")
    editing = Editing(model, SITE)
    made = editor("wise_memory", **{**SETTINGS["wise_memory"][1], "shard": 1, "merge": 2, "density": 1.0})
    made.edit(editing, edits[:1])
    (first,), (eps,) = editing.memory["wise"]["shards"], editing.memory["wise"]["eps"]
    mask = editing.memory["wise"]["mask"]
    assert bool((first[mask == 0] == 0).all())
    assert float(first.abs().max()) <= 3.0
    alone = Editing(model, SITE, name="other")
    editor("wise_memory", **{**SETTINGS["wise_memory"][1], "shard": 1, "merge": 0, "seed": 0}).edit(alone, edits[:2])
    second, other = alone.memory["wise"]["shards"][1], alone.memory["wise"]["eps"][1]
    alone.undo()
    made.edit(editing, edits[1:2])
    (merged,), (threshold,) = editing.memory["wise"]["shards"], editing.memory["wise"]["eps"]
    sign = torch.where(first + second >= 0, 1.0, -1.0)
    agree = [torch.where(d * sign > 0, d, 0) for d in (first, second)]
    count = sum((d != 0).float() for d in agree)
    torch.testing.assert_close(merged, sum(agree) / count.clamp_min(1))  # type: ignore[call-overload]
    assert threshold == min(eps, other)
    made.edit(editing, edits[2:])
    assert len(editing.memory["wise"]["shards"]) == 2


def test_gradients_are_those_of_the_loss() -> None:
    model, editing, _, _ = start("rome")
    edit = make(1, model, 2)
    x, g = gradients(model, editing.sites, edit, everywhere=True)[SITE]
    weight = model.layers[1].mlp.down_proj.weight  # type: ignore[index,union-attr]
    (expected,) = torch.autograd.grad(loss(model, [edit]), weight.requires_grad_(True))
    torch.testing.assert_close(g.T @ x, expected, rtol=1e-4, atol=1e-6)
    own, _ = gradients(model, editing.sites, edit)[SITE]
    torch.testing.assert_close(own, x[4:6])


def test_shifts_tried_in_hooks_are_those_that_are_made() -> None:
    model = language_model()
    editing = Editing(model)
    shifts = {s.name: 0.01 * torch.randn(s.shape) for s in editing.sites}
    with hooked(editing.sites, added(shifts)):
        hung = model(DATA)
    editing.shift(shifts)
    torch.testing.assert_close(model(DATA), hung, rtol=1e-4, atol=1e-5)


def test_scores_against_counting() -> None:
    model = language_model()
    edits = [make(i, model, 2) for i in range(4)]
    probes = unchanged(model, [DATA[8, :5], DATA[9, :4]], length=3)
    edits[0] = replace(edits[0], locality=probes)
    logits = [model(e.row[None])[0, 4:].argmax(-1) for e in edits]
    hits = [(z == e.target).numpy() for z, e in zip(logits, edits, strict=True)]
    found = edit_score(model, edits)
    assert found["reliability"] == pytest.approx(np.mean([h.mean() for h in hits]))
    assert edit_score(model, edits, exact=True)["reliability"] == pytest.approx(np.mean([h.all() for h in hits]))
    assert found["locality"] == 1.0
    assert [len(p.answer) for p in probes] == [3, 3]
    assert answers(model, [Probe(DATA[8, :5], torch.tensor([1, 2]))])[0].shape == (2, 40)


def test_key_covariance_against_numpy() -> None:
    model = language_model()
    keys: list[Tensor] = []
    with hooked([s for s in exapt.sites(model) if s.name == SITE], lambda s, x, h: keys.append(x.detach())):
        model(DATA)
    k = keys[0].flatten(0, 1).double().numpy()
    found = key_covariance(model, [DATA[:30], DATA[30:]], SITE)
    np.testing.assert_allclose(found[SITE].numpy(), k.T @ k / len(k), rtol=1e-4, atol=1e-7)


def test_model_surgery() -> None:
    model = language_model()
    editing = Editing(model, "mlp.gate")
    weights = {s.name: s.weight.clone() for s in editing.sites}
    probe = torch.randn(32)
    done = modulated(editing, probe, rows=5, alpha=0.7)
    every = np.concatenate([w.numpy() for w in weights.values()])
    cosine = every @ probe.numpy() / np.linalg.norm(every, axis=1)
    expected = np.zeros_like(every)
    expected[np.argsort(cosine)[:5]] = 0.7 * probe.numpy()
    np.testing.assert_allclose(np.concatenate([d.numpy() for d in done.values()]), expected, rtol=1e-6)
    editing.undo()
    assert all(torch.equal(s.weight, weights[s.name]) for s in editing.sites)
    with pytest.raises(exapt.InputError, match="rows is 0; the sites have 192"):
        modulated(editing, probe, rows=0)
    with pytest.raises(exapt.InputError, match=r"the probe has shape \(3,\)"):
        modulated(editing, torch.ones(3), rows=1)


def test_a_probe_finds_a_behaviour() -> None:
    model = language_model()
    inputs = [*DATA[:20, :5], *(DATA[:20, :5] % 5)]  # the second half is of the first five tokens only
    probe = behaviour_probe(Editing(model), inputs, [0] * 20 + [1] * 20)
    last = [s for s in exapt.sites(model) if s.role == "block"][-1]
    seen: list[Tensor] = []
    with torch.no_grad(), hooked([last], lambda s, x, h: seen.append(h.mean(1))):
        model(torch.stack(inputs))
    scores = seen[0] @ probe
    assert scores[20:].mean() - scores[:20].mean() > scores.std()
    with pytest.raises(exapt.InputError, match="give one, 0 or 1, for each"):
        behaviour_probe(Editing(model), inputs, [1] * 40)


def test_canonical_examples_choose_within_the_bound() -> None:
    model, editing, _, edits = start("rome")
    usual = [Probe(r[:4], r[4:]) for r in DATA[30:40]]
    validation = [Probe(r, e.target) for e in edits for r in e.rephrasings]
    candidates = {"weak": editor("rome", steps=1), "strong": editor("rome", **STRONG)}
    before = loss(model, usual).item()
    chosen, outcomes = best_within(lambda: editing, candidates, edits, validation, usual, bound=10.0)
    weak, strong = outcomes
    assert chosen == "strong"
    assert strong.success > weak.success
    candidates["strong"].edit(editing, edits)
    assert strong.degradation == pytest.approx(loss(model, usual).item() / before, rel=1e-4)
    editing.undo()
    strict, _ = best_within(lambda: editing, {"strong": candidates["strong"]}, edits, validation, usual, bound=0.0)
    assert strict is None or strong.degradation <= 1
    with pytest.raises(exapt.InputError, match="0 candidates"):
        best_within(lambda: editing, {}, edits, validation, usual)


def test_bad_edits() -> None:
    model = language_model()
    editing = Editing(model, SITE)
    rome, good = editor("rome"), make(0, model)
    cases: list[tuple[Any, str]] = [
        ([], "there is no edit to make"),
        ([good, replace(good, prompt=torch.zeros(0, dtype=torch.int64))], "edit 1: its prompt is of type torch.int64"),
        ([replace(good, prompt=DATA[:2])], r"edit 0: its token ids have shape \(2, 6\)"),
        ([replace(good, target=-1)], "edit 0: its target is -1"),
        ([replace(good, target=torch.ones(2))], "edit 0: its target is of type torch.float32"),
        ([replace(good, subject=9)], "its subject ends at token 9, but the prompt has 5"),
        ([replace(good, rephrasings=(DATA[:2],))], "edit 0, rephrasing 0"),
        ([replace(good, locality=(Probe(DATA[0], -3),))], "edit 0, locality 0"),
        (["edit"], "edit 0 is a str"),
        ([replace(good, prompt=torch.tensor([float("nan")]), target=1)], "holds NaN"),
    ]
    editing.covariance = key_covariance(model, [DATA], SITE)
    for edits, message in cases:
        with pytest.raises(exapt.InputError, match=message):
            rome.edit(editing, edits)
    with pytest.raises(exapt.InputError, match=r"beyond the model's 40 logits"):
        edit_score(model, [replace(good, target=torch.tensor([40]))])
    with pytest.raises(exapt.InputError, match="must be token ids"):
        edit_score(model, [replace(good, target=3)])
    assert not exapt.adapters(model)


def test_bad_settings() -> None:
    model = language_model()
    good = make(0, model)
    with pytest.raises(exapt.InputError, match='no editor "romee"; did you mean "rome"'):
        editor("romee")
    with pytest.raises(exapt.InputError, match='editor rome has no "step"; did you mean "steps"'):
        editor("rome", step=3)
    with pytest.raises(exapt.InputError, match="needs the covariance of the keys"):
        editor("rome").edit(Editing(model, SITE), [good])
    with pytest.raises(exapt.InputError, match="edits one layer, but where= names 3"):
        editor("rome").edit(Editing(model), [good])
    with pytest.raises(exapt.InputError, match="must be 64 x 64"):
        editor("rome").edit(Editing(model, SITE, {SITE: torch.eye(3)}), [good])
    plain = classifier()
    covariance = key_covariance(plain, [vectors(40)[0]], ["0", "2"])
    with pytest.raises(exapt.InputError, match="add up in one stream"):
        editor("memit").edit(Editing(plain, ["0", "2"], covariance), [Edit(vectors(1)[0][0], 1)])
    with pytest.raises(exapt.InputError, match="has not learnt to edit"):
        editor("mend").edit(Editing(model), [good])
    with pytest.raises(exapt.InputError, match="has no locality probe"):
        editor("wise_memory").edit(Editing(model, SITE), [good])
    with pytest.raises(exapt.InputError, match="came out as NaN"):
        Editing(model, SITE).shift({SITE: torch.full((32, 64), torch.nan)})
    with pytest.raises(exapt.InputError, match="does not belong to a site"):
        Editing(model, SITE).shift({"head": torch.zeros(2, 2)})
    editing = Editing(model, SITE).shift({SITE: torch.zeros(32, 64)})
    with pytest.raises(exapt.InputError, match="holds another editor's edits"):
        editor("grace_codebook").edit(editing, [good])
    with pytest.raises(exapt.InputError, match='an adapter "edit" is on this model already'):
        Editing(model)
    editing.undo()
    with pytest.raises(exapt.InputError, match="no batch reached it"):
        key_covariance(model, [], SITE)


def test_every_editor_is_listed() -> None:
    assert set(SETTINGS) <= editors().keys()
    for cls in editors().values():
        assert isinstance(cls(), Editor)
