"""The README's picture: one answer of the terminal chat with `/draft on`, as an animated SVG.

The model answers for real, greedily, with the chat's own session and drawing; what is made up is
the pace, so many passes a second, for a picture is no measurement. It needs no script, no font and
nothing from elsewhere, and stands still for readers who have asked for less motion.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType

from mlx_specstream.apps.chat.drafts import DraftView
from mlx_specstream.apps.chat.session import ChatSession, DraftStep
from mlx_specstream.apps.chat.settings import Settings
from mlx_specstream.apps.conversation import Conversation
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.exit_status import exit_status
from mlx_specstream.loading.load import load
from mlx_specstream.weights.files import atomic_file

if TYPE_CHECKING:
    from rich.style import Style

PROMPT = "Write a Python function that returns the largest number in a list."
COLUMNS, CELL, LINE, MARGIN = 78, 8.43, 19, 14
PASS_S, END_S = 0.55, 5.0
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
BACK, FORE, DIM = "#16181d", "#e6e6e6", "#8b919c"
COLOURS = {
    "green": "#7ee08a",
    "cyan": "#6cd3e8",
    "magenta": "#e08ae0",
    "yellow": "#e8d06c",
    "blue": "#82aaff",
    "red": "#f08a8a",
}


@dataclass(frozen=True)
class Scene:
    """Lines of SVG that appear together, `at` seconds after the beginning; `until`: None stays."""

    lines: list[str]
    at: float
    until: float | None = None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the study."""
    parser = argparse.ArgumentParser(
        prog="draft_picture", description="Draw an answer's drafts, pass by pass, as a moving SVG."
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tree", type=TreeSpec.parse, default=TreeSpec.parse("16"))
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--output", default="docs/images/draft.svg")
    return parser


def answered(
    name: str, prompt: str, tree: TreeSpec, max_tokens: int
) -> tuple[ChatSession, list[DraftStep]]:
    """Ask the model and return its passes."""
    model, tokenizer = load(name)
    settings = Settings(max_tokens=max_tokens, decode=DecodeConfig(tree))
    session = ChatSession(model, tokenizer, settings)
    conversation = Conversation()
    conversation.ask(prompt)
    for _ in session.answer(conversation):
        pass
    assert session.reply is not None
    return session, session.reply.steps


def picture(prompt: str, view: DraftView, steps: Sequence[DraftStep], num_streams: int) -> str:
    """Return the SVG of an answer's passes."""
    head = [
        *_typed("$ specstream chat --draft"),
        *_typed(f"1 › {prompt}"),
        "",
        *_lines(view.legend(num_streams)),
    ]
    scenes = [Scene(head, 0.0)]
    told, tokens = [], 0
    for number, step in enumerate(steps):
        at = 1.5 + number * PASS_S
        scenes.append(Scene(_lines(view.step(step)), at))
        tokens += len(step.tokens)
        passes = number + 1
        text = f"{passes} passes of the model: {tokens} tokens. Plain decoding: {passes} tokens."
        last = passes == len(steps)
        told.append(Scene(_typed(text), at, None if last else at + PASS_S))
    end = 1.5 + len(steps) * PASS_S + END_S
    return _svg(scenes, told, end)


def _typed(text: str) -> list[str]:
    return [_span(0, text, f'fill="{FORE}"')]


def _lines(what: RenderableType) -> list[str]:
    """Return what a terminal of so many columns would show, a string of tspans per line."""
    console = Console(
        width=COLUMNS, color_system="standard", force_terminal=True, legacy_windows=False
    )
    lines = []
    for segments in console.render_lines(what, pad=False):
        column, spans = 0, []
        for text, style, _ in segments:
            if text.strip():
                spans.append(_span(column, text, _look(style)))
            column += len(text)
        lines.append("".join(spans))
    return lines


def _span(column: int, text: str, look: str) -> str:
    lead = len(text) - len(text.lstrip(" "))
    x = MARGIN + (column + lead) * CELL
    width = len(text.strip(" ")) * CELL
    # Told how wide it is, text keeps its columns whatever font is there.
    return f'<tspan x="{x:.1f}" textLength="{width:.1f}" {look}>{escape(text.strip(" "))}</tspan>'


def _look(style: Style | None) -> str:
    """Return a style's attributes."""
    if style is None:
        return f'fill="{FORE}"'
    name = style.color.name if style.color is not None else ""
    words = [f'fill="{DIM if style.dim else COLOURS.get(name, FORE)}"']
    if style.strike:
        words.append('text-decoration="line-through"')
    if style.bold:
        words.append('font-weight="bold"')
    return " ".join(words)


def _svg(scenes: Sequence[Scene], told: Sequence[Scene], end: float) -> str:
    """Return the picture: scenes one below the other, and a line at the foot that changes."""
    row, groups, rules = 0, [], []
    for number, scene in enumerate(scenes):
        groups.append(_group(f"s{number}", scene.lines, row))
        rules.append(_rule(f"s{number}", scene, end))
        row += len(scene.lines)
    row += 1
    for number, scene in enumerate(told):
        still = scene.until is not None
        groups.append(_group(f"t{number}", scene.lines, row, "m" if still else ""))
        rules.append(_rule(f"t{number}", scene, end))
    width, height = COLUMNS * CELL + 2 * MARGIN, (row + 1) * LINE + 2 * MARGIN
    style = "\n".join(
        [
            ".m{opacity:0}",
            "@media (prefers-reduced-motion: no-preference){",
            *rules,
            "}",
        ]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" '
        'aria-label="A terminal: an answer grows by several tokens in every pass of the model">\n'
        f"<style>{style}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="{BACK}"/>\n'
        f'<g font-family="{FONT}" font-size="14" xml:space="preserve">\n'
        + "\n".join(groups)
        + "\n</g>\n</svg>\n"
    )


def _group(name: str, lines: Sequence[str], row: int, kind: str = "") -> str:
    texts = [
        f'<text y="{MARGIN + (row + place + 1) * LINE - 5}">{line}</text>'
        for place, line in enumerate(lines)
        if line
    ]
    return (
        f'<g id="{name}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{"".join(texts)}</g>'
    )


def _rule(name: str, scene: Scene, end: float) -> str:
    """Return the style that shows a group from its time on, over and over."""
    begin, until = (100 * min(1.0, t / end) for t in (scene.at, scene.until or end))
    frames = f"0%,{begin:.2f}%{{opacity:0}}{begin + 0.01:.2f}%,{until:.2f}%{{opacity:1}}"
    if begin <= 0:
        frames = f"0%,{until:.2f}%{{opacity:1}}"
    if until < 100:
        frames += f"{until + 0.01:.2f}%,100%{{opacity:0}}"
    return f"@keyframes k{name}{{{frames}}}#{name}{{animation:k{name} {end:.1f}s infinite}}"


def main(argv: list[str]) -> int:
    """Answer the prompt and write the picture."""
    arguments = build_parser().parse_args(argv)
    session, steps = answered(
        arguments.model, arguments.prompt, arguments.tree, arguments.max_tokens
    )
    assert session.model.streams is not None, "the model needs streams"
    view = DraftView(session.tokenizer, coloured=True)
    made = picture(arguments.prompt, view, steps, session.model.streams.num_streams)
    with atomic_file(Path(arguments.output), if_exists="replace") as partial:
        partial.write_text(made, encoding="utf-8")
    tokens = sum(len(step.tokens) for step in steps)
    print(f"{arguments.output}: {tokens} tokens in {len(steps)} passes, {len(made)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:]), "draft_picture"))
