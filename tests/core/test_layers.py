"""Layers of every kind: the matrix view, the operation on it, merging. Shapes are drawn by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import exapt
from exapt.core.layers import feature_layout, layers_of
from exapt.core.slots import refresh, slots_of


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    c_in, c_out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride = draw(st.integers(1, 2))
    dilation = draw(st.integers(1, 2))
    padding = draw(st.integers(0, 2))
    size = 9 if dims < 3 else 6
    kinds = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d] if transposed else [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    bias = draw(st.booleans())
    if transposed:
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        layer = kinds[dims - 1](c_in, c_out, kernel, stride, padding, extra, groups, bias, dilation)
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        pad = draw(st.sampled_from([padding, "same"])) if stride == 1 else padding
        layer = kinds[dims - 1](c_in, c_out, kernel, stride, pad, dilation, groups, bias, mode)
    return layer.double(), torch.randn(2, c_in, *[size] * dims, dtype=torch.double)


def check(layer: nn.Module, x: torch.Tensor, method: exapt.Method) -> None:
    """Identity at start, fast path against the definition, merge and unmerge."""
    base = {k: v.clone() for k, v in layer.state_dict().items()}
    before = layer(x)
    exapt.attach(layer, method, "all")
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        for p in exapt.trainable(layer).values():
            p.normal_()
    y = layer(x)
    assert not torch.allclose(y, before)
    exapt.merge(layer)
    torch.testing.assert_close(layer(x), y)
    exapt.unmerge(layer)
    assert torch.equal(layer(x), y)
    exapt.detach(layer)
    assert all(torch.equal(base[k], v) for k, v in layer.state_dict().items())
    assert torch.equal(layer(x), before)


# torch says so itself of even kernels with "same" padding; the result is what counts here
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_convolutions(drawn: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = drawn
    check(layer, x, exapt.LoRA(rank=min(2, *exapt.sites(layer)[0].shape)))
    (described,) = layers_of(layer)
    w = layer.weight.detach()
    assert torch.equal(described.from_matrix(described.to_matrix(w)), w)
    assert described.to_matrix(w).shape == described.shape
    assert feature_layout(layer) == (layer(x).shape[1], -(x.dim() - 1))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_transposed_matrix_is_the_layers_own_map(groups: int, i: int, o: int, k: int) -> None:
    """Row c of the matrix is what output channel c sees: checked against the layer on unit inputs."""
    layer = nn.ConvTranspose1d(groups * i, groups * o, k, groups=groups, bias=False).double()
    (described,) = layers_of(layer)
    matrix = described.to_matrix(layer.weight.detach()).view(groups * o, i, k)
    x = torch.zeros(1, groups * i, 1, dtype=torch.double)
    for g in range(groups):
        for c in range(i):
            x.zero_()
            x[0, g * i + c] = 1
            y = layer(x)[0]
            assert torch.equal(y[g * o : (g + 1) * o], matrix[g * o : (g + 1) * o, c])


def test_output_size_reaches_a_transposed_convolution() -> None:
    layer, x = nn.ConvTranspose2d(3, 4, 3, stride=2), torch.randn(1, 3, 5, 5)
    expected = layer(x, output_size=[12, 12])
    exapt.attach(layer, exapt.LoRA(rank=1), "all")
    assert torch.equal(layer(x, output_size=[12, 12]), expected)


def test_unbatched_convolution_input() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(3, 7, 7)
    check(layer.double(), x.double(), exapt.LoRA(rank=2))


@pytest.mark.parametrize("key", ["lora", "hra", "ether", "ether_plus"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_changes_of_low_rank_on_convolutions(key: str, kind: type[nn.Module], rows: int) -> None:
    """Values, gradients and memory format are those of the layer with the merged weight, whatever the order of the input's memory."""
    fields = {} if key.startswith("ether") else {"rank": 2}
    layer = kind(4, 6, 2).double()
    dims = layer.weight.dim() - 2
    exapt.attach(layer, exapt.method(key, **fields), "all")
    with torch.no_grad():
        for p in exapt.trainable(layer).values():
            p.normal_(std=0.3)
    x = torch.randn(rows, 4, *(5, 6, 4)[:dims], dtype=torch.double)
    inputs = [x] if dims != 2 else [x, x.to(memory_format=torch.channels_last)]
    for batch in inputs:
        batch.requires_grad_()
        y = layer(batch)
        (slope,) = torch.autograd.grad(y.square().sum(), batch)
        exapt.merge(layer)
        expected = layer(batch)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(slope, torch.autograd.grad(expected.square().sum(), batch)[0])
        exapt.unmerge(layer)


def test_linear_embedding_and_keyword_call() -> None:
    check(nn.Linear(5, 3).double(), torch.randn(2, 4, 5, dtype=torch.double), exapt.LoRA(rank=2))
    check(nn.Embedding(7, 4, padding_idx=1).double(), torch.tensor([[0, 1, 6]]), exapt.LoRA(rank=2))
    layer, x = nn.Linear(5, 3), torch.randn(2, 5)
    exapt.attach(layer, exapt.LoRA(rank=2), "all")
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("key", ["lora", "dora", "vera"])
def test_padding_takes_no_gradient(key: str) -> None:
    """As in the embedding's own definition: the padding row is looked up, but teaches nothing."""
    grads = []
    for by_definition in (False, True):
        torch.manual_seed(0)
        layer = nn.Embedding(5, 4, padding_idx=0).double()
        exapt.attach(layer, exapt.method(key, rank=2), "all", seed=0)
        for module, slots in slots_of(layer):
            slots.entries[0].definition = by_definition
            slots.chains.clear()
            refresh(module, slots)
        with torch.no_grad():
            for i, p in enumerate(exapt.trainable(layer).values()):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        layer(torch.tensor([0, 0, 1])).square().sum().backward()
        grads.append([p.grad for p in exapt.trainable(layer).values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    check(Conv1D(6, 4).double(), torch.randn(2, 3, 4, dtype=torch.double), exapt.LoRA(rank=2))


class Router(nn.Module):
    """Reads a parameter called ``weight`` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ self.weight.T, -1)


class Experts(nn.Module):
    """Stacked expert weights, read as one parameter."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.is_transposed = turned
        self.up_proj = nn.Parameter(torch.randn(3, 6, 4) if turned else torch.randn(3, 4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.up_proj if self.is_transposed else self.up_proj.transpose(1, 2)
        return torch.einsum("bi,eio->beo", x, w)


@pytest.mark.parametrize("module", [Router(), Experts(False), Experts(True)], ids=["reads-weight", "experts", "experts-transposed"])
def test_modules_that_read_a_parameter_themselves(module: nn.Module) -> None:
    module = module.double()
    where = "*" if isinstance(module, Experts) else "all"
    x = torch.randn(5, 6, dtype=torch.double)
    before = module(x)
    exapt.attach(module, exapt.LoRA(rank=2), where)
    torch.testing.assert_close(module(x), before)
    with torch.no_grad():
        for p in exapt.trainable(module).values():
            p.normal_()
    y = module(x)
    y.square().sum().backward()
    assert all(p.grad is not None for p in exapt.trainable(module).values())
    exapt.merge(module)
    torch.testing.assert_close(module(x), y)


def test_each_expert_gets_its_own_update() -> None:
    """The stacked update equals LoRA's formula, expert by expert."""
    module = Experts(False).double()
    w = module.up_proj.detach().clone()
    exapt.attach(module, exapt.LoRA(rank=2, alpha=4), "*")
    tensors = dict(exapt.trainable(module))
    (a,) = [t for n, t in tensors.items() if n.endswith("A")]
    (b,) = [t for n, t in tensors.items() if n.endswith("B")]
    assert a.shape == (3, 2, 6)
    assert b.shape == (3, 4, 2)
    with torch.no_grad():
        b.normal_()
    for e in range(3):
        torch.testing.assert_close(module.up_proj[e], w[e] + 2.0 * b[e] @ a[e])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("own_dims", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(batch_first: bool, own_dims: bool, training: bool) -> None:
    torch.manual_seed(0)
    options = {} if own_dims else {"kdim": 6, "vdim": 6}
    mha = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).double().train(training)
    q = torch.randn(3, 5, 8, dtype=torch.double)
    kv = q if own_dims else torch.randn(3, 5, 6, dtype=torch.double)
    before = mha(q, kv, kv)[0]
    exapt.attach(mha, exapt.LoRA(rank=2), ["*", "all"])
    names = {s for _, slots in slots_of(mha) for e in slots.entries for s in [e.site_name]}
    assert "out_proj" in names
    assert ("in_proj_weight" in names) == own_dims
    with torch.no_grad():
        torch.testing.assert_close(mha(q, kv, kv)[0], before)
        for p in exapt.trainable(mha).values():
            p.normal_()
        quick = mha(q, kv, kv, need_weights=False)[0]
    y = mha(q, kv, kv)[0]
    torch.testing.assert_close(y, quick)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in exapt.trainable(mha).values())
    exapt.merge(mha)
    torch.testing.assert_close(mha(q, kv, kv)[0], y)


@pytest.mark.parametrize("where", ["linear", "*norm*", "0", "*.mlp"])
def test_encoder_layer_runs_adapters_under_its_fused_kernel(where: str) -> None:
    """In eval without gradients torch would run the layer as one kernel that calls no child."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)).eval()
    x = torch.randn(2, 4, 8)
    method = exapt.LoRA(rank=2) if where == "linear" else exapt.SSF()
    exapt.attach(model, method, where)
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.add_(torch.randn_like(p) * 0.3)
        fused = model(x)
    torch.testing.assert_close(fused, model.train()(x).detach(), rtol=1e-4, atol=1e-5)
    exapt.detach(model)
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_encoder_with_padding_runs_without_nested_tensors() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False] * 3 + [True]])
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=padding)
    exapt.attach(encoder, exapt.LoRA(rank=2), "mlp.up")
    with torch.no_grad():
        after = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1, :3], before[1, :3])
    exapt.detach(encoder)
    assert encoder.use_nested_tensor


def test_activation_method_on_an_attentions_output_projection() -> None:
    """nn.MultiheadAttention never calls out_proj, so the change is made where its output appears."""
    mha, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    before = mha(x, x, x)[0]
    exapt.attach(mha, exapt.SSF(), "out_proj")
    gamma, beta = exapt.trainable(mha).values()
    with torch.no_grad():
        gamma.normal_()
        beta.normal_()
    torch.testing.assert_close(mha(x, x, x)[0], gamma * before + beta)
    exapt.detach(mha)
    assert torch.equal(mha(x, x, x)[0], before)


def test_recurrent_layers_are_not_offered() -> None:
    """An LSTM reads its weights from a flat list; a shift of the parameter would silently do nothing."""
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "out": nn.Linear(4, 2)})
    assert [s.name for s in exapt.sites(model) if s.layer is not None] == ["out"]
