"""Weight methods against PEFT: same tensors, same outputs, same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft_tools import MLP, QUIET, Convolutions, Same, Words, adapted, assert_same, our_tensors, peft, randomise
from tiny import Transformer, model_of
from torch import Tensor, nn

import exapt
from exapt.core.contract import Method

pytestmark = QUIET
ATTENTION = [f"layers.{i}.attention.{n}" for i in range(2) for n in ("query", "value", "o_proj")]
MODELS = ["mlp", "conv1d", "conv", "text", "embedding"]


def case(kind: str) -> tuple[nn.Module, list[str], Tensor]:
    """A model, its sites and an input."""
    if kind == "mlp":
        return MLP(), ["fc1", "fc2"], torch.randn(5, 4, 12)
    if kind == "conv1d":
        return MLP(conv1d=True), ["fc1", "fc2"], torch.randn(5, 4, 12)
    if kind == "conv":
        return Convolutions(), ["fc1", "fc2"], torch.randn(2, 3, 9, 7)
    if kind == "embedding":
        return Words(), ["embed"], torch.randint(0, 11, (4, 5))
    model = model_of("text")
    assert isinstance(model, Transformer)
    return model, ATTENTION, torch.randn(3, 6, 32)


def lora_tensors(layer: Any) -> dict[str, Same]:
    if "default" in layer.lora_embedding_A:
        found = {"A": Same(layer.lora_embedding_A["default"]), "B": Same(layer.lora_embedding_B["default"])}
    else:
        found = {k: Same(m["default"].weight, lambda t: t.flatten(1)) for k, m in (("A", layer.lora_A), ("B", layer.lora_B))}
    if "default" in layer.lora_magnitude_vector:
        found["m"] = Same(layer.lora_magnitude_vector["default"].weight, lambda t: t.flatten())
    return found


def lora_config(kind: str, names: list[str], **options: Any) -> Any:
    return peft.LoraConfig(target_modules=names, fan_in_fan_out=kind == "conv1d", **options)


@pytest.mark.parametrize("scaling", ["standard", "rs"])
@pytest.mark.parametrize("kind", MODELS)
def test_lora(kind: str, scaling: str) -> None:
    base, names, x = case(kind)
    theirs = adapted(base, lora_config(kind, names, r=4, lora_alpha=6, use_rslora=scaling == "rs"))
    randomise(*(p for p in theirs.parameters() if p.requires_grad))
    method = exapt.LoRA(rank=4, alpha=6, scaling=scaling)
    assert_same(base, method, theirs, lora_tensors, names, x)


@pytest.mark.parametrize("scaling", ["standard", "rs"])
@pytest.mark.parametrize("kind", MODELS)
def test_dora(kind: str, scaling: str) -> None:
    base, names, x = case(kind)
    theirs = adapted(base, lora_config(kind, names, r=4, lora_alpha=6, use_dora=True, use_rslora=scaling == "rs"))
    fresh = exapt.attach(copy.deepcopy(base), exapt.DoRA(rank=4), names)
    for name in names:  # the start: norms of the rows
        found = lora_tensors(theirs.base_model.model.get_submodule(name))["m"]
        torch.testing.assert_close(our_tensors(fresh, name)["m"], found.value(found.theirs))
    randomise(*(p for n, p in theirs.named_parameters() if p.requires_grad and "magnitude" not in n))
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "magnitude" in n:
                p.mul_(1 + 0.3 * torch.rand_like(p))
    assert_same(base, exapt.DoRA(rank=4, alpha=6, scaling=scaling), theirs, lora_tensors, names, x)


@pytest.mark.parametrize("kind", ["mlp", "conv1d", "text"])
def test_pissa(kind: str) -> None:
    base, names, x = case(kind)
    theirs = adapted(base, lora_config(kind, names, r=4, lora_alpha=6, init_lora_weights="pissa"))
    method = exapt.PiSSA(rank=4, alpha=6)
    fresh = exapt.attach(copy.deepcopy(base), method, names)
    for name in names:  # the same start, so that PEFT's residual weight is the one our form implies
        for k, same in lora_tensors(theirs.base_model.model.get_submodule(name)).items():
            torch.testing.assert_close(our_tensors(fresh, name)[k], same.theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    assert_same(base, method, theirs, lora_tensors, names, x)


def test_pissa_randomised_start_is_near_the_exact_one() -> None:
    base = nn.Linear(24, 20)
    with torch.no_grad():  # a clear gap after four values, where the randomised decomposition is good
        u, _, v = torch.linalg.svd(base.weight, full_matrices=False)
        base.weight.copy_(u @ torch.diag(torch.tensor([9.0, 8, 7, 6] + [0.1] * 16)) @ v)
    products = []
    for niter in (0, 4):
        tensors = our_tensors(exapt.attach(copy.deepcopy(base), exapt.PiSSA(rank=4, alpha=4, niter=niter), "all"), "")
        products.append(tensors["B"] @ tensors["A"])
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "conv1d", "text"])
def test_vera(kind: str) -> None:
    base, names, x = case(kind)
    config = peft.VeraConfig(target_modules=names, r=6, projection_prng_key=1, fan_in_fan_out=kind == "conv1d")
    theirs = adapted(base, config)
    randomise(*(p for p in theirs.parameters() if p.requires_grad))

    def share(ours: nn.Module) -> None:
        common = dict(ours.named_buffers())
        for k, value in (("A", theirs.base_model.vera_A["default"]), ("B", theirs.base_model.vera_B["default"])):
            assert common[f"exapt.default_shared_0.{k}"].shape == value.shape
            bound = (6 / value.shape[1]) ** 0.5
            assert 0.8 * bound < common[f"exapt.default_shared_0.{k}"].abs().max() <= bound  # Kaiming uniform, as theirs
            common[f"exapt.default_shared_0.{k}"].copy_(value)

    def mapping(layer: Any) -> dict[str, Same]:
        return {"lambda_d": Same(layer.vera_lambda_d["default"]), "lambda_b": Same(layer.vera_lambda_b["default"])}

    assert_same(base, exapt.VeRA(rank=6), theirs, mapping, names, x, share)


def oft_tensors(layer: Any) -> dict[str, Same]:
    return {"Q": Same(layer.oft_R["default"].weight)}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "text"])
def test_oft(kind: str, share: bool) -> None:
    base, names, x = case(kind)
    config = peft.OFTConfig(target_modules=names, r=0, oft_block_size=4, block_share=share, use_cayley_neumann=False)
    theirs = adapted(base, config)
    randomise(*(p for p in theirs.parameters() if p.requires_grad))
    assert_same(base, exapt.OFT(block_size=4, block_share=share), theirs, oft_tensors, names, x)


@pytest.mark.parametrize("share", [False, True])
def test_constrained_oft_projects_as_peft_does(share: bool) -> None:
    base, names, x = case("mlp")
    config = peft.OFTConfig(target_modules=names, r=0, oft_block_size=4, block_share=share, use_cayley_neumann=False, coft=True, eps=0.4)
    theirs = adapted(base, config)
    randomise(*(p for p in theirs.parameters() if p.requires_grad), scale=0.2 if share else 0.08)  # blocks outside the bound, and inside
    ours = exapt.attach(copy.deepcopy(base), exapt.OFT(block_size=4, block_share=share, constrained=True, eps=0.4), names)
    start = {n: oft_tensors(theirs.base_model.model.get_submodule(n))["Q"].theirs.detach().clone() for n in names}
    for n in names:
        our_tensors(ours, n)["Q"].data.copy_(start[n])
    exapt.after_step(ours, 1, 1)
    y = theirs(x)  # projects in place
    torch.testing.assert_close(ours(x), y)
    changed = []
    for n in names:
        q = our_tensors(ours, n)["Q"]
        torch.testing.assert_close(q, oft_tensors(theirs.base_model.model.get_submodule(n))["Q"].theirs)
        changed += (q != start[n]).any(1).tolist()
    assert any(changed)
    assert share or not all(changed)


class _Blocks:
    """What PEFT's CUDA kernel computes: block-diagonal matrices from their blocks, and back."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*one) for one in blocks])]

    def backward(self, gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        n, d, b, _ = blocks.shape
        return [torch.stack([torch.stack([gradient[i, j * b : (j + 1) * b, j * b : (j + 1) * b] for j in range(d)]) for i in range(n)])]


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("kind", ["mlp", "text"])
def test_boft(kind: str, factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.tuners.boft.layer as layers

    monkeypatch.setattr(layers, "get_fbd_cuda", lambda: _Blocks())
    base, names, x = case(kind)
    if kind == "mlp":  # widths that three factors fit
        base.fc1, x = nn.Linear(32, 24), torch.randn(5, 4, 32)
    block = 2 if kind == "mlp" else 8
    theirs = adapted(base, peft.BOFTConfig(target_modules=names, boft_block_size=block, boft_n_butterfly_factor=factors))
    for n, p in theirs.named_parameters():
        if p.requires_grad:
            randomise(p)
            p.data.add_(1.0 if "boft_s" in n else 0.0)
    row, column = torch.triu_indices(block, block, 1)

    def mapping(layer: Any) -> dict[str, Same]:
        # theirs is a full matrix of which the skew part counts: (R - R^T) / 2
        def upper(t: Tensor) -> Tensor:
            return t[..., row, column] - t[..., column, row]

        r, s = layer.boft_R["default"], layer.boft_s["default"]
        return {"R": Same(r, lambda t: upper(t) / 2, upper), "s": Same(s, lambda t: t.flatten())}

    assert_same(base, exapt.BOFT(block_size=block, factors=factors), theirs, mapping, names, x)


@pytest.mark.parametrize("kind", ["mlp", "conv1d", "conv", "text"])
def test_ia3(kind: str) -> None:
    base, names, x = case(kind)
    if kind == "text":
        names = [f"layers.{i}.{n}" for i in range(2) for n in ("attention.key", "attention.value", "mlp.fc2")]
    config = peft.IA3Config(target_modules=names, feedforward_modules=[n for n in names if n.endswith("fc2")], fan_in_fan_out=kind == "conv1d")
    theirs = adapted(base, config)
    for p in theirs.parameters():
        if p.requires_grad:
            randomise(p)
            p.data.add_(1.0)

    def mapping(layer: Any) -> dict[str, Same]:
        return {"l_in" if layer.is_feedforward else "l_out": Same(layer.ia3_l["default"], lambda t: t.flatten())}

    method: Method = exapt.IA3()
    assert_same(base, method, theirs, mapping, names, x)


def test_ia3_finds_its_sites_itself() -> None:
    model = exapt.attach(model_of("text"), exapt.IA3())
    names = [n.replace(".exapt.default", "") for n in exapt.trainable(model)]
    assert names == [f"layers.{i}.{n}" for i in range(2) for n in ("attention.key.l_out", "attention.value.l_out", "mlp.fc2.l_in")]
