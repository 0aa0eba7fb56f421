"""One adapter at one site: its tensors, and what they make of a parameter. Also what a contract can act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from exapt.core.base import Base
from exapt.core.contract import ActivationMethod, Columns, Entries, Method, SubsetMethod, TokenMethod, WeightMethod, Whole, frozen
from exapt.core.errors import InputError
from exapt.core.layers import Layer, dense

if TYPE_CHECKING:
    from exapt.core.slots import Slots
    from exapt.core.state import State

HALF = (torch.float16, torch.bfloat16)
OPTIONAL = ("attention_mask", "token_type_ids", "domain")
"""Inputs that a call may leave out; a method that reads them finds them in ``p`` or not."""


class Holder(nn.Module):
    """The tensors of one adapter at one place: parameters train, buffers do not."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
        super().__init__()
        for name, t in tensors.items():
            fixed = isinstance(t, nn.Buffer)
            value = t.detach()
            kind = dtype if dtype and t.is_floating_point() else t.dtype
            if value.device != device or value.dtype != kind:
                value = value.to(device=device, dtype=kind)
            value = _aligned(value.contiguous())
            if fixed:
                self.register_buffer(name, value, persistent=cast(Any, t).persistent)
            else:  # not by register_parameter, which looks for an attribute of that name first: there are thousands of these
                self._parameters[name] = nn.Parameter(value)

    def tensors(self) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], {**self._parameters, **self._buffers})


def _aligned(t: Tensor) -> Tensor:
    """The tensor at an address such as torch allocates. What a reader of files made may lie elsewhere, where products can end in another last bit."""
    return t.clone() if type(t) is Tensor and t.device.type == "cpu" and t.data_ptr() % 64 else t


class Notes(dict[str, Tensor]):
    """What a method notes of its site in a call; a copy of the model, or a pickle, begins without."""

    def __deepcopy__(self, memo: Any) -> Notes:
        return Notes()

    def __reduce__(self) -> tuple[type[Notes], tuple[()]]:
        return Notes, ()


@dataclass(eq=False)
class Entry:
    """One adapter at one site. ``definition``: acts through the parameter, not in ``forward``."""

    adapter: str
    method: Any
    site_name: str
    layer: Layer | None
    holder: Holder
    common: Holder | None
    axis: int = -1
    definition: bool = False
    chosen: dict[str, str] = field(default_factory=dict)
    position: int = 0
    last: bool = False
    source: Slots | None = None
    state: State | None = None
    notes: Notes = field(default_factory=Notes)
    product: bool | None = None
    bare: bool = False

    def __post_init__(self) -> None:
        m = self.method
        self.bare = m.full_precision and self.common is None and not (m.reads or m.notes)  # its tensors are the holder's as they are

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The method's ``p``; cast once to the layer's dtype unless the method asks for full precision."""
        p = self.holder.tensors()
        if self.common is not None:
            p = {**self.common.tensors(), **p}
        if self.method.reads and dtype is not None:
            p = {**p, **self._call()}
        if dtype is not None and not self.method.full_precision:
            p = {k: v.to(dtype) if v.is_floating_point() and v.dtype != dtype else v for k, v in p.items()}
        return {**p, "notes": cast(Tensor, self.notes)} if self.method.notes else p

    @property
    def sees_more(self) -> bool:
        """Whether the method sees more than its site: the model's call, or what other sites carry over."""
        return bool(self.method.reads) or (isinstance(self.method, ActivationMethod) and self.method.carries)

    def _call(self) -> dict[str, Tensor]:
        """What the method reads of the model's present call."""
        assert self.state is not None
        for name in self.method.reads:
            if name not in self.state.call and name not in OPTIONAL:
                raise InputError(f"{self.method.key} reads {name}, which the model was not called with; call it as model(..., {name}=...)")
        return {f"call.{name}": self.state.call[name] for name in self.method.reads if name in self.state.call}

    def carried(self) -> dict[int, Any]:
        """What this rule's sites have passed on in this call, by their place among them, in the order in which they ran."""
        assert self.state is not None
        notes = self.state.carried.setdefault((self.adapter, id(self.method)), {})
        if self.position in notes:  # a site runs once in a call, so this is another call
            notes.clear()
        return notes

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.bare:
            return self.method.forward({**self.holder._parameters, **self.holder._buffers}, x, base)
        return self.method.forward(self.tensors(_compute_dtype(x, base.module)), x, base)

    def changed(self, parameter: str, value: Tensor, matrix: Callable[[], Tensor] | None = None) -> Tensor:
        """The definition: the stored parameter's new value from its old one (already dequantised); ``matrix`` gives the old weight matrix."""
        p = {k: t for k, t in self.tensors(value.dtype).items() if k != "notes"}
        if isinstance(self.method, SubsetMethod):
            return _replace(self.chosen.get(parameter), p, parameter, value, self.layer)
        layer = self.layer
        assert layer is not None
        assert isinstance(self.method, WeightMethod)
        run: Callable[..., Tensor]
        if parameter == layer.parameter:
            w, run = layer.to_matrix(value), self.method.weight
            w = torch.vmap(run, in_dims=(self._stacked_dims(p), 0))(p, w) if layer.stacked else run(p, w)
            return layer.from_matrix(w).to(value.dtype)
        run = self.method.bias
        if self.method.bias_reads_weight:
            assert matrix is not None
            p = {**p, "W": matrix().to(value.dtype)}
        changed = torch.vmap(run, in_dims=(self._stacked_dims(p), 0))(p, value) if layer.stacked else run(p, value)
        return changed.to(value.dtype)

    def _stacked_dims(self, p: dict[str, Tensor]) -> dict[str, int | None]:
        own = self.holder.tensors()
        return {k: 0 if k in own or k == "W" else None for k in p}

    def names(self) -> tuple[str, ...]:
        """The module's parameters that this entry changes."""
        if isinstance(self.method, SubsetMethod):
            return tuple(self.chosen)
        if not isinstance(self.method, WeightMethod) or self.layer is None:
            return ()
        bias = type(self.method).bias is not WeightMethod.bias and self.layer.bias
        return (self.layer.parameter, self.layer.bias) if bias and self.layer.bias else (self.layer.parameter,)


def _compute_dtype(x: Any, module: nn.Module) -> torch.dtype | None:
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    return next((p.dtype for p in module._parameters.values() if p is not None and p.is_floating_point()), None)


def _replace(how: str | None, p: dict[str, Tensor], name: str, value: Tensor, layer: Layer | None) -> Tensor:
    if how is None:
        return value
    new = p[name].to(value.dtype)
    if how == "whole":
        return new
    index = p[f"{name}_index"]
    if how == "entries":
        return value.flatten().index_put((index,), new).view(value.shape)
    assert layer is not None
    matrix = layer.to_matrix(value).index_copy(1, index, new)
    return layer.from_matrix(matrix)


def selection(method: SubsetMethod, site: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a subset method at a site (chosen entries' present values, their indices), and how each was chosen."""
    tensors: dict[str, Tensor] = {}
    chosen: dict[str, str] = {}
    for name, part in method.select(site).items():
        value = dense(cast(Tensor, site.module._parameters[name])).detach()
        if isinstance(part, Columns):
            tensors[name], chosen[name] = site.layer.to_matrix(value)[:, part.index], "columns"
        elif isinstance(part, Entries):
            tensors[name], chosen[name] = value.flatten()[part.index], "entries"
        else:
            tensors[name], chosen[name] = value.clone(), "whole"
        if not isinstance(part, Whole):
            tensors[f"{name}_index"] = frozen(part.index)
    return tensors, chosen


def chosen_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """How a subset method's tensors were chosen, told from them alone."""

    def how(name: str, value: Tensor) -> str:
        return "whole" if f"{name}_index" not in tensors else "columns" if value.dim() == 2 else "entries"

    return {k: how(k, t) for k, t in tensors.items() if not k.endswith("_index")}


def usable(method: Method, site: Any) -> bool:
    """Whether the contract of ``method`` has anything to act on at ``site``."""
    if method.contract == "weight":
        return site.layer is not None
    if method.contract == "subset":
        if site.name != site.module_name or not any(p is not None for p in site.module._parameters.values()):
            return False
        return bool(method.needs) or bool(cast(SubsetMethod, method).select(site))
    if method.contract == "token":
        level = cast(TokenMethod, method).level
        return site.role == "attention" if level == "attention" else site.role in ("model", "embeddings")
    if method.contract == "side":
        return bool(site.role == "block")
    return site.name == site.module_name or site.source is not None
