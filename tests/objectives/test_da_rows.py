"""ParetoDA, SLM, LFTL, mixing with edges: against NumPy, SciPy and brute force; what each promises."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from da_steps import LABELS, config, images, model, seen, step
from torch import Tensor, nn

import exapt
from exapt.core.objective import Objective, Seen, Shapes
from exapt.objectives.balancing import GenericMixup, edge_translation
from exapt.objectives.dann import DANN
from exapt.objectives.learn_from_learnt import LearnFromLearnt, attended_entropy, contrastive_sampling
from exapt.objectives.pareto import ParetoDA, mimicking_loss, pareto_weights, refined_predictions
from exapt.objectives.select_label_mix import SelectLabelMix, averaged_hausdorff, hard_selection
from exapt.objectives.shot import SHOT
from exapt.train.tasks import ImageClassification

TASK = ImageClassification(LABELS)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(-1)


# ParetoDA


def test_refined_predictions_and_surrogate_against_numpy() -> None:
    p, d = torch.randn(6, 3, dtype=torch.float64).softmax(-1), torch.rand(6, 3, dtype=torch.float64)
    joint = p.numpy() * d.numpy()
    np.testing.assert_allclose(refined_predictions(p, d).numpy(), joint / joint.sum(1, keepdims=True), rtol=1e-12)
    expected = math.log(3) - (entropy(p.numpy().mean(0)) - entropy(p.numpy()).mean())
    np.testing.assert_allclose(float(mimicking_loss(p)), expected, rtol=1e-12)


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_pareto_weights_against_a_grid(seed: int, follow: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    g, v = torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)
    got = pareto_weights(g, v, follow).double().numpy()
    c, a = (g.double() @ g.double().T).numpy(), (g.double() @ v.double()).numpy()
    grid = np.array([(i, j, 200 - i - j) for i in range(201) for j in range(201 - i)]) / 200

    def allowed(w: np.ndarray, slack: float) -> np.ndarray:
        inner = w @ c
        if not follow:
            return (inner >= -slack).all(1) & (w @ a >= min(0, a.max()) - slack)
        floor = np.where(a > 0, -np.inf, a) if (a > 0).any() else np.zeros(3)
        floor[a.argmax()] = 0
        return (inner >= floor - slack).all(1)

    goal = a if follow else c.sum(0)
    assert got.sum() == pytest.approx(1)
    assert (got >= -1e-6).all()
    inside = grid[allowed(grid, 0)]
    if len(inside):
        assert allowed(got[None], 1e-5)[0]
        assert got @ goal >= (inside @ goal).max() - 1e-5
    else:
        np.testing.assert_allclose(got, 1 / 3, rtol=1e-6)


def test_pareto_gradient_is_the_weighted_sum_below_the_features_and_plain_above() -> None:
    objective = ParetoDA(hidden=4)
    parts = objective.parts(Shapes(features=3, classes=2))
    w, head = torch.randn(5, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    x, y = torch.randn(14, 5), torch.tensor([0, 1, 0, 1, 0, 1])

    def made() -> exapt.core.objective.Step:
        h = x @ w
        own = {f"parts.{k}": p for k, p in parts.named_parameters()}
        return step(seen(h[:6] @ head, h[:6], y), seen(h[6:] @ head, h[6:]), parts, parameters={"w": w, "head": head, **own})

    three, preference, own = objective.losses(made())
    assert preference is not None
    rows = [torch.autograd.grad(t, w, retain_graph=True)[0].flatten() for t in (*three, preference)]
    alpha = pareto_weights(torch.stack(rows[:3]), rows[3], True)
    s = made()
    loss = objective.loss(s)
    torch.testing.assert_close(loss, three[0] + three[1] + own)
    got = torch.autograd.grad(loss, [w, head, *parts.parameters()])
    torch.testing.assert_close(got[0].flatten(), 3 * (alpha @ torch.stack(rows[:3])), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[1], torch.autograd.grad(three[0], head, retain_graph=True)[0])
    for a, b in zip(got[2:], torch.autograd.grad(three[1] + own, list(parts.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_held_out_rows_give_the_preference_only() -> None:
    objective = ParetoDA(hidden=4)
    parts = objective.parts(Shapes(features=3, classes=2))
    z = torch.randn(6, 2, requires_grad=True)
    s = step(
        seen(torch.randn(4, 2), torch.randn(4, 3), torch.zeros(4, dtype=torch.long)), seen(z, torch.randn(6, 3), index=torch.tensor([0, 1, 2, 3, 5, 8])), parts
    )
    three, preference, _ = objective.losses(s)
    assert preference is not None
    assert (torch.autograd.grad(three[2], z, retain_graph=True)[0].abs().sum(1) > 0).tolist() == [False, True, False, True, True, False]
    assert (torch.autograd.grad(preference, z)[0].abs().sum(1) > 0).tolist() == [True, False, True, False, False, True]


# SLM


def test_hard_selection_is_hard_with_a_soft_gradient() -> None:
    z, noise = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2)
    a = hard_selection(z, 0.7, noise)
    assert torch.equal(a.detach(), (z + noise)[:, 1].gt((z + noise)[:, 0]).float())
    soft = ((z + noise) / 0.7).softmax(-1)[:, 1]
    torch.testing.assert_close(torch.autograd.grad(a.sum(), z)[0], torch.autograd.grad(soft.sum(), z)[0])


def test_averaged_hausdorff_against_numpy() -> None:
    a, h_s, h_t = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.randn(4, 3), torch.randn(5, 3)
    d = np.linalg.norm(h_s.numpy()[:, None] - h_t.numpy()[None], axis=-1)
    expected = (a.numpy() * d.min(1)).mean() + d[a.numpy() > 0].min(0).mean()
    np.testing.assert_allclose(float(averaged_hausdorff(h_s, h_t, a)), expected, rtol=1e-5)
    assert float(averaged_hausdorff(h_s, h_t, a * 0)) == 0


def test_dropped_source_rows_teach_no_class() -> None:
    """Where the selector keeps nothing, the source's labels have no part in the loss."""
    objective = SelectLabelMix(hidden=4)
    parts = objective.parts(Shapes(features=3, classes=2))
    with torch.no_grad():
        parts.select[2].weight.zero_()  # type: ignore[index,union-attr]
        parts.select[2].bias.copy_(torch.tensor([500.0, -500.0]))  # type: ignore[index,union-attr]
    x = torch.randn(8, 3)
    head = nn.Linear(3, 2)

    def value(y: Tensor) -> float:
        s = step(seen(head(x[:4]), x[:4], y), seen(head(x[4:]), x[4:]), parts)
        s.s.batch["inputs"], s.t.batch["inputs"] = x[:4], x[4:]
        s.run = lambda batch, change=None: seen(head(batch["inputs"]), batch["inputs"])
        return float(objective.loss(s).detach())

    assert value(torch.zeros(4, dtype=torch.long)) == pytest.approx(value(torch.ones(4, dtype=torch.long)))
    with torch.no_grad():
        parts.select[2].bias.mul_(-1)  # type: ignore[index,union-attr,operator]
    assert value(torch.zeros(4, dtype=torch.long)) != pytest.approx(value(torch.ones(4, dtype=torch.long)))


# LFTL


def test_contrastive_sampling_against_numpy() -> None:
    g = np.random.default_rng(0)
    p, before = (torch.from_numpy(g.dirichlet(np.ones(4), 30)) for _ in range(2))
    u = p.numpy() + 0.3 * (p.numpy() - before.numpy())
    ordered = np.sort(u, 1)
    margin, labels = ordered[:, -1] - ordered[:, -2], p.numpy().argmax(1)
    counts = np.bincount(labels[np.argsort(-margin)[:10]], minlength=4)
    score = margin / margin.max() + 0.5 * (counts / counts.max())[labels]
    np.testing.assert_array_equal(contrastive_sampling(p, 5, before, 0.3, 0.5, 10).numpy(), np.argsort(score)[:5])
    np.testing.assert_array_equal(contrastive_sampling(p, 5, before, 0.3, 0.0).numpy(), np.argsort(margin)[:5])


def test_attended_entropy_against_numpy() -> None:
    h, anchors = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in anchors.numpy()] for a in h.numpy()])
    attention = np.exp(cosine) / np.exp(cosine).sum(1, keepdims=True)
    np.testing.assert_allclose(float(attended_entropy(h, anchors)), entropy(attention).mean(), rtol=1e-10)


def test_anchors_are_averages_over_states_of_the_model() -> None:
    objective, memory = LearnFromLearnt(momentum=0.9), {}  # type: ignore[var-annotated]
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    for h in (first, second):
        passes = [seen(torch.zeros(2, 2), h[:2], index=torch.tensor([0, 1])), seen(torch.zeros(2, 2), h[2:], index=torch.tensor([3, 2]))]
        objective.before_epoch(step(memory=memory, sources=lambda passes=passes: passes))
    order = [0, 1, 3, 2]
    torch.testing.assert_close(memory["anchors"][order], 0.1 * first + 0.9 * second)
    now = torch.randn(2, 3)
    expected = 0.1 * memory["anchors"][1:3] + 0.9 * now
    s = step(seen(torch.zeros(2, 2), now, torch.tensor([0, 1]), torch.tensor([1, 2])), seen(torch.zeros(3, 2), torch.randn(3, 3)), memory=memory)
    got = objective.loss(s)
    torch.testing.assert_close(memory["anchors"][1:3], expected)
    torch.testing.assert_close(got, torch.tensor(math.log(2)) + attended_entropy(s.t.h, memory["anchors"]))


# Mixing with edges


def test_edges_against_scipy() -> None:
    from scipy.ndimage import sobel

    x = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    for image, got in zip(x.numpy(), edge_translation(x).numpy(), strict=True):
        grey = image.mean(0)
        length = np.hypot(sobel(grey, 0, mode="nearest"), sobel(grey, 1, mode="nearest"))
        expected = image.min() + (image.max() - image.min()) * length / length.max()
        np.testing.assert_allclose(got, np.stack([expected] * 3), rtol=1e-9)


def test_the_inner_objective_sees_mixed_rows() -> None:
    noted: list[Tensor] = []
    x = torch.rand(3, 1, 4, 4)
    s = seen(torch.zeros(3, 2), torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.tensor([5, 6, 7]))
    s.batch["inputs"] = x

    def run(batch: dict[str, Tensor], change: object = None) -> Seen:
        noted.append(batch["inputs"])
        return seen(torch.ones(3, 2), torch.ones(3, 2))

    outer = GenericMixup(inner=DANN(hidden=4), ratio=0.75)
    mixed = outer.seen_by_inner(step(s, s, run=run))
    torch.testing.assert_close(noted[0], 0.75 * x + 0.25 * edge_translation(x))
    assert mixed.s.labels is s.labels
    assert torch.equal(mixed.s.index, s.index)
    assert (outer.setting, outer.needs_features) == ("adaptation", True)
    assert (GenericMixup(inner=SHOT()).setting, GenericMixup().setting) == ("source-free", "source")
    assert GenericMixup(inner="dann") == GenericMixup(inner="dann")


OBJECTIVES = [
    ParetoDA(hidden=8), SelectLabelMix(hidden=8, part_rate=1.0), LearnFromLearnt(), LearnFromLearnt(mixup=1.0),
    GenericMixup(inner=DANN(hidden=8), ratio=0.9), GenericMixup(ratio=0.9),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", [None, exapt.LoRA(rank=2)])
def test_fit_helps_on_the_target(objective: Objective, method: exapt.Method | None) -> None:
    m, rows = model(), images(32, 0.6, 1)
    before = exapt.evaluate(m, TASK, rows)["loss"]
    where = None if method is None else "linear"
    exapt.fit(m, TASK, objective=objective, source=images(32), target=images(29, 0.6), method=method, where=where, config=config(steps=40))
    assert exapt.evaluate(m, TASK, rows)["loss"] < before


def test_shot_on_mixed_rows_holds_the_head() -> None:
    m = model()
    exapt.fit(m, TASK, images(32), config=config(steps=30))
    head = m[3].weight.detach().clone()  # type: ignore[index,union-attr,operator]
    exapt.fit(m, TASK, objective=GenericMixup(inner=SHOT(), ratio=0.9), target=images(30, 0.6), config=config(steps=20))
    assert torch.equal(head, m[3].weight)  # type: ignore[index,arg-type]


def test_bad_input() -> None:
    with pytest.raises(exapt.InputError, match="asked for 4 of 3 rows"):
        contrastive_sampling(torch.eye(3), 4)
    with pytest.raises(exapt.InputError, match=r"ratio lies in \[0, 1\], not 2"):
        GenericMixup(ratio=2)
    with pytest.raises(exapt.InputError, match="held_out is at least 2"):
        ParetoDA(held_out=1)
    s = seen(F.one_hot(torch.arange(3)).float(), torch.randn(3, 3), torch.tensor([0, 1, 2]))
    s.batch["input_ids"] = torch.zeros(3, 2)
    with pytest.raises(exapt.InputError, match=r"needs batches whose \"inputs\" are"):
        GenericMixup().loss(step(s))
    slm = SelectLabelMix()
    with pytest.raises(exapt.InputError, match="SelectLabelMix mixes inputs"):
        slm.loss(step(s, s, slm.parts(Shapes(features=3, classes=3))))
    with pytest.raises(exapt.InputError, match="leave mixup=0 for others"):
        LearnFromLearnt(mixup=1.0).loss(step(s, s, memory={"anchors": torch.randn(3, 3)}))
