"""Tables for /stats, /tokens and /set."""

from __future__ import annotations

import mlx.core as mx
from rich.console import Group, RenderableType
from rich.text import Text

from ..tokens import TokenBytes, TokenTexts
from .listing import Listing
from .session import ChatSession
from .settings import Settings
from .speed import Speed
from .text import on_one_line


def settings_table(settings: Settings, only: str = "") -> RenderableType:
    """Return the settings with their values and what they may be."""
    table = Listing()
    for name, value, wanted in settings.rows():
        if only in ("", name):
            table.add_row(Text(name, style="bold"), Text(value), Text(wanted, style="dim"))
    return table


def stats_table(session: ChatSession, speed: Speed | None) -> RenderableType:
    """Return the figures of the last answer and of the machine."""
    table = Listing()

    def row(name: str, value: str) -> None:
        table.add_row(Text(name, style="bold"), Text(value))

    reply = session.reply
    if reply is not None and reply.last is not None:
        last, stats = reply.last, reply.last.stats
        reused = len(reply.prompt) - reply.prefilled
        row("prompt", f"{len(reply.prompt)} tokens, {reused} of them from the cache")
        row("reading", _rate(last.prompt_rate))
        row("answer", f"{stats.tokens} tokens in {stats.passes} passes")
        row("writing", _rate(last.generation_rate))
        if stats.drafted:
            row("per step", f"{stats.tokens_per_step:.2f} tokens")
            found = f", {stats.looked_up} of them looked up" if stats.looked_up else ""
            row("drafts", f"{stats.accepted} of {stats.drafted} accepted{found}")
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
    table = Listing()

    def count(text: str) -> str:
        return str(len(session.tokenizer.encode(text, add_special_tokens=False)))

    table.add_row("", Text("asked", style="dim"), Text("answered", style="dim"))
    if conversation.system is not None:
        table.add_row(Text("system", style="bold"), count(conversation.system), "")
    for number, exchange in enumerate(conversation.exchanges, start=1):
        name = Text(str(number), style="bold" if number > conversation.forgotten else "dim")
        if number <= conversation.forgotten:
            name.append(" (forgotten)")
        table.add_row(name, count(exchange.question), count(exchange.answer or ""))
    messages = conversation.messages()
    seen = len(session.encode(messages)) if messages else 0
    limit = session.model.context_length
    total = Text(f"{seen} tokens in all" + (f" of {limit}" if limit is not None else ""))
    return Group(table, total)


def token_pieces(session: ChatSession, text: str) -> RenderableType:
    """Return a text cut into its tokens."""
    ids = session.tokenizer.encode(text, add_special_tokens=False)
    texts = TokenTexts(TokenBytes(session.tokenizer))
    line = Text(f"{len(ids)}: ", style="bold")
    for place, token in enumerate(ids):
        line.append("|" if place else "", style="dim")
        line.append(on_one_line(texts.next(token)), style="not bold")
    return line


def why_no_drafts(session: ChatSession) -> str:
    """Return why the last answer has no drafts to show, and how to get an answer with some."""
    settings = session.settings
    if session.model.streams is None and session.mode == "look-up":
        how = "nothing in the text was likely enough to come again; the model has no streams"
    elif session.model.streams is None and session.model.drafter is None:
        how = "the model has no streams; `specstream train` makes some and --streams loads them"
    elif settings.mode == "plain":
        how = "/set mode speculative, then /retry"
    elif settings.decode.tree.kind == "auto":
        how = "that is faster here; to see drafts all the same: /set tree chain, then /retry"
    else:
        how = "/retry drafts"
    return f"(this answer was decoded plainly, nothing was drafted; {how})"


def _rate(rate: float | None) -> str:
    return "too short to tell" if rate is None else f"{rate:.1f} tok/s"
