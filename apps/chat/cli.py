"""`specstream chat`: options, and which screen and which input fit where it was started."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import OutputError
from ...generation.decode_options import (
    add_cache_options,
    add_decode_options,
    add_model_options,
    cache_config,
    load_options,
)
from ...generation.sampling_options import add_sampling_options
from ...machine import ranks
from ..conversation import Conversation
from ..learning import LEARN_HELP, Learner, learned_file, notice
from ..saving import load_conversation
from .interrupt import can_move_cursor, typing_ahead
from .paths import history_file, newest_conversation
from .settings import DEFAULT_MAX_TOKENS, Settings

if TYPE_CHECKING:
    from .chat import Chat
    from .view import View

_NEWEST = ""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `specstream chat`."""
    parser = argparse.ArgumentParser(
        prog="specstream chat",
        description=(
            "Chat with a model in the terminal, in fewer passes of the model. Reads lines from a "
            "pipe as well: echo hi | specstream chat"
        ),
    )
    add_model_options(parser)
    parser.add_argument("--system-prompt", help="system prompt for the chat template")
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        help="most tokens of an answer, -1 for no limit (default: %(default)s)",
    )
    add_sampling_options(parser)
    add_cache_options(parser)
    add_decode_options(parser, lossy=True)
    parser.add_argument(
        "--no-speculation", action="store_true", help="decode plainly, one token per pass"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=_NEWEST,
        metavar="FILE",
        help="go on with the last conversation, or with the one in FILE",
    )
    parser.add_argument(
        "--no-save",
        action="store_true",
        help="write neither the conversation nor the typed lines to disk",
    )
    parser.add_argument(
        "--draft", action="store_true", help="show the drafts of every answer (as /draft on)"
    )
    parser.add_argument("--learn", action="store_true", help=LEARN_HELP)
    return parser


def main(argv: list[str]) -> int:
    """Load the model and chat."""
    arguments = build_parser().parse_args(argv)
    settings = Settings.from_arguments(arguments)
    cache_config(arguments)  # refused before the model is loaded
    interactive = _can_edit_lines()
    own, conversation = _resumed(arguments)
    if arguments.system_prompt is not None:
        conversation.system = arguments.system_prompt or None
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not interactive:
        return _plain_chat(arguments, settings, conversation)
    with typing_ahead():
        return _live_chat(arguments, settings, conversation, own)


def _plain_chat(
    arguments: argparse.Namespace, settings: Settings, conversation: Conversation
) -> int:
    """Chat over a pipe or a dumb terminal: lines in, text out, nothing written to disk."""
    from .app import run
    from .reader import LineReader, SharedReader
    from .view import PlainView

    chat = _chat(arguments, settings, conversation, PlainView(), None, interactive=False)
    prompts = sys.stderr if sys.stdin.isatty() else None
    reader = LineReader(prompts=prompts)
    shared = SharedReader(reader) if ranks.is_launched() else reader
    return run(chat, shared, is_attended=prompts is not None)


def _live_chat(
    arguments: argparse.Namespace,
    settings: Settings,
    conversation: Conversation,
    own: Path | None,
) -> int:
    """Chat with a line editor and a live screen."""
    from rich.console import Console

    from .app import completer, run
    from .reader import EditorReader
    from .status import fitted
    from .view import TerminalView

    for name in ("COLUMNS", "LINES"):  # rich would believe them even after a resize
        os.environ.pop(name, None)
    view = TerminalView(Console())
    view.note(f"loading {arguments.model} ...")
    chat = _chat(arguments, settings, conversation, view, own, interactive=True)
    reader = EditorReader(
        None if arguments.no_save else _history(view),
        completer(chat),
        lambda width: fitted([*chat.status(chat.session.reply), "/help"], width),
    )
    view.note(chat.described("/help"))
    if conversation.exchanges:
        chat.show_exchange(len(conversation.exchanges))
    try:
        status = run(chat, reader)
    finally:  # an answer may have been cut by a signal; /load and /system change things, too
        chat.autosave.write(chat.session.conversation)
    if chat.autosave.own is not None and chat.session.conversation.exchanges:
        view.note("(saved; specstream chat --resume goes on with it)")
    return status


def _chat(
    arguments: argparse.Namespace,
    settings: Settings,
    conversation: Conversation,
    view: View,
    own: Path | None,
    *,
    interactive: bool,
) -> Chat:
    """Load the model and return the chat with it."""
    from ... import load
    from ...loading.folders import model_folder
    from .autosave import Autosave
    from .chat import Chat, short_name
    from .session import ChatSession

    model, tokenizer = load(arguments.model, **load_options(arguments))
    learner = None
    if arguments.learn:
        folder = model_folder(arguments.model, arguments.revision)
        learner = Learner(learned_file(arguments.model, folder, arguments.adapter_path), tokenizer)
        view.note(f"({notice(learner.path)})")
    autosave = Autosave(
        short_name(model.name), automatic=interactive and not arguments.no_save, own=own
    )
    return Chat(
        ChatSession(model, tokenizer, settings, conversation, cache_config(arguments), learner),
        view,
        autosave,
        interactive=interactive,
        live_drafts=arguments.draft,
    )


def _resumed(arguments: argparse.Namespace) -> tuple[Path | None, Conversation]:
    """Return the file to go on with and its conversation, an empty one without --resume."""
    if arguments.resume is None:
        return None, Conversation()
    path = newest_conversation() if arguments.resume == _NEWEST else Path(arguments.resume)
    path = path.expanduser()
    return path, load_conversation(path)


def _can_edit_lines() -> bool:
    """Tell whether a person sits at a terminal that can move its cursor."""
    here = sys.stdin.isatty() and sys.stdout.isatty() and not ranks.is_launched()
    return here and can_move_cursor()


def _history(view: View) -> Path | None:
    """Return the file of typed lines; None, with a remark, where there can be none."""
    try:
        return history_file()
    except OutputError as error:
        view.note(f"(typed lines are not kept: {error})")
        return None
