"""Methods trained in few bits, against NumPy from the paper and its code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

import exapt
from exapt.methods.precision_adapter import normal_medians, rounded


def by_numpy(w: np.ndarray, bits: int) -> np.ndarray:
    """Standardise, take the nearest of the normal distribution's k-medians, and undo; float64."""
    codes = np.linspace(-1, 1, 2**bits)
    for _ in range(3000):
        ends = norm.cdf((codes[1:] + codes[:-1]) / 2)
        shares = np.concatenate([[0.0], ends, [1.0]])
        codes = norm.ppf((shares[1:] + shares[:-1]) / 2)
    z = (w - w.mean()) / (w.std(ddof=1) + 1e-5)
    return codes[np.abs(z[..., None] - codes).argmin(-1)] * w.std(ddof=1) + w.mean()


def latents(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n.rpartition(".")[2]: p for n, p in exapt.trainable(model).items()}


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_quantised_lora_against_its_formula(bits: int) -> None:
    layer, x = nn.Linear(12, 7), torch.randn(5, 12)
    w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    model = exapt.attach(nn.Sequential(layer), exapt.Quantised(exapt.LoRA(rank=3, alpha=6.0), bits=bits), where="all")
    p = latents(model)
    assert {k: tuple(t.shape) for k, t in p.items()} == {"A_latent": (3, 12), "B_latent": (7, 3)}
    assert 0 < float(p["B_latent"].detach().abs().max()) <= 0.002  # small and not zero: zeros have no distribution
    with torch.no_grad():
        p["B_latent"].normal_(0.05, 0.1)
    a_, b_ = (by_numpy(p[k].detach().double().numpy(), bits) for k in ("A_latent", "B_latent"))
    assert len(np.unique(a_.round(9))) <= 2**bits
    np.testing.assert_allclose(model(x).detach().numpy(), x.numpy() @ (w + 2.0 * b_ @ a_).T + b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_is_the_median_of_its_cell(bits: int) -> None:
    codes = normal_medians(bits).numpy()
    ends = norm.cdf((codes[1:] + codes[:-1]) / 2)
    shares = np.concatenate([[0.0], ends, [1.0]])
    np.testing.assert_allclose(norm.cdf(codes), (shares[1:] + shares[:-1]) / 2, atol=1e-12)
    assert (np.diff(codes) > 0).all()
    np.testing.assert_allclose(codes, -codes[::-1], atol=1e-14)


def test_gradient_passes_straight_through() -> None:
    w, g = torch.randn(6, 5, dtype=torch.double, requires_grad=True), torch.randn(6, 5, dtype=torch.double)
    (rounded(w, 2) * g).sum().backward()
    v, up = w.detach().numpy(), g.numpy()
    n, mean, std = v.size, v.mean(), v.std(ddof=1)
    z = (v - mean) / (std + 1e-5)
    q = (by_numpy(v, 2) - mean) / std
    to_z = up * std  # the rounding's own gradient is taken as one
    to_std = (up * q).sum() - (to_z * z).sum() / (std + 1e-5)
    to_mean = up.sum() - to_z.sum() / (std + 1e-5)
    expected = to_z / (std + 1e-5) + to_std * (v - mean) / (std * (n - 1)) + to_mean / n
    np.testing.assert_allclose(w.grad.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_quantised_adapter_against_its_formula() -> None:
    inner, x = exapt.BottleneckAdapter(bottleneck=4), torch.randn(3, 10)
    model = exapt.attach(nn.Sequential(nn.Linear(10, 10)), exapt.QuantisedAdapter(inner, bits=1), where="0")
    plain = exapt.attach(nn.Sequential(nn.Linear(10, 10)), inner, where="0")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in ("0.weight", "0.bias")}, strict=False)
    p, theirs = latents(model), latents(plain)
    assert {k for k in p if k.endswith("_latent")} == {f"{k}_latent" for k, t in theirs.items() if t.dim() == 2}
    with torch.no_grad():
        for k, t in theirs.items():
            source = p.get(f"{k}_latent", p.get(k))
            source.normal_(0, 0.3)
            t.copy_(torch.from_numpy(by_numpy(source.double().numpy(), 1)) if t.dim() == 2 else source)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_file_holds_codes_that_act_the_same(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    model = exapt.attach(base, exapt.Quantised(exapt.LoRA(rank=16), bits=1), where="all")
    with torch.no_grad():
        latents(model)["B_latent"].normal_()
        expected = model(x)
    file = exapt.read(exapt.save(model, tmp_path / "a"))
    codes = {k.rpartition("/")[2]: t for k, t in file.tensors.items()}
    assert {k: t.dtype for k, t in codes.items()} == {f"{n}_{p}": t for n in "AB" for p, t in (("codes", torch.uint8), ("scale", torch.float32))}
    assert all(int(t.max()) <= 1 for k, t in codes.items() if k.endswith("codes"))
    exapt.detach(model)
    with torch.no_grad():
        torch.testing.assert_close(exapt.load(model, tmp_path / "a.safetensors")(x), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_wrapped() -> None:
    for make, said in (
        (lambda: exapt.Quantised(exapt.BottleneckAdapter()), "must be of the contract weight, such as LoRA"),
        (lambda: exapt.QuantisedAdapter(exapt.LoRA()), "must be of the contract activation"),
        (lambda: exapt.Quantised(exapt.Quantised()), "must be of the contract weight"),
        (lambda: exapt.Quantised(exapt.LoRA(dropout=0.1)), "dropout or noise"),
        (lambda: exapt.Quantised(exapt.method("adalora")), "changes its tensors in training"),
        (lambda: exapt.Quantised(bits=0), "from 1 to 8"),
    ):
        with pytest.raises(exapt.InputError, match=said):
            make()


def test_training_in_one_bit_beats_rounding_to_it_afterwards() -> None:
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = (x.float() - 8) / 8
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    turned = x.view(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)  # the new domain: digits on their side
    _trained(base, list(base.parameters()), x, y, 120)

    def accuracy(model: nn.Module) -> float:
        return float((model(turned[1200:]).argmax(1) == y[1200:]).float().mean())

    found = {"base": accuracy(base)}
    for name, method in (("trained", exapt.Quantised(exapt.LoRA(rank=8), bits=1)), ("rounded", exapt.LoRA(rank=8))):
        model = exapt.attach(base, method, where="all", seed=0)
        _trained(model, list(exapt.trainable(model).values()), turned[:1200], y[:1200], 200)
        if name == "rounded":
            with torch.no_grad():
                for p in exapt.trainable(model).values():
                    p.copy_(torch.from_numpy(by_numpy(p.double().numpy(), 1)))
        found[name] = accuracy(model)
        exapt.detach(model)
    assert found["base"] + 0.3 < found["trained"], found
    assert found["trained"] > found["rounded"] + 0.2, found


def _trained(model: nn.Module, parameters: list[nn.Parameter], x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    for p in parameters:
        p.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters, lr=5e-3)
    for step in range(steps):
        rows = torch.arange(step * 64, step * 64 + 64) % len(x)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
