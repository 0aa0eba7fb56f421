"""The verbs on one model: names, activation, routing, merging, penalties, steps, statistics, and methods of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from tiny import attach_example, call, inputs_of, model_of, perturb
from torch import Tensor, nn

import exapt
from exapt.core.registry import _METHODS


def test_attach_errors() -> None:
    model = model_of("text")
    keys = set(model.state_dict())
    with pytest.raises(exapt.InputError, match='did you mean "attention"'):
        exapt.attach(model, exapt.LoRA(), "atention")
    with pytest.raises(exapt.InputError, match="cannot act on any"):
        exapt.attach(model, exapt.LoRA(), "norm")
    with pytest.raises(exapt.InputError, match="adapter name"):
        exapt.attach(model, exapt.LoRA(), name="a.b")
    with pytest.raises(exapt.InputError, match="needs a method"):
        exapt.attach(model, "lora")  # type: ignore[arg-type]
    with pytest.raises(exapt.InputError, match="no adapter is attached"):
        exapt.detach(model)
    assert set(model.state_dict()) == keys
    assert type(model).__name__ == "Transformer"
    exapt.attach(model, exapt.LoRA())
    with pytest.raises(exapt.InputError, match="attached already"):
        exapt.attach(model, exapt.LoRA())
    with pytest.raises(exapt.InputError, match='did you mean "default"'):
        exapt.activate(model, "defualt")
    assert exapt.adapters(model) == ("default",)
    with pytest.raises(exapt.InputError, match="a part of this model"):
        exapt.attach(nn.ModuleList([model]), exapt.LoRA())


def test_a_failed_attach_leaves_the_first_adapter_as_it_was() -> None:
    model, x = exapt.attach(model_of("text"), exapt.LoRA(rank=2), name="a"), inputs_of("text")
    perturb(model)
    expected = call(model, x)

    @dataclass(frozen=True)
    class Breaks(exapt.WeightMethod):
        def init(self, site: exapt.Site) -> dict[str, Tensor]:
            if site.role == "mlp.down":
                raise RuntimeError("on purpose")
            return {"A": torch.zeros(1)}

        def weight(self, p: dict[str, Tensor], w: Tensor) -> Tensor:
            return w

    with pytest.raises(RuntimeError, match="on purpose"):
        exapt.attach(model, Breaks(), name="b")
    assert exapt.adapters(model) == ("a",)
    assert torch.equal(call(model, x), expected)
    assert len(exapt.trainable(model)) == 24


def test_method_errors() -> None:
    with pytest.raises(exapt.InputError, match='did you mean "lora"'):
        exapt.method("loar")
    with pytest.raises(exapt.InputError, match='did you mean "rank"'):
        exapt.method("lora", rnk=3)
    with pytest.raises(exapt.InputError, match="must be int"):
        exapt.method("lora", rank="8")
    with pytest.raises(exapt.InputError, match="one of 'standard', 'rs'"):
        exapt.method("lora", scaling="root")
    assert exapt.method("lora", alpha=4).alpha == 4.0


def test_active_adapters_and_gradients() -> None:
    model, x = model_of("text"), inputs_of("text")
    exapt.attach(model, exapt.LoRA(rank=2), name="a")
    perturb(model)
    exapt.attach(model, exapt.LoRA(rank=3), "mlp.up", name="b")
    perturb(model)
    with exapt.disabled(model):
        base = call(model, x)
        assert exapt.parameter_count(model).trainable == 0
    with exapt.using(model, "a"):
        a = call(model, x)
        assert all(".a." in n for n in exapt.trainable(model))
    exapt.activate(model, "a", "b")
    both = call(model, x)
    assert {n.split(".exapt.")[1].split(".")[0] for n in exapt.trainable(model)} == {"a", "b"}
    exapt.activate(model)
    assert torch.equal(call(model, x), base)
    assert not torch.allclose(a, base)
    assert not torch.allclose(both, a)
    exapt.activate(model, "a", "b")
    exapt.merge(model)
    assert torch.allclose(call(model, x), both, atol=1e-5)
    assert exapt.merged(model) == ("a", "b")


def test_merge_errors() -> None:
    model = model_of("text")
    with pytest.raises(exapt.InputError, match="nothing was merged"):
        exapt.unmerge(model)
    exapt.attach(model, exapt.LoRA(), name="mine")
    exapt.merge(model)
    with pytest.raises(exapt.InputError, match="mine is merged already"):
        exapt.merge(model)
    exapt.unmerge(model)
    assert exapt.adapters(model) == ("mine",)
    exapt.merge(model, undo=False)
    with pytest.raises(exapt.InputError, match="undo=False"):
        exapt.unmerge(model)


def test_merging_nan_is_refused_and_changes_nothing() -> None:
    model = exapt.attach(model_of("text"), exapt.LoRA())
    next(iter(exapt.trainable(model).values())).data.fill_(float("nan"))
    before = {k: v.clone() for k, v in model.state_dict().items() if "exapt" not in k}
    next(p for n, p in exapt.trainable(model).items() if n.endswith("B")).data.fill_(1.0)
    with pytest.raises(exapt.InputError, match="NaN"):
        exapt.merge(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_routed_gradients_and_errors() -> None:
    model, x = model_of("text"), inputs_of("text", 4)
    for name in "ab":
        exapt.attach(model, exapt.LoRA(rank=2), name=name)
        perturb(model, seed=ord(name))
    with exapt.routed(model, ["a", "b", "a", None]):
        call(model, x).square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert {n.split(".exapt.")[1][0] for n in mixed} == {"a", "b"}
    model.zero_grad()
    for name, rows in (("a", [0, 2]), ("b", [1])):
        with exapt.using(model, name):
            call(model, x[rows]).square().sum().backward()
    for n, p in model.named_parameters():
        if n in mixed:
            torch.testing.assert_close(p.grad, mixed[n], rtol=1e-4, atol=1e-5)
    with pytest.raises(exapt.InputError, match='no adapter "c"'), exapt.routed(model, ["c"]):
        pass
    with pytest.raises(exapt.InputError, match="3 names, but a batch of 4"), exapt.routed(model, ["a", "b", None]):
        call(model, x)
    assert call(model, x).shape == (4, 5)


def test_routing_different_methods_together() -> None:
    model, x = model_of("text"), inputs_of("text", 4)
    exapt.attach(model, exapt.LoRA(rank=2), name="lora")
    perturb(model)
    for key in ("ssf", "bitfit", "oft"):
        attach_example(model, exapt.method(key), "text", name=key)
        perturb(model)
    rows = ["bitfit", "lora", "oft", "ssf"]
    with torch.no_grad():
        with exapt.routed(model, rows):
            mixed = call(model, x)
        for i, name in enumerate(rows):
            with exapt.using(model, name):
                torch.testing.assert_close(mixed[i : i + 1], call(model, x[i : i + 1]), rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class RankDropping(exapt.WeightMethod):
    """A method of a user's own file: shared tensors, a penalty, and a rank that shrinks while training.

    Args:
        rank: Rank.

    References:
        None; this is a test.
    """

    key = "test_rank_dropping"
    paper = "A test"
    rank: int = 4

    def shared(self, sites: list[exapt.Site]) -> dict[str, Tensor]:
        return {"gate": torch.ones(self.rank)}

    def init(self, site: exapt.Site) -> dict[str, Tensor]:
        d_out, d_in = site.shape
        return {"A": torch.randn(self.rank, d_in), "B": torch.zeros(d_out, self.rank)}

    def weight(self, p: dict[str, Tensor], w: Tensor) -> Tensor:
        return w + (p["B"] * p["gate"]) @ p["A"]

    def penalty(self, p: dict[str, Tensor], w: Tensor) -> Tensor:
        return p["gate"].abs().sum() + 0.0 * w.sum()

    def on_step(self, tensors: Mapping[str, dict[str, Tensor]], step: int, total: int) -> None:
        for p in tensors.values():
            p["A"][self.rank - step :] = 0.0


def test_a_method_of_the_users_own_file(tmp_path: object) -> None:
    model, x = model_of("text"), inputs_of("text")
    exapt.attach(model, RankDropping(), seed=0)
    assert sum(n.endswith("gate") for n in exapt.trainable(model)) == 1
    total = exapt.penalty(model)
    assert total is not None
    assert total.item() == 4 * 12
    total.backward()
    (gate,) = [p for n, p in exapt.trainable(model).items() if n.endswith("gate")]
    assert torch.equal(gate.grad, torch.full((4,), 12.0))
    exapt.after_step(model, 3, 10)
    ranks = {int((p.abs().sum(1) > 0).sum()) for n, p in exapt.trainable(model).items() if n.endswith(".A")}
    assert ranks == {1}
    perturb(model)
    path = exapt.save(model, f"{tmp_path}/own")
    again = exapt.load(model_of("text"), path)
    assert torch.equal(call(again, x), call(model, x))
    assert exapt.method("test_rank_dropping", rank=2).rank == 2


def test_register_refuses_what_is_no_method() -> None:
    with pytest.raises(exapt.InputError, match="frozen dataclass"):

        @exapt.register
        class Loose(exapt.WeightMethod):
            pass

    with pytest.raises(exapt.InputError, match="belongs to"):

        @exapt.register
        @dataclass(frozen=True)
        class LoRA(exapt.WeightMethod):
            key = "lora"

    with pytest.raises(exapt.InputError, match="exactly one of"):

        @exapt.register
        @dataclass(frozen=True)
        class Free(exapt.Method):
            pass


@pytest.fixture(autouse=True, scope="module")
def _own_method_comes_and_goes() -> object:
    exapt.register(RankDropping)
    yield
    _METHODS.pop("test_rank_dropping", None)


def test_calibrate_collects_what_is_declared_in_one_pass() -> None:
    @dataclass(frozen=True)
    class Wants(exapt.WeightMethod):
        key = "wants"
        needs = ("input_mean", "input_covariance", "gradient", "fisher")

        def init(self, site: exapt.Site) -> dict[str, Tensor]:
            return {"A": site.statistics["input_mean"].clone()}

        def weight(self, p: dict[str, Tensor], w: Tensor) -> Tensor:
            return w

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).train()
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    calls = 0

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(m(batch[0]), batch[1])

    flags = [p.requires_grad for p in model.parameters()]
    got = exapt.calibrate(model, [(x[:4], y[:4]), (x[4:], y[4:])], Wants(), "all", loss)
    assert calls == 8
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(got["0"]["input_mean"], x.mean(0))
    torch.testing.assert_close(got["0"]["input_covariance"], x.T @ x / 8)
    assert "output_mean" not in got["0"]
    fisher = torch.zeros(4, 3)
    mean = torch.zeros(4, 3)
    for i in range(8):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        fisher += model[0].weight.grad ** 2 / 8
        mean += model[0].weight.grad / 8
    torch.testing.assert_close(got["0"]["fisher"], fisher)
    torch.testing.assert_close(got["0"]["gradient"], mean)
    with pytest.raises(exapt.InputError, match="needs the statistics"):
        exapt.attach(model, Wants(), "all")
    exapt.attach(model, Wants(), "all", statistics=got)


def test_names_that_begin_alike_do_not_meet() -> None:
    model, x = model_of("text"), inputs_of("text")
    exapt.attach(model, exapt.method("vera"), name="a")
    exapt.attach(model, exapt.method("vera"), name="a_shared_b")
    perturb(model)
    expected, kept = call(model, x), {k for k in model.state_dict() if "a_shared_b" in k}
    exapt.detach(model, "a")
    assert {k for k in model.state_dict() if "a_shared_b" in k} == kept
    assert torch.equal(call(model, x), expected)


def test_unmerge_after_another_adapter_was_detached() -> None:
    model, x = model_of("text"), inputs_of("text")
    exapt.attach(model, exapt.LoRA(rank=2), name="a")
    perturb(model)
    alone = call(model, x)
    exapt.attach(model, exapt.LoRA(rank=2), name="b")
    exapt.activate(model, "a", "b")
    exapt.merge(model, "a")
    exapt.detach(model, "b")
    exapt.unmerge(model)
    assert exapt.adapters(model) == ("a",)
    assert torch.equal(call(model, x), alone)
