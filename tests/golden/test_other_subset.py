"""Methods that train existing parameters, against training those parameters of the base itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, call, inputs_of, model_of, tiny_llama
from torch import Tensor, nn

import exapt
from exapt import BitFit, FISHMask, FullTuning, LoRA, PaCA

TARGETS = torch.arange(3) % CLASSES


def loss_of(model: nn.Module, kind: str) -> Tensor:
    if kind == "llama":
        ids = inputs_of(kind)
        return model(ids, labels=ids).loss
    return F.cross_entropy(call(model, inputs_of(kind)), TARGETS)


def own(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's trainable tensors under the names of the base's parameters."""
    return {n.replace("exapt.default.", ""): p for n, p in exapt.trainable(model).items()}


def gradients(base: nn.Module, kind: str) -> dict[str, Tensor]:
    base.requires_grad_(True)
    base.zero_grad()
    loss_of(base, kind).backward()
    return {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in base.named_parameters()}


def same_as_training_the_base(base: nn.Module, adapted: nn.Module, masks: dict[str, Tensor], kind: str, steps: int = 3, rate: float = 0.05) -> None:
    """SGD on the adapter, and on the base's own entries where the masks are true: same gradients, same losses."""
    found = own(adapted)
    assert found.keys() == masks.keys()
    for _ in range(steps):
        expected = gradients(base, kind)
        for p in found.values():
            p.grad = None
        loss = loss_of(adapted, kind)
        loss.backward()
        torch.testing.assert_close(loss, loss_of(base, kind), rtol=1e-5, atol=1e-6)
        for name, p in found.items():
            chosen = expected[name][masks[name]]
            assert p.grad is not None
            torch.testing.assert_close(p.grad.flatten(), chosen, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for name, p in found.items():
                p -= rate * p.grad
                base.get_parameter(name)[masks[name]] -= rate * expected[name][masks[name]]
    assert loss_of(base, kind) < loss_of(model_of(kind), kind)


def whole(base: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {n: torch.ones_like(base.get_parameter(n), dtype=torch.bool) for n in names}


@pytest.mark.parametrize("kind", ["bert", "text", "image"])
def test_bitfit_trains_all_biases_and_only_them(kind: str) -> None:
    base = model_of(kind)
    names = [n for n, _ in base.named_parameters() if n.endswith("bias")]
    same_as_training_the_base(base, exapt.attach(model_of(kind), BitFit()), whole(base, names), kind)


def test_bitfit_on_multihead_attention_and_without_biases() -> None:
    layer = exapt.attach(nn.TransformerEncoderLayer(8, 2, 16), BitFit())
    assert sum(n.endswith("in_proj_bias") for n in exapt.trainable(layer)) == 1
    assert exapt.parameter_count(layer).trainable == 3 * 8 + 8 + 16 + 8 + 8 + 8
    with pytest.raises(exapt.InputError):
        exapt.attach(tiny_llama(), BitFit())


@pytest.mark.parametrize(("kind", "where"), [("bert", None), ("text", "all"), ("image", "all"), ("llama", "all")])
def test_full_tuning_trains_the_modules_own_parameters(kind: str, where: Any) -> None:
    base = model_of(kind)
    names = [n for n, _ in base.named_parameters() if where == "all" or n.startswith("classifier")]
    same_as_training_the_base(base, exapt.attach(model_of(kind), FullTuning(), where), whole(base, names), kind)


def test_full_tuning_of_tied_weights_is_one_tensor() -> None:
    torch.manual_seed(0)
    base = tiny_llama(tie_word_embeddings=True)
    adapted = exapt.attach(copy.deepcopy(base), FullTuning(), "all")
    expected = gradients(base, "llama")
    loss_of(adapted, "llama").backward()
    found = own(adapted)
    assert found.keys() == expected.keys()
    for name, p in found.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_full_tuning_refuses_recurrent_layers() -> None:
    with pytest.raises(exapt.InputError, match="leave it out"):
        exapt.attach(nn.Sequential(nn.LSTM(3, 4)), FullTuning(), "all")


def columns(model: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """Masks of the columns that PaCA chose."""
    from exapt.core.slots import slots_of

    masks = {}
    names = {id(m): n for n, m in model.named_modules()}
    for module, slots in slots_of(model):
        for e in slots.entries:
            name = f"{names[id(module)]}.weight"
            mask = torch.zeros_like(base.get_parameter(name), dtype=torch.bool)
            mask[:, e.holder.tensors()["weight_index"]] = True
            masks[name] = mask
    return masks


@pytest.mark.parametrize("kind", ["bert", "text", "llama"])
def test_paca_trains_its_columns_of_the_base(kind: str) -> None:
    base = model_of(kind)
    adapted = exapt.attach(model_of(kind), PaCA(rank=5))
    masks = columns(adapted, base)
    assert all(int(m[0].sum()) == 5 for m in masks.values())
    assert len({tuple(m[0].nonzero().flatten().tolist()) for m in masks.values()}) > 1, "each site draws its own"
    same_as_training_the_base(base, adapted, masks, kind)


def test_paca_draws_from_its_seed() -> None:
    def drawn(seed: int) -> Tensor:
        model = exapt.attach(model_of("text"), PaCA(seed=seed), "attention*")
        return torch.stack([m[0].nonzero().flatten() for m in columns(model, model_of("text")).values()])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("choice", ["norm", "gradient"])
def test_paca_chooses_columns_by_norm(choice: str) -> None:
    base, model = model_of("text"), model_of("text")
    method: Any = PaCA(rank=3, choice=choice)
    batch = (inputs_of("text"), TARGETS)
    statistics = None
    if choice == "gradient":
        with pytest.raises(exapt.InputError, match="calibrate"):
            exapt.attach(model, method)
        statistics = exapt.calibrate(model, [batch], method, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    masks = columns(exapt.attach(model, method, statistics=statistics), base)
    score = gradients(base, "text") if choice == "gradient" else {n: p.detach() for n, p in base.named_parameters()}
    for name, mask in masks.items():
        best = score[name].norm(dim=0).topk(3).indices
        assert set(best.tolist()) == set(mask[0].nonzero().flatten().tolist())


def saved_numel(model: nn.Module, x: Tensor) -> int:
    """Entries of activations kept for backward: all saved storages but those of parameters and the input."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in known:
            kept[pointer] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(kept.values())


def test_paca_keeps_only_its_inputs_for_backward() -> None:
    def chain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])

    x = torch.randn(100, 64)
    rank = 4
    paca = saved_numel(exapt.attach(chain(), PaCA(rank=rank), "all"), x)
    lora = saved_numel(exapt.attach(chain(), LoRA(rank=rank), "all"), x)
    # per layer the chosen inputs, and the change of the chosen columns; LoRA keeps the whole input of all layers but the first
    assert paca == 4 * 100 * rank + 3 * 64 * rank
    assert lora >= 3 * 100 * 64


def per_example_fisher(base: nn.Module, kind: str) -> dict[str, Tensor]:
    x = inputs_of(kind)
    total = {n: torch.zeros_like(p) for n, p in base.named_parameters()}
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(call(base, x[i : i + 1]), TARGETS[i : i + 1]), list(base.parameters()))
        for (_, t), g in zip(total.items(), grads, strict=True):
            t += g**2 / len(x)
    return total


@pytest.mark.parametrize("kind", ["text", "bert", "image"])
def test_fish_mask_takes_the_largest_of_all(kind: str, tmp_path: Any) -> None:
    base, model, method = model_of(kind), model_of(kind), FISHMask(keep=0.01)
    statistics = exapt.calibrate(model, [(inputs_of(kind), TARGETS)], method, loss=lambda m, b: F.cross_entropy(call(m, b[0]), b[1]))
    exapt.attach(model, method, statistics=statistics)
    fisher = per_example_fisher(base, kind)
    every = torch.cat([f.flatten() for f in fisher.values()])
    count = round(0.01 * len(every))
    threshold = every.topk(count).values[-1]
    masks = {n: f >= threshold for n, f in fisher.items() if bool((f >= threshold).any())}
    assert len(masks) < len(fisher), "some parameter should get nothing"
    assert exapt.parameter_count(model).trainable == count
    same_as_training_the_base(base, model, masks, kind)
    path = exapt.save(model, tmp_path / "fish")
    again = exapt.load(model_of(kind), path)
    assert torch.equal(call(again, inputs_of(kind)), call(model, inputs_of(kind)))


def test_fish_mask_beside_a_whole_head() -> None:
    model, method = model_of("text"), FISHMask(keep=0.01)
    rules = {"head": FullTuning(), "all": method}
    statistics = exapt.calibrate(model, [(inputs_of("text"), TARGETS)], method, loss=lambda m, b: F.cross_entropy(call(m, b[0]), b[1]))
    exapt.attach(model, rules, statistics=statistics)
    found = own(model)
    assert found["head.weight"].shape == model.head._parameters["weight"].shape
    assert all(p.dim() == 1 for n, p in found.items() if not n.startswith("head"))
    with pytest.raises(exapt.InputError, match="calibrate"):
        exapt.attach(model_of("text"), method)
