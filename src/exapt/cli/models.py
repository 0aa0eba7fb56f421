"""Finds and loads base models: a folder, a GGUF file, one inside an installed package, or what a Python function returns."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import nn

from exapt.core.errors import InputError, did_you_mean

FORMS = "a folder with config.json, a .gguf file, package:NAME or python:module:function"


@dataclass(frozen=True)
class Source:
    """Where a model is.

    Attributes:
        text: As the user gave it.
        path: Folder of a transformers model, or a GGUF file; ``None`` for a Python function.
        function: ``module:function``.
    """

    text: str
    path: Path | None = None
    function: str = ""

    @property
    def gguf(self) -> bool:
        """Whether it is one GGUF file."""
        return self.path is not None and self.path.is_file()

    @property
    def arguments(self) -> tuple[str, dict[str, Any]]:
        """What ``from_pretrained`` takes to find it, offline."""
        if self.path is None:
            raise InputError(f'model "{self.text}" is a Python function, which has no tokenizer or configuration of its own; name one under task')
        if self.gguf:
            return str(self.path.parent), {"gguf_file": self.path.name, "local_files_only": True}
        return str(self.path), {"local_files_only": True}


def locate(text: str) -> Source:
    """Returns where the model ``text`` is, without loading it.

    Raises:
        InputError: if there is none; the message says what was looked for.
    """
    form, colon, rest = text.partition(":")
    if form == "python" and colon:
        if rest.count(":") != 1:
            raise InputError(f'model "{text}": write python:module:function')
        return Source(text, function=rest)
    if form == "package" and colon:
        return Source(text, path=_in_package(text, rest))
    path = Path(text).expanduser()
    if path.is_dir():
        return Source(text, path=path if _is_model(path / "config.json") else _only(text, path))
    if path.is_file() and path.suffix == ".gguf":
        return Source(text, path=path)
    if path.is_file():
        raise InputError(f'model "{text}" is a {path.suffix or "plain"} file; give {FORMS}')
    raise InputError(f'model "{text}": no such file or folder; give {FORMS} (nothing is downloaded)')


def _in_package(text: str, rest: str) -> Path:
    """A model inside an installed package, found without importing the package."""
    name, _, inside = rest.replace("\\", "/").partition("/")
    module = name.replace("-", "_")
    spec = util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f'model "{text}": no installed package "{module}"{did_you_mean(module, [m.name for m in iter_modules()])}; install it with pip')
    return _only(text, Path(next(iter(spec.submodule_search_locations))) / inside)


def _only(text: str, folder: Path) -> Path:
    """The one model in a folder or below it."""
    found = [folder] if folder.suffix == ".gguf" and folder.is_file() else [p.parent for p in sorted(folder.rglob("config.json")) if _is_model(p)]
    found = found or sorted(folder.rglob("*.gguf"))
    if not found:
        raise InputError(f'model "{text}": no config.json with a model_type and no .gguf file in it or below it; give {FORMS}')
    if len(found) > 1:
        names = ", ".join(p.relative_to(folder).as_posix() for p in found[:6])
        raise InputError(f'model "{text}" holds {len(found)} models ({names}); add /NAME to choose one')
    return found[0]


def _is_model(config: Path) -> bool:
    try:
        return "model_type" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def load_model(text: str, kind: str | None = None) -> nn.Module:
    """Loads a base model in eval mode; only safetensors and GGUF weights, nothing unpickled, nothing downloaded.

    Args:
        text: What ``locate`` takes.
        kind: The task, which decides whether the language-model head is loaded; ``None``: as the model was saved.
    """
    source = locate(text)
    if source.path is None:
        return _call(source)
    name, where = source.arguments
    auto = _auto(source, kind)
    more = {} if source.gguf else {"use_safetensors": True}
    try:
        with _quiet():
            model, info = auto.from_pretrained(name, **where, **more, output_loading_info=True)
    except (OSError, ValueError) as e:
        raise InputError(f'model "{text}": could not be loaded as {auto.__name__} ({_first_line(e)}); give {FORMS}') from e
    _refuse_fresh(model, info["missing_keys"], text, auto.__name__)
    quantizer = getattr(model, "hf_quantizer", None)
    if source.gguf and quantizer is not None and all(p.is_floating_point() for p in model.parameters()):
        quantizer.remove_quantization_config(model)  # its weights are dequantised, so that it can be saved like any other
    return model.eval()  # type: ignore[no-any-return]


def _refuse_fresh(model: Any, missing: Iterable[str], text: str, wanted: str) -> None:
    """Weights that the files lack come out at random: no base to adapt. A pooler alone, which no task here reads, is left out."""
    if not missing:
        return
    if all(name.startswith("pooler.") for name in missing):
        model.pooler = None  # as transformers' own add_pooling_layer=False
        return
    raise InputError(f'model "{text}": its files lack {len(list(missing))} weights of {wanted} ({min(missing)}, ...); it is no model for this task')


def outline(text: str) -> nn.Module:
    """Returns the model's structure without its weights (parameters on the meta device), which takes no time or memory."""
    source = locate(text)
    if source.path is None:
        return _call(source)
    with torch.device("meta"):
        model: nn.Module = _auto(source, None).from_config(_configuration(source))
    return model


def load_tokenizer(text: str) -> Any:
    """Loads the tokenizer that lies beside a model."""
    name, where = locate(text).arguments
    try:
        return _transformers().AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError) as e:
        raise InputError(f'"{text}" has no tokenizer that can be loaded ({_first_line(e)}); name another under task.tokenizer') from e


def _auto(source: Source, kind: str | None) -> Any:
    transformers = _transformers()
    if kind is None:
        architecture = next(iter(getattr(_configuration(source), "architectures", None) or []), "")
        kind = "causal_lm" if source.gguf or architecture.endswith(("ForCausalLM", "LMHeadModel")) else "features"
    return transformers.AutoModelForCausalLM if kind == "causal_lm" else transformers.AutoModel


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what optional packages log of kernels not built for this machine, and a report that is an ``InputError`` here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _transformers() -> Any:
    with _quiet():
        import transformers
        import transformers.modeling_utils
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers


def _configuration(source: Source) -> Any:
    name, where = source.arguments
    try:
        return _transformers().AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError) as e:
        raise InputError(f'model "{source.text}": its configuration cannot be read ({_first_line(e)}); give {FORMS}') from e


def _call(source: Source) -> nn.Module:
    module, _, function = source.function.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a file beside the configuration is found
    try:
        found = import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module}.".startswith(f"{e.name}."):
            raise
        raise InputError(f'model "{source.text}": no module "{e.name}" here or installed; write python:module:function') from e
    if not callable(getattr(found, function, None)):
        raise InputError(f'model "{source.text}": {module} has no function "{function}"{did_you_mean(function, dir(found))}')
    model = getattr(found, function)()
    if not isinstance(model, nn.Module):
        raise InputError(f'model "{source.text}": {function}() returned {type(model).__name__}, not a torch.nn.Module')
    return model.eval()


def _first_line(e: Exception) -> str:
    return str(e).strip().partition("\n")[0].rstrip(".")
