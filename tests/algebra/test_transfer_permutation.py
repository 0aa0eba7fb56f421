"""Permutations of hidden units: exact on functions, against brute force, and the barrier on digits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_digits import digits, network, trained
from torch import Tensor, nn

import exapt
from exapt.algebra.tensors import merge_tensors
from exapt.algebra.transfer.barrier import interpolation_barrier
from exapt.algebra.transfer.permutation import apply_permutation, match_pairs, weight_matching
from exapt.algebra.transfer.units import UnitSpec, feed_forward_units, sequential_units


def tree(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in model.state_dict().items()}


def chain(seed: int) -> nn.Sequential:
    """Convolutions, norms, a flattened map and a nested chain."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.PReLU(5), nn.MaxPool2d(2), nn.Conv2d(5, 3, 1), nn.ReLU(), nn.Flatten(),
        nn.Sequential(nn.Linear(3 * 4, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Dropout(0.5)), nn.Linear(7, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():
        model(torch.randn(16, 2, 4, 4))  # running statistics that are not all the same
        for m in model.modules():
            for p in m.parameters(recurse=False):
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def drawn(counts: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {u: torch.randperm(n, generator=g) for u, n in counts.items()}


def test_a_permuted_chain_is_the_same_function() -> None:
    model, x = chain(0), torch.randn(9, 2, 4, 4)
    spec, start = sequential_units(model), tree(model)
    counts = spec.counts(start)
    assert list(counts.values()) == [5, 3, 7, 6]
    moved = apply_permutation(start, drawn(counts), spec)
    assert moved.keys() == start.keys()
    assert sum(not torch.equal(moved[k], start[k]) for k in start) >= 14
    before, after = model(x), torch.func.functional_call(model, moved, (x,))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [pytest.param(tiny.tiny_bert, marks=pytest.mark.slow), tiny.Transformer])
def test_permuted_feed_forwards_are_the_same_function(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    spec, start = feed_forward_units(model), tree(model)
    moved = apply_permutation(start, drawn(spec.counts(start)), spec)
    assert len([k for k, a in spec.axes.items() if len(a) == 2 and not torch.equal(moved[k], start[k])]) == 4, "two matrices of two blocks"
    x = torch.randint(3, tiny.VOCABULARY, (2, 6))
    before = tiny.call(model, x)
    model.load_state_dict(moved)
    torch.testing.assert_close(tiny.call(model, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gpt2_and_llama_feed_forwards() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    x = torch.randint(0, 40, (2, 5))
    for model in (GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)), LlamaForCausalLM(llama)):
        model.eval()
        spec, start = feed_forward_units(model), tree(model)
        before = model(x).logits
        model.load_state_dict(apply_permutation(start, drawn(spec.counts(start)), spec))
        torch.testing.assert_close(model(x).logits, before, rtol=1e-5, atol=1e-5)


def test_heads_by_hand() -> None:
    """Attention heads, whose units take several places on every axis."""
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 4, batch_first=True), torch.randn(2, 5, 8)
    start = tree(layer)
    parts = {f"in.{n}": t for n, t in zip("qkv", start["in_proj_weight"].chunk(3), strict=True)}
    spec = UnitSpec({**dict.fromkeys(parts, ("heads", None)), "out_proj.weight": (None, "heads")}, {"heads": 4})
    moved = apply_permutation({**parts, "out_proj.weight": start["out_proj.weight"]}, {"heads": torch.tensor([2, 0, 3, 1])}, spec)
    before = layer(x, x, x)[0]
    stacked = torch.cat([moved[f"in.{n}"] for n in "qkv"])
    layer.load_state_dict({**start, "in_proj_weight": stacked, "out_proj.weight": moved["out_proj.weight"]})
    torch.testing.assert_close(layer(x, x, x)[0], before, rtol=1e-5, atol=1e-6)


def brute(target: dict[str, Tensor], source: dict[str, Tensor], spec: UnitSpec) -> tuple[float, dict[str, Tensor]]:
    """The nearest of all that permutations can make, by NumPy."""
    counts = spec.counts(target)
    best = (float("inf"), {})
    for orders in itertools.product(*(itertools.permutations(range(n)) for n in counts.values())):
        perms = dict(zip(counts, map(np.array, orders), strict=True))
        total = 0.0
        for name, axes in spec.axes.items():
            b = source[name].numpy()
            for axis, unit in enumerate(axes):
                b = b if unit is None else np.take(b, perms[unit], axis=axis)
            total += float(((target[name].numpy() - b) ** 2).sum())
        if total < best[0] - 1e-9:
            best = (total, {u: torch.from_numpy(p) for u, p in perms.items()})
    return best


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[k] - b[k]).square().sum()) for k in a)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_one_hidden_layer_is_solved_exactly(seed: int, width: int) -> None:
    g = torch.Generator().manual_seed(seed)
    shapes = {"w0": (width, 3), "b0": (width,), "w1": (2, width)}
    a, b = ({k: torch.randn(s, generator=g) for k, s in shapes.items()} for _ in range(2))
    spec = UnitSpec({"w0": ("h", None), "b0": ("h",), "w1": (None, "h")})
    found = weight_matching(a, b, spec)
    least, perms = brute(a, b, spec)
    assert distance(a, apply_permutation(b, found, spec)) == pytest.approx(least, rel=1e-5)
    assert torch.equal(found["h"], perms["h"])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_two_hidden_layers_end_where_no_single_one_gains(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    shapes = {"w0": (4, 3), "w1": (3, 4), "w2": (2, 3)}
    a, b = ({k: torch.randn(s, generator=g) for k, s in shapes.items()} for _ in range(2))
    spec = UnitSpec({"w0": ("h", None), "w1": ("k", "h"), "w2": (None, "k")})
    found = weight_matching(a, b, spec, seed=seed)
    reached = distance(a, apply_permutation(b, found, spec))
    assert brute(a, b, spec)[0] - 1e-4 <= reached <= distance(a, b) + 1e-4
    for unit, n in spec.counts(a).items():
        for order in itertools.permutations(range(n)):
            assert reached <= distance(a, apply_permutation(b, {**found, unit: torch.tensor(order)}, spec)) + 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_permutation_is_found(seed: int) -> None:
    model = chain(seed)
    spec, start = sequential_units(model), tree(model)
    hidden = drawn(spec.counts(start), seed + 5)
    noisy = {k: t + 0.01 * torch.randn(t.shape) if t.is_floating_point() else t for k, t in apply_permutation(start, hidden, spec).items()}
    found = weight_matching(start, noisy, spec, seed=seed)
    for unit, p in hidden.items():
        assert torch.equal(p[found[unit]], torch.arange(len(p)))
    again = weight_matching(start, noisy, spec, start=found)
    assert all(torch.equal(again[u], p) for u, p in found.items())


def test_pairs_add_up_and_norms_are_taken_out() -> None:
    spec = UnitSpec({"w": ("h", None), "v": ("h",)})
    eye = torch.eye(3)
    big = {"w": 100 * eye, "v": torch.zeros(3)}, {"w": 100 * eye[[1, 2, 0]], "v": torch.zeros(3)}
    small = {"w": eye, "v": torch.zeros(3)}, {"w": eye[[2, 0, 1]], "v": torch.zeros(3)}
    assert match_pairs([big, small], spec)["h"].tolist() == [2, 0, 1]
    assert match_pairs([small, big, small], spec, normalise=True)["h"].tolist() == [1, 2, 0], "two small pairs outweigh one large"


def test_barrier_against_numpy() -> None:
    g = torch.Generator().manual_seed(3)
    a, b = ({"w": torch.randn(4, generator=g), "n": torch.tensor(3)} for _ in range(2))
    found = interpolation_barrier(lambda t: float(t["w"].sin().sum()), a, b, points=7)
    way = np.linspace(0, 1, 7)
    losses = np.array([np.sin((1 - x) * a["w"].numpy() + x * b["w"].numpy()).sum() for x in way])
    excess = losses - (1 - way) * losses[0] - way * losses[-1]
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    assert found.height == pytest.approx(max(excess.max(), 0), abs=1e-6)
    assert found.at == pytest.approx(way[excess.argmax()])


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 160), nn.ReLU(), nn.Linear(160, 10))


def learned(seed: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradient descent with a little weight decay."""
    torch.manual_seed(seed)
    now = tree(wide())
    for _ in range(200):
        free = {k: t.requires_grad_() for k, t in now.items()}
        rows = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(torch.func.functional_call(wide(), free, (x[rows],)), y[rows])
        now = {k: (0.998 * t - 0.3 * g).detach() for (k, t), g in zip(free.items(), torch.autograd.grad(loss, list(free.values())), strict=True)}
    return now


def test_the_barrier_between_digits_networks_falls() -> None:
    x, y, held, labels = digits()["upright"]
    a, b = learned(1, x, y), learned(2, x, y)
    spec = sequential_units(wide())

    @torch.no_grad()
    def loss(t: dict[str, Tensor]) -> float:
        return float(nn.functional.cross_entropy(torch.func.functional_call(wide(), t, (held,)), labels))

    moved = apply_permutation(b, weight_matching(a, b, spec), spec)
    assert loss(moved) == pytest.approx(loss(b), abs=1e-5)
    before, after = interpolation_barrier(loss, a, b, points=5), interpolation_barrier(loss, a, moved, points=5)
    assert before.height > 0.3
    assert after.height < 0.3 * before.height
    merged = loss(merge_tensors("average", [a, moved]))
    assert merged < 0.5 * loss(merge_tensors("average", [a, b]))


def test_a_task_vector_moves_to_a_permuted_base() -> None:
    """A shift of one base serves a base that is the same but for the order of its units."""
    x, y, held, labels = digits()["mirrored"]
    torch.manual_seed(0)
    start = network()
    base = trained(tree(start), *digits()["upright"][:2], steps=150, lr=3e-3, seed=0)
    tuned = trained(base, x, y, steps=100, lr=3e-3, seed=1)
    spec = sequential_units(start)
    other = apply_permutation(base, drawn(spec.counts(base), 3), spec)
    shift = apply_permutation({k: tuned[k] - base[k] for k in base}, weight_matching(other, base, spec), spec)
    moved = {k: other[k] + shift[k] for k in base}
    naive = {k: other[k] + tuned[k] - base[k] for k in base}

    def right(t: dict[str, Tensor]) -> float:
        return float((torch.func.functional_call(network(), t, (held,)).argmax(1) == labels).float().mean())

    assert right(moved) == pytest.approx(right(tuned), abs=2e-3)
    assert right(naive) < right(tuned) - 0.1


def test_bad_input() -> None:
    spec = UnitSpec({"w": ("h", None), "v": ("h",)})
    good = {"w": torch.zeros(3, 2), "v": torch.zeros(3)}
    with pytest.raises(exapt.InputError, match="v is missing"):
        apply_permutation({"w": good["w"]}, {"h": torch.arange(3)}, spec)
    with pytest.raises(exapt.InputError, match="w has 1 axes"):
        apply_permutation({**good, "w": torch.zeros(3)}, {"h": torch.arange(3)}, spec)
    with pytest.raises(exapt.InputError, match="length 4, no multiple of 3 units"):
        apply_permutation({**good, "w": torch.zeros(4, 2)}, {"h": torch.arange(3)}, spec)
    with pytest.raises(exapt.InputError, match="no order of 0 to 2"):
        apply_permutation(good, {"h": torch.tensor([0, 0, 1])}, spec)
    with pytest.raises(exapt.InputError, match='"h" is on one side only'):
        apply_permutation(good, {"k": torch.arange(3)}, spec)
    with pytest.raises(exapt.InputError, match="nothing to permute"):
        weight_matching(good, good, UnitSpec({"w": (None, None)}))
    with pytest.raises(exapt.InputError, match="two axes"):
        weight_matching({"w": torch.eye(2)}, {"w": torch.eye(2)}, UnitSpec({"w": ("h", "h")}))
    with pytest.raises(exapt.InputError, match="NaN"):
        weight_matching(good, {**good, "v": torch.tensor([1.0, float("nan"), 0.0])}, spec)
    with pytest.raises(exapt.InputError, match=r"shape \(3, 2\) in the target and \(3, 5\)"):
        weight_matching(good, {**good, "w": torch.zeros(3, 5)}, spec)
    with pytest.raises(exapt.InputError, match="too few"):
        interpolation_barrier(lambda t: 0.0, good, good, points=2)
    with pytest.raises(exapt.InputError, match="not finite"):
        interpolation_barrier(lambda t: float("nan"), good, good)


def test_models_that_cannot_be_followed() -> None:
    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    layer = nn.Linear(4, 4)
    wrong = {
        "plain nn.Sequential": Own(nn.Linear(4, 4), nn.Linear(4, 4)), "twice": nn.Sequential(layer, nn.ReLU(), layer), "GLU": nn.Sequential(
            nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2)), "grouped": nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)),
        "1 layers": nn.Sequential(nn.Linear(2, 2)), "normalises 2 dimensions": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm((2, 2)), nn.Linear(2, 2)),
    }  # fmt: skip
    for message, model in wrong.items():
        with pytest.raises(exapt.InputError, match=message):
            sequential_units(model)
    with pytest.raises(exapt.InputError, match=r"no block with mlp\.up"):
        feed_forward_units(nn.Sequential(nn.Linear(2, 2)))
