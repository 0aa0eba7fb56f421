"""Every weight method on every kind of layer: attached, trained a little, merged and detached, against the layer run by its definition.

A method that cannot serve a kind says so; the table of refusals below is complete, so that neither a new one nor a lost one goes unnoticed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import KINDS, Kind
from tiny import EXAMPLES, perturb
from torch import Tensor, nn

import exapt
from exapt.core.contract import Method, WeightMethod
from exapt.core.entry import Entry
from exapt.core.slots import slots_of

METHODS: list[type[WeightMethod]] = [m for m in exapt.methods().values() if issubclass(m, WeightMethod)]
CONVOLUTIONS = ("conv1d", "conv2d", "conv2d dilated", "conv2d grouped", "transposed", "transposed grouped")
EXPERTS = ("experts", "experts transposed")

# method: kinds of layer that it refuses: part of what it says
REFUSALS: dict[str, dict[tuple[str, ...], str]] = {
    "allocated_lora": {EXPERTS: "tries out the components of one matrix"},
    "boft": {("embedding",): "an embedding's are token ids"},
    "corda": {
        CONVOLUTIONS: "corda serves linear layers only",
        ("embedding",): "corda serves linear layers only",
        EXPERTS: "corda needs what each expert sees",
    },
    "embedding_factorization": {("Conv1D", "attention", *CONVOLUTIONS, *EXPERTS): "acts on embeddings and output layers"},
    "ether": {("embedding",): "an embedding's are token ids"},
    "ether_plus": {("embedding",): "an embedding's are token ids"},
    "eva": {(*CONVOLUTIONS, "embedding"): "its input is not what its matrix multiplies", EXPERTS: "eva needs what each expert sees"},
    "hra": {("embedding",): "an embedding's are token ids"},
    "increlora": {EXPERTS: "follows the gradient of one matrix"},
    "npas": {EXPERTS: "generates single matrices"},
    "oft": {("embedding",): "an embedding's are token ids"},
    "partial_lora": {("embedding", "attention", *CONVOLUTIONS, *EXPERTS): "tells tokens apart in linear layers only"},
    "qgoft": {("embedding",): "an embedding's are token ids"},
    "spiel": {EXPERTS: "follows the gradient of one matrix"},
}

# method: by how much its start may differ from the base, relative to the largest output
NEARLY = {"increlora": 1e-4}  # its components in reserve act with a factor of 1e-5, as in the official code


def refusal(key: str, kind: str) -> str | None:
    """What the method has to say of this kind of layer, if it refuses it."""
    return next((text for kinds, text in REFUSALS.get(key, {}).items() if kind in kinds), None)


def attached(model: nn.Module, method: Method, site: str, x: Tensor, statistics: Any = None) -> nn.Module:
    """Attaches at one site, calibrating on ``x`` first where the method declares a need."""
    if method.needs and statistics is None:
        statistics = calibrated(model, method, site, x)
    return exapt.attach(model, method, lambda s: s.name == site, statistics=statistics, seed=0)


def calibrated(model: nn.Module, method: Method, site: str, x: Tensor) -> Any:
    return exapt.calibrate(model, [x], method, lambda s: s.name == site, loss=lambda m, batch: m(batch).square().mean())


def the_entry(model: nn.Module) -> Entry:
    (entry,) = [e for _, slots in slots_of(model) for e in slots.entries]
    return entry


def changed(entry: Entry, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The new matrix and bias by the method's definition, one expert after the other; in double precision."""
    method, own = entry.method, entry.holder.tensors()
    p = {k: t.double() if t.is_floating_point() else t for k, t in entry.tensors(torch.float64).items() if k != "notes"}

    def one(p: dict[str, Tensor], w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with_w = {**p, "W": w} if method.bias_reads_weight else p
        return method.weight(p, w), None if b is None else method.bias(with_w, b)

    if matrix.dim() == 2:
        return one(p, matrix, bias)
    each = [one({k: t[i] if k in own else t for k, t in p.items()}, w, None if bias is None else bias[i]) for i, w in enumerate(matrix)]
    return torch.stack([w for w, _ in each]), None if bias is None else torch.stack([b for _, b in each if b is not None])


def defined(kind: Kind, model: nn.Module, x: Tensor) -> Tensor:
    """The layer's output by the definition, in double precision, with gradients to the adapter's own tensors."""
    weight, bias = kind.stored(model)
    stored = model.layer._parameters
    matrix = kind.matrix(stored[weight].detach().double())
    w, b = changed(the_entry(model), matrix, stored[bias].detach().double() if bias else None)
    return kind.run(model.layer, x.double() if x.is_floating_point() else x, w, b)


def gradients(y: Tensor, targets: list[Tensor]) -> list[Tensor]:
    """Of a random combination of the outputs; zeros for what has no part in it."""
    loss = (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)).sum()
    found = torch.autograd.grad(loss, targets, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(targets, found, strict=True)]


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cls", METHODS, ids=[m.key for m in METHODS])
def test_layer(cls: type[WeightMethod], name: str) -> None:
    kind, method = KINDS[name], cls(**EXAMPLES.get(cls.key, {}))
    model, x = kind.model(), kind.input()
    reason = refusal(cls.key, name)
    if reason:
        with pytest.raises(exapt.InputError, match=reason) as said:
            attached(model, method, kind.site, x)
        assert str(said.value).startswith(f"{kind.site}: ")
        assert not exapt.adapters(model)
        return
    base, before = {k: v.clone() for k, v in model.state_dict().items()}, model(x).detach()
    layer_class = type(model.layer)
    attached(model, method, kind.site, x)
    if "identity" not in cls.exceptions:
        assert near(model(x), before, NEARLY.get(cls.key, 1e-9))
    perturb(model)
    parameters = exapt.trainable(model)
    targets = [*parameters.values(), *([x.requires_grad_(True)] if x.is_floating_point() else [])]
    y = model(x)
    expected = defined(kind, model, x)
    assert near(y, expected, 1e-9)
    assert not near(y, before, 1e-6) or "gradient" in cls.exceptions
    for path, a, b in zip([*parameters, "input"], gradients(y, targets), gradients(expected, targets), strict=False):
        assert near(a, b, 1e-7), path
        assert "gradient" in cls.exceptions or a.any(), f"{path} has no gradient"
    if cls.mergeable:
        exapt.merge(model)
        assert type(model.layer) is layer_class
        assert near(model(x), y, 1e-9)
        exapt.unmerge(model)
        assert torch.equal(model(x), y)
    else:
        with pytest.raises(exapt.InputError, match="has no merged form"):
            exapt.merge(model)
    exapt.detach(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cls", METHODS, ids=[m.key for m in METHODS])
def test_layer_in_bf16(cls: type[WeightMethod], name: str) -> None:
    """The adapter's tensors stay in single precision, and the output is what they and the rounded base make in double."""
    if refusal(cls.key, name):
        return  # test_layer has seen that it says so
    kind, method = KINDS[name], cls(**EXAMPLES.get(cls.key, {}))
    model, x = kind.model(torch.bfloat16), kind.input(torch.bfloat16)
    attached(model, method, kind.site, x)
    perturb(model, 0.02)
    y, expected = model(x), defined(kind, model, x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 0.02 * expected.norm()
    parameters = list(exapt.trainable(model).values())
    assert all(p.dtype == torch.float32 for p in parameters)
    assert all(torch.isfinite(g).all() for g in gradients(y, parameters))


def int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear))
    return model


def nf4(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    plain = model.layer
    layer = bnb.nn.Linear4bit(plain.in_features, plain.out_features, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({k: v.clone() for k, v in plain.state_dict().items()})
    model.layer = layer
    return model.to("cpu")


def statistics_for(model: nn.Module, plain: nn.Module, method: Method, x: Tensor) -> Any:
    """Gradients, and loftq's weight, cannot be had from a quantised layer: they are of the layer before, as the methods ask for."""
    if method.key == "loftq":
        return {"layer": {"original": plain.layer.weight.detach()}}
    return calibrated(plain if "gradient" in method.needs else model, method, "layer", x) if method.needs else None


@pytest.mark.parametrize("quantise", [int8, nf4])
@pytest.mark.parametrize("cls", METHODS, ids=[m.key for m in METHODS])
def test_quantised_linear(cls: type[WeightMethod], quantise: Any) -> None:
    """On a quantised base the method acts on what it dequantises to."""
    kind, method = KINDS["linear"], cls(**EXAMPLES.get(cls.key, {}))
    model, x = quantise(kind.model(torch.float32)), kind.input(torch.float32)
    (site,) = [s for s in exapt.sites(model) if s.layer]
    assert site.quantised
    statistics = statistics_for(model, kind.model(torch.float32), method, x)
    before, w, b = model(x).detach(), site.weight.double(), site.bias.double()
    attached(model, method, "layer", x, statistics)
    if "identity" not in cls.exceptions:
        assert near(model(x), before, max(1e-4, NEARLY.get(cls.key, 0)))
    perturb(model, 0.05)
    y = model(x)
    new_w, new_b = changed(the_entry(model), w, b)
    assert near(y.double(), x.double() @ new_w.T + new_b, 0.02 if nf4_is_packed(model) else 1e-4)
    for path, g in zip(exapt.trainable(model), gradients(y, list(exapt.trainable(model).values())), strict=True):
        assert "gradient" in cls.exceptions or g.any(), f"{path} has no gradient"
    with pytest.raises(exapt.InputError, match=r"^layer: its weight is quantised and cannot take a merge" if cls.mergeable else "has no merged form"):
        exapt.merge(model)
    exapt.detach(model)
    assert torch.equal(model(x), before)


def nf4_is_packed(model: nn.Module) -> bool:
    """Whether bitsandbytes has rounded its scales for its kernel on CPUs with bf16, as its layers do when they first run in eval mode."""
    return bool(getattr(getattr(model.layer.weight, "quant_state", None), "packing_format_for_cpu", False))


@pytest.mark.parametrize("key", ["lora", "dora", "delora", "hira", "oft"])
def test_nf4_that_was_evaluated_still_trains(key: str) -> None:
    """On CPUs with bf16 bitsandbytes rearranges the weight in eval mode, for a kernel without gradients; W stays readable, and gradients right."""
    results = []
    for evaluated in (False, True):
        model, x = nf4(KINDS["linear"].model(torch.float32)), KINDS["linear"].input(torch.float32).requires_grad_(True)
        if evaluated:
            with torch.no_grad():
                model.eval()(x.detach())
            model.train()
        weight = next(s for s in exapt.sites(model) if s.layer).weight
        exapt.attach(model, exapt.method(key), "all", seed=0)
        perturb(model, 0.05)
        y = model(x)
        results.append([weight, y, *gradients(y, [x, *exapt.trainable(model).values()])])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


def test_the_table_of_refusals_names_what_exists() -> None:
    known = {m.key for m in METHODS}
    assert set(REFUSALS) <= known
    assert set(NEARLY) <= known
    assert {k for kinds in REFUSALS.values() for group in kinds for k in group} <= set(KINDS)
