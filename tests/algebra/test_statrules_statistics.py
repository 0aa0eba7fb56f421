"""Statistics that merge rules weigh by, against closed forms and loops in NumPy; and that the model is left as it was."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import exapt
from exapt.algebra.rules.regmean import regression_mean, regression_mean_in_depth
from exapt.algebra.statistics import diagonal_fisher, gram_matrices, layer_scores, logit_distances, sensitivities, unit_norm
from exapt.algebra.tensors import merge_tensors


class Conv1D(nn.Module):
    """As in transformers: a linear layer that stores (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Tied(nn.Module):
    """Token logits from tied embeddings, through residual blocks that are called with a mask by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> SimpleNamespace:
        h = self.embed(ids)
        for layer in self.layers:
            (h,) = layer(h, mask=(ids > 0)[..., None])
        return SimpleNamespace(logits=self.lm_head(self.norm(h)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), Conv1D(6, 8)

    def forward(self, h: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (h + self.down(self.up(h).tanh()) * mask,)


def softmax_model() -> tuple[nn.Linear, Tensor, np.ndarray]:
    model, x = nn.Linear(4, 3), torch.randn(7, 4)
    return model, x, model(x).softmax(-1).detach().numpy()


def test_fisher_of_softmax_regression_in_closed_form() -> None:
    model, x, p = softmax_model()
    expected = np.zeros((3, 4))
    for row, chances in zip(x.numpy(), p, strict=True):
        for c in range(3):
            expected[c] += chances[c] * (1 - chances[c]) * row**2 / 7
    found = diagonal_fisher(model, [x[:5], x[5:]])
    np.testing.assert_allclose(found["weight"].numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(found["bias"].numpy(), (p * (1 - p)).mean(0), rtol=1e-4)


def test_sampled_fisher_tends_to_the_exact_and_repeats_under_a_seed() -> None:
    model, x, p = softmax_model()
    drawn = [diagonal_fisher(model, [x], samples=200, seed=s)["bias"].numpy() for s in (0, 0, 1)]
    np.testing.assert_allclose(drawn[0], (p * (1 - p)).mean(0), rtol=0.15)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_empirical_fisher_takes_the_labels() -> None:
    model, x, p = softmax_model()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    found = diagonal_fisher(model, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    errors = p - np.eye(3)[y.numpy()]
    np.testing.assert_allclose(found["weight"].numpy(), np.mean([np.outer(e, v) ** 2 for e, v in zip(errors, x.numpy(), strict=True)], 0), rtol=1e-4)


def test_sensitivity_is_the_mean_over_rows_of_parameter_times_gradient() -> None:
    model, x, p = softmax_model()
    y = torch.zeros(7, dtype=torch.long)
    found = sensitivities(model, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    w, errors = model.weight.detach().numpy(), p - np.eye(3)[y.numpy()]
    np.testing.assert_allclose(found["weight"].numpy(), np.mean([abs(w * np.outer(e, v)) for e, v in zip(errors, x.numpy(), strict=True)], 0), rtol=1e-4)


def test_gram_matrices_stream_over_batches_positions_and_layer_types() -> None:
    model, seen = Tied(), []
    ids = [torch.randint(11, (n, 5)) for n in (3, 4)]
    model.layers[1].down.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().flatten(0, 1)))
    found = gram_matrices(model, ids, dtype=torch.float64)
    assert set(found) == {f"layers.{i}.{n}.weight" for i in range(3) for n in ("up", "down")}  # the tied head is the embedding's
    x = torch.cat(seen).double()
    torch.testing.assert_close(found["layers.1.down.weight"]["transposed"], x.T @ x / 35)
    assert found["layers.0.up.weight"].dtype == torch.float64
    assert not model.layers[0].up._forward_pre_hooks


def test_gram_matrix_of_patches() -> None:
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 4, 5)
    patches = [x[n, :, i : i + 3, j : j + 3].flatten().numpy() for n in range(2) for i in range(2) for j in range(3)]
    expected = np.mean([np.outer(v, v) for v in patches], 0)
    np.testing.assert_allclose(gram_matrices(conv, [x])["weight"].numpy(), expected, rtol=1e-4, atol=1e-6)
    assert not gram_matrices(nn.Conv2d(2, 4, 3, groups=2), [x])


@pytest.mark.parametrize("collect", [gram_matrices, diagonal_fisher, lambda m, b: sensitivities(m, b, lambda n, x: n(x).square().sum())])
def test_the_model_is_left_as_it_was(collect: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = collect(model, [torch.randn(6, 3)])
    again = collect(model, [torch.randn(6, 3)])
    assert set(found) == set(again) <= {n for n, _ in model.named_parameters()}
    assert [m.training for m in model] == [True, True, False, True]
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layer_scores_sum_within_layers_and_have_norm_one_over_them() -> None:
    parts = {"embed.weight": 1.0, "layers.0.up.weight": 2.0, "layers.0.up.bias": 1.0, "layers.10.up.weight": 2.0, "norm.weight": 4.0}
    found = layer_scores({k: torch.tensor([v / 2, v / 2]) for k, v in parts.items()})
    norm = (1 + 9 + 4 + 16) ** 0.5
    expected = {"embed.weight": 1, "layers.0.up.weight": 3, "layers.0.up.bias": 3, "layers.10.up.weight": 2, "norm.weight": 4}
    assert {k: pytest.approx(float(v)) for k, v in found.items()} == {k: v / norm for k, v in expected.items()}
    one = layer_scores({k: torch.tensor(v) for k, v in parts.items()}, layer=lambda name: "all")
    assert all(float(v) == pytest.approx(1.0) for v in one.values())


def test_logit_distances_by_hand() -> None:
    models, tasks = [nn.Linear(2, 3) for _ in range(3)], [[torch.randn(4, 2), torch.randn(1, 2)] for _ in range(3)]
    raw = np.zeros(3)
    for i in range(3):
        for j in range(3):
            raw[i] += np.mean([np.linalg.norm((models[i](v) - models[j](v)).detach().numpy()) for b in tasks[j] for v in b])
    np.testing.assert_allclose(logit_distances(models, tasks).numpy(), raw / raw.sum(), rtol=1e-5)
    assert logit_distances([models[0]] * 2, tasks[:2]).tolist() == [0.5, 0.5]


def test_unit_norm_is_over_all_tensors() -> None:
    made = unit_norm({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])})
    assert made["a"].tolist() == pytest.approx([0.6, 0.0])
    assert float(made["b"]) == pytest.approx(0.8)


def test_clear_errors() -> None:
    model, tokens = nn.Linear(2, 3), Tied()
    for match, call in {
        "gram_matrices was given no batches": lambda: gram_matrices(model, []),
        "diagonal_fisher was given no batches": lambda: diagonal_fisher(model, []),
        "sensitivities was given no batches": lambda: sensitivities(model, []),
        "give samples= to draw": lambda: diagonal_fisher(tokens, [torch.ones(1, 3, dtype=torch.long)]),
        "returns no loss": lambda: sensitivities(model, [torch.ones(1, 2)]),
        "returns Tensor|has no logits": lambda: diagonal_fisher(nn.LSTM(2, 3), [torch.ones(1, 2)]),
        "zero in every entry": lambda: unit_norm({"a": torch.zeros(2)}),
        "2 models, 1 lists": lambda: logit_distances([model, model], [[]]),
        "task 0 has no batches": lambda: logit_distances([model], [[]]),
        "1 models, 2 lists": lambda: regression_mean_in_depth([model], [[], []]),
        'no module "x"': lambda: regression_mean_in_depth([model], [[]], blocks=["x"]),
        'no batch reaches a linear layer of "norm"': lambda: regression_mean_in_depth([tokens], [[torch.ones(1, 3, dtype=torch.long)]], blocks=["norm"]),
    }.items():
        with pytest.raises(exapt.InputError, match=match):
            call()


def test_tokens_draw_predictions() -> None:
    found = diagonal_fisher(Tied(), [torch.ones(2, 3, dtype=torch.long)], samples=2)
    assert found["embed.weight"].shape == (11, 6)
    assert float(found["embed.weight"].sum()) > 0


def by_hand(models: list[Tied], batches: list[list[Tensor]], shrink: float) -> nn.Module:
    """RegMean++ written out for the model above: hidden states of the merged model, one block after the other."""
    merged = Tied()
    merged.load_state_dict({k: torch.stack([m.state_dict()[k] for m in models]).mean(0) for k in merged.state_dict()})
    with torch.no_grad():
        hidden = [[merged.embed(ids) for ids in task] for task in batches]
        for i, layer in enumerate(merged.layers):
            grams = []
            for m, task, states in zip(models, batches, hidden, strict=True):
                up = torch.cat([h.flatten(0, 1) for h in states])
                down = m.layers[i].up(up).tanh()
                grams.append((up.T @ up / len(up), down.T @ down / len(down)))
                assert len(task) == len(states)
            for part, name in enumerate(("up", "down")):
                weights = [getattr(m.layers[i], name).weight for m in models]
                wide = [w if name == "up" else w.T for w in weights]
                shrunk = [g[part] * shrink + (1 - shrink) * torch.diag(g[part].diagonal()) for g in grams]
                solution = torch.linalg.solve(sum(shrunk), sum(g @ w.T for g, w in zip(shrunk, wide, strict=True)))  # type: ignore[arg-type]
                getattr(layer, name).weight.copy_(solution.T if name == "up" else solution)
            hidden = [[layer(h, mask=(ids > 0)[..., None])[0] for ids, h in zip(t, s, strict=True)] for t, s in zip(batches, hidden, strict=True)]
    return merged


def test_regmean_plusplus_against_the_layers_written_out() -> None:
    models = [Tied().double() for _ in range(2)]
    batches = [[torch.randint(11, (9, 5)) for _ in range(2)] for _ in models]
    torch.set_default_dtype(torch.float64)
    try:
        expected = by_hand(models, batches, 0.9)
    finally:
        torch.set_default_dtype(torch.float32)
    before = {k: v.clone() for k, v in models[0].state_dict().items()}
    merged = regression_mean_in_depth(models, batches, blocks=["layers.0", "layers.1", "layers.2"], dtype=torch.float64)
    assert type(merged) is Tied
    assert merged.lm_head.weight is merged.embed.weight
    for k, v in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[k], v, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(v, before[k]) for k, v in models[0].state_dict().items())
    first = [gram_matrices(m, task, dtype=torch.float64) for m, task in zip(models, batches, strict=True)]
    plain = merge_tensors(regression_mean, [m.state_dict() for m in models], statistics=first)
    assert not torch.allclose(plain["layers.2.up.weight"], merged.state_dict()["layers.2.up.weight"])


def test_regmean_plusplus_of_identical_models_changes_nothing() -> None:
    model, ids = Tied(), [torch.randint(11, (20, 5))]
    merged = regression_mean_in_depth([model, model], [ids, ids])
    torch.testing.assert_close(dict(merged.state_dict()), dict(model.state_dict()))
