"""Generative Adapter and HyperTuning: their formulas in NumPy, and adapters for contexts that no training saw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exapt
from exapt.algebra.hyper.emitted import call_with, install
from exapt.algebra.hyper.generative_adapter import GenerativeAdapter, contextual_loss
from exapt.algebra.hyper.hypertuning import HyperTuning, segments
from exapt.core.errors import InputError

D = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Language(nn.Module):
    """Next-token scores from each token and the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Embedding(12, D)
        self.embed, self.layers, self.head = nn.Embedding(11, D), nn.ModuleList([Block(), Block()]), nn.Linear(D, 11)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + self.before(nn.functional.pad(ids + 1, (1, -1)))
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


BLOCKS = {f"layers.{i}.down": f"layers.{i}" for i in range(2)}


def adapted(rank: int = 3) -> nn.Module:
    return exapt.attach(Language(), exapt.LoRA(rank=rank, alpha=rank), where=tuple(BLOCKS))


def randomised(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))


@pytest.mark.parametrize(("norm", "most"), [("svd", 0), ("svd", 2), ("frobenius", 0), ("spectral", 0)])
def test_generative_adapter_against_its_formulas(norm: str, most: int) -> None:
    model = adapted()
    generator = GenerativeAdapter(model, BLOCKS, D, scale=0.5, norm=norm, most=most)
    assert all(not t.any() for n, t in generator(generator.read(model, torch.arange(4)[None])).items() if n.endswith("B"))
    randomised(generator)
    chunks = [torch.randint(11, (1, 5)), torch.randint(11, (2, 4))]
    state = generator.read(model, chunks[0])
    state = generator.read(model, chunks[1], state=state, mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    emitted = generator(state)
    with torch.no_grad(), exapt.disabled(model):
        h = torch.cat([(model.embed(c) + model.before(nn.functional.pad(c + 1, (1, -1)))).flatten(0, 1) for c in chunks])[:11]
        inputs = {"layers.0": h.numpy(), "layers.1": model.layers[0](h).numpy()}
    for (site, block), own in zip(BLOCKS.items(), generator.sites, strict=True):
        c = inputs[block] / np.sqrt((inputs[block] ** 2).mean(-1, keepdims=True) + 1e-6) * own.norm.weight.detach().numpy()
        s = (c @ own.A2.detach().numpy().T).T @ (c @ own.A3.detach().numpy().T)
        np.testing.assert_allclose(state[site].detach().numpy(), s, rtol=1e-3, atol=1e-4)
        u, values, v = np.linalg.svd(s)
        kept = most or 3
        normed = {"svd": u[:, :kept] @ v[:kept], "frobenius": s / np.linalg.norm(s), "spectral": s / values[0]}[norm]
        delta = 0.5 * own.B.detach().numpy() @ normed.T @ own.A1.detach().numpy()
        got = emitted[f"{site}.exapt.default.B"] @ emitted[f"{site}.exapt.default.A"]
        np.testing.assert_allclose(got.detach().numpy(), delta, rtol=1e-3, atol=1e-3)


def test_emitted_adapters_run_train_their_generator_and_are_kept(tmp_path) -> None:
    model = adapted()
    generator = GenerativeAdapter(model, BLOCKS, D)
    randomised(generator)
    ids = torch.randint(11, (2, 5))
    emitted = generator(generator.read(model, ids))
    y = call_with(model, emitted, ids)
    y.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in generator.parameters())
    assert all(p.grad is None for p in model.parameters())
    install(model, emitted)
    torch.testing.assert_close(model(ids), y)
    again = exapt.load(fresh_like(model), exapt.save(model, tmp_path / "context"))
    torch.testing.assert_close(again(ids), y)


def fresh_like(model: nn.Module) -> nn.Module:
    fresh = Language()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "exapt" not in k})
    return fresh


def pairs(order: Tensor, rows: int = 10) -> Tensor:
    """Texts of two tokens in a made-up language, in which every token has one successor."""
    first = torch.randint(len(order), (rows,))
    return torch.stack([first, order[first]], 1)


def test_generative_adapter_carries_what_a_context_says() -> None:
    """Languages differ in which token follows which: what one chunk tells of its language helps with the next chunk, and with none of another language."""
    torch.manual_seed(0)
    model = adapted(rank=6)
    generator = GenerativeAdapter(model, BLOCKS, D, norm="frobenius", scale=8.0)
    orders = [(torch.arange(5) + shift) % 5 for shift in (1, 2, 3)]
    optimiser = torch.optim.Adam(generator.parameters(), lr=2e-2)
    for _ in range(160):
        loss = torch.stack([contextual_loss(model, generator, [pairs(order) for _ in range(2)]) for order in orders]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def loss_of(context: int, text: int) -> float:
        with torch.no_grad():
            ids = pairs(orders[text])
            scores = call_with(model, generator(generator.read(model, pairs(orders[context]))), ids)
            return float(nn.functional.cross_entropy(scores[:, 0], ids[:, 1]))

    same = np.mean([loss_of(i, i) for i in range(3) for _ in range(4)])
    other = np.mean([loss_of(i, (i + 1) % 3) for i in range(3) for _ in range(4)])
    assert same < 0.5 * other, (same, other)


def test_hypertuning_against_its_formulas() -> None:
    model = exapt.attach(nn.Linear(4, 3), exapt.LoRA(rank=2), where="all")
    hyper = HyperTuning(exapt.trainable(model), tokens=2, width=8, heads=2)
    start = {n: t.detach().clone() for n, t in exapt.trainable(model).items()}
    states = torch.randn(5, 8)
    torch.testing.assert_close(dict(hyper(states)), start)
    randomised(hyper.emitters)
    s = hyper.decoder(hyper.tokens[None], states[None])[0].detach().numpy()
    for (name, t), emitter in zip(hyper(states).items(), hyper.emitters, strict=True):
        w = {k: v.detach().numpy() for k, v in emitter.named_parameters()}
        rows = np.tanh(s @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
        expected = start[name].numpy() + (rows if name.endswith("A") else rows.T)
        np.testing.assert_allclose(t.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_hypertuning_emits_prefixes_too() -> None:
    layer = exapt.attach(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), exapt.PrefixTuning(length=3))
    hyper = HyperTuning(exapt.trainable(layer), tokens=3, width=8, heads=2, around=False)
    x = torch.randn(2, 5, 8)
    y = call_with(layer, hyper(torch.randn(7, 8)), x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None for p in hyper.parameters())


def test_hypertuning_adapts_to_unseen_tasks_from_examples_without_gradients() -> None:
    """Tasks are linear maps that differ in one direction; from eight examples of a new one the hypermodel emits its adapter."""
    torch.manual_seed(0)
    model = exapt.attach(nn.Linear(4, 1, bias=False), exapt.LoRA(rank=1, alpha=1), where="all")
    hyper = HyperTuning(exapt.trainable(model), tokens=1, width=8, heads=2, layers=1)
    encoder = nn.Linear(5, 8)
    optimiser = torch.optim.Adam([*hyper.parameters(), *encoder.parameters()], lr=3e-3)

    def episode() -> tuple[Tensor, Tensor]:
        w = model.weight.detach() + torch.randn(1, 1) * torch.tensor([[1.0, -1.0, 0.5, 0.0]])
        x, z = torch.randn(8, 4), torch.randn(32, 4)
        emitted = hyper(encoder(torch.cat([x, x @ w.T], 1)))
        return (call_with(model, emitted, z) - z @ w.T).square().mean(), (model(z) - z @ w.T).square().mean().detach()

    for _ in range(300):
        loss, _ = episode()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        tested = torch.tensor([[float(v) for v in episode()] for _ in range(50)]).mean(0)
    assert tested[0] < 0.5 * tested[1]


def test_what_they_refuse() -> None:
    model = adapted()
    with pytest.raises(InputError, match=r"layers\.0\.up: .* attach one"):
        GenerativeAdapter(model, {"layers.0.up": "layers.0"}, D)
    with pytest.raises(InputError, match='norm is "none"'):
        GenerativeAdapter(model, BLOCKS, D, norm="none")
    with pytest.raises(InputError, match="1 chunks"):
        contextual_loss(model, GenerativeAdapter(model, BLOCKS, D), [torch.zeros(1, 3, dtype=torch.long)])
    with pytest.raises(InputError, match="no axis of 5 tokens"):
        HyperTuning(exapt.trainable(model), tokens=5, width=8)
    with pytest.raises(InputError, match="in the model it is missing"):
        call_with(model, {"nothing": torch.zeros(1)}, torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(InputError, match="cannot be cut"):
        segments(torch.arange(4), 2, 2)
