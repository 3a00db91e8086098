"""How all plots look, and how they are written. They need matplotlib, an extra of the package (`plots`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..weights.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind people too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
MISSING = "plots are left out: matplotlib is not installed (pip install 'mlx-specstream[plots]')."


def available() -> bool:
    """Tell whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def line_style(index: int) -> tuple[str, str]:
    """Return the colour and the marker of the line number `index`; they repeat after eight."""
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_file(path, if_exists="replace") as partial:
        figure.savefig(partial, dpi=160)


def new_figure(width: float, height: float, title: str, below: str) -> tuple[Figure, Axes]:
    """Return an empty figure of that size in inches, with a title and a small line under it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{title}\n", loc="left", fontsize=12, fontweight="bold")
    axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=8, color="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def whole_numbers(axes: Axes) -> None:
    """Have the horizontal axis count in whole numbers: there is no half of a row."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def add_legend(figure: Figure, axes: Axes, count: int) -> None:
    """Put a legend below, in two columns if it has `count` > 1 entries."""
    handles: tuple[list[Any], list[str]] = axes.get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside lower left", ncols=2 if count > 1 else 1, fontsize=8, frameon=False
    )
