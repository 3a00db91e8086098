"""A benchmark's plots, PNG files: speed-up by category, acceptance by depth, roofline.

They need matplotlib, an extra of the package (`plots`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .methods import MLX_LM
from .plot_style import add_legend, line_style, new_figure, save_figure, whole_numbers
from .result import Result
from .summary import ALL, summarised

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_plots(result: Result, folder: Path) -> list[str]:
    """Write all plots that the result has figures for; return their file names."""
    makers: dict[str, Callable[[Result], Figure | None]] = {
        "speedup.png": speedup,
        "acceptance.png": acceptance,
        "roofline.png": roofline,
        "cost.png": cost,
        "trees.png": trees,
    }
    written = []
    for name, make in makers.items():
        figure = make(result)
        if figure is not None:
            save_figure(figure, folder / name)
            written.append(name)
    return written


def subtitle(result: Result) -> str:
    """Return what a plot was measured on, for the line under its title."""
    machine = result.machine
    facts = [result.model["name"], machine.summary, machine.chip, f"MLX {machine.mlx}"]
    return " · ".join([*facts, "other programs ran: uncertain"][: 5 if result.busy else 4])


def speedup(result: Result) -> Figure | None:
    """Draw each category's median speed-up over mlx-lm, with the middle half of its prompts."""
    lines = summarised(result)
    methods = [name for name in result.named_methods if name != MLX_LM.label]
    methods = [name for name in methods if any(line.method == name for line in lines)]
    categories = list(dict.fromkeys(line.category for line in lines))
    if not methods:
        return None
    row = 0.22 * len(methods) + 0.25
    figure, axes = new_figure(
        7.5,
        1.7 + row * len(categories),
        "Decoding speed against mlx-lm, by category",
        subtitle(result),
    )
    step = 0.8 / len(methods)
    for place in range(1, len(categories)):
        axes.axhline(place - 0.5, color="#e4e4e4", linewidth=0.8)
    for index, method in enumerate(methods):
        color, marker = style(result, method)
        own = [line for line in lines if line.method == method]
        heights = [
            categories.index(line.category) + (index - (len(methods) - 1) / 2) * step
            for line in own
        ]
        middle = [line.speedup.median for line in own]
        spread = [
            [line.speedup.median - line.speedup.low for line in own],
            [line.speedup.high - line.speedup.median for line in own],
        ]
        axes.errorbar(
            middle,
            heights,
            xerr=spread,
            fmt=marker,
            markersize=5,
            color=color,
            elinewidth=1.6,
            capsize=2,
            label=method,
        )
        for x, y in zip(middle, heights, strict=True):
            axes.annotate(
                f"{x:.2f}",
                (1, y),
                xycoords=("axes fraction", "data"),
                fontsize=7,
                va="center",
                ha="right",
                color=color,
            )
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_yticks(range(len(categories)), categories)
    axes.set_ylim(len(categories) - 0.45, -0.55)
    low, high = axes.get_xlim()
    low, high = min(0.5, low), max(1.5, high)
    axes.set_xlim(low, high + 0.06 * (high - low))  # medians stand at the right edge
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("times as fast as mlx-lm (median and middle half of the prompts; 1 = equal)")
    add_legend(figure, axes, len(methods))
    return figure


def acceptance(result: Result) -> Figure | None:
    """Draw the share of drafting passes in which at least 1, 2, 3 ... drafts were accepted."""
    lines = [line for line in summarised(result) if line.accepted]
    whole = [line for line in lines if line.category == ALL] or lines
    if not whole:
        return None
    figure, axes = new_figure(7.5, 4.2, "How deep drafts are accepted", subtitle(result))
    deepest = max(len(line.accepted) for line in lines)
    for line in lines:
        color, marker = style(result, line.method)
        shares = [1.0, *line.accepted, *[0.0] * (deepest - len(line.accepted))]
        if line in whole:
            label = f"{line.method}: {line.tokens_per_step:.2f} tokens per pass"
            axes.plot(shares, color=color, linewidth=2, marker=marker, markersize=5, label=label)
        else:
            axes.plot(shares, color=color, alpha=0.18, linewidth=1)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(deepest + 1))
    axes.set_xlabel("drafts accepted, at least (thin lines: single categories)")
    axes.set_ylabel("share of drafting passes")
    add_legend(figure, axes, len(whole))
    return figure


def roofline(result: Result) -> Figure | None:
    """Draw the methods' passes under the machine's ceilings of memory and arithmetic."""
    from .roofline import Ceilings, points

    if result.ceilings is None:
        return None
    ceilings, found = Ceilings(**result.ceilings), points(result)
    figure, axes = new_figure(7.5, 4.4, "Roofline: where a pass's time goes", subtitle(result))
    low = min([point.intensity for point in found] + [ceilings.ridge]) / 3
    high = max([point.intensity for point in found] + [ceilings.ridge]) * 6
    roof = [
        (x, min(ceilings.flop_s, x * ceilings.bytes_s) / 1e9) for x in (low, ceilings.ridge, high)
    ]
    axes.plot(*zip(*roof, strict=True), color="#444444", linewidth=1.6)
    middle = (low * ceilings.ridge) ** 0.5
    axes.annotate(
        f"memory: {ceilings.bytes_s / 1e9:.3g} GB/s",
        (middle, middle * ceilings.bytes_s / 1e9),
        fontsize=8,
        xytext=(-6, 6),
        textcoords="offset points",
        ha="right",
        color="#444444",
    )
    axes.annotate(
        f"arithmetic ({ceilings.dtype}): {ceilings.flop_s / 1e9:.3g} GFLOP/s",
        (high, roof[2][1]),
        fontsize=8,
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        color="#444444",
    )
    for place, point in enumerate(found):
        color, marker = style(result, point.method)
        label = f"{point.method}: {point.rows:.1f} rows a pass"
        # Hollow and each smaller than the one before: methods may lie on the same point.
        axes.plot(
            point.intensity,
            point.flop_s / 1e9,
            marker,
            color=color,
            markersize=max(5.0, 13 - 2.5 * place),
            markerfacecolor="none",
            markeredgewidth=1.5,
            linestyle="none",
            label=label,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=ceilings.flop_s / 1e9 * 3)
    axes.set_xlabel("FLOP per byte of weights read")
    axes.set_ylabel("GFLOP per second")
    add_legend(figure, axes, len(found))
    return figure


def cost(result: Result) -> Figure | None:
    """Draw what steps cost and yield by rows, in plain tokens, and the planner's choice."""
    if not result.plans:
        return None
    streams, planned = next(iter(result.plans.items()))
    forecasts = planned["forecasts"]
    plain = next(f["step_s"] for f in forecasts if f["kind"] == "plain")
    below = f"{Path(streams).name} · {subtitle(result)}"
    figure, axes = new_figure(
        7.5, 4.6, "What a step costs, and what it is expected to yield", below
    )
    kinds = list(dict.fromkeys(f["kind"] for f in forecasts if f["kind"] != "plain"))
    for index, kind in enumerate(kinds):
        own = sorted((f for f in forecasts if f["kind"] == kind), key=lambda f: f["rows"])
        color, marker = line_style(index)
        rows = [f["rows"] for f in own]
        axes.plot(
            rows,
            [f["step_s"] / plain for f in own],
            color=color,
            marker=marker,
            markersize=5,
            label=f"{kind}: cost",
        )
        axes.plot(
            rows,
            [f["tokens_per_step"] for f in own],
            color=color,
            linestyle=":",
            marker=marker,
            markersize=3,
            label=f"{kind}: tokens expected",
        )
    choice = next(f for f in forecasts if f["plan"] == planned["chosen"])
    axes.plot(
        choice["rows"],
        choice["step_s"] / plain,
        "o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor="#444444",
        markeredgewidth=1.5,
        label=f"chosen: {choice['plan']}, {choice['speedup']:.2f}x expected",
    )
    axes.axhline(1, color="#444444", linewidth=1)
    axes.set_ylim(bottom=0)
    whole_numbers(axes)
    axes.set_xlabel("rows that a step verifies (it gains where the dotted line is above the solid)")
    axes.set_ylabel("plain tokens")
    add_legend(figure, axes, 2)
    return figure


def trees(result: Result) -> Figure | None:
    """Draw predicted against measured speed of every small tree, over plain decoding."""
    if not result.trees:
        return None
    figure, axes = new_figure(
        6.4, 6.2, "Every small tree: predicted and measured", subtitle(result)
    )
    top = 1.0
    for index, (category, found) in enumerate(result.trees.items()):
        base = next(row for row in found["rows"] if row["plan"] == "plain")
        base_s = base["measured_tokens_per_s"]
        xs = [row["measured_tokens_per_s"] / base_s for row in found["rows"]]
        ys = [row["predicted_tokens_per_s"] / base_s for row in found["rows"]]
        top = max(top, *xs, *ys)
        color, marker = line_style(index)
        axes.plot(xs, ys, marker, color=color, markersize=4.5, alpha=0.7, label=category)
        ring = 10 + 2.5 * index  # choices may lie on the same point
        for x, y, row in zip(xs, ys, found["rows"], strict=True):
            if row["plan"] == found["choice"]:
                axes.plot(x, y, "o", markersize=ring, markerfacecolor="none", markeredgecolor=color)
    top *= 1.1
    axes.plot([0, top], [0, top], color="#444444", linewidth=1)
    axes.fill_between([0, top], [0, 0.9 * top], [0, 1.1 * top], color="#444444", alpha=0.08)
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("measured, times plain decoding (rings: the planner's choice)")
    axes.set_ylabel("predicted (band: 10 %)")
    add_legend(figure, axes, len(result.trees))
    return figure


def style(result: Result, method: str) -> tuple[str, str]:
    """Return a method's colour and marker, the same in all plots of a result."""
    return line_style(list(result.named_methods).index(method) - 1)
