"""The scaling study's results as tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.endurance import growth_bytes
from mlx_specstream.bench.plot_style import available, line_style, new_figure, save_figure
from mlx_specstream.machine import Machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG = "long"


def number(value: float) -> str:
    """Return a count in full, a fraction in three digits."""
    return f"{value:.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def line(point: dict[str, Any]) -> str:
    """Return one measurement in words."""
    where = f"{number(point['x'])}, {point['series']}"
    if point.get("left_out"):
        return f"{where}: left out"
    if "tokens_per_pass" in point:
        return f"{where}: {point['tokens_per_pass']:.2f} tokens per pass"
    if "step_ms" in point:
        return f"{where}: {point['step_ms'][1]:.1f} ms, {point['ratio']:.2f} plain steps"
    return (
        f"{where}: {_beyond(point):.1f} MB beyond the KV cache, {point['token_ms']:.1f} ms a token"
    )


def markdown(record: dict[str, Any]) -> str:
    """Return the tables of all studies."""
    machine = Machine.from_dict(record["machine"])
    parts = [
        "# Scaling",
        f"{record['model']}; {machine.summary}, {machine.chip}; {machine.versions}; {record['started']}; medians of "
        f"{record['rounds']} dependent steps with the middle half, beside plain steps in turns.",
    ]
    for name, study in record["studies"].items():
        points = [point for point in study["points"] if not point.get("left_out")]
        left_out = len(study["points"]) - len(points)
        parts.append(f"## {name}")
        if points:
            parts.append(_table(name, study["grows"], points))
        if left_out:
            parts.append(f"{left_out} points left out for time, memory or context.")
        if name == LONG and points:
            parts.append(
                f"Memory beyond the KV cache grew by {growth_bytes(points) / 1e6:.1f} MB between "
                "the first fifth and the end."
            )
    return "\n\n".join(parts) + "\n"


def _table(name: str, grows: str, points: list[dict[str, Any]]) -> str:
    if name == LONG:
        head = f"| {grows} | KV cache | MLX beyond it | kept for reuse | process | a token |"
        rows = [
            f"| {p['x']} | {p['kv_bytes'] / 1e6:.1f} MB | {_beyond(p):.1f} MB | {p['kept_bytes'] / 1e6:.1f} MB | "
            f"{p['process_bytes'] / 1e6:.0f} MB | {p['token_ms']:.1f} ms |"
            for p in points
        ]
    elif "tokens_per_pass" in points[0]:
        head = f"| {grows} | series | tokens per pass |"
        rows = [
            f"| {number(p['x'])} | {p['series']} | {p['tokens_per_pass']:.2f} |" for p in points
        ]
    else:
        head = f"| {grows} | series | step | middle half | plain step | in plain steps |"
        rows = [
            f"| {number(p['x'])} | {p['series']} | {p['step_ms'][1]:.1f} ms | "
            f"{p['step_ms'][0]:.1f}–{p['step_ms'][2]:.1f} | {p['plain_ms'][1]:.1f} ms | {p['ratio']:.2f} |"
            for p in points
        ]
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])


def write_plots(record: dict[str, Any], folder: Path) -> list[str]:
    """Draw a plot per study if matplotlib is there; return the file names."""
    if not available():
        return []
    written = []
    for name, study in record["studies"].items():
        points = [point for point in study["points"] if not point.get("left_out")]
        if points:
            save_figure(_figure(record, name, study["grows"], points), folder / f"{name}.png")
            written.append(f"{name}.png")
    return written


def _figure(record: dict[str, Any], name: str, grows: str, points: list[dict[str, Any]]) -> Figure:
    machine = Machine.from_dict(record["machine"])
    below = f"{record['model']} · {machine.summary} · {machine.chip} · MLX {machine.mlx}"
    kind = LONG if name == LONG else "yield" if "tokens_per_pass" in points[0] else "step"
    title = {
        LONG: "Memory over a long generation",
        "yield": f"Tokens per pass against {grows}",
        "step": f"Price of a step against {grows}",
    }[kind]
    figure, axes = new_figure(7.5, 4.4, title, below)
    if kind == LONG:
        x = [p["x"] for p in points]
        parts = [
            ("beyond the KV cache", [_beyond(p) for p in points]),
            ("KV cache", [p["kv_bytes"] / 1e6 for p in points]),
            ("whole process", [p["process_bytes"] / 1e6 for p in points]),
        ]
        series = {label: (x, values) for label, values in parts}
        axes.set_ylabel("MB")
    else:
        series = {}
        for p in points:
            xs, ys = series.setdefault(p["series"], ([], []))
            xs.append(p["x"])
            ys.append(p["tokens_per_pass"] if kind == "yield" else p["ratio"])
        axes.set_ylabel("tokens per pass" if kind == "yield" else "a step, in plain steps")
    for index, (label, (xs, ys)) in enumerate(series.items()):
        color, marker = line_style(index)
        axes.plot(xs, ys, color=color, marker=marker, markersize=4, linewidth=1.8, label=label)
    values = sorted({x for xs, _ in series.values() for x in xs})
    if kind != LONG and len(values) > 1 and values[-1] >= 8 * values[0]:
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [number(value) for value in values])
        axes.tick_params(axis="x", labelsize=8, rotation=45 if len(values) > 9 else 0)
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(grows)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    return figure


def _beyond(sample: dict[str, Any]) -> float:
    """Return what MLX holds beyond the KV cache, in megabytes."""
    return float(sample["active_bytes"] - sample["kv_bytes"]) / 1e6
