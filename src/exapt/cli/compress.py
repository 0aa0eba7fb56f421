"""``exapt compress``: an adapter's file in fewer bytes, by a method, or by whichever keeps a measured quality."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from exapt.cli.algebra import Output, Settings, settings_of
from exapt.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np


def compress(
    file: Path, /, *settings: Settings, output: Output, method: str = "auto", max_drop: float | None = None, config: Path | None = None,
    certain: bool = False, seed: int = 0, json: Annotated[bool, Parameter(negative="")] = False,
) -> None:  # fmt: skip
    """Writes an adapter in fewer bytes; `exapt.load` and every command read the file like any other.

    `exapt compress A -o B --method compeft --density 0.1` does what is said. `exapt compress A -o B --max-drop 0.5` finds the smallest file
    whose quality, measured on the validation data (else the test data), drops at most half a point; what it found is measured once more on
    the test data where both are there. How to measure is what `exapt fit` noted in the file, or a configuration; `--data.test FILE` and the
    like change it.

    Args:
        file: The adapter file.
        settings: Of the method, by name (--density 0.1), and over the configuration (--data.validation FILE).
        output: The file to write.
        method: lossless, cast, bitdelta, compeft, precision_codebook, uniform_groups, svd_truncation, seeded_bases; or auto, all of them.
        max_drop: Largest drop in points, hundredths of the measure: accuracy 0.915 to 0.910 is half a point. A loss may rise as much.
        config: The YAML file that the adapter was made with.
        certain: Whether the upper end of the drop's 95 % interval must be within max_drop too.
        seed: Of the resampling.
        json: Print JSON.
    """
    from exapt.algebra.compress.compressing import compress as compress_file
    from exapt.algebra.compress.file import read_compressed

    words = _split(settings)
    given = settings_of(words[0])
    adapter = read_compressed(file)
    before = file.stat().st_size
    record: dict[str, Any]
    if max_drop is None:
        if method == "auto":
            raise InputError("compress needs --max-drop to choose a method by (--max-drop 0.5), or --method to name one")
        if words[1] or config is not None or certain:
            raise InputError("compress was told how to measure, but not what may be lost; give --max-drop, or leave these out")
        made = compress_file(adapter, method, **given)
        record = {}
    else:
        with contextlib.redirect_stdout(sys.stderr):
            made, record = _searched(file, adapter, method, given, max_drop / 100, config, words[1], certain, seed)
    target = made.save(output)
    worst = max(made.errors, key=lambda k: made.errors[k], default=None)
    record = {
        "output": str(target), "method": made.name, "bytes": made.bytes, "bytes_before": before, "ratio": before / made.bytes,
        "relative_error": made.error, "largest_error": None if worst is None else made.errors[worst], "at": worst, **record,
    }  # fmt: skip
    _printed(record, json)


def _split(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The method's words, and those over the configuration (their names have a point)."""
    own: list[str] = []
    over: list[str] = []
    target = own
    for word in settings:
        if word.startswith("--"):
            target = over if "." in word.partition("=")[0] or word.partition("=")[0] in ("--model",) else own
        target.append(word)
    return own, over


def _searched(
    file: Path, adapter: Any, method: str, given: dict[str, Any], max_drop: float, path: Path | None, over: list[str], certain: bool, seed: int,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    from exapt.algebra.compress.search import CANDIDATES, smallest

    candidates = [s for s in CANDIDATES if method in ("auto", s[0][0])]
    if given and method == "auto":
        raise InputError(f"--{next(iter(given)).replace('_', '-')} is a setting of one method; name it with --method")
    config = _config(file, adapter, path, over)
    splits = [s for s in ("validation", "test") if config["data"].get(s) is not None]
    if not splits:
        config.place("validation")
    with tempfile.TemporaryDirectory() as folder:
        measured = _Measured(config, adapter, splits[0], Path(folder))
        found = smallest(adapter, measured, max_drop, [((method, given),)] if given or not candidates else candidates, certain=certain, seed=seed)
        record: dict[str, Any] = {
            "measure": measured.measure, "data": splits[0], "rows": len(measured.rows), "before": abs(found.score), "after": abs(found.score - found.drop),
            "drop": 100 * found.drop, "drop_interval": found.interval and [100 * v for v in found.interval], "max_drop": 100 * max_drop,
            "tried": [vars(t) | {"drop": 100 * t.drop, "interval": t.interval and [100 * v for v in t.interval]} for t in found.tried],
            "left_out": found.left_out,
        }  # fmt: skip
        if len(splits) > 1 and found.found.steps[-1][0] != "lossless":
            again = _Measured(config, adapter, "test", Path(folder))
            once = smallest(adapter, again, float("inf"), [found.found.steps], seed=seed)
            record["test"] = {"rows": len(again.rows), "before": abs(once.score), "after": abs(once.score - once.drop), "drop": 100 * once.drop}
            record["test"]["drop_interval"] = once.interval and [100 * v for v in once.interval]
    return found.found, record


def _config(file: Path, adapter: Any, path: Path | None, over: list[str]) -> Any:
    """How to measure: a configuration file, or what the adapter's own file says of its training."""
    import yaml

    from exapt.cli.config import read_config

    if path is not None:
        return read_config(path, over, verb="compress")
    noted = adapter.provenance.get("config")
    if not isinstance(noted, dict):
        raise InputError(f"{file}: does not say how it was made (exapt fit notes that); give --config FILE to measure with")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "noted.yaml"
        written.write_text(yaml.safe_dump({k: v for k, v in noted.items() if v is not None and k != "search"}), encoding="utf-8")
        return read_config(written, over, verb="compress")


class _Measured:
    """Scores an adapter on one part of the data: above and below the line of the task's measure, by row."""

    def __init__(self, config: Any, adapter: Any, split: str, folder: Path) -> None:
        from exapt.cli.run import _adapted, _rows
        from exapt.core.file import write
        from exapt.train import FitConfig, load_data

        self.folder, self.batch = folder, FitConfig.from_dict(config["train"]).batch_size
        self.rows = _rows(config, split)
        self.model, self.task = _adapted(config, write(adapter, folder / "whole.safetensors"), self.rows)
        self.rows = self.task.rows(load_data(self.rows))
        self.task.check(self.rows, training=False)
        self.measure = self.task.interval
        self.sign = -1.0 if self.measure == "loss" else 1.0

    def __call__(self, adapter: Any) -> np.ndarray:
        from exapt.core.attach import detach
        from exapt.core.file import load, write
        from exapt.train.loop import observed

        load(detach(self.model), write(adapter, self.folder / "tried.safetensors"))
        device = next(p.device for p in self.model.parameters())
        import numpy as np

        pairs = np.array([self.task.ratio(o) for o in observed(self.model, self.task, self.rows, self.batch, device)], dtype=float)
        return pairs * np.array([self.sign, 1.0])


def _printed(record: dict[str, Any], json: bool) -> None:
    from exapt.cli.show import print_json, print_table, size

    if json:
        print_json(record)
        return
    facts: list[tuple[str, Any]] = [
        ("output", record["output"]),
        ("method", record["method"]),
        ("size", f"{size(record['bytes'])}, {record['ratio']:.1f} times smaller than {size(record['bytes_before'])}"),
        ("relative error", f"{record['relative_error']:.3g}" + (f"; at most {record['largest_error']:.3g}, at {record['at']}" if record["at"] else "")),
    ]
    for name, part in ((record.get("data"), record), ("test", record.get("test", {}))):
        if "drop" not in part:
            continue
        within = ", 95 % {:.2f} to {:.2f}".format(*part["drop_interval"]) if part["drop_interval"] else ""
        change = f"{part['before']:.4f} to {part['after']:.4f}, a drop of {part['drop']:.2f} points{within}"
        facts.append((f"{record['measure']}, {name}", f"{change} ({part['rows']} rows)"))
    print_table(("", ""), facts)
    if record.get("tried"):
        print_table(("tried", "bytes", "relative error", "drop"), [(t["name"], t["bytes"], t["error"], round(t["drop"], 3)) for t in record["tried"]])
