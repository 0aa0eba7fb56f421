"""What part a module plays, read from the model's structure and the field's habits of naming."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from torch import nn

from exapt.core.layers import CONV, CONV_TRANSPOSED, NORMS, holds_parameters, walk

_NAMES: tuple[tuple[str, str], ...] = (
    (r"(qkv|qkv_proj|c_attn|query_key_value|in_proj|in_proj_weight|Wqkv)$", "attention.qkv"),
    (r"(query|q_proj|q_lin|to_q|wq|q_proj_weight|(SelfAttention|EncDecAttention)\.q)$", "attention.query"),
    (r"(key|k_proj|k_lin|to_k|wk|k_proj_weight|(SelfAttention|EncDecAttention)\.k)$", "attention.key"),
    (r"(value|v_proj|v_lin|to_v|wv|v_proj_weight|(SelfAttention|EncDecAttention)\.v)$", "attention.value"),
    (r"(o_proj|out_proj|out_lin|wo_attn|to_out(\.0)?|(SelfAttention|EncDecAttention)\.o)$", "attention.output"),
    (r"(attention\.output\.dense|attn\.(c_proj|proj)|attention\.dense)$", "attention.output"),
    (r"(gate_proj|w1|wi_0)$", "mlp.gate"),
    (r"(up_proj|gate_up_proj|fc1|c_fc|wi|wi_1|w3|lin1|linear1|intermediate\.dense|dense_h_to_4h)$", "mlp.up"),
    (r"(down_proj|fc2|mlp\.c_proj|DenseReluDense\.wo|w2|lin2|linear2|output\.dense|dense_4h_to_h)$", "mlp.down"),
)  # fmt: skip
_HEADS = re.compile(r"(^|\.)(classifier|lm_head|head|heads|score|fc|qa_outputs|cls|output_projection|text_projection|visual_projection)(\.[\w]+)*$")
_TABLES = (
    (re.compile(r"(^|_)(pos|rel|wpe|distance)"), "embedding.position"),
    (re.compile(r"(^|_)(type|segment|lang)"), "embedding.type"),
)  # fmt: skip
"""Look-ups of something else than tokens, by their own name."""
_PATTERNS = tuple((re.compile(r"(^|\.)" + pattern), role) for pattern, role in _NAMES)


def _blocks(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Names of repeated composite modules: members of a list or sequence that share their class and hold layers."""
    held: dict[nn.Module, bool] = {}
    for name, module in modules.items():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
            continue
        kinds = {type(c) for c in module}
        composite = all(not is_leaf(c) and holds_parameters(c, held) for c in module)
        if composite and len(kinds) == 1 and not isinstance(module[0], nn.ModuleList):
            yield from (f"{name}.{i}" if name else str(i) for i in range(len(module)))


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children of its own (our slots aside)."""
    return not module._modules or not module._modules.keys() - {"exapt"}


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) or type(module).__name__.endswith("Norm")


def _inside(name: str, blocks: set[str]) -> bool:
    """Whether a module is inside one of ``blocks``; looked up by its path, so that the cost does not grow with their number."""
    while name:
        name = name.rpartition(".")[0]
        if name in blocks:
            return True
    return False


def _head(modules: dict[str, nn.Module], blocks: set[str]) -> str | None:
    """The last Linear that stands outside every block, if it is named like a head or ends a plain model."""
    outside = (n for n, m in reversed(modules.items()) if isinstance(m, nn.Linear) and "pooler" not in n and not _inside(n, blocks))
    last = next(outside, None)
    if last is None:
        return None
    return last if _HEADS.search(last) or not hasattr(modules[""], "config") else None


@functools.lru_cache(4096)
def named_role(tail: str) -> str | None:
    """The role that the last parts of a name (three are enough) say."""
    return next((role for pattern, role in _PATTERNS if pattern.search(tail)), None)


def roles(model: nn.Module) -> dict[str, str]:
    """Returns a role for each module name: ``attention.query``, ``mlp.up``, ``block``, ``norm``, ``embedding``, ``head`` ...

    >>> roles(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)))
    {'': 'model', '0': 'linear', '1': 'norm', '2': 'head'}
    """
    return roles_of(dict(walk(model)))


def roles_of(modules: dict[str, nn.Module]) -> dict[str, str]:
    """As :func:`roles`, of a model's modules by their names."""
    blocks = set(_blocks(modules))
    outer = {b for b in blocks if not _inside(b, blocks)}
    head = _head(modules, blocks)
    found: dict[str, str] = {}
    attention: set[str] = set()
    halves: dict[str, set[str]] = {}
    for name, module in modules.items():
        role = _role(name, module, outer, head)
        found[name] = role
        parent = name.rpartition(".")[0]
        if role in ("attention.query", "attention.qkv") and parent:
            attention.add(parent)
        if role in ("mlp.up", "mlp.down") and parent:
            halves.setdefault(parent, set()).add(role)
    for name in attention:
        found[name] = "attention" if found[name] in ("other", "attention") else found[name]
    for name, seen in halves.items():
        if len(seen) == 2 and found[name] == "other":
            found[name] = "mlp"
    return found


def _role(name: str, module: nn.Module, blocks: set[str], head: str | None) -> str:
    if not name:
        return "model"
    last = name.rpartition(".")[2]
    if name == head or (isinstance(module, nn.Linear) and last in ("lm_head", "classifier", "score")):
        return "head"
    if name in blocks:
        return "block"
    if _is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding):
        return next((role for pattern, role in _TABLES if pattern.search(last)), "embedding")
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if is_leaf(module) and any(p is not None for p in module._parameters.values()):
        role = named_role(".".join(name.split(".")[-3:]))
        if role is not None:
            return role
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "linear"
    if isinstance(module, (*CONV, *CONV_TRANSPOSED)):
        return "conv"
    if last in ("embeddings", "mlp"):
        return last
    return "other"
