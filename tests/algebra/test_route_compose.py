"""Experts from files, X-LoRA's two passes and blocks of adapters: against the adapters one by one, NumPy and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import call, inputs_of, model_of, perturb
from torch import Tensor, nn

import exapt
from exapt.algebra.compose.blocks import average_outputs, split_sequence
from exapt.algebra.compose.experts import from_adapters
from exapt.algebra.compose.xlora_router import XLoRARouter, hidden_states

WHERE = ("attention.query", "mlp.up")


def saved(folder: Path, method: Any, number: int, where: Any = WHERE) -> Path:
    model = exapt.attach(model_of("text"), method, where)
    perturb(model, 0.3, seed=number + 10)
    return exapt.save(model, folder / f"expert{number}")


def gated_loop(model: nn.Module, paths: list[Path], site: str, x: Tensor, gates: Tensor) -> Tensor:
    """The layer at ``site`` with each expert alone, weighed by ``gates``."""
    base = model_of("text")
    y = base.get_submodule(site)(x)
    total = y.clone()
    for e, path in enumerate(paths):
        alone = exapt.load(model_of("text"), path)
        total = total + gates[..., e : e + 1] * (alone.get_submodule(site)(x) - y)
    return total


def test_loras_of_other_ranks_and_scales(tmp_path: Path) -> None:
    methods = [exapt.LoRA(rank=2, alpha=5.0), exapt.LoRA(rank=4, alpha=1.0), exapt.LoRA(rank=3, scaling="rs")]
    paths = [saved(tmp_path, m, i) for i, m in enumerate(methods)]
    model = from_adapters(model_of("text"), paths)
    assert {n.rpartition(".")[2] for n in exapt.trainable(model)} == {"router"}
    x = torch.randn(2, 5, 32)
    for site in ("layers.0.attention.query", "layers.1.mlp.fc1"):
        layer: Any = model.get_submodule(site)
        logits = x @ layer.exapt.default.router.T
        kept = torch.zeros_like(logits).scatter(-1, logits.topk(2).indices, 1.0)
        gates = (logits.exp() * kept) / (logits.exp() * kept).sum(-1, keepdim=True)
        torch.testing.assert_close(layer(x), gated_loop(model, paths, site, x, gates), rtol=1e-4, atol=1e-5)
    path = exapt.save(model, tmp_path / "mixture")
    again = exapt.load(model_of("text"), path)
    ids = inputs_of("text")
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("expert", [exapt.DoRA(rank=2), exapt.HiRA(rank=2), exapt.VeRA(rank=4)])
def test_other_experts(tmp_path: Path, expert: Any) -> None:
    paths = [saved(tmp_path, expert, i) for i in range(2)]
    model = from_adapters(model_of("text"), paths, exapt.Mixture(router="token"))
    x, site = torch.randn(2, 5, 32), "layers.0.attention.query"
    layer: Any = model.get_submodule(site)
    gates = (x @ layer.exapt.default.router.T).softmax(-1)
    torch.testing.assert_close(layer(x), gated_loop(model, paths, site, x, gates), rtol=1e-4, atol=1e-5)


def test_adapters_for_a_fusion(tmp_path: Path) -> None:
    expert = exapt.BottleneckAdapter(bottleneck=3)
    paths = [saved(tmp_path, expert, i, where="mlp.down") for i in range(3)]
    model = from_adapters(model_of("text"), paths, exapt.AdapterFusion())
    site = model.layers[0].mlp.fc2  # type: ignore[union-attr]
    held = site.exapt.default  # type: ignore[union-attr]
    assert held.expert_W_down.shape == (3, 3, 32)
    assert not held.expert_W_down.requires_grad
    x = torch.randn(2, 5, 64)
    base = model_of("text").layers[0].mlp.fc2(x)  # type: ignore[union-attr]
    z = torch.stack([exapt.load(model_of("text"), p).layers[0].mlp.fc2(x) - base for p in paths], -2)  # type: ignore[union-attr]
    score = torch.einsum("btd,btnd->btn", base @ held.Q.T + held.b_Q, z @ held.K.T + held.b_K).softmax(-1)
    torch.testing.assert_close(site(x), base + torch.einsum("btn,btnd->btd", score, z @ held.V.T), rtol=1e-4, atol=1e-5)


def test_meteora_and_xlora(tmp_path: Path) -> None:
    paths = [saved(tmp_path, exapt.LoRA(rank=2, alpha=3.0), i) for i in range(3)]
    model = from_adapters(model_of("text"), paths, exapt.MeteoRA(), name="gates")
    assert exapt.adapters(model) == ["gates"] or "gates" in exapt.adapters(model)
    assert {n.rpartition(".")[2] for n in exapt.trainable(model)} == {"router"}

    model = from_adapters(model_of("text"), paths, exapt.XLoRA())
    assert not exapt.trainable(model)
    ids = inputs_of("text")
    for e, path in enumerate(paths):  # scalings of one expert alone give that adapter
        scalings = torch.zeros(3, 6, 4, 3)
        scalings[..., e] = 1.0
        torch.testing.assert_close(model(ids, scalings=scalings), exapt.load(model_of("text"), path)(ids), rtol=1e-4, atol=1e-5)


def test_from_adapters_bad_input(tmp_path: Path) -> None:
    a = saved(tmp_path, exapt.LoRA(rank=2), 0)
    b = saved(tmp_path, exapt.LoRA(rank=2), 1, where="attention.query")
    c = saved(tmp_path, exapt.DoRA(rank=2), 2)
    d = saved(tmp_path, exapt.DoRA(rank=3), 3)
    model = model_of("text")
    for paths, method, match in [
        ([], None, "at least one"), ([a, b], None, "same sites"), ([a, c], None, "one method"), ([c, d], None, "one configuration"),
        ([c, c], exapt.XLoRA(), "cannot hold"), ([a, a], exapt.UniPELT(), "recipe of 3"), ([a], exapt.ActivationMixture(), "must change a module's output"),
    ]:  # fmt: skip
        with pytest.raises(exapt.InputError, match=match):
            from_adapters(model, paths, method)
        assert not any("exapt" in n for n, _ in model.named_modules())
        assert all(p.requires_grad for p in model.parameters())


class Net(nn.Module):
    """A model whose layers see positions, and nothing mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def two() -> nn.Module:
    model: nn.Module = Net()
    for i, name in enumerate("ab"):
        exapt.attach(model, exapt.LoRA(rank=2), where="all", name=name)
        perturb(model, 0.8, seed=i)
    return model


def test_average_outputs() -> None:
    model, x = two(), torch.randn(3, 5, 4)
    with torch.no_grad():
        each = []
        for names in (["a"], ["b"], []):
            with exapt.using(model, *names):
                each.append(model(x))
        with average_outputs(model, "a", "b", None):
            torch.testing.assert_close(model(x), sum(each) / 3)
        with average_outputs(model, "a", None, weights=[3.0, 1.0]):
            torch.testing.assert_close(model(x), 0.75 * each[0] + 0.25 * each[2])
        torch.testing.assert_close(model(x), each[1])  # b, the last attached, is active again
    for weights in ([1.0], [1.0, -1.0]):
        with pytest.raises(exapt.InputError, match="one for each"), average_outputs(model, "a", "b", weights=weights):
            pass


def test_split_sequence() -> None:
    model, x = two(), torch.randn(3, 7, 4)
    with torch.no_grad():
        each = {}
        for name in ("a", "b", None):
            with exapt.using(model, *([name] if name else [])):
                each[name] = model(x)
        with split_sequence(model, {"b": 2, "a": 3}):
            y = model(x)
    torch.testing.assert_close(y, torch.cat([each["b"][:, :2], each["a"][:, 2:5], each[None][:, 5:]], 1))
    assert not torch.allclose(each["a"], each["b"])
    with split_sequence(model, {"b": 2, "a": 3}):
        model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "exapt" in n)
    with pytest.raises(exapt.InputError, match='no adapter "c"'), split_sequence(model, {"c": 1}):
        pass
    with pytest.raises(exapt.InputError, match="not negative"), split_sequence(model, {"a": -1}):
        pass
    with pytest.raises(exapt.InputError, match="no positions"), split_sequence(model, {"a": 1}):
        model(torch.randn(3, 4))
    exapt.attach(model, exapt.LoRA(rank=1), where="all", name="whole")
    prompted = exapt.attach(model_of("bert"), exapt.PromptTuning(length=2), name="p")
    with pytest.raises(exapt.InputError, match="position by position"), split_sequence(prompted, {"p": 1}):
        pass


@pytest.mark.parametrize("options", [{}, {"depth": 3, "width": 8}, {"layerwise": False}, {"softmax": False}, {"temperature": 0.5}])
def test_xlora_router_against_peft(options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    from types import SimpleNamespace

    from peft import XLoraConfig
    from peft.tuners.xlora.classifier import XLoraClassifier

    model = exapt.attach(model_of("llama"), exapt.XLoRA(experts=3, rank=2), where=("attention.query", "attention.value"))
    ids = inputs_of("llama")
    router = XLoRARouter(model, **{"dropout": 0.0, **options})
    config = XLoraConfig(
        hidden_size=32, adapters={"0": "a", "1": "b", "2": "c"}, xlora_depth=options.get("depth", 1), xlora_size=8, xlora_dropout_p=0.0,
        layerwise_scalings=options.get("layerwise", True), enable_softmax=options.get("softmax", True), softmax_temperature=options.get("temperature", 1.0),
    )  # fmt: skip
    theirs = XLoraClassifier(model_of("llama"), config, 3, 4, torch.device("cpu"))
    ours = list(router.parameters())
    for p, q in zip(theirs.parameters(), ours, strict=True):
        p.data.copy_(q.data)
    with torch.no_grad():
        states = model_of("llama")(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(hidden_states(model, ids), states[-1])
        torch.testing.assert_close(router(states[-1]), theirs(SimpleNamespace(hidden_states=states), input_ids=ids))


def test_xlora_trains_its_router_alone(tmp_path: Path) -> None:
    paths = [saved(tmp_path, exapt.LoRA(rank=2), i) for i in range(2)]
    model = from_adapters(model_of("text"), paths, exapt.XLoRA())
    ids, router = inputs_of("text"), XLoRARouter(model, depth=2, width=4, dropout=0.0)
    with torch.no_grad():
        expected = call(exapt.load(model_of("text"), paths[1]), ids)
    optimiser = torch.optim.Adam(router.parameters(), lr=0.1)
    losses = []
    for _ in range(160):
        optimiser.zero_grad()
        loss = (router.run(model, ids) - expected).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]  # the experts are far apart, so the router must have found the second
    assert router(hidden_states(model, ids))[..., 1].mean() > 0.8
    exapt.detach(model)
    with pytest.raises(exapt.InputError, match="X-LoRA adapter"):
        XLoRARouter(exapt.attach(model, exapt.LoRA(rank=2)))
