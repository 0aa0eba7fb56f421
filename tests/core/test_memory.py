"""What is kept for the backward pass, counted through saved_tensors_hooks."""

from __future__ import annotations

import pytest
import torch
from tiny import Transformer
from torch import nn

import exapt


def saved_bytes(model: nn.Module, x: torch.Tensor, skip_parameters: bool = True) -> int:
    """Bytes of distinct storages saved by one forward pass."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())} if skip_parameters else set()
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    total = sum(seen.values())
    y.float().sum().backward()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skip_parameters", [True, False])
def test_lora_never_keeps_more_than_full_fine_tuning(dtype: torch.dtype, skip_parameters: bool) -> None:
    x = torch.randn(4, 16, 32, dtype=dtype)
    torch.manual_seed(0)
    full = saved_bytes(Transformer().to(dtype), x, skip_parameters)
    model = exapt.attach(Transformer().to(dtype), exapt.LoRA(rank=8))
    assert all(p.dtype == torch.float32 for p in exapt.trainable(model).values())
    lora = saved_bytes(model, x, skip_parameters)
    assert lora <= full + (0 if skip_parameters else sum(p.numel() * 4 for p in exapt.trainable(model).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_keeps_one_input_for_projections_that_share_it(dtype: torch.dtype) -> None:
    """No copy of the input per projection, in whatever type the parameters are: three projections, one tensor."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.k(x) + self.v(x)

    x = torch.randn(128, 64, dtype=dtype)
    model = exapt.attach(Three().to(dtype), exapt.LoRA(rank=4), "all")
    assert saved_bytes(model, x) == x.untyped_storage().nbytes()


def test_autocast_keeps_one_cast_input() -> None:
    x = torch.randn(128, 64)
    model = exapt.attach(nn.Sequential(nn.Linear(64, 64)), exapt.LoRA(rank=4), "all")
    full = nn.Sequential(nn.Linear(64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        adapted = saved_bytes(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted <= saved_bytes(full, x)


def test_a_full_backbone_gradient_equals_the_plain_formula() -> None:
    """The fused function against W + sBA written out, gradients of input and factors."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5).double(), torch.randn(3, 4, 6, dtype=torch.double, requires_grad=True)
    exapt.attach(layer, exapt.LoRA(rank=2, alpha=3.0), "all")
    a, b = exapt.trainable(layer).values()
    with torch.no_grad():
        b.normal_()
    layer(x).square().sum().backward()
    got = [x.grad.clone(), a.grad.clone(), b.grad.clone()]
    x.grad = a.grad = b.grad = None
    (x @ (layer.weight + 1.5 * b @ a).T + layer.bias).square().sum().backward()
    for mine, plain in zip(got, (x.grad, a.grad, b.grad), strict=True):
        torch.testing.assert_close(mine, plain)


def test_gradcheck_of_the_low_rank_function() -> None:
    from exapt.core.base import LowRank

    shapes = [(3, 5), (3, 6), (2, 6), (5, 2)]
    y, x, a, b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *t: LowRank.apply(*t, 0.7), (y, x, a, b))


def test_per_sample_gradients_by_vmap() -> None:
    """The forward holds no in-place operation, so functional transforms go through it."""
    model = exapt.attach(nn.Sequential(nn.Linear(4, 3)), exapt.LoRA(rank=2), "all")
    x = torch.randn(5, 4)
    parameters = {n: p.detach() for n, p in exapt.trainable(model).items()}
    parameters = {n: torch.randn_like(p) for n, p in parameters.items()}

    def loss(p: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, p, (row,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        alone = torch.func.grad(loss)(parameters, x[i])
        for n in alone:
            torch.testing.assert_close(grads[n][i], alone[n])
