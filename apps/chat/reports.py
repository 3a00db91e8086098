"""Tables for /stats, /tokens and /set."""

from __future__ import annotations

import mlx.core as mx
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..tokens import decoded
from .session import ChatSession
from .settings import Settings
from .speed import Speed
from .text import on_one_line


def settings_table(settings: Settings, only: str = "") -> RenderableType:
    """Return the settings with their values and what they may be."""
    table = _columns(3)
    for name, value, wanted in settings.rows():
        if only in ("", name):
            table.add_row(Text(name, style="bold"), Text(value), Text(wanted, style="dim"))
    return table


def stats_table(session: ChatSession, speed: Speed | None) -> RenderableType:
    """Return the figures of the last answer and of the machine."""
    table = _columns(2)

    def row(name: str, value: str) -> None:
        table.add_row(Text(name, style="bold"), Text(value))

    reply = session.reply
    if reply is not None and reply.last is not None:
        last, stats = reply.last, reply.last.stats
        reused = len(reply.prompt) - reply.prefilled
        row("prompt", f"{len(reply.prompt)} tokens, {reused} of them from the cache")
        row("reading", f"{last.prompt_tps:.1f} tok/s")
        row("answer", f"{stats.tokens} tokens in {stats.passes} passes")
        row("writing", f"{last.generation_tps:.1f} tok/s")
        if stats.drafted:
            row("per step", f"{stats.tokens_per_step:.2f} tokens")
            row("drafts", f"{stats.accepted} of {stats.drafted} accepted")
            steps = ", ".join(f"{n}: {count}" for n, count in enumerate(stats.histogram) if count)
            row("steps", f"by drafts accepted {steps}")
    if session.mode != "plain":
        row(
            "speed",
            str(speed) if speed is not None else "not measured: too short an answer, or too slow",
        )
    row("mode", session.mode)
    cache = session.prefix
    row("cache", f"{cache.kv.length} tokens, {cache.kv.nbytes / 1e6:.1f} MB")
    row(
        "memory",
        f"{mx.get_active_memory() / 1e9:.2f} GB, {mx.get_peak_memory() / 1e9:.2f} GB at its peak",
    )
    return table


def tokens_table(session: ChatSession) -> RenderableType:
    """Return how many tokens every part of the conversation has, and how full the context is."""
    conversation = session.conversation
    table = _columns(3)

    def count(text: str) -> str:
        return str(len(session.tokenizer.encode(text, add_special_tokens=False)))

    table.add_row("", Text("asked", style="dim"), Text("answered", style="dim"))
    if conversation.system is not None:
        table.add_row(Text("system", style="bold"), count(conversation.system))
    for number, exchange in enumerate(conversation.exchanges, start=1):
        name = Text(str(number), style="bold" if number > conversation.forgotten else "dim")
        if number <= conversation.forgotten:
            name.append(" (forgotten)")
        table.add_row(name, count(exchange.question), count(exchange.answer or ""))
    messages = conversation.messages()
    seen = len(session.encode(messages)) if messages else 0
    limit = session.model.context_length
    total = Text(f"{seen} tokens in all" + (f" of {limit}" if limit is not None else ""))
    outer = _columns(1)
    outer.add_row(table)
    outer.add_row(total)
    return outer


def token_pieces(session: ChatSession, text: str) -> RenderableType:
    """Return a text cut into its tokens."""
    ids = session.tokenizer.encode(text, add_special_tokens=False)
    line = Text(f"{len(ids)}: ", style="bold")
    for place, token in enumerate(ids):
        line.append("|" if place else "", style="dim")
        line.append(on_one_line(decoded(session.tokenizer, [token])), style="not bold")
    return line


def _columns(count: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(count):
        table.add_column(overflow="fold")
    return table
