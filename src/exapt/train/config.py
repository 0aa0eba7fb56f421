"""How to train: one frozen dataclass, whose fields are the keys under ``train:`` in a configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from exapt.core.errors import InputError, did_you_mean

FREE = (
    "epochs", "steps", "save_every", "log_every", "folder", "resume", "devices", "strategy", "accelerator", "progress", "workers",
)  # fmt: skip
"""Fields in which a resumed run may differ from the one that wrote the checkpoint (its number of steps is compared by itself)."""


@dataclass(frozen=True)
class FitConfig:
    """Settings of :func:`exapt.fit`.

    Args:
        epochs: Passes over the data.
        steps: Optimiser steps; given, it decides instead of ``epochs``.
        batch_size: Rows per batch, over all processes together, so that results do not depend on their number.
        accumulate: Batches per optimiser step.
        lr: Highest learning rate of AdamW (betas 0.9 and 0.999).
        weight_decay: Decoupled decay, on tensors of two or more dimensions only.
        warmup: Share of the steps in which the rate rises linearly from zero.
        schedule: What follows: ``"cosine"`` or ``"linear"`` fall to zero, ``"constant"`` stays.
        clip: Largest Euclidean norm of the gradient; ``None`` does not clip.
        precision: ``"32-true"``; ``"bf16-mixed"`` runs the forward under autocast; ``"bf16-true"`` casts the base to
            bfloat16, where it stays, and keeps adapters in single precision.
        checkpointing: Recompute the blocks in backward instead of keeping their activations.
        patience: Stop after this many evaluations without a better main metric, and go back to the best weights.
        eval_every: Steps between evaluations on the validation data; by default once an epoch. The end is always evaluated.
        save_every: Steps between checkpoints; the end is then saved too. Needs ``folder``.
        log_every: Steps between log entries.
        seed: Seed of everything random: initialisation, order of the data, dropout.
        folder: Where logs, checkpoints and the adapter go.
        resume: Continue from the last checkpoint in ``folder``, bit for bit as if never stopped; without one, start.
        devices: Processes; more than one is started with ``torchrun --nproc_per_node``.
        strategy: ``"ddp"`` or ``"fsdp2"`` under ``torchrun``; ``"auto"`` is ``"ddp"`` there.
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.
        progress: Show a progress bar on standard error.
        workers: Processes that load data.

    Raises:
        InputError: for a value that cannot be used.
    """

    epochs: int = 3
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.06
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float | None = 1.0
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    checkpointing: bool = False
    patience: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    seed: int = 0
    folder: str | None = None
    resume: bool = False
    devices: int = 1
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    accelerator: str = "auto"
    progress: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            value, options = getattr(self, f.name), get_args(hints[f.name])
            words = [o for o in options if isinstance(o, str)]
            if words and value not in words:
                raise InputError(f"train.{f.name} is {value!r}; it must be one of {', '.join(words)}")
        for name in ("epochs", "steps", "batch_size", "accumulate", "patience", "eval_every", "save_every", "log_every", "devices"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"train.{name} is {value!r}; it must be a whole number of at least 1")
        for name, low, high in (("lr", 0.0, float("inf")), ("weight_decay", 0.0, float("inf")), ("warmup", 0.0, 1.0), ("clip", 0.0, float("inf"))):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and (not number or not low <= value <= high or (name in ("lr", "clip") and value == 0)):
                wanted = "from 0 to 1" if high == 1 else "of at least 0" if name == "weight_decay" else "above 0"
                raise InputError(f"train.{name} is {value!r}; it must be a number {wanted}")
        if not isinstance(self.seed, int) or not isinstance(self.workers, int) or self.workers < 0:
            raise InputError(f"train.seed and train.workers are whole numbers, not {self.seed!r} and {self.workers!r}")
        if self.folder is None and (self.save_every or self.resume):
            raise InputError(f"train.{'save_every' if self.save_every else 'resume'} needs train.folder, where the checkpoints are")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FitConfig:
        """Returns the configuration that a mapping (from YAML or JSON) describes.

        >>> FitConfig.from_dict({"lr": "1e-4", "steps": 5}).lr
        0.0001
        >>> FitConfig.from_dict({"batchsize": 4})
        Traceback (most recent call last):
        ...
        exapt.core.errors.InputError: train has no key "batchsize"; did you mean "batch_size"?
        """
        hints = get_type_hints(cls)
        given = {}
        for name, value in data.items():
            if name not in hints:
                raise InputError(f'train has no key "{name}"{did_you_mean(str(name), hints)}')
            if isinstance(value, str) and float in (hints[name], *get_args(hints[name])):
                try:
                    value = float(value)  # YAML reads 1e-4 as text
                except ValueError as e:
                    raise InputError(f"train.{name} is {value!r}; it must be a number") from e
            given[name] = value
        return cls(**given)

    def fixed(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the one that wrote the checkpoint."""
        return {k: v for k, v in asdict(self).items() if k not in FREE}
