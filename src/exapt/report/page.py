"""One HTML page that holds everything it shows: text, tables and pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from exapt.core.file import write_aside
from exapt.report.plots import data_address

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; background: white; }
figcaption, .note { color: #777; font-size: .9rem; }
"""


class Page:
    """Collects parts and writes them as one file. All text is escaped.

    >>> page = Page("A < B")
    >>> page.text("one", "two").table(["x"], [["1"]])
    Page('A < B', 3 parts)
    >>> "A &lt; B" in page.html()
    True
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def __repr__(self) -> str:
        return f"Page({self.title!r}, {len(self.parts)} parts)"

    def heading(self, text: str) -> Page:
        """Adds a heading."""
        self.parts.append(f"<h2>{escape(text)}</h2>")
        return self

    def text(self, *paragraphs: str) -> Page:
        """Adds paragraphs."""
        self.parts += [f"<p>{escape(p)}</p>" for p in paragraphs]
        return self

    def points(self, lines: Iterable[str]) -> Page:
        """Adds a list."""
        self.parts.append("<ul>" + "".join(f"<li>{escape(x)}</li>" for x in lines) + "</ul>")
        return self

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> Page:
        """Adds a table, with a note below it."""
        head = "".join(f"<th>{escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        below = f'<p class="note">{escape(note)}</p>' if note else ""
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}")
        return self

    def picture(self, made: Figure, caption: str) -> Page:
        """Adds a figure, embedded in the page."""
        self.parts.append(f'<figure><img alt="{escape(caption)}" src="{data_address(made)}"><figcaption>{escape(caption)}</figcaption></figure>')
        return self

    def html(self) -> str:
        """Returns the page."""
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(self.title)}</title><style>{_STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{escape(self.title)}</h1>{"".join(self.parts)}</body></html>\n'

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page, whole or not at all, and returns its path."""
        write_aside(Path(path), self.html().encode())
        return Path(path)
