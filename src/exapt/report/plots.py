"""The plots of a report, each drawn on axes it is given; matplotlib is imported when the first one is made."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from exapt.report.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
"""Distinct for colour-blind readers (Okabe and Ito)."""

Draw = Callable[["Axes"], None]


def figure(draws: Sequence[Draw], columns: int = 1, width: float = 6.4, height: float = 4.0) -> Figure:
    """Returns a figure with one plot per function in ``draws``. No global state of matplotlib is used."""
    from matplotlib.figure import Figure

    rows = -(-len(draws) // columns)
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False).ravel()
    for ax, draw in zip(axes, draws, strict=False):
        draw(ax)
    for ax in axes[len(draws) :]:
        ax.set_axis_off()
    return made


def png(made: Figure, dpi: int = 110) -> bytes:
    """Returns the figure as PNG."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def data_address(made: Figure, dpi: int = 110) -> str:
    """Returns the figure as a ``data:`` address, to be embedded in a page."""
    return f"data:image/png;base64,{base64.b64encode(png(made, dpi)).decode()}"


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def accuracy_against_parameters(points: Mapping[str, tuple[int, Interval]]) -> Draw:
    """Accuracy with its interval against the number of trainable parameters, ``{method: (parameters, interval)}``."""

    def draw(ax: Axes) -> None:
        for i, (name, (count, shown)) in enumerate(points.items()):
            spread = [[100 * (shown.value - shown.low)], [100 * (shown.high - shown.value)]]
            ax.errorbar([count], [100 * shown.value], yerr=spread, fmt="o", capsize=4, color=COLOURS[i % len(COLOURS)])
            ax.annotate(name, (count, 100 * shown.value), xytext=(7, 4), textcoords="offset points", fontsize=9, color=COLOURS[i % len(COLOURS)])
        ax.set_xscale("log")
        ax.margins(x=0.45)
        ax.set(xlabel="trainable parameters", ylabel="test accuracy (%)", title="Accuracy, 95 % bootstrap interval")
        _tidy(ax)

    return draw


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str, title: str, first: int = 0) -> Draw:
    """Lines, ``{name: (x, y)}``; a name that ends in "validation" is dashed and takes the colour of the one before.

    ``first`` is the colour to begin with, so that a method can have the same one in every plot.
    """

    def draw(ax: Axes) -> None:
        colour = first - 1
        for name, (x, y) in series.items():
            held_out = name.endswith("validation")
            colour += 0 if held_out and colour >= first else 1
            style: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 4} if held_out else {"linewidth": 1.4}
            ax.plot(x, y, label=name, color=COLOURS[colour % len(COLOURS)], **style)
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        ax.legend(fontsize=8, frameon=False)
        _tidy(ax)

    return draw


def grouped_bars(groups: Sequence[str], series: Mapping[str, Sequence[Interval]], title: str) -> Draw:
    """Bars with intervals: one group per entry of ``groups``, in it one bar per series. The axis starts at zero."""

    def draw(ax: Axes) -> None:
        wide = 0.8 / max(1, len(series))
        for i, (name, shown) in enumerate(series.items()):
            x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * wide
            value = np.array([100 * s.value for s in shown])
            spread = [value - [100 * s.low for s in shown], [100 * s.high for s in shown] - value]
            ax.bar(x, value, wide * 0.92, label=name, color=COLOURS[i % len(COLOURS)])
            ax.errorbar(x, value, yerr=spread, fmt="none", ecolor="#333333", capsize=3, linewidth=1)
        ax.set_xticks(np.arange(len(groups)), groups, fontsize=9)
        ax.set(ylabel="accuracy (%)", title=title, ylim=(0, 118))
        ax.set_yticks(range(0, 101, 20))
        ax.legend(fontsize=8, frameon=False, ncols=len(series), loc="upper center")
        _tidy(ax)

    return draw


def confusion_matrix(counts: ArrayLike, labels: Sequence[str], title: str) -> Draw:
    """Counts in a grid; the shade is the share of the true class."""
    table = np.asarray(counts)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)

    def draw(ax: Axes) -> None:
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), n in np.ndenumerate(table):
            ax.text(j, i, str(n), ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.5 else "black")
        ax.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=8)
        ax.set_yticks(range(len(labels)), labels, fontsize=8)
        ax.set(xlabel="predicted", ylabel="true", title=title)

    return draw
