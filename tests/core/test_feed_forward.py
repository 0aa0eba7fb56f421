"""BERT's feed-forward network is no module of its own; the site "mlp" stands for it all the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import call, inputs_of, model_of, perturb

import exapt


def test_parallel_adapter_sees_the_input_of_the_first_layer() -> None:
    model, x = model_of("bert"), inputs_of("bert")
    found = [s.name for s in exapt.sites(model) if s.role == "mlp"]
    assert found == ["bert.encoder.layer.0.mlp", "bert.encoder.layer.1.mlp"]
    seen = {}
    layer = model.bert.encoder.layer[1]
    hooks = [
        layer.intermediate.dense.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])),
        layer.output.dense.register_forward_hook(lambda m, a, y: seen.update(h=y)),
    ]
    call(model, x)
    base = dict(seen)
    exapt.attach(model, exapt.ParallelAdapter(bottleneck=3), lambda s: s.name == found[1])
    perturb(model, 0.3)
    call(model, x)
    p = {n.split(".")[-1]: t for n, t in exapt.trainable(model).items()}
    expected = base["h"] + 4.0 * F.linear(F.relu(F.linear(base["x"], p["W_down"], p["b_down"])), p["W_up"], p["b_up"])
    torch.testing.assert_close(seen["h"], expected)
    for h in hooks:
        h.remove()
    exapt.detach(model)
    assert not any("exapt" in m._modules for m in model.modules())


def test_routed_parallel_adapters_on_bert() -> None:
    model, x = model_of("bert"), inputs_of("bert")
    for name in "ab":
        exapt.attach(model, exapt.ParallelAdapter(bottleneck=3), name=name)
        perturb(model, 0.3, seed=ord(name))
    with torch.no_grad():
        with exapt.routed(model, ["a", None, "b"]):
            mixed = call(model, x)
        for i, name in enumerate(["a", None, "b"]):
            with exapt.using(model, *([name] if name else [])):
                torch.testing.assert_close(mixed[i : i + 1], call(model, x[i : i + 1]), rtol=1e-4, atol=1e-6)
