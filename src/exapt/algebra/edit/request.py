"""What an edit is: an input, the answer wanted of it, and what tells whether the rest of the model stayed as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exapt.core.errors import InputError


@dataclass(frozen=True, eq=False)
class Probe:
    """An input and the answer that is to stay.

    Attributes:
        prompt: As :attr:`Edit.prompt`.
        target: As :attr:`Edit.target`.
    """

    prompt: Tensor
    target: Tensor | int

    @property
    def language(self) -> bool:
        """Whether the answer is a continuation of the prompt, and not a class."""
        return isinstance(self.target, Tensor)

    @property
    def answer(self) -> Tensor:
        """The answer as indices of logits (m,): the tokens, or the one class."""
        return self.target if isinstance(self.target, Tensor) else torch.tensor([self.target])

    @property
    def row(self) -> Tensor:
        """What the model is called with: the prompt, and of a continuation all but its last token."""
        return torch.cat([self.prompt, self.target[:-1]]) if isinstance(self.target, Tensor) else self.prompt


@dataclass(frozen=True, eq=False)
class Edit(Probe):
    """One wanted change.

    Attributes:
        prompt: Token ids (n,) int64; or one input of a classifier of vectors, in floating point, of any shape.
        target: The wanted answer: token ids (m,) int64 that continue the prompt, or a class.
        subject: Place of the last token of what the edit is about. By default the prompt's last token where the answer is a continuation, and its
            first (BERT's [CLS]) where it is a class.
        rephrasings: Other prompts that are to get the same answer.
        locality: Inputs with the answers that are to stay; see :func:`exapt.algebra.edit.score.unchanged`.

    >>> edit = Edit(torch.tensor([5, 6]), torch.tensor([7, 8]))
    >>> edit.place, edit.row
    (1, tensor([5, 6, 7]))
    """

    subject: int | None = None
    rephrasings: tuple[Tensor, ...] = ()
    locality: tuple[Probe, ...] = ()

    @property
    def place(self) -> int:
        """The place of the subject."""
        if self.subject is not None:
            return self.subject
        return len(self.prompt) - 1 if self.language else 0


def checked(edits: Sequence[Edit]) -> list[Edit]:
    """Looks at edits before anything is done.

    Raises:
        InputError: for no edits, and for one that is malformed, with its number.
    """
    found = list(edits)
    if not found:
        raise InputError("there is no edit to make; give at least one exapt.algebra.edit.request.Edit")
    for i, edit in enumerate(found):
        if not isinstance(edit, Edit):
            raise InputError(f"edit {i} is a {type(edit).__name__}; make it an exapt.algebra.edit.request.Edit")
        for what, probe in [("", edit), *((f", rephrasing {j}", Probe(r, edit.target)) for j, r in enumerate(edit.rephrasings))]:
            _check(probe, f"edit {i}{what}")
        for j, probe in enumerate(edit.locality):
            _check(probe, f"edit {i}, locality {j}")
        if not edit.prompt.is_floating_point() and not 0 <= edit.place < len(edit.prompt):
            raise InputError(f"edit {i}: its subject ends at token {edit.place}, but the prompt has {len(edit.prompt)} tokens (counted from 0)")
    return found


def _check(probe: Probe, where: str) -> None:
    prompt, target = probe.prompt, probe.target
    if not isinstance(prompt, Tensor) or prompt.numel() == 0 or prompt.dtype == torch.bool:
        raise InputError(f"{where}: its prompt is {_what(prompt)}; give token ids (n,) or the numbers of one input")
    if prompt.is_floating_point() and not bool(torch.isfinite(prompt).all()):
        raise InputError(f"{where}: its prompt holds NaN or infinity")
    if not prompt.is_floating_point() and prompt.dim() != 1:
        raise InputError(f"{where}: its token ids have shape {tuple(prompt.shape)}; give one row (n,), without a batch")
    if isinstance(target, Tensor):
        if target.dim() != 1 or not len(target) or target.is_floating_point() or prompt.is_floating_point():
            raise InputError(f"{where}: its target is {_what(target)}; give token ids (m,) that continue token ids, or a class (int)")
    elif isinstance(target, bool) or not isinstance(target, int) or target < 0:
        raise InputError(f"{where}: its target is {target!r}; give token ids (m,) that continue the prompt, or a class (int)")


def _what(value: Any) -> str:
    return f"of type {value.dtype} and shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
