"""Many adapters on one model: rows with different ones together, switching, and what each costs while it only waits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import Transformer, attach_example, example, inputs_of, kind_for, model_of, perturb
from torch import Tensor, nn

import exapt
from exapt.core.base import Base
from exapt.core.contract import WeightMethod
from exapt.core.kept import kept
from exapt.core.registry import methods
from exapt.core.rows import Layout
from exapt.core.slots import slots_of
from exapt.core.state import state_of

MIXED: dict[str, Any] = {
    "r2": exapt.LoRA(rank=2), "r5": exapt.LoRA(rank=5, scaling="rs"), "xs": exapt.method("lora_xs", rank=3), "dora": exapt.DoRA(rank=2),
    "ia3": exapt.method("ia3"),
    "sora": exapt.method("sora", rank=4), "bottle": exapt.method("adapter"), "drop": exapt.LoRA(rank=2, dropout=0.5), "tiny": exapt.method("tinylora", rank=2),
}  # fmt: skip


MORE = {("adamss", "v"), ("loftq", "codes")}
"""Tensors with which a method is more than its product."""


def mixed(model: nn.Module, names: Any = MIXED) -> nn.Module:
    for i, name in enumerate(names):
        exapt.attach(model, MIXED[name], name=name)
        perturb(model, seed=i)
    return model


def alone(model: nn.Module, rows: list[str | None], run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The batch by a loop over its rows."""
    parts = []
    for i, name in enumerate(rows):
        with exapt.using(model, *([name] if name else [])):
            parts.append(run(x[i : i + 1]))
    return torch.cat(parts)


@pytest.mark.parametrize("rows", [
    ["r2", "r5", None, "xs", "r2", "sora"], ["r2", "r2", "r5", "r5", "tiny", "tiny"], ["dora", "r2", "ia3", "bottle", None, "dora"],
    ["r5", "bottle", "r5", "bottle", "drop", "sora"], ["r2"] * 5 + ["r5"],
])  # fmt: skip
def test_a_mixed_batch_equals_a_loop_in_values_and_gradients(rows: list[str | None]) -> None:
    model = mixed(Transformer()).eval()
    x = inputs_of("text", len(rows))
    with torch.no_grad(), exapt.routed(model, rows):
        without = model(x)
    with exapt.routed(model, rows):
        together = model(x)
        together.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loop = alone(model, rows, model, x)
    torch.testing.assert_close(without, loop, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together, loop, rtol=1e-5, atol=1e-6)
    for i, name in enumerate(rows):  # one backward for each: a graph made under another adapter has its own parameters' flags
        if name:
            with exapt.using(model, name):
                model(x[i : i + 1]).square().sum().backward()
    for n, p in model.named_parameters():
        if n in gradients or p.grad is not None:
            torch.testing.assert_close(gradients[n], p.grad, rtol=1e-4, atol=1e-6)


def test_the_layer_beneath_runs_once() -> None:
    model, rows = mixed(Transformer(), ["r2", "r5", "bottle", "dora"]).eval(), ["r2", "r5", "bottle", None, "r2", "dora"]
    calls: list[int] = []
    run = nn.functional.linear

    def counted(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        calls.append(w is model.layers[0].mlp.fc1._parameters["weight"])
        return run(x, w, b)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), exapt.routed(model, rows):
        patch.setattr(nn.functional, "linear", counted)
        patch.setattr(torch.nn.modules.linear.F, "linear", counted)
        model(inputs_of("text", 6))
        assert sum(calls) == 2  # for the five together, and for DoRA's row
        calls.clear()
        with exapt.routed(model, [None if n == "dora" else n for n in rows]):
            model(inputs_of("text", 6))
        assert sum(calls) == 1


def test_a_batch_with_a_prefix_runs_all_other_rows_together() -> None:
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 40}
    model = BertModel(BertConfig(**small)).eval()
    for name, method in (("a", exapt.LoRA(rank=2)), ("b", exapt.LoRA(rank=3)), ("p", exapt.method("prefix_tuning"))):
        exapt.attach(model, method, name=name)
        perturb(model)
    runs: list[int] = []
    model.pooler.register_forward_hook(lambda m, args, y: runs.append(len(y)))
    rows, ids = ["a", "p", "b", None, "p"], torch.randint(0, 40, (5, 6))
    with torch.no_grad():
        with exapt.routed(model, rows):
            together = model(ids).last_hidden_state
        assert sorted(runs) == [2, 3]
        torch.testing.assert_close(together, alone(model, rows, lambda x: model(x).last_hidden_state, ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "flat"])
def test_other_layers_and_other_shapes(kind: str) -> None:
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        model: nn.Module = nn.Sequential(Conv1D(6, 5), nn.Tanh(), Conv1D(4, 6))
        x = torch.randn(4, 3, 5)
    elif kind == "embedding":
        model, x = nn.Sequential(nn.Embedding(9, 5, padding_idx=0), nn.Linear(5, 3)), torch.randint(0, 9, (4, 7))
    else:
        model, x = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2)), torch.randn(8, 5)  # two samples for each name
    for name, rank in (("a", 1), ("b", 2)):
        exapt.attach(model, exapt.LoRA(rank=rank), where="all", name=name)
        perturb(model)
    rows = ["b", "a", None, "b"]
    each = [n for n in rows for _ in range(len(x) // 4)]
    with exapt.routed(model, rows):
        together = model(x)
        together.square().sum().backward()
    gradients = [p.grad.clone() for n, p in model.named_parameters() if ".exapt." in n and p.grad is not None]
    model.zero_grad()
    for i, name in enumerate(each):
        with exapt.using(model, *([name] if name else [])):
            y = model(x[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], y, rtol=1e-5, atol=1e-6)
            if name:
                y.square().sum().backward()
    for got, p in zip(gradients, [p for n, p in model.named_parameters() if ".exapt." in n and p.grad is not None], strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-6)


def test_a_shift_of_tied_embeddings_reaches_the_head_of_its_rows_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model, x = Tied(), torch.randint(0, 9, (3, 4))
    exapt.attach(model, exapt.LoRA(rank=2), where="embed", name="a")
    perturb(model)
    with torch.no_grad():
        with exapt.routed(model, ["a", None, "a"]):
            together = model(x)
        torch.testing.assert_close(together, alone(model, ["a", None, "a"], model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [c for c in methods().values() if issubclass(c, WeightMethod) and c.low_rank is not WeightMethod.low_rank], ids=lambda c: c.key)
def test_declared_factors_are_the_update(cls: type[WeightMethod]) -> None:
    kind = kind_for(cls())
    model = attach_example(model_of(kind), example(cls), kind)
    perturb(model)
    found = 0
    for module, slots in slots_of(model):
        for e in slots.entries:
            w = e.layer.to_matrix(module._parameters[e.layer.parameter].detach()).double()
            p = {k: t.double() if t.is_floating_point() else t for k, t in e.tensors().items() if (cls.key, k) not in MORE}
            factors = e.method.low_rank(p, e.layer.shape)
            if factors is not None:
                found += 1
                a, b = factors
                assert (b.shape[0], a.shape[1]) == e.layer.shape
                torch.testing.assert_close(w + b @ a, e.method.weight(p, w), rtol=1e-6, atol=1e-7)
                assert a.requires_grad or b.requires_grad
    assert found


def test_layouts() -> None:
    for owners in ([0, 0, 1, 1], [0, 1, 0, None], [1, 0, 1, 1, 1, 1, 1]):
        lay = Layout(owners, 2)
        assert lay.whole == (owners == [0, 0, 1, 1])
        assert [lay.taken[i] for i in lay.valid] == lay.used
        assert [owners[i] for i in lay.sorted] == lay.owners


@pytest.mark.parametrize("trains", [False, True])
def test_rows_that_find_their_adapter_by_an_index(trains: bool) -> None:
    model, x = mixed(Transformer(), ["r2", "r5", "xs", "ia3"]).eval(), inputs_of("text", 4)
    for a in state_of(model).adapters.values():
        a.trainable = trains
    for rows in (["r2", None, "xs", "r2"], ["r5", "r5", "r5", "xs"]):
        with exapt.routed(model, rows, among=("r2", "r5", "xs")):
            together = model(x)
            assert together.requires_grad is trains
            if trains:
                together.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        torch.testing.assert_close(together, alone(model, rows, model, x), rtol=1e-5, atol=1e-6)
        for i, name in enumerate(rows if trains else []):
            with exapt.using(model, *([name] if name else [])):
                y = model(x[i : i + 1]).square().sum()
                if name:
                    y.backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(gradients[n], p.grad, rtol=1e-4, atol=1e-6)
        model.zero_grad()
    for wrong, match in (({"among": ("r2",)}, "not in among"), ({"among": ("r2", "ia3", "xs")}, "ia3.*does more")):
        with pytest.raises(exapt.InputError, match=match), exapt.routed(model, ["r2", "xs"], **wrong):
            pass


# torch's own tracer makes an instance of autograd functions and warns itself about it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_other_rows_compile_nothing_anew() -> None:
    from torch._dynamo.utils import counters

    model, x = mixed(Transformer(), ["r2", "r5", "xs"]).eval(), inputs_of("text", 4)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = []
    with torch.no_grad():
        for rows in (["r2", None, "xs", "r2"], ["r5", "r5", "r5", "xs"], [None, "xs", "r2", "r5"]):
            with exapt.routed(model, rows, among=("r2", "r5", "xs")):
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
            seen.append(counters["stats"]["unique_graphs"])
    assert len(set(seen)) == 1


def test_stacks_are_kept_until_a_parameter_changes() -> None:
    model, rows = mixed(Transformer(), ["r2", "r5", "xs"]).eval(), ["r2", "r5", None, "xs"]
    x = inputs_of("text", 4)
    for a in state_of(model).adapters.values():
        a.trainable = False
    slots = next(s for _, s in slots_of(model) if s.entries)

    def check() -> Any:
        with torch.no_grad():
            with exapt.routed(model, rows):
                together = model(x)
            stack = slots.stack
            torch.testing.assert_close(together, alone(model, rows, model, x), rtol=1e-5, atol=1e-6)
        return stack

    first = check()
    assert check() is first  # also in the next block
    parameters = list(slots.of("r5")[0].holder.parameters())
    optimizer = torch.optim.AdamW([p.requires_grad_() for _, s in slots_of(model) for e in s.entries for p in e.holder.parameters()], lr=0.1)
    with exapt.routed(model, rows):
        state_of(model).adapters["r5"].trainable = True
        exapt.core.state.set_gradients(model, ["r5"])
        model(x).square().sum().backward()
    optimizer.step()
    second = check()
    assert second is not first
    state_of(model).adapters["r5"].trainable = False
    check()
    parameters[0].data = parameters[0].data + 0.5  # no version tells of it, but it lies elsewhere
    check()
    with torch.no_grad():
        parameters[1].mul_(2)
    assert check() is check()


def test_stacks_of_adapters_that_train_last_for_a_block() -> None:
    model, rows = mixed(Transformer(), ["r2", "r5"]).eval(), ["r2", "r5"]
    x = inputs_of("text", 2)
    with torch.no_grad(), exapt.routed(model, rows):
        model(x)
    for p in model.layers[0].parameters():
        p.data.mul_(1.5)  # no trace of it
    with torch.no_grad():
        with exapt.routed(model, rows):
            together = model(x)
        torch.testing.assert_close(together, alone(model, rows, model, x), rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_go_on_by_themselves() -> None:
    model, rows, x = mixed(Transformer(), ["r2", "r5", "dora"]).eval(), ["r2", "r5"], inputs_of("text", 2)
    with torch.no_grad():
        for name in ("r2", "dora", "r5"):
            exapt.activate(model, name)
        with exapt.routed(model, rows):
            expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for p in other.parameters():
                p.requires_grad_(False)
            with exapt.routed(other, rows):
                assert torch.equal(other(x), expected)
            exapt.activate(other, "dora")
            assert all(".exapt.dora" in n for n in exapt.trainable(other))
            assert exapt.trainable(other)
            assert not torch.equal(other(x), model(x))
            exapt.activate(other, "r5")
            assert torch.equal(other(x), model(x))
            exapt.detach(other, "r5")
            assert exapt.adapters(model) == ("r2", "r5", "dora")
    assert {n.split(".exapt.")[1].split(".")[0] for n in exapt.trainable(model)} == {"r5"}


def test_what_is_kept_of_frozen_tensors() -> None:
    module = exapt.attach(nn.Sequential(nn.Linear(4, 3)), exapt.DoRA(rank=2), where="all", trainable=False)[0]
    slots = module.exapt
    p, made = slots.entries[0].tensors(), []

    def norm() -> Tensor:
        def make() -> Tensor:
            made.append(1)
            return (module._parameters["weight"] + p["B"] @ p["A"]).norm(dim=1)

        return kept(Base(module, slots, (), ((), {})), make, p["A"], p["B"])

    assert norm() is norm()
    assert len(made) == 1
    with torch.no_grad():
        for t in (p["B"], p["A"], module._parameters["weight"]):
            t.add_(0.5)
            torch.testing.assert_close(norm(), (module._parameters["weight"] + p["B"] @ p["A"]).norm(dim=1))
    assert len(made) == 4
    p["A"].data = p["A"].data + 1.0
    norm()
    assert len(made) == 5
    p["A"].requires_grad_()
    assert norm().requires_grad
    norm()
    assert len(made) == 7
    assert not copy.deepcopy(slots).kept


def test_what_two_makers_keep_of_one_weight() -> None:
    module = exapt.attach(nn.Sequential(nn.Linear(4, 3)), exapt.LoRA(rank=2), where="all")[0]
    base = Base(module, module.exapt, (), ((), {}))
    rows, all_of_it = kept(base, lambda: base.weight.sum(1)), kept(base, lambda: base.weight.sum())
    assert rows.shape == (3,)
    assert all_of_it.shape == ()


def test_the_norms_of_a_base_that_changes_under_dora_while_it_trains() -> None:
    model = exapt.attach(nn.Sequential(nn.Linear(4, 3)), exapt.DoRA(rank=2), where="all").train()
    x, other = torch.randn(5, 4), nn.Linear(4, 3).state_dict()
    with torch.no_grad():
        for p in exapt.trainable(model).values():
            p.normal_()
    for change in (lambda: None, lambda: model[0].load_state_dict(other, strict=False), lambda: setattr(model[0].weight, "data", model[0].weight.data * 2)):
        change()
        y = model(x)
        exapt.merge(model)
        torch.testing.assert_close(y, model(x))
        exapt.unmerge(model)


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use() -> None:
    model, rows, x = mixed(Transformer(), ["r2", "r5"]).eval(), ["r2", "r5"], inputs_of("text", 2)
    for a in state_of(model).adapters.values():
        a.trainable = False
    with torch.inference_mode(), exapt.routed(model, rows):
        expected = model(x)
    stack = next(s.stack for _, s in slots_of(model) if s.stack is not None)
    h = model.embed(x).detach().requires_grad_()
    with exapt.routed(model, rows):
        y = model(h)
        y.sum().backward()
    assert any(s.stack is stack for _, s in slots_of(model))
    torch.testing.assert_close(y, expected.clone(), rtol=1e-5, atol=1e-6)
    assert torch.isfinite(h.grad).all()
