"""Methods that act on activations, against their papers' formulas in NumPy, inside whole models."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import call, inputs_of, model_of, perturb
from torch import Tensor, nn

import exapt
from exapt import SSF, BottleneckAdapter, LoReFT, ParallelAdapter
from exapt.core.slots import slots_of

Array = np.ndarray[Any, np.dtype[np.float64]]


def recorded(model: nn.Module, x: Tensor) -> list[tuple[dict[str, Array], Array, Array, Array]]:
    """Runs the model and notes for every adapted site: the tensors, and what the method was given and returned."""
    seen = []
    originals = []
    for _, slots in slots_of(model):
        for e in slots.entries:
            original = e.method.apply

            def spy(p: Any, x: Tensor, h: Tensor, original: Any = original) -> Tensor:
                y = original(p, x, h)
                seen.append(({k: v.detach().numpy() for k, v in p.items()}, x.detach().numpy(), h.detach().numpy(), y.detach().numpy()))
                return y

            if "apply" not in e.method.__dict__:
                object.__setattr__(e.method, "apply", spy)
                originals.append(e.method)
    try:
        call(model, x)
    finally:
        for m in originals:
            object.__delattr__(m, "apply")
    assert seen
    return seen


def prepared(method: Any, kind: str, where: Any = None) -> nn.Module:
    model = exapt.attach(model_of(kind).double(), method, where, seed=0)
    perturb(model, 0.3)
    return model


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5))


def input_of(kind: str) -> Tensor:
    x = inputs_of(kind)
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("kind", ["text", "bert", "image"])
def test_ssf_scales_and_shifts(kind: str) -> None:
    for p, _, h, y in recorded(prepared(SSF(), kind), input_of(kind)):
        np.testing.assert_allclose(y, p["gamma"] * h + p["beta"])


@pytest.mark.parametrize("kind", ["bert", "image"])
def test_ssf_folds_into_layers(kind: str) -> None:
    def foldable(s: exapt.Site) -> bool:
        return s.role == "norm" or (s.layer is not None and s.bias is not None and s.role != "head")

    model = prepared(SSF(), kind, foldable)
    x = input_of(kind)
    expected, base = call(model, x), {n: p.clone() for n, p in model_of(kind).double().named_parameters()}
    found = exapt.trainable(model)
    shifts = {n.removesuffix(".exapt.default.gamma"): (p, found[n[: -len("gamma")] + "beta"]) for n, p in found.items() if n.endswith("gamma")}
    exapt.merge(model)
    torch.testing.assert_close(call(model, x), expected)
    for name, (gamma, beta) in shifts.items():
        module = model.get_submodule(name)
        axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
        shape = [-1 if i == axis else 1 for i in range(module.weight.dim())]
        torch.testing.assert_close(module.weight, gamma.view(shape) * base[f"{name}.weight"])
        torch.testing.assert_close(module.bias, gamma * base[f"{name}.bias"] + beta)


def test_ssf_starts_as_the_official_code_when_asked() -> None:
    model = exapt.attach(nn.Linear(4, 20_000), SSF(std=0.02), "all", seed=0)
    gamma, beta = (p.detach() for p in exapt.trainable(model).values())
    assert float(gamma.mean()) == pytest.approx(1, abs=1e-3)
    assert float(gamma.std()) == pytest.approx(0.02, rel=0.05)
    assert float(beta.mean()) == pytest.approx(0, abs=1e-3)
    assert float(beta.std()) == pytest.approx(0.02, rel=0.05)


def test_ssf_says_where_it_cannot_merge() -> None:
    with pytest.raises(exapt.InputError, match="no bias"):
        exapt.merge(exapt.attach(nn.Linear(2, 2, bias=False), SSF(), "all"))


@pytest.mark.parametrize(("activation", "f"), [("gelu", gelu), ("relu", lambda x: np.maximum(x, 0)), ("tanh", np.tanh)])
def test_bottleneck_adapter(activation: Any, f: Any) -> None:
    model = prepared(BottleneckAdapter(bottleneck=6, activation=activation), "bert")
    seen = recorded(model, inputs_of("bert"))
    assert len(seen) == 4, "two in each of two blocks"
    for p, _, h, y in seen:
        np.testing.assert_allclose(y, h + f(h @ p["W_down"].T + p["b_down"]) @ p["W_up"].T + p["b_up"])


def test_bottleneck_adapter_acts_before_the_residual_connection() -> None:
    model = exapt.attach(model_of("text"), BottleneckAdapter(bottleneck=2), "mlp.down")
    p = {n.rpartition(".")[2]: v for n, v in exapt.trainable(model).items() if n.startswith("layers.0.")}
    p["b_up"].data.fill_(3.0)
    seen: dict[str, Tensor] = {}
    model.layers[0].norm2.register_forward_hook(lambda m, i, o: seen.update(before=i[0], normed=o))
    model.layers[0].register_forward_hook(lambda m, i, o: seen.update(after=o))
    model(inputs_of("text"))
    base = model_of("text").layers[0]
    torch.testing.assert_close(seen["after"], seen["before"] + base.mlp(seen["normed"]) + 3.0)


def test_bottleneck_adapter_starts_near_the_identity_as_in_the_paper() -> None:
    model = exapt.attach(nn.Linear(4, 400), BottleneckAdapter(bottleneck=100, std=0.01), "all", seed=0)
    p = {n.rpartition(".")[2]: v.detach() for n, v in exapt.trainable(model).items()}
    for name in ("W_down", "W_up"):
        assert float(p[name].abs().max()) <= 0.02
        assert float(p[name].std()) == pytest.approx(0.0088, rel=0.02)  # of a normal distribution cut at two deviations
    assert not p["b_up"].any()
    assert not p["b_down"].any()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["text", "llama", "bert"])
def test_parallel_adapter(kind: str, learned: bool) -> None:
    model = prepared(ParallelAdapter(bottleneck=6, scale=2.0, learned_scale=learned), kind)
    seen = recorded(model, inputs_of(kind))
    assert len(seen) == 2, "one in each block"
    for p, x, h, y in seen:
        s = p["s"] if learned else 2.0
        assert not learned or abs(float(s[0]) - 2) > 1e-3
        np.testing.assert_allclose(y, h + s * (np.maximum(x @ p["W_down"].T + p["b_down"], 0) @ p["W_up"].T + p["b_up"]), atol=1e-12)


def test_parallel_adapter_sees_what_the_feed_forward_network_sees() -> None:
    method = ParallelAdapter(bottleneck=6)
    for kind, into, out in (("text", "layers.0.mlp", "layers.0.mlp"), ("bert", "bert.encoder.layer.0.intermediate", "bert.encoder.layer.0.output.dense")):
        model = prepared(method, kind)
        base = model_of(kind).double()
        seen: dict[str, Tensor] = {}
        base.get_submodule(into).register_forward_hook(lambda m, i, o, seen=seen: seen.update(x=i[0].detach()))
        base.get_submodule(out).register_forward_hook(lambda m, i, o, seen=seen: seen.update(h=o.detach()))
        call(base, inputs_of(kind))
        _, x, h, _ = recorded(model, inputs_of(kind))[0]
        np.testing.assert_allclose(x, seen["x"].numpy(), atol=1e-12)
        np.testing.assert_allclose(h, seen["h"].numpy(), atol=1e-12)


def test_parallel_adapter_refuses_convolutions() -> None:
    with pytest.raises(exapt.InputError, match="features last"):
        exapt.attach(model_of("image"), ParallelAdapter(), "conv")


def gram_schmidt(rows: Array) -> Array:
    """Orthonormal rows that span the same spaces one after the other."""
    out: list[Array] = []
    for row in rows:
        for done in out:
            row = row - (row @ done) * done
        out.append(row / np.linalg.norm(row))
    return np.stack(out)


@pytest.mark.parametrize("positions", ["all", "f1+l2", "f2", "l1", "f9+l9"])
@pytest.mark.parametrize("kind", ["text", "bert"])
def test_loreft_edits_a_subspace(kind: str, positions: str) -> None:
    model = prepared(LoReFT(rank=3, positions=positions), kind)
    edited = {"all": range(6), "f1+l2": (0, 4, 5), "f2": (0, 1), "l1": (5,), "f9+l9": range(6)}[positions]
    for p, _, h, y in recorded(model, inputs_of(kind)):
        rows = gram_schmidt(p["R"])
        np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-12)
        for t in range(6):
            expected = h[:, t] + (h[:, t] @ p["W"].T + p["b"] - h[:, t] @ rows.T) @ rows if t in edited else h[:, t]
            np.testing.assert_allclose(y[:, t], expected, atol=1e-10)


def test_loreft_starts_from_orthonormal_rows_and_trains_through_them() -> None:
    model = exapt.attach(nn.Linear(5, 8).double(), LoReFT(rank=3), "all", seed=0)
    p: Any = {n.rpartition(".")[2]: v for n, v in exapt.trainable(model).items()}
    np.testing.assert_allclose(gram_schmidt(p["R"].detach().numpy()), p["R"].detach().numpy(), atol=1e-6)
    x = torch.randn(2, 5, dtype=torch.double)
    method = LoReFT(rank=3)
    h = torch.randn(2, 8, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda R, W, b: method.apply({"R": R, "W": W, "b": b}, x, h), (p["R"], p["W"], p["b"]))


def test_loreft_edits_the_prompt_only_when_generating() -> None:
    ids = inputs_of("llama")
    model = exapt.attach(model_of("llama"), LoReFT(positions="l1"), seed=0)
    perturb(model, 0.5)
    with torch.no_grad():
        first = model(ids, use_cache=True)
        token, cache = first.logits[:, -1:].argmax(-1), copy.deepcopy(first.past_key_values)
        alone = model(token, past_key_values=first.past_key_values).logits
        with exapt.disabled(model):
            assert torch.equal(model(token, past_key_values=cache).logits, alone), "a generated token is not edited"
            before = model(token, past_key_values=model(ids, use_cache=True).past_key_values).logits
    assert not torch.allclose(alone, before), "the prompt's edited states stay in the cache"
    for bad in ("x4", "f", "4", "", "+"):
        with pytest.raises(exapt.InputError, match="positions"):
            LoReFT(positions=bad)
    with pytest.raises(exapt.InputError, match="rank"):
        exapt.attach(model_of("text"), LoReFT(rank=33))
