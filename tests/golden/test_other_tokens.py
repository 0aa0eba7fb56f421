"""Prompt tuning and prefix-tuning against PEFT, and prefixes on nn.MultiheadAttention against attention written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import inputs_of, model_of, tiny_bert, tiny_llama
from torch import Tensor, nn

import exapt
from exapt import PrefixTuning, PromptTuning
from exapt.core.slots import slots_of

# PEFT 0.21 asks transformers 5 by a name that it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
N = 4  # prompt tokens


def padded() -> tuple[Tensor, Tensor]:
    """Token ids and an attention mask that leaves out the end of one row."""
    ids = inputs_of("bert")
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return ids, mask


def peft_model(model: nn.Module, config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, config).eval()


def draw(*shape: int, seed: int = 5) -> Tensor:
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=40, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_prompt_tuning_equals_peft(kind: str) -> None:
    from peft import PromptTuningConfig

    base = tiny_t5() if kind == "t5" else model_of(kind)
    theirs = peft_model(copy.deepcopy(base), PromptTuningConfig(task_type=TASKS[kind], num_virtual_tokens=N, num_transformer_submodules=1))
    prompt = theirs.prompt_encoder["default"].embedding.weight
    prompt.data.copy_(draw(*prompt.shape))
    ours = exapt.attach(base, PromptTuning(length=N))
    (own,) = exapt.trainable(ours).values()
    own.data.copy_(prompt.data)
    ids, mask = padded()
    labels = torch.arange(3) if kind == "bert" else ids
    a, b = ours(input_ids=ids, attention_mask=mask, labels=labels), theirs(input_ids=ids, attention_mask=mask, labels=labels)
    assert_same(a.logits, b.logits[:, N:] if kind == "llama" else b.logits)
    assert_same(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    assert own.grad.abs().max() > 1e-4
    assert_same(own.grad, prompt.grad)


def test_prompts_leave_positions_and_labels_as_they_were_given() -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=40)
    model = exapt.attach(BertForQuestionAnswering(config).eval(), PromptTuning(length=N), seed=0)
    ids, mask = padded()
    places = torch.tensor([0, 1, 5])
    out = model(input_ids=ids, attention_mask=mask, start_positions=places, end_positions=places)
    assert out.start_logits.shape == ids.shape
    prompt = next(iter(exapt.trainable(model).values()))
    longer = torch.cat([prompt.expand(3, -1, -1), model.get_input_embeddings()(ids)], 1)
    with exapt.disabled(model):
        whole = model(inputs_embeds=longer, attention_mask=F.pad(mask, (N, 0), value=1), start_positions=places + N, end_positions=places + N)
    assert_same(out.start_logits, whole.start_logits[:, N:])
    assert_same(out.loss, whole.loss)


def test_labels_of_several_classes_are_not_tokens() -> None:
    model = tiny_bert(labels=6)
    model.config.problem_type = "multi_label_classification"
    exapt.attach(model, PromptTuning(length=N), seed=0)
    ids, mask = padded()  # six tokens, six classes
    labels = torch.ones(3, 6)
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert_same(out.loss, F.binary_cross_entropy_with_logits(out.logits, labels))


def split(prefix: Tensor, layers: int, heads: int) -> list[tuple[Tensor, Tensor]]:
    """PEFT's (n, 2 x layers x d) as keys and values of each layer, (n, heads, d_head)."""
    parts = prefix.view(N, 2 * layers, heads, -1)
    return [(parts[:, 2 * i], parts[:, 2 * i + 1]) for i in range(layers)]


def prefixes(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    found = exapt.trainable(model)
    return [(found[name], found[name[:-1] + "v"]) for name in found if name.endswith(".k")]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_prefix_tuning_equals_peft(kind: str, attention: str) -> None:
    from peft import PrefixTuningConfig

    theirs = peft_model(model_of(kind), PrefixTuningConfig(task_type=TASKS[kind], num_virtual_tokens=N))
    theirs.base_model.set_attn_implementation(attention)
    base = model_of(kind)
    base.set_attn_implementation(attention)
    prefix = theirs.prompt_encoder["default"].embedding.weight
    prefix.data.copy_(draw(*prefix.shape))
    ours = exapt.attach(base, PrefixTuning(length=N))
    heads = 2 if kind == "llama" else 4
    for (k, v), (own_k, own_v) in zip(split(prefix.data, 2, heads), prefixes(ours), strict=True):
        own_k.data.copy_(k)
        own_v.data.copy_(v)
    ids, mask = padded()
    labels = ids if kind == "llama" else torch.arange(3)
    positions = torch.arange(N, N + ids.shape[1]).expand_as(ids)  # PEFT lets the tokens' positions begin after the prefix
    a, b = ours(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels), theirs(input_ids=ids, attention_mask=mask, labels=labels)
    assert_same(a.logits, b.logits)
    a.loss.backward()
    b.loss.backward()
    for (k, v), (own_k, own_v) in zip(split(prefix.grad, 2, heads), prefixes(ours), strict=True):
        assert own_k.grad.abs().max() > 1e-5
        assert_same(own_k.grad, k)
        assert_same(own_v.grad, v)


def test_reparameterised_prefix_equals_pefts() -> None:
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=7)
    theirs = peft_model(tiny_llama(num_key_value_heads=4), config).prompt_encoder["default"]
    ours = exapt.attach(tiny_llama(num_key_value_heads=4), PrefixTuning(length=N, projection=7))
    found = exapt.trainable(ours)
    first, last = theirs.transform[0], theirs.transform[2]
    with torch.no_grad():
        for name, value in (("E", theirs.embedding.weight), ("W1", first.weight), ("b1", first.bias)):
            next(p for n, p in found.items() if n.endswith(f"_shared_0.{name}")).copy_(value)
        for i in range(2):
            for name, value in (("W2", last.weight), ("b2", last.bias)):
                next(p for n, p in found.items() if f"layers.{i}." in n and n.endswith(name)).copy_(value.chunk(2)[i])
    made = theirs(torch.arange(N)[None])[0]
    entries = [e for _, slots in slots_of(ours) for e in slots.entries]
    empty = torch.zeros(1, 4, 0, 8)
    for (k, v), e in zip(split(made, 2, 4), entries, strict=True):
        own_k, own_v = e.method.extend(e.tensors(), empty, empty)
        assert_same(own_k[0], k.transpose(0, 1))
        assert_same(own_v[0], v.transpose(0, 1))


def attend(m: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], allowed: Tensor) -> Tensor:
    """Multi-head attention with a prefix, row by row and head by head; ``allowed`` (batch, queries, keys)."""
    wq, wk, wv = m.in_proj_weight.chunk(3) if m.in_proj_weight is not None else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    bq, bk, bv = m.in_proj_bias.chunk(3)
    size, rows = m.head_dim, []
    for b in range(q.shape[0]):
        heads = []
        for h in range(m.num_heads):
            own = slice(h * size, (h + 1) * size)
            keys = torch.cat([prefix[0][:, h], (k[b] @ wk.T + bk)[:, own]])
            values = torch.cat([prefix[1][:, h], (v[b] @ wv.T + bv)[:, own]])
            scores = (q[b] @ wq.T + bq)[:, own] @ keys.T / size**0.5
            seen = torch.cat([torch.ones(q.shape[1], len(prefix[0]), dtype=torch.bool), allowed[b]], 1)
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values)
        rows.append(torch.cat(heads, -1) @ m.out_proj.weight.T + m.out_proj.bias)
    return torch.stack(rows)


class Cross(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attention(*args, **kwargs)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"batch_first": True, "kdim": 6, "vdim": 5}])
@pytest.mark.parametrize("bool_mask", [True, False])
def test_prefix_on_multihead_attention(options: dict[str, Any], bool_mask: bool) -> None:
    torch.manual_seed(0)
    model = exapt.attach(Cross(**options), PrefixTuning(length=3, std=1.0), where="attention").double()
    m: Any = model.attention
    m.in_proj_bias.data.normal_()
    ((k, v),) = prefixes(model)
    q_in, k_in, v_in = torch.randn(2, 4, 8).double(), torch.randn(2, 5, m.kdim).double(), torch.randn(2, 5, m.vdim).double()
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    causal = torch.ones(4, 5, dtype=torch.bool).tril(1)
    expected = attend(m, q_in, k_in, v_in, (k, v), causal & ~padding[:, None])
    forbid = ~causal if bool_mask else torch.zeros(4, 5).double().masked_fill(~causal, -torch.inf)
    streams = [q_in, k_in, v_in] if options.get("batch_first") else [t.transpose(0, 1) for t in (q_in, k_in, v_in)]
    left_out = padding if bool_mask else torch.zeros(2, 5).double().masked_fill(padding, -torch.inf)
    out, weights = model(*streams, key_padding_mask=left_out, attn_mask=forbid)
    out = out if options.get("batch_first") else out.transpose(0, 1)
    torch.testing.assert_close(out, expected)
    assert weights.shape == (2, 4, 3 + 5)
    mine = torch.autograd.grad(out.square().sum(), [k, v], retain_graph=True)
    theirs = torch.autograd.grad(expected.square().sum(), [k, v])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_prefix_acts_inside_torch_encoder_layers(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 4, [False, False, False, True]])
    exapt.attach(encoder, PrefixTuning(length=3, std=1.0))
    out = encoder(x, src_key_padding_mask=padding)
    h = x
    for block, prefix in zip(encoder.layers, prefixes(encoder), strict=True):
        h = block.norm1(h + attend(block.self_attn, h, h, h, prefix, ~padding[:, None].expand(-1, 4, -1)))
        h = block.norm2(h + F.linear(F.relu(F.linear(h, block.linear1.weight, block.linear1.bias)), block.linear2.weight, block.linear2.bias))
    torch.testing.assert_close(out, h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [PromptTuning(length=N), PrefixTuning(length=N, std=1.0), PrefixTuning(length=N, projection=8)])
def test_generation_is_the_same_with_and_without_a_cache(method: Any, attention: str) -> None:
    model = model_of("llama")
    model.set_attn_implementation(attention)
    plain = copy.deepcopy(model)
    exapt.attach(model, method, seed=0)
    for p in exapt.trainable(model).values():
        p.data.mul_(3)
    ids, mask = padded()
    mask = mask.flip(1)  # generation pads on the left
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert not torch.equal(cached, plain.generate(ids, use_cache=True, **options))
    step = ids.clone()
    for _ in range(8):  # and the same as asking the model token by token
        grown = F.pad(mask, (0, step.shape[1] - ids.shape[1]), value=1)
        positions = (grown.cumsum(1) - 1).clamp(min=0)
        step = torch.cat([step, model(step, attention_mask=grown, position_ids=positions).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, step)


def test_prompts_start_from_the_vocabulary_or_at_random() -> None:
    model = exapt.attach(tiny_bert(), PromptTuning(length=50), seed=0)
    (prompt,) = exapt.trainable(model).values()
    words = model.get_input_embeddings().weight
    assert (prompt[:, None] == words[None]).all(-1).any(1).all()
    model = exapt.attach(tiny_llama(), PromptTuning(length=500, init_from="random"), seed=0)
    (prompt,) = exapt.trainable(model).values()
    assert -0.5 <= float(prompt.data.min()) < -0.49
    assert 0.49 < float(prompt.data.max()) <= 0.5


def test_prompts_refuse_what_has_no_tokens() -> None:
    with pytest.raises(exapt.InputError, match="a transformers model of text"):
        exapt.attach(nn.Sequential(nn.Linear(2, 2)), PromptTuning())
    model = exapt.attach(tiny_t5(), PromptTuning(length=N))
    with pytest.raises(exapt.InputError, match="without the prompt"):
        model.generate(inputs_of("bert"), max_new_tokens=2)
