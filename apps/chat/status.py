"""The status line: what speculation does right now, as much of it as the screen is wide."""

from __future__ import annotations

import mlx.core as mx
from rich.cells import cell_len

from .session import ChatSession, Reply
from .speed import Speed

SEPARATOR = " · "


def answer_status(session: ChatSession, reply: Reply | None, speed: Speed | None) -> list[str]:
    """Return the parts of the status line, the most telling first."""
    parts = []
    if reply is not None and reply.last is not None:
        if (rate := reply.last.generation_rate) is not None:
            parts.append(f"{rate:.1f} tok/s")
        if session.mode != "plain":
            parts.append(f"{reply.last.stats.tokens_per_step:.2f} tok/step")
    if speed is not None:
        parts.append(f"{speed.ratio:.2f}× plain")
    parts.append(session.mode)
    parts.append(f"{mx.get_active_memory() / 1e9:.2f} GB")
    return parts


def prompt_status(done: int, total: int) -> list[str]:
    """Return the parts of the status line while the prompt is being read."""
    return [f"reading {done}/{total} tokens"]


def wrapped(parts: list[str], width: int) -> str:
    """Return all of the parts, on as many lines as they take; a part is not broken if it fits."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}{SEPARATOR}{part}"
        if cell_len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return "\n".join(lines)


def fitted(parts: list[str], width: int) -> str:
    """Return as many of the parts as fit into `width` cells."""
    line = ""
    for part in parts:
        longer = f"{line}{SEPARATOR}{part}" if line else part
        if cell_len(longer) > width:
            break
        line = longer
    return line
