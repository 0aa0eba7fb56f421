"""What higher floors give to this one, which names none of them. It imports nothing, so that they can give it before torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

METHODS: list[Callable[[str | None], None]] = []
"""Called with a key (or a class's name) that is wanted, or with ``None`` for all, before the registry of methods answers: packages of many
methods import each of them only when it is asked for."""
COMPONENTS: list[Callable[[str | None], None]] = []
"""Called with a kind (``None``: all) before the catalogue of components answers for it."""
UNPACK: list[Callable[[Any, Any, Any], Any]] = []
"""What makes an adapter of a compressed file's path, header and tensors; this floor has no codecs."""
