"""One table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from exapt.core.errors import InputError


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", note: str = "") -> None:
    """Prints a table: the first column to the left, the others to the right. Uses ``rich`` where it is installed.

    Raises:
        InputError: if a row has another number of cells than there are columns.

    >>> show(["method", "accuracy"], [["LoRA", "95.0"]])  # doctest: +SKIP
    """
    for row in rows:
        if len(row) != len(columns):
            raise InputError(f"the row {row[0] if row else '(empty)'!r} has {len(row)} cells, the table has {len(columns)} columns")
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain(columns, rows, title, note)
        return
    table = Table(title=title or None, caption=note or None, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(140, console.width))
    console.print(table)


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, note: str) -> None:
    widths = [max(len(r[i]) for r in (columns, *rows)) for i in range(len(columns))]
    lines = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in (columns, *rows)]
    print("\n".join(x for x in (title, *lines, note) if x))
