"""The command line: finds the module that holds a verb and hands over.

Nothing heavy is imported before the verb is known, so `specstream --help` answers at once. Each
verb's module has `build_parser() -> argparse.ArgumentParser` and `main(argv) -> int`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn, cast

from . import __version__
from .commands.words import check_flags, join_the_others, unknown_verb
from .exit_status import EXIT_USER_ERROR, exit_status


class Verb(NamedTuple):
    """Where a verb lives and what it does, in a line for the help."""

    module: str
    summary: str


VERBS: dict[str, Verb] = {
    "cache_prompt": Verb(
        "mlx_specstream.commands.cache_prompt", "run a long prompt once, keep its cache"
    ),
    "adopt": Verb("mlx_specstream.commands.adopt", "make streams for your own model"),
    "bench": Verb("mlx_specstream.commands.bench", "measure what speculation gains here"),
    "chat": Verb("mlx_specstream.apps.chat.cli", "chat with a model in the terminal"),
    "convert": Verb(
        "mlx_specstream.convert.cli", "turn a checkpoint into an MLX model with streams"
    ),
    "demo": Verb(
        "mlx_specstream.commands.demo", "answer a few prompts both ways with the demo model"
    ),
    "doctor": Verb("mlx_specstream.commands.doctor", "say what runs here, and what to change"),
    "generate": Verb("mlx_specstream.commands.generate", "answer one prompt, streaming the text"),
    "plan": Verb("mlx_specstream.commands.plan", "show what steps cost here and which tree pays"),
    "train": Verb("mlx_specstream.commands.train", "train streams for a model on data"),
    "distill": Verb("mlx_specstream.commands.distill", "write a model's own answers, to train on"),
    "serve": Verb("mlx_specstream.apps.serve.cli", "serve a model to OpenAI clients and a browser"),
    "upload": Verb("mlx_specstream.commands.upload", "share streams on the Hugging Face hub"),
    "find": Verb("mlx_specstream.commands.find", "list streams on the hub that fit a model"),
    "verify": Verb("mlx_specstream.commands.verify", "compare plain and speculative answers"),
}
"""Every verb of `specstream`; a new one is a line here."""

OTHER_NAMES = {
    "families": ("doctor", "--families"),
    "simulate": ("doctor", "--chips"),
    "server": ("serve",),
    "cache-prompt": ("cache_prompt",),
    "benchmark": ("bench",),
}
"""Verbs of earlier versions and of mlx-lm, and what they are called here."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the first word; a verb's own options are its module's business."""
    width = max((len(name) for name in VERBS), default=0)
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    parser = argparse.ArgumentParser(
        prog="specstream",
        usage="specstream [-h] [--version] VERB ...",
        description="Speculative Streaming on MLX: the same words in fewer passes of the model.",
        epilog="\n".join(["verbs:", *lines, "", "`specstream VERB --help` explains a verb."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "verb",
        metavar="VERB",
        nargs="?",
        help="what to do; listed below",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0 done, 1 the verb's own no, 2 what the user gave is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _file_limits_kept():
        return exit_status(lambda: _dispatch(arguments))


def run() -> NoReturn:
    """Be the `specstream` command: run `main` and end the process with its status, at once.

    Python would take every module apart first, which takes seconds where transformers found PyTorch
    to import, and aborts where another thread still computes, as at Ctrl-C while a server loads.
    """
    status = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def _dispatch(arguments: list[str]) -> int:
    parser = build_parser()
    verb = parser.parse_args(arguments[:1]).verb
    if verb is None:
        parser.print_help()
        return EXIT_USER_ERROR
    verb, *words = list(OTHER_NAMES.get(verb, [verb])) + arguments[1:]
    if verb not in VERBS:
        raise unknown_verb(verb, [*VERBS, *OTHER_NAMES])
    join_the_others(verb)
    module = importlib.import_module(VERBS[verb].module)
    if build := getattr(module, "build_parser", None):
        # A verb may have options of their own behind one of its words.
        check_flags(verb, words, getattr(module, "parser_for", lambda _: build())(words))
    run = cast(Callable[[list[str]], int], module.main)
    return run(words)


@contextlib.contextmanager
def _file_limits_kept() -> Iterator[None]:
    """Let nobody lower the limits of open files, or fail where they are low.

    mlx-lm sets them to 2048 and 4096 when it is imported, which raises an error below 4096.
    """
    set_limits = resource.setrlimit

    def raised(which: int, limits: tuple[int, int]) -> None:
        if which == resource.RLIMIT_NOFILE:
            soft, hard = resource.getrlimit(which)
            if soft < 0 or limits[0] <= soft:  # infinity is negative
                return
            limits = (limits[0] if hard < 0 else min(limits[0], hard), hard)
        set_limits(which, limits)

    resource.setrlimit = raised
    try:
        yield
    finally:
        resource.setrlimit = set_limits


if __name__ == "__main__":
    run()
