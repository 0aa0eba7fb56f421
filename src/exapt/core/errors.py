"""The one exception for mistakes in what the user gave; its text is one line: what, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Raised when an argument, a file or a configuration cannot be used as given."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ``'; did you mean "lora"?'`` for the known words nearest to ``word``, or an empty string.

    >>> did_you_mean("lorra", ["lora", "dora"])
    '; did you mean "lora"?'
    """
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(chr(34) + n + chr(34) for n in near[:1] or near)}?" if near else ""
