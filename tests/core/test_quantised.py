"""Quantised bases go through their layer's own forward: bitsandbytes NF4 on the CPU (torchao is in the conformance suite)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import exapt


def nf4(d_out: int = 32, d_in: int = 64) -> tuple[nn.Sequential, torch.Tensor]:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(d_in, d_out)
    layer = bnb.nn.Linear4bit(d_in, d_out, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({k: v.clone() for k, v in plain.state_dict().items()})
    return nn.Sequential(layer).to("cpu"), torch.randn(5, d_in)


def test_nf4_runs_through_its_own_forward() -> None:
    model, x = nf4()
    layer = model[0]
    with torch.no_grad():
        model(x)
        before = model(x)
    packed = layer.weight.data.clone()
    (site,) = [s for s in exapt.sites(model) if s.layer]
    assert site.quantised
    assert site.weight.shape == (32, 64)
    exapt.attach(model, exapt.LoRA(rank=4), "all")
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
        for p in exapt.trainable(model).values():
            p.normal_(std=0.1)
    a, b = (p.detach() for p in exapt.trainable(model).values())
    model(x).sum().backward()
    assert all(p.grad is not None for p in exapt.trainable(model).values())
    with torch.no_grad():
        torch.testing.assert_close(model(x), before + 4.0 * (x @ a.T) @ b.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(exapt.InputError, match="quantised and cannot take a merge"):
        exapt.merge(model)
    assert exapt.parameter_count(model).total == 32 * 64 + 32 + 4 * 96
    exapt.detach(model)
    assert torch.equal(layer.weight.data, packed)
    with torch.no_grad():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("key", ["dora", "pissa", "svfit", "oft", "ia3", "vera", "nola", "paca"])
def test_other_methods_on_nf4(key: str) -> None:
    """Methods that read W get it dequantised and say so; the result is the definition on the dequantised weight."""
    model, x = nf4()
    with torch.no_grad():
        model(x)
    (site,) = [s for s in exapt.sites(model) if s.layer]
    w, bias = site.weight.clone(), site.bias
    exapt.attach(model, exapt.method(key), "all", seed=0)
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.add_(torch.randn_like(p) * 0.05)
        (entry,) = model[0].exapt.entries
        p = entry.tensors(torch.float32)
        changed = entry.changed("weight", w)
        bias = entry.method.bias(p, bias) if hasattr(entry.method, "bias") else bias
        torch.testing.assert_close(model(x), x @ changed.T + bias, rtol=1e-3, atol=1e-3)


def test_file_of_a_quantised_base_reloads(tmp_path: object) -> None:
    model, x = nf4()
    exapt.attach(model, exapt.LoRA(rank=2), "all")
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.normal_(std=0.1)
    path = exapt.save(model, f"{tmp_path}/q")
    again, _ = nf4()
    exapt.load(again, path)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
