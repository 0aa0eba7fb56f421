"""OASIS's post-training: its labels, its gate and its step against NumPy; what it takes for unknown."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exapt
from exapt.core.gaussians import class_gaussians, inside, mahalanobis
from exapt.online.oasis import OASIS, pseudo_labels

CLASSES, D = 3, 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def rows(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


def source() -> list[tuple[Tensor, Tensor]]:
    return [(rows(20, 7), torch.arange(20) % CLASSES), (rows(10, 8), torch.arange(10) % CLASSES)]


def of_source(model: Net) -> tuple[np.ndarray, np.ndarray]:
    h = np.concatenate([model.body(x).detach().numpy() for x, _ in source()]).astype(np.float64)
    return h, np.concatenate([y.numpy() for _, y in source()])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def distance(h: np.ndarray, of: np.ndarray, ridge: float) -> np.ndarray:
    """Distances of rows to the Gaussian of other rows."""
    cov = np.cov(of.T, bias=True)
    return _to(h, of.mean(0), cov + ridge * np.trace(cov) / D * np.eye(D))


def _to(h: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    return np.sqrt(np.array([(v - mean) @ np.linalg.solve(cov, v - mean) for v in h]))


def limit(h: np.ndarray, y: np.ndarray, ridge: float, share: float) -> float:
    """Quantile of the source rows' distances to their nearest class, each left out of its own, whose ridge stays."""
    found = []
    for i in range(len(y)):
        near = []
        for c in range(CLASSES):
            added = ridge * np.trace(np.cov(h[y == c].T, bias=True)) / D * np.eye(D)
            others = h[(y == c) & (np.arange(len(y)) != i)]
            near.append(_to(h[i : i + 1], others.mean(0), np.cov(others.T, bias=True) + added)[0])
        found.append(min(near))
    return float(np.quantile(found, share))


def expected(method: OASIS, x: Tensor, before: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Pseudo-labels (-1: not used), which rows are unknown, and the similarity, by hand."""
    model = net()
    h, y = of_source(model)
    z, v = model(x).detach().numpy().astype(np.float64), model.body(x).detach().numpy()
    p = softmax(z)
    entropy, dist = -(p * np.log(p)).sum(1), np.stack([distance(v, h[y == c], method.ridge) for c in range(CLASSES)], 1)
    far = dist.min(1) > limit(h, y, method.ridge, method.unknown)
    labels = np.full(len(x), -1)
    for i in range(len(x)):
        first, second = np.sort(dist[i])[:2]
        if entropy[i] < method.least * math.log(CLASSES) or far[i]:
            continue
        if entropy[i] < method.sure * math.log(CLASSES):
            labels[i] = z[i].argmax()
        elif second - first >= method.gap:
            labels[i] = dist[i].argmin()
    now = p.mean(0)
    return labels, far, float(now @ before / np.linalg.norm(now) / np.linalg.norm(before))


METHOD = OASIS(lr=0.3, least=0.8, sure=0.95, similar=2.0, gap=0.3, unknown=0.8)


def test_a_step_by_hand() -> None:
    model, x = net(), rows(24, 3)
    h, _ = of_source(model)
    before = softmax(h @ model.head.weight.detach().numpy().T + model.head.bias.detach().numpy()).mean(0)
    labels, far, similarity = expected(METHOD, x, before)
    kinds = model(x).detach().softmax(1).numpy().argmax(1)
    used = labels >= 0
    assert 0 < far.sum() < 20
    assert 3 < used.sum() < 20
    assert (labels[used] != kinds[used]).any(), "some labels are the nearest class's and not the model's"
    o = exapt.online(model, METHOD, reference=source())
    (a,), (b,) = ([p.detach().clone() for n, p in o.host.parameters.items() if n.endswith(f".{k}")] for k in "AB")
    assert not b.any()
    torch.testing.assert_close(o(x), net()(x).detach())
    said = o.diagnostics[-1]
    assert (said["used"], said["unknown"]) == (used.sum(), far.sum())
    assert said["similarity"] == pytest.approx(similarity, abs=1e-5)
    # the gradient of the mean cross-entropy in B, at B = 0, where that in A is zero
    p, v = softmax(net()(x).detach().numpy().astype(np.float64))[used], net().body(x).detach().numpy()[used]
    slope = ((p - np.eye(CLASSES)[labels[used]]).T @ (v @ a.numpy().T)) / used.sum()
    (after_a,), (after_b,) = ([t.detach() for n, t in o.host.parameters.items() if n.endswith(f".{k}")] for k in "AB")
    np.testing.assert_allclose(after_b.numpy(), -0.3 * slope, atol=1e-5)
    assert torch.equal(after_a, a)


def test_the_gate_opens_when_the_label_distribution_changes() -> None:
    method = OASIS(lr=0.0, least=0.0, sure=1.0, similar=0.999, gap=0.0, unknown=1.0)
    o = exapt.online(net(), method, reference=source())
    batches = [rows(16, 3), rows(16, 3), 3 * rows(16, 4).abs(), rows(16, 3)]
    means = [net()(x).softmax(1).mean(0).detach().numpy() for x in batches]
    h, _ = of_source(net())
    before = softmax(h @ net().head.weight.detach().numpy().T + net().head.bias.detach().numpy()).mean(0)
    opened = []
    for x, now in zip(batches, means, strict=True):
        o(x)
        similarity = now @ before / np.linalg.norm(now) / np.linalg.norm(before)
        assert o.diagnostics[-1]["similarity"] == pytest.approx(similarity, abs=1e-5)
        assert (o.diagnostics[-1]["used"] > 0) == (similarity < 0.999)
        opened.append(bool(similarity < 0.999))
        before = now
    assert opened[1:] == [False, True, True]
    o.reset()
    o(batches[1])
    assert (o.diagnostics[-1]["used"] > 0) == opened[0], "reset goes back to the reference's mean prediction"


def test_pseudo_labels_by_hand() -> None:
    rng = np.random.default_rng(0)
    z, dist = 2 * rng.normal(size=(40, 4)), rng.random((40, 4))
    p = softmax(z)
    entropy, by_hand = -(p * np.log(p)).sum(1), []
    for i in range(40):
        first, second = np.sort(dist[i])[:2]
        by_hand.append(z[i].argmax() if entropy[i] < 0.7 else dist[i].argmin() if second - first >= 0.2 else -1)
    assert len(set(by_hand)) == 5
    np.testing.assert_array_equal(pseudo_labels(torch.tensor(z), torch.tensor(dist), 0.7, 0.2), by_hand)


def test_rows_far_from_every_class_are_unknown() -> None:
    torch.manual_seed(0)
    model = net()
    o = exapt.online(model, OASIS(least=0.0, similar=2.0), reference=source())
    x = rows(10, 3)
    o(torch.cat([x, 50 * x]))
    assert o.diagnostics[-1]["unknown"] >= 8
    assert o.diagnostics[-1]["used"] <= 12
    before = [p.detach().clone() for p in o.host.parameters.values()]
    o(500 * x)
    assert (o.diagnostics[-1]["unknown"], o.diagnostics[-1]["used"]) == (10, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, o.host.parameters.values(), strict=True))


def test_new_rows_of_the_source_are_as_often_unknown_as_was_asked() -> None:
    """Where there are hardly more rows than dimensions, and the chi-squared distribution calls nearly all of them unknown."""
    g = torch.Generator().manual_seed(0)
    h, y = torch.randn(400, 20, generator=g).double(), torch.arange(400) % 10
    found = class_gaussians(h, y, 10, 0.1, "it")
    nearest = mahalanobis(h, found.mean, found.precision).scatter(1, y[:, None], found.left_out(h, y)[:, None]).min(1).values
    new = mahalanobis(torch.randn(4000, 20, generator=g).double(), found.mean, found.precision).min(1).values
    assert float((new > nearest.quantile(0.9)).double().mean()) == pytest.approx(0.1, abs=0.03)
    own = mahalanobis(h, found.mean, found.precision).gather(1, y[:, None])[:, 0]
    assert float((new > own.quantile(0.9)).double().mean()) > 0.15
    assert float((inside(own, 20) > 0.9).double().mean()) < 0.02, "rows are near to a Gaussian that is made of them"


def test_left_out_is_a_gaussian_of_the_others() -> None:
    rng = np.random.default_rng(0)
    h, y = rng.normal(size=(15, 3)), np.array([0] * 8 + [1] * 4 + [2] * 2 + [3])
    g = class_gaussians(torch.tensor(h), torch.tensor(y), 5, 0.05, "it")
    found = g.left_out(torch.tensor(h), torch.tensor(y)).numpy()
    for i in range(14):
        others, own = h[(y == y[i]) & (np.arange(15) != i)], h[y == y[i]]
        cov = np.cov(others.T, bias=True) + 0.05 * np.trace(np.cov(own.T, bias=True)) / 3 * np.eye(3)
        assert found[i] == pytest.approx((h[i] - others.mean(0)) @ np.linalg.solve(cov, h[i] - others.mean(0)), rel=1e-8)
    assert np.isnan(found[14])
    assert g.seen.tolist() == [True, True, True, True, False]


def test_classes_without_rows_or_labels() -> None:
    x, y = source()[0]
    o = exapt.online(net(), OASIS(least=0.0, sure=0.0, similar=2.0, gap=0.0, unknown=1.0), reference=[(x[y != 1], y[y != 1])])
    x_new = rows(200)
    labels, unknown = o.method.labels(o.host.kept("gaussians"), net()(x_new), net().body(x_new))
    assert set(labels[~unknown].tolist()) == {0, 2}
    assert set(labels[unknown].tolist()) == {-1}
    blank = y.clone()
    blank[:3] = -100
    exapt.online(net(), OASIS(), reference=[(x, blank)])(rows(4))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"least": 1.5}, "least is 1.5; it is a share"), ({"sure": -0.1}, "sure is -0.1"), ({"unknown": 0.0}, "unknown is 0.0"),
        ({"ridge": 0.0}, "ridge is 0.0"), ({"gap": -1.0}, "gap -1.0"), ({"rank": 0}, "rank 0"), ({"least": float("nan")}, "least is nan"),
    ],
)  # fmt: skip
def test_bad_fields(fields: dict[str, float], said: str) -> None:
    with pytest.raises(exapt.InputError, match=f"^OASIS: .*{said}") as e:
        OASIS(**fields)  # type: ignore[arg-type]
    assert "\n" not in str(e.value)


def test_bad_input() -> None:
    x, y = source()[0]
    model = net()
    for reference, said in (
        (None, "OASIS needs rows of the source"), ([x], "OASIS needs the labels of its reference"), ([(x, y[:4])], "4 labels for 20 predictions"),
        ([(x, torch.zeros(20, dtype=torch.int64))], "OASIS needs a reference of two classes at least"),
    ):  # fmt: skip
        with pytest.raises(exapt.InputError, match=said):
            exapt.online(model, OASIS(), reference=reference)
    assert exapt.adapters(model) == ()
