"""Weight methods against their papers (NumPy), and every fast path against the definition over the kinds of layer."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exapt
from exapt.core.contract import WeightMethod
from exapt.core.slots import refresh, slots_of

METHODS: dict[str, WeightMethod] = {
    "lora": exapt.LoRA(rank=3, alpha=5),
    "dora": exapt.DoRA(rank=3, alpha=5),
    "dora-rs": exapt.DoRA(rank=3, alpha=5, scaling="rs"),
    "pissa": exapt.PiSSA(rank=3, alpha=5),
    "pissa-niter": exapt.PiSSA(rank=3, alpha=5, niter=2),
    "svfit": exapt.SVFit(rank=4),
    "vera": exapt.VeRA(rank=7),
    "nola": exapt.NOLA(rank=3, num_basis=5),
    "oft": exapt.OFT(block_size=4),
    "oft-shared": exapt.OFT(block_size=3, block_share=True),
    "boft": exapt.BOFT(block_size=2, factors=2),
    "boft-one": exapt.BOFT(block_size=3, factors=1),
    "ia3-out": exapt.IA3(),
    "ia3-in": exapt.IA3(inputs="*"),
}


def conv1d_hf() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 12)


LAYERS: dict[str, Any] = {
    "linear": lambda: (nn.Linear(12, 6), torch.randn(2, 5, 12)),
    "linear without bias": lambda: (nn.Linear(12, 6, bias=False), torch.randn(12)),
    "conv1d_hf": lambda: (conv1d_hf(), torch.randn(2, 5, 12)),
    "embedding": lambda: (nn.Embedding(12, 6), torch.randint(0, 12, (3, 4))),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding="same", dilation=2), torch.randn(2, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 1), stride=2, padding=(2, 0), padding_mode="reflect"), torch.randn(2, 4, 8, 7)),
    "conv3d": lambda: (nn.Conv3d(4, 6, (1, 2, 3), bias=False), torch.randn(2, 4, 3, 4, 5)),
    "grouped": lambda: (nn.Conv2d(8, 6, 3, groups=2), torch.randn(2, 8, 6, 5)),
    "conv_transpose1d": lambda: (nn.ConvTranspose1d(4, 6, 3, stride=2), torch.randn(2, 4, 7)),
    "conv_transpose2d": lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), torch.randn(2, 4, 5, 6)),
    "conv_transpose3d": lambda: (nn.ConvTranspose3d(4, 6, (1, 2, 3), dilation=2), torch.randn(2, 4, 3, 4, 5)),
    "grouped transpose": lambda: (nn.ConvTranspose2d(8, 6, 3, groups=2), torch.randn(2, 8, 5, 6)),
}
REFUSED = {("oft", "embedding"), ("oft-shared", "embedding"), ("boft", "embedding"), ("boft-one", "embedding")} | {
    ("ia3-in", kind) for kind in ("embedding", "grouped", "grouped transpose")
}


def randomise(model: nn.Module) -> None:
    """Moves every trainable tensor away from its start."""
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.add_(0.3 * torch.randn_like(p))


def by_definition(model: nn.Module) -> None:
    """Lets every entry act through the parameter."""
    for module, slots in list(slots_of(model)):
        for e in slots.entries:
            e.definition = True
        slots.chains.clear()
        refresh(module, slots)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients of the adapter's tensors and of the input."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = model(x)
    torch.manual_seed(3)
    (y * torch.randn_like(y)).sum().backward()
    return [y.detach(), *(p.grad for p in exapt.trainable(model).values()), *([x.grad] if x.grad is not None else [])]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_fast_path_equals_the_definition(method: str, kind: str) -> None:
    layer, x = LAYERS[kind]()
    layer = layer.double()
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        if getattr(layer, "bias", None) is not None:
            layer.bias.normal_()
        before = layer(x)
    if (method, kind) in REFUSED:
        with pytest.raises(exapt.InputError, match="leave it out"):
            exapt.attach(layer, METHODS[method], "all")
        assert torch.equal(layer(x), before)
        return
    exapt.attach(layer, METHODS[method], "all")
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)  # identity at the start
    randomise(layer)
    slow = copy.deepcopy(layer)
    by_definition(slow)
    entries = [e for _, slots in slots_of(layer) for e in slots.entries]
    assert [e.definition for e in entries] == [_has_no_fast_path(method, kind)]
    fast, defined = results(layer, x), results(slow, x)
    assert (fast[0] - before).abs().max() > 1e-3
    for a, b in zip(fast, defined, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(exapt.merge(layer)(x), fast[0], rtol=1e-9, atol=1e-10)


def _has_no_fast_path(method: str, kind: str) -> bool:
    return kind.startswith("grouped") or ("oft" in method and kind not in ("linear", "linear without bias", "conv1d_hf"))


@pytest.mark.parametrize("method", METHODS)
def test_stacked_experts_equal_single_layers(method: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(3, 6, 12, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ebi,eoi->ebo", x, self.down_proj)

    model, x = Experts(), torch.randn(3, 4, 12, dtype=torch.float64)
    before = model(x).detach()
    exapt.attach(model, METHODS[method], "down_proj")
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)
    randomise(model)
    y, *gradients = results(model, x)
    (stacked,) = (entry for _, slots in slots_of(model) for entry in slots.entries)
    for e in range(3):
        one = nn.Linear(12, 6, bias=False).double()
        one.weight.data.copy_(model._parameters["down_proj"][e])  # type: ignore[index]
        exapt.attach(one, METHODS[method], "all")
        (single,) = (entry for _, slots in slots_of(one) for entry in slots.entries)
        # IA3 chooses by role, which a lone layer does not have: take over names as well as values
        single.holder._parameters.clear()
        single.holder._buffers.clear()
        for k, t in stacked.holder.tensors().items():
            single.holder.register_buffer(k, t[e].detach())
        torch.testing.assert_close(one(x[e]), y[e], rtol=1e-9, atol=1e-10)
    assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_layer_is_near_the_double_one(method: str) -> None:
    wide = nn.Linear(48, 24).double()
    narrow = copy.deepcopy(wide).bfloat16()
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(4, 48).bfloat16()
    torch.manual_seed(0)
    exapt.attach(wide, METHODS[method], "all", dtype=torch.float32)
    torch.manual_seed(0)
    exapt.attach(narrow, METHODS[method], "all")
    for a, b in zip(exapt.trainable(narrow).values(), exapt.trainable(wide).values(), strict=True):
        torch.manual_seed(0)
        noise = 0.1 * torch.randn_like(a)
        assert a.dtype == torch.float32
        a.data.copy_(b.data + noise)
        b.data.add_(noise)
    for k, buffer in dict(wide.named_buffers()).items():
        dict(narrow.named_buffers())[k].copy_(buffer)
    by_def = copy.deepcopy(narrow)
    by_definition(by_def)
    expected = wide(x.double())
    for model in (narrow, by_def):
        y = model(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)


def test_pissa_and_svfit_start_exactly_at_the_base() -> None:
    for method in (exapt.PiSSA(), exapt.SVFit()):
        layer, x = nn.Linear(40, 30).bfloat16(), torch.randn(3, 40).bfloat16()
        before = layer(x)
        assert torch.equal(exapt.attach(layer, method, "all")(x), before)


def numpy_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {k.rpartition(".")[2]: t.detach().numpy() for k, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}


@pytest.mark.parametrize("rank", [4, 99])
def test_svfit_is_the_papers(rank: int) -> None:
    layer, x = nn.Linear(9, 7).double(), torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    w, b = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    exapt.attach(layer, exapt.SVFit(rank=rank), "all")
    u, s0, vt = np.linalg.svd(w)
    r = min(rank, 7)
    (trained,) = exapt.trainable(layer).values()
    np.testing.assert_allclose(trained.detach().numpy(), s0[:r], rtol=1e-10)
    s = s0[:r] * np.linspace(0.5, 1.5, r)
    trained.data.copy_(torch.from_numpy(s))
    # W_r = U_r diag(s) V_r^T trains, W_e = the other singular triplets stay
    changed = u[:, :r] @ np.diag(s) @ vt[:r] + u[:, r:7] @ np.diag(s0[r:]) @ vt[r:7]
    y = layer(x)
    np.testing.assert_allclose(y.detach().numpy(), x.detach().numpy() @ changed.T + b, rtol=1e-10, atol=1e-12)
    dy = np.random.default_rng(0).normal(size=(5, 7))
    y.backward(torch.from_numpy(dy))
    dw = dy.T @ x.detach().numpy()
    assert trained.grad is not None
    assert x.grad is not None
    np.testing.assert_allclose(trained.grad.numpy(), np.einsum("oi,or,ri->r", dw, u[:, :r], vt[:r]), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), dy @ changed, rtol=1e-9, atol=1e-12)


def test_nola_is_the_papers() -> None:
    rank, k, scale = 3, 5, 6 / 3
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 11)).double()
    weights = [m.weight.detach().numpy().copy() for m in model]  # type: ignore[union-attr, operator]
    exapt.attach(model, exapt.NOLA(rank=rank, alpha=6, num_basis=k), "all")
    shared = {n.rpartition(".")[2]: b.numpy() for n, b in model.named_buffers() if "shared" in n}
    assert shared["basis_A"].shape == (9, rank, k)
    assert shared["basis_B"].shape == (11, rank, k)
    for basis in shared.values():  # uniform in (-1, 1) over sqrt(k)
        assert 0.9 < np.abs(basis).max() * k**0.5 <= 1
        assert abs(basis.std() * k**0.5 - 3**-0.5) < 0.06
    tensors = [numpy_of(m) for m in model]
    assert all((t["alpha"] == 0).all() and (t["beta"] == 0).all() for t in tensors)
    assert all(0.7 < np.abs(t["A0"]).max() * d**0.5 <= 1 for t, d in zip(tensors, (9, 7), strict=True))
    assert not np.allclose(tensors[0]["A0"][:, :7], tensors[1]["A0"])
    randomise(model)
    x = np.random.default_rng(0).normal(size=(4, 9))
    h = x
    expected = []
    for module, w, t in zip(model, weights, tensors, strict=True):
        d_out, d_in = w.shape
        a, b = t["A0"].copy(), np.zeros((d_out, rank))
        for i in range(k):  # the sums of the paper, one basis after the other
            a += t["alpha"][i] * shared["basis_A"][:d_in, :, i].T
            b += t["beta"][i] * shared["basis_B"][:d_out, :, i]
        expected.append((a, b))
        h = h @ (w + scale * b @ a).T + module.bias.detach().numpy()  # type: ignore[union-attr, operator]
    y = model(torch.from_numpy(x))
    np.testing.assert_allclose(y.detach().numpy(), h, rtol=1e-9, atol=1e-12)
    y.sum().backward()
    (a1, _), (a2, b2) = expected
    db1 = scale * (np.ones((4, 11)) @ (weights[1] + scale * b2 @ a2)).T @ (x @ a1.T)  # the loss is the sum of outputs
    by_hand = [(db1 * shared["basis_B"][:7, :, j]).sum() for j in range(k)]
    np.testing.assert_allclose(exapt.trainable(model)["0.exapt.default.beta"].grad, by_hand, rtol=1e-9)


@pytest.mark.parametrize("method", [exapt.VeRA(rank=7), exapt.NOLA(num_basis=5)])
def test_seeded_matrices_are_not_in_the_file(method: WeightMethod, tmp_path: Any) -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 40))

    first = exapt.attach(model(), method, "all")
    randomise(first)
    path = exapt.save(first, tmp_path / "adapter")
    assert sum(t.numel() for t in exapt.read(path).tensors.values()) == exapt.parameter_count(first).trainable
    x = torch.randn(2, 30)
    assert torch.equal(exapt.load(model(), path)(x), first(x))
    other = exapt.attach(model(), type(method)(**{**method.__dict__, "seed": 1}), "all")
    assert not torch.equal(next(iter(other.buffers())), next(iter(first.buffers())))


def test_dora_never_forms_a_square_or_the_update() -> None:
    layer, x = nn.Linear(64, 48), torch.randn(2, 64)
    exapt.attach(layer, exapt.DoRA(rank=2), "all")
    randomise(layer)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = f(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not f.is_view:
                Sizes.largest = max(Sizes.largest, out.numel())
            return out

    with Sizes():
        layer(x).sum().backward()
    assert 0 < Sizes.largest <= 2 * 64


def test_dora_leaves_rows_of_zeros_alone() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    layer.weight.data[1] = 0
    before = layer(x)
    exapt.attach(layer, exapt.DoRA(rank=2), "all")
    torch.testing.assert_close(layer(x), before)
    layer(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in exapt.trainable(layer).values() if p.grad is not None)


def test_rotations_are_orthogonal_and_butterflies_reach_everything() -> None:
    for method, dense in ((exapt.OFT(block_size=4), False), (exapt.BOFT(block_size=4, factors=2), False), (exapt.BOFT(block_size=4, factors=3), True)):
        layer = nn.Linear(16, 16, bias=False).double()
        layer.weight.data.copy_(torch.eye(16))
        exapt.attach(layer, method, "all")
        with torch.no_grad():
            for name, p in exapt.trainable(layer).items():
                if not name.endswith(".s"):
                    p.normal_()
        r = exapt.merge(layer).weight.detach()
        torch.testing.assert_close(r @ r.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
        assert bool((r.abs() > 1e-9).all()) == dense
        assert torch.linalg.det(r) > 0


def test_block_sizes_that_do_not_fit() -> None:
    with pytest.raises(exapt.InputError, match="no divisor of d_in=13"):
        exapt.attach(nn.Linear(13, 4), exapt.OFT(block_size=8), "all")
    with pytest.raises(exapt.InputError, match="lower factors"):
        exapt.attach(nn.Linear(20, 4), exapt.BOFT(block_size=8, factors=5), "all")
    with pytest.raises(exapt.InputError, match="at least one"):
        exapt.attach(nn.Linear(20, 4), exapt.BOFT(factors=0), "all")
    assert exapt.attach(nn.Linear(20, 4), exapt.OFT(block_size=8), "all")(torch.zeros(20)).shape == (4,)


def test_constrained_oft_stays_within_its_bound() -> None:
    layer = exapt.attach(nn.Linear(12, 3), exapt.OFT(block_size=4, constrained=True, eps=1e-2), "all")
    (q,) = exapt.trainable(layer).values()
    optimiser = torch.optim.SGD([q], lr=1.0)
    for step in range(3):
        optimiser.zero_grad()
        layer(torch.ones(12)).sum().backward()
        optimiser.step()
        exapt.after_step(layer, step + 1, 3)
    lengths = (2 * q.square().sum(1)).sqrt()
    assert (lengths <= 1e-2 / 3**0.5 * (1 + 1e-5)).all()
    assert lengths.max() > 0.9e-2 / 3**0.5
