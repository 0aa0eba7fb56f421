"""What a method makes of tensors that stay as they are, kept from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from exapt.core.base import Base

MOST = 64
"""What a module keeps."""


class Kept(dict[tuple[Any, ...], tuple[tuple[tuple[int, Tensor], ...], Tensor]]):
    """By the maker's code and the tensors' identities: their versions, and what was made. A copy of the model, or a pickle, begins without."""

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def kept(base: Base, make: Callable[[], Tensor], *tensors: Tensor) -> Tensor:
    """Returns ``make()``, which is a function of the layer's weight and of ``tensors``, or what it gave before while none of them changed.

    Nothing is kept of tensors that ask for gradients, beside other adapters that change the weight, or in a compiled graph. Changes are
    told from torch's version counters and the tensors' places in memory; what is written in place through ``.data`` goes unseen.

    Args:
        base: The layer.
        make: Makes the value; a function or a lambda, told from others by its code.
        tensors: The method's tensors that it is made from, as they are in ``p``.
    """
    slots, stored = base.slots, base.module._parameters["weight"]
    if base.entries or slots.chain.inner or slots.aliases or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return make()
    own = (*tensors, stored)
    if any(t.requires_grad or t.is_inference() or hasattr(t, "full_tensor") for t in own):
        return make()
    key = make.__code__, *map(id, own)  # type: ignore[attr-defined]
    found = slots.kept.get(key)
    if found is not None and all(t._version == version and t.data_ptr() == old.data_ptr() for t, (version, old) in zip(own, found[0], strict=True)):
        return found[1]
    if len(slots.kept) >= MOST:
        slots.kept.clear()
    with torch.inference_mode(False), torch.no_grad():
        value = make()
    slots.kept[key] = (tuple((t._version, t.detach()) for t in own), value)  # the tensors are held, so that no address is used anew
    return value
