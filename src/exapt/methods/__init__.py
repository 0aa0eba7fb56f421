"""Parameter shifts: one method, one file. Every module in this folder is imported and registers what it holds."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
