"""Parameter shifts: one method, one file. A file of this folder is imported when its method is first asked for, and registers it."""

import functools
import re
from importlib import import_module
from pathlib import Path

from exapt.core.registry import _METHODS, SOURCES


@functools.cache
def places() -> dict[str, str]:
    """In which module each method is, by its key and by its class's name; told from the files, which are not imported for it."""
    found: dict[str, str] = {}
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        names = re.findall(r'^class (\w+)\(|^    key = "(\w+)"', file.read_text(encoding="utf-8"), re.MULTILINE)
        found |= dict.fromkeys((n for pair in names for n in pair if n), file.stem)
    return found


def _source(wanted: str | None) -> None:
    """Imports the module of one method, or all."""
    if wanted and (Path(__file__).parent / f"{wanted}.py").is_file():
        import_module(f"{__name__}.{wanted}")  # most methods are in the file of their key: no need to look into all
    found = wanted is not None and wanted in _METHODS
    modules = set() if found else set(places().values()) if wanted is None else {places().get(wanted)}
    for module in sorted(m for m in modules if m):
        import_module(f"{__name__}.{module}")


SOURCES.append(_source)
