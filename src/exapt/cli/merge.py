"""``exapt merge-models``: models in files, merged out of core."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from exapt.cli.algebra import Output, Settings, numbers, told_apart
from exapt.core.errors import InputError

Several = Annotated[list[Path] | None, Parameter(negative="", consume_multiple=False)]


def merge_models(
    *models_and_settings: Settings, output: Output, rule: str = "average", base: Path | None = None, weights: str | None = None,
    statistics: Several = None, shard_size: str = "5GB", dtype: str | None = None, seed: int = 0, overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Merges whole models, tensor by tensor: `exapt merge-models A B -o C --rule ties --base BASE --weights 0.5,0.5 --density 0.2`.

    Models are .safetensors files, or folders with model.safetensors or its shards. No model is ever whole in memory, and the output appears when it is
    whole. A rule's own settings follow it by name; `exapt components --kind "merge rule"` lists the rules.

    Args:
        models_and_settings: The models, then settings of the rule.
        output: NAME.safetensors for one file; anything else is a new folder, with configuration and tokenizer.
        rule: A merge rule.
        base: The model that the others were trained from; needed by rules on differences.
        weights: One number for each model, with commas between them.
        statistics: What the rule needs of each model's tensors, a .safetensors file for each, the flag once for each.
        shard_size: Largest file in a folder.
        dtype: Type to write: float32, float16 or bfloat16; needed where the models have several.
        seed: Of rules that draw.
        overwrite: Replace a model that is there, once the new one is whole.
        json: Print JSON.
    """
    from exapt.algebra.files import merge_files
    from exapt.algebra.rule import rule_of

    models, settings = told_apart(models_and_settings)
    if not models:
        raise InputError("merge-models needs models: exapt merge-models A B -o C")
    _refuse_words(rule, rule_of(rule).checked(settings), rule_of(rule).config)
    given = None if weights is None else numbers(weights)
    started = time.perf_counter()
    made = merge_files(
        rule, models, output, base, given, shard_size=shard_size, dtype=dtype, seed=seed, statistics=statistics, overwrite=overwrite, **settings
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if json:
        from exapt.cli.show import print_json

        record = {"output": str(made.path), "tensors": made.tensors, "bytes": made.bytes, "shards": made.shards, "seconds": round(seconds, 3)}
        print_json({**record, "rule": rule, "models": models, "base": None if base is None else str(base), "weights": given, "settings": settings})
        return
    print(f"{made.path}: {made.tensors} tensors, {made.bytes / 1e6:.1f} MB in {made.shards} file{'s' if made.shards > 1 else ''}, {seconds:.1f} s")


def _refuse_words(rule: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """A word where the rule has a number."""
    for name, value in settings.items():
        if isinstance(defaults[name], (int, float)) and isinstance(value, str):
            raise InputError(f'--{name.replace("_", "-")} "{value}": {rule} takes a number there, by default {defaults[name]}')
