"""Every registered method against every invariant of the house plan. Exceptions are declared on the method, with a reason."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from typing import Any

import pytest
import torch
from tiny import CLASSES, attach_example, call, example, inputs_of, kind_for, model_of, perturb
from torch import nn

import exapt
from exapt.core.contract import Method, SubsetMethod, WeightMethod, as_dict
from exapt.core.registry import from_dict
from exapt.core.roles import roles
from exapt.core.slots import slots_of

METHODS = list(exapt.methods().values())
pytestmark = pytest.mark.parametrize("cls", METHODS, ids=[m.key for m in METHODS])


def declared(cls: type[Method], invariant: str) -> bool:
    """Whether the method declares that the invariant does not hold; the test then shows that it does not."""
    return invariant in cls.exceptions


def prepared(cls: type[Method], **options: Any) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    kind = kind_for(cls())
    model, x = model_of(kind), inputs_of(kind)
    with torch.no_grad():
        before = call(model, x)
    attach_example(model, example(cls), kind, **options)
    return model, x, before


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_described(cls: type[Method]) -> None:
    method = cls()
    doc = inspect.getdoc(cls) or ""
    assert cls.paper, "the paper's title"
    assert "References:" in doc
    if inspect.signature(cls).parameters:
        assert "Args:" in doc
    for field in inspect.signature(cls).parameters:
        assert f"{field}:" in doc, f"{field} is not documented"
    assert from_dict(json.loads(json.dumps(as_dict(method)))) == method
    for invariant, reason in cls.exceptions.items():
        assert invariant in {"identity", "gradient", "compile", "routing", "quantised", "fsdp", "precision", "rows"}
        assert len(reason) > 15


def test_identity_at_start(cls: type[Method]) -> None:
    model, x, before = prepared(cls)
    with torch.no_grad():
        same_output = torch.allclose(call(model, x), before, atol=2e-6)
    assert same_output != declared(cls, "identity")


def test_only_the_adapter_trains_and_all_of_it(cls: type[Method]) -> None:
    kind = kind_for(cls())
    model, x = model_of(kind), inputs_of(kind)
    base = list(model.parameters())
    attach_example(model, example(cls), kind)
    perturb(model)
    if not exapt.trainable(model):
        assert declared(cls, "gradient"), "nothing to train and no reason given"
        return
    call(model, x).square().sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in base)
    got = {n: p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in exapt.trainable(model).items()}
    if declared(cls, "gradient"):
        assert not all(got.values()) or not got
    else:
        assert got
        assert all(got.values()), [n for n, ok in got.items() if not ok]


def _by_definition(model: nn.Module) -> None:
    from exapt.core.slots import refresh

    for module, slots in list(slots_of(model)):
        for e in slots.entries:
            e.definition = e.definition or bool(e.names())
        slots.chains.clear()
        refresh(module, slots)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_fast_path_equals_the_definition(cls: type[Method], kind: str) -> None:
    if not issubclass(cls, (WeightMethod, SubsetMethod)) or not cls.has_fast_path():
        pytest.skip("has no fast path: it always runs by its definition")
    where = None if kind == "text" else (lambda s: s.layer is not None and s.layer.kind.startswith("conv") and s.layer.groups == 1)
    results = []
    for by_definition in (False, True):
        model, x = model_of(kind).double(), inputs_of(kind)
        x = x.double() if kind == "image" else model.embed(x).detach()
        x.requires_grad_(True)
        try:
            attach_example(model, example(cls), kind, where, seed=0)
        except exapt.InputError as e:
            pytest.skip(f"refuses these layers: {e}")
        perturb(model)
        if by_definition:
            _by_definition(model)
        y = call(model, x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in exapt.trainable(model).values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_merge_keeps_outputs_and_unmerge_is_exact(cls: type[Method]) -> None:
    kind = kind_for(cls())
    model = model_of(kind)
    base, classes = snapshot(model), [type(m) for m in model.modules()]
    x = inputs_of(kind)
    attach_example(model, example(cls), kind)
    perturb(model)
    with torch.no_grad():
        expected = call(model, x)
    if not cls.mergeable:
        with pytest.raises(exapt.InputError, match="no merged form"):
            exapt.merge(model)
        assert torch.equal(call(model, x), expected)
        return
    exapt.merge(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.state_dict().keys() == base.keys()
    with torch.no_grad():
        torch.testing.assert_close(call(model, x), expected, rtol=1e-4, atol=1e-5)
    exapt.unmerge(model)
    with torch.no_grad():
        assert torch.equal(call(model, x), expected)
    exapt.detach(model)
    assert same(snapshot(model), base)


def test_detach_is_exact(cls: type[Method]) -> None:
    kind = kind_for(cls())
    model = model_of(kind)
    next(model.parameters()).requires_grad_(False)
    base, classes = snapshot(model), [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    attach_example(model, example(cls), kind)
    assert all(isinstance(m, c) for m, c in zip([m for m in model.modules() if _ours(m)], classes, strict=True))
    assert base.keys() <= model.state_dict().keys()
    perturb(model)
    call(model, inputs_of(kind))
    exapt.detach(model)
    assert same(snapshot(model), base)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes


def _ours(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("exapt.")


def test_save_then_load_is_exact(cls: type[Method], tmp_path: Any) -> None:
    model, x, _ = prepared(cls)
    perturb(model)
    path = exapt.save(model, tmp_path / "adapter", metrics={"accuracy": 0.5})
    again, frozen = exapt.load(model_of(kind_for(cls())), path, trainable=True), exapt.load(model_of(kind_for(cls())), path)
    with torch.no_grad():
        expected = call(model, x)
        assert torch.equal(call(again, x), expected)
        # torch.matmul folds a batch by whether its arguments ask for gradients, which on some processors changes the last bit
        torch.testing.assert_close(call(frozen, x), expected, rtol=1e-5, atol=1e-6)
    assert not exapt.trainable(frozen)
    assert exapt.save(frozen, tmp_path / "twice").read_bytes() == path.read_bytes()


def test_mixed_batch_equals_a_loop(cls: type[Method]) -> None:
    model, x, _ = prepared(cls, name="a")
    perturb(model)
    kind = kind_for(cls())
    with exapt.disabled(model):
        attach_example(model, example(cls), kind, name="b")
    perturb(model, seed=3)
    rows = ["a", None, "b"]
    with torch.no_grad():
        with exapt.routed(model, rows):
            mixed = call(model, x)
        alone = []
        for i, name in enumerate(rows):
            with exapt.using(model, *([name] if name else [])):
                alone.append(call(model, x[i : i + 1]))
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_two_adapters_act_in_order(cls: type[Method]) -> None:
    model, x, _ = prepared(cls, name="a")
    perturb(model)
    with torch.no_grad():
        a = call(model, x)
        exapt.attach(model, exapt.LoRA(rank=2), "head" if kind_for(cls()) == "image" else "attention.query", name="b")
        perturb(model)
        exapt.activate(model, "a", "b")
        both = call(model, x)
        exapt.activate(model, "a")
        assert torch.equal(call(model, x), a)
        exapt.detach(model, "b")
        assert torch.equal(call(model, x), a)
    assert torch.isfinite(both).all()


# torch's own tracer makes an instance of autograd functions and warns itself about it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph(cls: type[Method]) -> None:
    if declared(cls, "compile"):
        pytest.skip(cls.exceptions["compile"])
    model, x, _ = prepared(cls)
    perturb(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    y = compiled(x)
    torch.testing.assert_close(y if isinstance(y, torch.Tensor) else y.logits, call(model, x), rtol=1e-5, atol=1e-6)


def test_copies_and_pickles(cls: type[Method]) -> None:
    model, x, _ = prepared(cls)
    perturb(model)
    with torch.no_grad():
        expected = call(model, x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(call(twin, x), expected)
            perturb(twin)
            exapt.detach(twin)
        assert torch.equal(call(model, x), expected)


def test_bf16_base_with_fp32_parameters(cls: type[Method]) -> None:
    kind = kind_for(cls())
    model, x = model_of(kind).bfloat16(), inputs_of(kind)
    x = x.bfloat16() if x.is_floating_point() else x
    attach_example(model, example(cls), kind, seed=0)
    perturb(model, 0.02)
    y = call(model, x)
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
    parameters = exapt.trainable(model)
    assert all(p.dtype == torch.float32 for p in parameters.values())
    if parameters:
        y.float().square().sum().backward()
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        assert len(grads) == len(parameters) or declared(cls, "gradient")
        assert all(torch.isfinite(g).all() for g in grads)
    wide = model_of(kind)
    attach_example(wide, example(cls), kind, seed=0)
    perturb(wide, 0.02)
    if not declared(cls, "precision"):
        torch.testing.assert_close(y.float(), call(wide, x.float() if x.is_floating_point() else x), rtol=0.1, atol=0.1)


def test_train_and_eval_mean_the_same(cls: type[Method]) -> None:
    model, x, _ = prepared(cls)
    perturb(model)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    with torch.no_grad():
        quiet = call(model.eval(), x)
        model.train()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()  # torch's own batch norms do change
        assert torch.equal(call(model, x), quiet)


def test_recomputed_activations_give_the_same_gradients(cls: type[Method]) -> None:
    """Activation checkpointing: blocks run again in backward, even after another call."""
    model, x, _ = prepared(cls)
    perturb(model)
    parameters = exapt.trainable(model)
    if not parameters:
        pytest.skip("nothing to train")
    if "block" not in roles(model).values():
        pytest.skip("a model without blocks")
    other = x.flip(0, 1)
    found = []
    for wanted in (False, True):
        model.train()
        torch.manual_seed(3)
        with exapt.recomputed(model, wanted):
            y = call(model, x)
            with torch.no_grad():
                call(model, other)
            grads = torch.autograd.grad(y.square().sum(), list(parameters.values()), allow_unused=True)
        found.append(dict(zip(parameters, grads, strict=True)))
    for n, g in found[0].items():
        assert (g is None) == (found[1][n] is None)
        if g is not None:
            torch.testing.assert_close(found[1][n], g, rtol=1e-4, atol=1e-6, msg=n)


def test_quantised_base(cls: type[Method]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if declared(cls, "quantised"):
        pytest.skip(cls.exceptions["quantised"])
    kind = kind_for(cls())
    model, x = model_of(kind), inputs_of(kind)
    quantize_(model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and "head" not in name and "classifier" not in name)
    with torch.no_grad():
        before = call(model, x)
    attach_example(model, example(cls), kind)
    with torch.no_grad():
        if not declared(cls, "identity"):
            torch.testing.assert_close(call(model, x), before, rtol=1e-4, atol=1e-4)
    perturb(model)
    y = call(model, x)
    if exapt.trainable(model):
        y.square().sum().backward()
        assert all(p.grad is not None for p in exapt.trainable(model).values()) or declared(cls, "gradient")
    assert y.shape == (3, CLASSES)
    exapt.detach(model)
    with torch.no_grad():
        assert torch.equal(call(model, x), before)
