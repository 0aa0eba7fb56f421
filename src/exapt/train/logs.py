"""What training tells: JSON lines and TensorBoard in the folder, a progress bar on standard error, a history in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exapt.core.errors import InputError
from exapt.core.file import write_aside


class Log:
    """The log of one run. Only the first process writes; every process keeps the history.

    Args:
        folder: Where ``log.jsonl`` and ``tensorboard/`` go; ``None`` writes nothing.
        writes: Whether this process writes.
        progress: Whether it shows a bar.
        total: Steps of the run.
        step: Steps done before; what an older log says of later ones is dropped.
    """

    def __init__(self, folder: Path | None, writes: bool, progress: bool, total: int, step: int = 0) -> None:
        self.history: list[dict[str, Any]] = []
        self._file: Any = None
        self._board: Any = None
        self._bar: Any = None
        if folder is not None and step:
            self.history = [e for e in _entries(folder / "log.jsonl") if e["step"] <= step]
        if folder is not None and writes:
            write_aside(folder / "log.jsonl", "".join(json.dumps(e) + "\n" for e in self.history).encode())
            self._file = (folder / "log.jsonl").open("a", encoding="utf-8")
            self._board = _board(folder / "tensorboard", step)
        if progress and writes:
            self._start_bar(total, step)

    def _start_bar(self, total: int, step: int) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            return
        columns = (TextColumn("fit"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=False)
        self._task = self._bar.add_task("", total=total, completed=step)
        self._bar.start()

    def write(self, entry: dict[str, Any]) -> None:
        """Notes one entry: numbers by name, with its ``step``."""
        self.history.append(entry)
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in entry.items():
                if name not in ("step", "epoch"):
                    prefix, found, rest = name.partition("validation_")
                    self._board.add_scalar(f"validation/{rest}" if found and not prefix else f"train/{name}", value, entry["step"])

    def advance(self, step: int, loss: float) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"loss {loss:.4f}")

    def close(self) -> None:
        """Ends the bar and the files."""
        for part, end in ((self._bar, "stop"), (self._board, "close"), (self._file, "close")):
            if part is not None:
                getattr(part, end)()


def _entries(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an older log; a process killed while writing leaves half a line."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise InputError('logging to a folder needs tensorboard; pip install "exapt[train]"') from e
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
