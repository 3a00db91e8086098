"""The other side of `timed.py`: what answers in a process of its own, which can be ended.

Run as a file, with a kind of work and the import path: it imports nothing of the package, and of
others only what the work needs, so that it starts fast.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

_SPARE_S = 5.0  # beyond the limit, for should nobody be left to end this process


def calls() -> Callable[[Any], Any]:
    """Return what parses a text by one of mlx-lm's parsers of tool calls."""
    found = importlib.util.find_spec("mlx_lm")
    if found is None:
        raise ImportError("mlx_lm")
    package = ModuleType("mlx_lm")  # its own __init__ imports all of MLX
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["mlx_lm"] = package

    def parse(question: Any) -> Any:
        return importlib.import_module(question["parser"]).parse_tool_call(
            question["text"], question["tools"]
        )

    return parse


def grammars() -> Callable[[Any], Any]:
    """Return what compiles a grammar; the first question is the tokenizer."""
    from llguidance import LLMatcher, LLTokenizer

    tokenizer: Any = None

    def compile_once(question: Any) -> Any:
        nonlocal tokenizer
        if tokenizer is None:
            tokenizer = LLTokenizer(
                question["tokenizer"], n_vocab=question["vocab_size"], eos_token=question["ends"]
            )
            return None
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(question), log_level=0)
        matcher.compute_bitmask()
        return None

    return compile_once


_KINDS = {"calls": calls, "grammars": grammars}


def main(kind: str, path: str) -> None:
    """Answer questions, a line of JSON each, until there are no more."""
    sys.path[:] = json.loads(path)
    work: Callable[[Any], Any] | None = None
    for line in sys.stdin.buffer:
        limit_s, question = json.loads(line)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(
            resource.RLIMIT_CPU, (int(time.process_time() + limit_s + _SPARE_S), hard)
        )
        try:
            work = work or _KINDS[kind]()
            answer = json.dumps({"found": work(question)}, allow_nan=False)
        except Exception as error:  # parsers raise whatever they like
            answer = json.dumps({"error": type(error).__name__})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
