"""Methods that read more of the call when there are several tasks: the invariants of the suite, which runs them with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import WIDTH, inputs_of, model_of, perturb
from torch import Tensor, nn

import exapt
from exapt.core.contract import Method
from exapt.methods.hyperformer import HyperFormer
from exapt.methods.hyperllava import HyperLLaVA
from exapt.methods.partial_lora import PartialLoRA
from exapt.methods.pha import PHA
from exapt.methods.polyhistor import Polyhistor
from exapt.methods.ssf_pool import SSFPool
from exapt.methods.upcycled import Upcycled

IDS = {"task_ids": torch.tensor([1, 0, 1])}
CASES: dict[str, tuple[Method, dict[str, Tensor]]] = {
    "hyperformer": (HyperFormer(n_tasks=2), IDS),
    "hyperformer_position": (HyperFormer(n_tasks=2, share="position"), IDS),
    "hyperformer_none": (HyperFormer(n_tasks=2, share="none"), IDS),
    "polyhistor": (Polyhistor(n_tasks=2), IDS),
    "polyhistor_own": (Polyhistor(n_tasks=2, lite=False), IDS),
    "pha": (PHA(n_tasks=2), IDS),
    "upcycled": (Upcycled(experts=2), IDS),
    "ssf_pool": (SSFPool(pool=6, width=WIDTH), {"queries": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))}),
    "partial_lora": (PartialLoRA(), {"token_type_ids": torch.tensor([[0, 1, 1, 0, 0, 1]]).repeat(3, 1)}),
    "hyperllava": (HyperLLaVA(guide="first", tokens=2), {}),
}


def prepared(case: str) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    method, given = CASES[case]
    model = model_of("text")
    x = inputs_of("text")
    with torch.no_grad():
        before = model(x)
        exapt.attach(model, method, "block" if case == "hyperllava" else None, seed=0)
        torch.testing.assert_close(model(x, **given), before, rtol=1e-5, atol=1e-5)
    perturb(model)
    return model, x, given


@pytest.mark.parametrize("case", CASES)
def test_gradients_files_rows_and_graphs(case: str, tmp_path: Path) -> None:
    model, x, given = prepared(case)
    y = model(x, **given)
    loss, extra = y.square().sum(), exapt.penalty(model)
    (loss if extra is None else loss + extra).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in exapt.trainable(model).values())
    y = y.detach()
    with torch.no_grad():
        again = exapt.load(model_of("text"), exapt.save(model, tmp_path / "adapter"))
        assert torch.equal(again(x, **given), model(x, **given))
        for i in range(len(x)):  # a row alone is what it is in a batch
            alone = model(x[i : i + 1], **{k: v[i : i + 1] for k, v in given.items()})
            torch.testing.assert_close(alone, y[i : i + 1], rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, **given), model(x, **given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_and_detach(case: str) -> None:
    method, given = CASES[case]
    model = model_of("text").bfloat16()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    exapt.attach(model, method, "block" if case == "hyperllava" else None, seed=0)
    perturb(model, 0.02)
    y = model(inputs_of("text"), **given)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in exapt.trainable(model).values() if p.grad is not None)
    exapt.detach(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
