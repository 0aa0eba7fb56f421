"""Ladder side-tuning and LAME against their papers' formulas, written out token by token and row by row."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import call, inputs_of, model_of, perturb
from torch import Tensor, nn

import exapt
from exapt import LAME, LadderSideTuning, LoRA

Array = np.ndarray[Any, np.dtype[np.float64]]
METHOD = LadderSideTuning(reduction=4, heads=2, expansion=2)


def rms(x: Array, scale: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ladder(p: dict[str, Array], hidden: list[Array], allowed: Array) -> Array:
    """One sequence: hidden states (length, d) before the first and after every block, who sees whom (length, length)."""
    s = hidden[0] @ p["first"].T + p["b_first"]
    w = s.shape[-1]
    for i, h in enumerate(hidden[1:]):
        gate = 1 / (1 + math.exp(-p["alpha"][i] / METHOD.temperature))
        s = gate * s + (1 - gate) * (h @ p["down"][i].T + p["b_down"][i])
        x = rms(s, p["norm_1"][i])
        q, k, v = (x @ p["qkv"][i][j * w : (j + 1) * w].T for j in range(3))
        mixed = np.zeros_like(s)
        size = w // METHOD.heads
        for head in range(METHOD.heads):
            own = slice(head * size, (head + 1) * size)
            scores = np.where(allowed, q[:, own] @ k[:, own].T / math.sqrt(size), -np.inf)
            mixed[:, own] = softmax(scores) @ v[:, own]
        s = s + mixed @ p["o"][i].T
        s = s + np.maximum(rms(s, p["norm_2"][i]) @ p["up"][i].T, 0) @ p["out"][i].T
    return rms(s, p["norm"]) @ p["last"].T + p["b_last"]


def blocks(model: nn.Module, kind: str) -> Any:
    return {"text": lambda m: m.layers, "bert": lambda m: m.bert.encoder.layer, "llama": lambda m: m.model.layers, "torch": lambda m: m}[kind](model)


def first(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


def watched(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """Notes the first block's input and every block's output."""
    seen: dict[str, Tensor] = {}
    layers = blocks(model, kind)
    layers[0].register_forward_pre_hook(lambda m, a, k: seen.update(start=a[0] if a else k["hidden_states"]), with_kwargs=True)
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, a, y, i=i: seen.update({str(i): first(y)}))
    return seen


def compared(kind: str, model: nn.Module, base: nn.Module, run: Any, allowed: Tensor, real: Tensor) -> None:
    """Compares the last block's output at the ``real`` positions (batch, length)."""
    exapt.attach(model, METHOD, seed=0)
    perturb(model, 0.2)
    p = {n.rpartition(".")[2]: v.detach().numpy() for n, v in exapt.trainable(model).items()}
    plain, ours = watched(base, kind), watched(model, kind)
    run(base)
    run(model)
    hidden = [plain["start"], *(plain[str(i)] for i in range(2))]
    for b in range(hidden[0].shape[0]):
        expected = ladder(p, [h[b].detach().numpy() for h in hidden], allowed[b].numpy())
        np.testing.assert_allclose(ours["1"][b, real[b]].detach().numpy(), expected[real[b].numpy()], atol=1e-9)
    torch.testing.assert_close(ours["0"], plain["0"])


@pytest.mark.parametrize(("kind", "pad"), [("text", False), ("bert", False), ("bert", True), ("llama", False), ("llama", True)])
def test_ladder_side_tuning(kind: str, pad: bool) -> None:
    x = inputs_of(kind)
    keys = torch.ones(3, 6, dtype=torch.bool)
    if pad:
        keys[1, :2] = False  # on the left
    allowed = keys[:, None, :].expand(3, 6, 6) | torch.eye(6, dtype=torch.bool)  # a padding token may see itself, which tells nobody
    if kind == "llama":
        allowed = allowed & torch.ones(6, 6, dtype=torch.bool).tril()
    options = {"attention_mask": keys.long()} if pad else {}
    compared(kind, model_of(kind).double(), model_of(kind).double(), lambda m: m(x, **options), allowed, keys)


@pytest.mark.parametrize("bool_mask", [True, False])
def test_ladder_on_torch_layers_with_their_masks(bool_mask: bool) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(32, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)])

        def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, src_mask=mask, src_key_padding_mask=padding)
            return x

    torch.manual_seed(0)
    base = Stack().double()
    model = Stack().double()
    model.load_state_dict(base.state_dict())
    causal, padding = torch.ones(5, 5, dtype=torch.bool).tril(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 32).double()
    masks = [~causal, padding] if bool_mask else [torch.zeros(m.shape).double().masked_fill(m, -torch.inf) for m in (~causal, padding)]
    compared("text", model, base, lambda m: m(x, *masks), causal & ~padding[:, None, :], ~padding)


def saved(model: nn.Module, x: Tensor) -> int:
    """Bytes of activations kept for backward."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(model, x)
    y.square().sum().backward()
    return sum(kept.values())


def test_the_backbone_runs_without_a_graph() -> None:
    x = inputs_of("bert", 8)
    model = exapt.attach(model_of("bert"), LadderSideTuning())
    graph: dict[str, bool] = {}
    for name, m in model.bert.encoder.layer.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, a, y, name=name: graph.update({name: y.requires_grad}))
    ladder_bytes = saved(model, x)
    assert len(graph) == 12
    assert not any(graph.values())
    assert all(p.grad is not None and p.grad.any() for p in exapt.trainable(model).values())
    lora_bytes = saved(exapt.attach(model_of("bert"), LoRA(rank=4)), x)
    assert ladder_bytes < 0.6 * lora_bytes, (ladder_bytes, lora_bytes)


def test_ladder_refuses_what_it_cannot_do() -> None:
    with pytest.raises(exapt.InputError, match="divisible"):
        exapt.attach(model_of("text"), LadderSideTuning(reduction=16, heads=4))
    two = nn.ModuleDict({k: nn.ModuleList([nn.TransformerEncoderLayer(32, 2, 16) for _ in range(2)]) for k in ("encoder", "decoder")})
    with pytest.raises(exapt.InputError, match="one stack"):
        exapt.attach(two, METHOD)
    assert exapt.parameter_count(exapt.attach(two, METHOD, lambda s: s.role == "block" and s.name.startswith("encoder"))).trainable > 0
    model = exapt.attach(model_of("llama"), METHOD)
    ids = inputs_of("llama")
    with pytest.raises(exapt.InputError, match="use_cache=False"):
        model.generate(ids, use_cache=True, max_new_tokens=3, do_sample=False)
    assert model.generate(ids, use_cache=False, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (3, 9)


def lame(q: Array, x: Array, affinity: str, k: int, symmetric: bool) -> Array:
    """Probabilities and features to corrected probabilities."""
    n = len(q)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
    w = np.zeros((n, n))
    if affinity == "linear":
        w = x @ x.T
    elif affinity == "rbf":
        sigma = np.mean([sorted(row)[min(k, n) - 1] for row in distance])
        w = np.exp(-(distance**2) / (2 * sigma**2))
    else:
        for i in range(n):
            w[i, [j for j in np.argsort(distance[i]) if j != i][:k]] = 1
    w = (w + w.T) / 2 if symmetric else w
    z = q
    for _ in range(2000):  # to the fixed point, far beyond any stopping rule
        z = softmax(np.log(q + 1e-10) + w @ z)
    return z


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("affinity", ["rbf", "knn", "linear"])
def test_lame_reaches_the_fixed_point(affinity: Any, symmetric: bool) -> None:
    generator = np.random.default_rng(0)
    x, logits = generator.normal(size=(20, 6)), generator.normal(size=(20, 4))
    method = LAME(affinity=affinity, neighbours=3, symmetric=symmetric, steps=500)
    out = method.apply({}, torch.tensor(x), torch.tensor(logits))
    np.testing.assert_allclose(out.exp().numpy(), lame(softmax(logits), x, affinity, 3, symmetric), atol=2e-3)
    np.testing.assert_allclose(out.exp().sum(-1).numpy(), 1, atol=1e-6)
    assert (out.argmax(-1).numpy() != logits.argmax(-1)).any(), "it should change some predictions"


def test_lame_lowers_its_objective_step_by_step() -> None:
    generator = torch.Generator().manual_seed(0)
    x, logits = torch.randn(30, 5, generator=generator), torch.randn(30, 4, generator=generator)
    w, q = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T, logits.softmax(-1)
    energies = []
    for steps in (1, 2, 4, 8, 16, 100):
        z = LAME(affinity="linear", steps=steps).apply({}, x, logits).exp()
        energies.append(float((z * (z.log() - q.log())).sum() - 0.5 * (w * (z @ z.T)).sum()))
    assert all(b <= a + 1e-5 for a, b in itertools.pairwise(energies))
    assert energies[-1] < energies[0] - 0.1


@pytest.mark.parametrize("kind", ["text", "bert"])
def test_lame_corrects_a_models_head(kind: str) -> None:
    ids = inputs_of(kind, 9)
    model = model_of(kind)
    seen: dict[str, Tensor] = {}
    head = model.head if kind == "text" else model.classifier
    hook = head.register_forward_hook(lambda m, a, y: seen.update(x=a[0], h=y))
    with torch.no_grad():
        call(model, ids)
        hook.remove()
        exapt.attach(model, LAME(affinity="knn", neighbours=2))
        out = call(model, ids)
    expected = lame(softmax(seen["h"].double().numpy()), seen["x"].double().numpy(), "knn", 2, False)
    np.testing.assert_allclose(out.exp().numpy(), expected, atol=2e-3)
    alone = call(model, ids[:1])
    torch.testing.assert_close(alone, seen["h"][:1].log_softmax(-1), rtol=1e-4, atol=1e-4)  # nobody to agree with


def test_lame_needs_one_prediction_a_row() -> None:
    with pytest.raises(exapt.InputError, match="one prediction per row"):
        LAME().apply({}, torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
