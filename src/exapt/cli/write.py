"""Writes what a command makes: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from exapt.core.errors import InputError


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Gives an unused path beside ``target`` to write a file or a folder to; at the end it takes the target's name.

    After an error the target is as it was. A folder that holds something is refused before anything is done.
    """
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target}: is a folder that is not empty; name another, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made = holder / target.name
        yield made
        mask = os.umask(0)
        os.umask(mask)
        for path in [made, *made.rglob("*")]:
            if path.is_file():
                path.chmod(0o666 & ~mask)  # as a plain open() would; what writes through a temporary file leaves it private
            _sync(path)
        os.replace(made, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(target: Path, text: str) -> None:
    """Writes a text file."""
    with aside(target) as path:
        path.write_text(text, encoding="utf-8")


def write_model(model: nn.Module, target: Path, tokenizer: Any = None, beside: Mapping[str, nn.Module | None] | None = None) -> None:
    """Writes a model's weights.

    Args:
        model: The model.
        target: ``NAME.safetensors``: one file with every parameter and buffer (tied ones once). Otherwise a folder, as
            ``save_pretrained`` makes it, which only a transformers model has.
        tokenizer: Put into the folder too.
        beside: Further modules for the folder, each a ``NAME.safetensors``.
    """
    from safetensors.torch import save_model

    save_pretrained = getattr(model, "save_pretrained", None)
    if target.suffix != ".safetensors" and save_pretrained is None:
        raise InputError(f"{target}: a {type(model).__name__} is no transformers model and has no folder form; give a name that ends in .safetensors")
    with aside(target) as path:
        if target.suffix == ".safetensors":
            save_model(model, str(path))
            return
        assert save_pretrained is not None
        save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        for name, module in (beside or {}).items():
            if module is not None:
                save_model(module, str(path / f"{name}.safetensors"))
