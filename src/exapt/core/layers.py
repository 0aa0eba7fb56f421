"""Each kind of layer, described once: its matrix, its operation with another matrix, its feature axis.

A layer's matrix is (output features, inputs per output). ``apply`` runs the layer's operation with a matrix of ``m`` rows
in place of ``W`` and no bias; ``out`` multiplies the feature axis of what ``apply`` gave. Both exist where one matrix
product can serve every output (``low_rank``): grouped convolutions would need ``groups`` times the rank, so core runs
them by the definition.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMS = (nn.LayerNorm, nn.GroupNorm, BATCH_NORM, nn.modules.instancenorm._InstanceNorm)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class Layer:
    """A matrix stored as it is, read by its module as a parameter: acted on by definition only.

    Attributes:
        parameter: The attribute that holds the weight.
        bias: The attribute that holds the bias, if the kind has one.
        shape: (d_out, d_in) of the matrix.
        stored: Shape of the stored parameter.
    """

    kind: ClassVar[str] = "matrix"
    fast: ClassVar[bool] = False
    parameter: str
    bias: str | None
    shape: tuple[int, int]
    stored: tuple[int, ...]

    @property
    def axis(self) -> int:
        """Position of the features in outputs and inputs: -1, or -2, -3, -4 for convolutions."""
        return -1

    @property
    def groups(self) -> int:
        """Groups of a convolution."""
        return 1

    @property
    def operates(self) -> bool:
        """Whether ``apply`` exists, so that methods can act without forming their weight."""
        return self.fast and self.groups == 1

    @property
    def stacked(self) -> int | None:
        """Number of stacked expert weights; the matrix is then (experts, d_out, d_in)."""
        return None

    def to_matrix(self, w: Tensor) -> Tensor:
        """Stored weight to matrix; a view where possible."""
        return w.flatten(1)

    def from_matrix(self, w: Tensor) -> Tensor:
        """Matrix to the stored layout."""
        return w.reshape(self.stored)

    def apply(self, module: Any, x: Tensor, matrix: Tensor, *rest: Any, **named: Any) -> Tensor:
        """The layer's operation with a matrix of any number of rows and no bias."""
        raise NotImplementedError(self.kind)

    def out(self, matrix: Tensor, h: Tensor) -> Tensor:
        """Multiplies the feature axis of ``h`` by ``matrix`` (d_out, m)."""
        if self.axis == -1:
            return F.linear(h, matrix)
        return F.linear(h.movedim(self.axis, -1), matrix).movedim(-1, self.axis)

    def plus(self, y: Tensor, matrix: Tensor, h: Tensor, scale: float) -> Tensor:
        """``y + scale * out(matrix, h)``."""
        return y + scale * self.out(matrix, h)

    def scale(self, v: Tensor, h: Tensor) -> Tensor:
        """Multiplies the feature axis of ``h`` by the vector ``v``."""
        return h * v.reshape(v.shape + (1,) * (-1 - self.axis))


class Linear(Layer):
    """nn.Linear and quantised layers that keep its interface."""

    kind = "linear"
    fast = True

    def to_matrix(self, w: Tensor) -> Tensor:
        return w

    def from_matrix(self, w: Tensor) -> Tensor:
        return w

    def apply(self, module: Any, x: Tensor, matrix: Tensor, *rest: Any, **named: Any) -> Tensor:
        return F.linear(x, matrix)

    def plus(self, y: Tensor, matrix: Tensor, h: Tensor, scale: float) -> Tensor:
        if not (y.is_contiguous() and _keeps_type(y)):
            return super().plus(y, matrix, h, scale)
        return torch.addmm(y.view(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), matrix.T, alpha=scale).view(y.shape)


class TransposedLinear(Linear):
    """The transformers library's Conv1D: a linear layer that stores (in, out)."""

    kind = "conv1d_hf"

    def to_matrix(self, w: Tensor) -> Tensor:
        return w.T

    def from_matrix(self, w: Tensor) -> Tensor:
        return w.T


class Embedding(TransposedLinear):
    """A look-up: the matrix is (dimensions, vocabulary)."""

    kind = "embedding"

    def apply(self, module: Any, x: Tensor, matrix: Tensor, *rest: Any, **named: Any) -> Tensor:
        return F.embedding(x, matrix.T, module.padding_idx, None, 2.0, module.scale_grad_by_freq)


class OwnEmbedding(Embedding):
    """A look-up with more to it than the table (Gemma scales it): acted on by definition, through the table."""

    fast = False


@dataclass(frozen=True)
class Conv(Layer):
    """Convolution with any stride, padding, padding mode, dilation, kernel and groups."""

    kind: ClassVar[str] = "conv"
    fast: ClassVar[bool] = True
    n_groups: int = 1

    @property
    def axis(self) -> int:
        return 1 - len(self.stored)

    @property
    def groups(self) -> int:
        return self.n_groups

    def apply(self, module: Any, x: Tensor, matrix: Tensor, *rest: Any, **named: Any) -> Tensor:
        return module._conv_forward(x, matrix.reshape(-1, *self.stored[1:]), None)

    def out(self, matrix: Tensor, h: Tensor) -> Tensor:
        if not h.is_contiguous():  # channels last: the product over the last axis is the quick one
            return super().out(matrix, h)
        return torch.matmul(matrix, h.flatten(self.axis + 1)).view(*h.shape[: self.axis], len(matrix), *h.shape[self.axis + 1 :])

    def plus(self, y: Tensor, matrix: Tensor, h: Tensor, scale: float) -> Tensor:
        if h.dim() != 1 - self.axis or not (h.is_contiguous() and y.is_contiguous() and _keeps_type(y)):
            return super().plus(y, matrix, h, scale)
        return torch.baddbmm(y.flatten(2), matrix.expand(len(h), -1, -1), h.flatten(2), alpha=scale).view(y.shape)


class ConvTransposed(Conv):
    """Transposed convolution; stored (in, out / groups, kernel), matrix (out, in / groups x kernel)."""

    kind = "conv_transposed"

    def to_matrix(self, w: Tensor) -> Tensor:
        g, (i, o, *kernel) = self.n_groups, self.stored
        return w.reshape(g, i // g, o, *kernel).transpose(1, 2).reshape(g * o, -1)

    def from_matrix(self, w: Tensor) -> Tensor:
        g, (i, o, *kernel) = self.n_groups, self.stored
        return w.reshape(g, o, i // g, *kernel).transpose(1, 2).reshape(self.stored)

    def apply(self, module: Any, x: Tensor, matrix: Tensor, *rest: Any, **named: Any) -> Tensor:
        rows = matrix.reshape(-1, self.stored[0], *self.stored[2:]).transpose(0, 1)
        d = len(self.stored) - 2
        size = rest[0] if rest else named.get("output_size")
        padding = module._output_padding(x, size, module.stride, module.padding, module.kernel_size, d, module.dilation)
        return _TRANSPOSED[d - 1](x, rows, None, module.stride, module.padding, padding, 1, module.dilation)


@dataclass(frozen=True)
class Stacked(Layer):
    """Expert weights in one 3-D parameter, (experts, out, in) or, ``turned``, (experts, in, out)."""

    kind: ClassVar[str] = "experts"
    turned: bool = False

    @property
    def stacked(self) -> int | None:
        return self.stored[0]

    def to_matrix(self, w: Tensor) -> Tensor:
        return w.transpose(-1, -2) if self.turned else w

    def from_matrix(self, w: Tensor) -> Tensor:
        return w.transpose(-1, -2) if self.turned else w


def _keeps_type(y: Tensor) -> bool:
    """Whether a product added to ``y`` is of its type, which under autocast it need not be."""
    kind = y.device.type
    return not torch.is_autocast_enabled(kind) or y.dtype == torch.get_autocast_dtype(kind)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields what ``named_modules`` does without the adapters, so that no walk grows with their number."""
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if module._modules:
            prefix = f"{name}." if name else ""
            waiting += [(prefix + key, m) for key, m in reversed(module._modules.items()) if m is not None and key != "exapt"]


def holds_parameters(module: nn.Module, known: dict[nn.Module, bool]) -> bool:
    """Whether a module or one inside it holds a parameter, adapters aside; each is looked into once and noted in ``known``."""
    if module not in known:
        own = any(p is not None for p in module._parameters.values())
        known[module] = own or any(m is not None and k != "exapt" and holds_parameters(m, known) for k, m in module._modules.items())
    return known[module]


def _parameter(m: nn.Module, name: str) -> Tensor:
    stored = m._parameters[name]
    assert stored is not None
    return stored


def _plain(m: nn.Module, name: str, bias: str | None) -> Layer:
    stored = tuple(_parameter(m, name).shape)
    return Layer(name, bias, (stored[0], math.prod(stored[1:])), stored)


def _stacked(m: nn.Module, name: str) -> Layer:
    _, a, b = stored = tuple(_parameter(m, name).shape)
    turned = bool(getattr(m, "is_transposed", False))
    bias = f"{name}_bias" if f"{name}_bias" in m._parameters else None
    return Stacked(name, bias, (b, a) if turned else (a, b), stored, turned)


def _conv(m: Any) -> Layer:
    stored, transposed = tuple(m.weight.shape), isinstance(m, CONV_TRANSPOSED)
    shape = (m.out_channels, m.in_channels // m.groups * math.prod(stored[2:]))
    return (ConvTransposed if transposed else Conv)("weight", "bias", shape, stored, m.groups)


def layers_of(module: nn.Module) -> list[Layer]:
    """Returns a description of every weight matrix that ``module`` itself holds (not its children).

    >>> [(layer.kind, layer.shape) for layer in layers_of(nn.Conv2d(4, 6, 3, groups=2))]
    [('conv', (6, 18))]
    """
    if isinstance(module, (nn.RNNBase, *NORMS)):
        return []  # an RNN reads its weights from a flat list of its own; a norm's weight is a vector
    if isinstance(module, nn.Linear):
        if module._parameters.get("weight") is None:
            return []
        shape = (module.out_features, module.in_features)
        return [Linear("weight", "bias", shape, shape)]
    if isinstance(module, nn.Embedding):
        own = getattr(module._modules.get("exapt"), "base_class", type(module)).forward is not nn.Embedding.forward
        kind, shape = OwnEmbedding if own else Embedding, (module.embedding_dim, module.num_embeddings)
        return [kind("weight", None, shape, tuple(_parameter(module, "weight").shape))]
    if isinstance(module, (*CONV, *CONV_TRANSPOSED)):
        return [_conv(module)]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        d_in, d_out = _parameter(module, "weight").shape
        return [TransposedLinear("weight", "bias", (d_out, d_in), (d_in, d_out))]
    if isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight"] if module.in_proj_weight is not None else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return [_plain(module, n, "in_proj_bias" if n == "in_proj_weight" and module.in_proj_bias is not None else None) for n in names]
    found = []
    for name, stored in module._parameters.items():
        if stored is None or not stored.is_floating_point():
            continue
        if name == "weight" and stored.dim() >= 2:
            found.append(_plain(module, name, "bias" if module._parameters.get("bias") is not None else None))
        elif stored.dim() == 3 and min(stored.shape) > 1 and not _positional(name):
            found.append(_stacked(module, name))
    return found


def _positional(name: str) -> bool:
    return any(word in name for word in ("pos", "token", "bias", "relative", "query_embed"))


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored in a quantised form (torchao tensor or bitsandbytes 4 or 8 bit)."""
    if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
        return True
    return type(weight.data) is not Tensor and hasattr(weight, "dequantize") and type(weight).__module__.startswith("torchao")


def dense(weight: Tensor) -> Tensor:
    """Returns a weight as an ordinary floating-point tensor, dequantised if need be."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found]

        return dequantize_4bit(*_unpacked(weight.data, state)) if packed(weight) else dequantize_4bit(weight.data, state)
    scale = getattr(weight, "SCB", None)
    if scale is not None:
        return weight.data.float() * (scale / 127.0).unsqueeze(1)
    if is_quantised(weight):
        return weight.dequantize()
    return weight


def packed(weight: Tensor) -> bool:
    """Whether bitsandbytes has rearranged a 4-bit weight for its CPU kernel, as it does when a layer first runs in eval mode. The layer's
    own forward then has no gradient."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)  # the inverse writes into it
    state.original_nested, absmax = False, state.absmax.T.reshape(-1).float()
    codes, state = _convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = absmax
    return codes, state


def feature_layout(module: nn.Module) -> tuple[int, int] | None:
    """Returns (features, axis) of a module's output, from its last layer; ``None`` if it cannot be told.

    >>> feature_layout(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    (8, -3)
    """
    found = None
    for _, child in walk(module):  # adapters' own tensors, some of which are called weight too, are no layers
        own = _own_layout(child)
        if own is not None and not (isinstance(child, nn.Embedding) and child is not module):
            found = own
    return (found[0], -1) if found is not None and found[1] < -1 and _makes_tokens(module, found[0]) else found


def _makes_tokens(module: nn.Module, features: int) -> bool:
    """Whether a module turns feature maps into a sequence: it holds tokens or positions (1, length, features), or looks them up."""
    own = any(p is not None and p.dim() == 3 and p.shape[-1] == features for p in module._parameters.values())
    return not layers_of(module) and (own or any(isinstance(m, nn.Embedding) for m in module.modules()))


def _own_layout(m: nn.Module) -> tuple[int, int] | None:
    if isinstance(m, nn.MultiheadAttention):
        return m.embed_dim, -1
    if isinstance(m, nn.LayerNorm):
        return int(m.normalized_shape[-1]), -1
    if isinstance(m, nn.BatchNorm1d):
        return m.num_features, 1  # (batch, channels) and (batch, channels, length) alike
    if isinstance(m, NORMS):
        features = int(getattr(m, "num_features", 0) or m.num_channels)  # type: ignore[arg-type]
        dims = {"1": -2, "2": -3, "3": -4}.get(type(m).__name__.removesuffix("d")[-1:], -3)
        return features, dims
    weight = m._parameters.get("weight")
    if weight is not None and weight.dim() == 1 and not is_quantised(weight):
        return int(weight.shape[0]), -1  # RMSNorm and its kind
    layers = layers_of(m)
    if not layers or layers[-1].stacked:
        return (layers[-1].shape[0], -1) if layers and layers[-1].parameter == "down_proj" else None
    return layers[-1].shape[0], layers[-1].axis
