"""Answers that must call a tool (`tool_choice`): a grammar of calls as the model writes them.

    <tool_call>
    {"name": "add", "arguments": {"a": 1}}
    </tool_call>

The marks and names are fixed text, the arguments JSON that fits the function's parameters. Only
where a model writes its arguments as JSON can that be said; other formats are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...generation.grammar import Grammar
from .errors import invalid
from .schema import ChatRequest, FunctionChoice, FunctionDescription, PlainFormat

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .tool_calls import ToolFormat

# mlx-lm's parsers whose calls are marks around a name and JSON.
JSON_TOOLS, MISTRAL = "json_tools", "mistral"
_ARGS = "[ARGS]"  # of Mistral's newer tokenizers: name[ARGS]{...}; older ones write a list
# As chat templates show arguments to models; a choice of blanks is one that has no end.
_JSON = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


def forced_calls(
    request: ChatRequest, tokenizer: TokenizerWrapper, form: ToolFormat | None, vocab_size: int
) -> Grammar | None:
    """Return the grammar of the calls that a request insists on, None if it does not.

    `required` takes one call or several, a named function exactly one call of it.

    Raises:
        ApiError: there is nothing to call, or calls of this model cannot be forced.
        SpecStreamError: llguidance is missing or cannot use a function's parameters.
    """
    choice = request.tool_choice
    if choice is None or choice in ("none", "auto"):
        return None
    functions = [tool.function for tool in request.tools or ()]
    if isinstance(choice, FunctionChoice):
        name = choice.function.name
        functions = [function for function in functions if function.name == name]
        if not functions:
            raise invalid(f"tool_choice: {name[:200]!r} is not among the tools.", "tool_choice")
    if not functions:
        raise invalid("tool_choice: a call is required, but there are no tools.", "tool_choice")
    if not isinstance(request.response_format, PlainFormat | None):
        raise invalid(
            "tool_choice: an answer cannot be a call and fit response_format at once; leave one "
            "of them out.",
            "tool_choice",
        )
    several = choice == "required" and request.parallel_tool_calls is not False
    return Grammar.lark(tokenizer, _lark(functions, tokenizer, form, several), vocab_size)


def _lark(
    functions: Sequence[FunctionDescription],
    tokenizer: TokenizerWrapper,
    form: ToolFormat | None,
    several: bool,
) -> str:
    """Return the grammar in llguidance's dialect of Lark.

    Every function's parameters are a document of their own, so that `#/$defs` in them means theirs.
    """
    if form is None:
        raise invalid(
            "tool_choice: mlx-lm knows no format in which this model calls tools; leave it out.",
            "tool_choice",
        )
    kind = form.parse.__module__.rpartition(".")[2]
    headed = kind == MISTRAL and _ARGS in tokenizer.get_vocab()
    start = _mark(tokenizer, form.start)
    if kind == JSON_TOOLS:
        again = r'("\n" call)*' if several else ""
        end = _mark(tokenizer, form.end)
        rules = [f"start: call {again}", rf'call: {start} "\n"? body "\n"? {end}']
    elif headed:
        rules = [f"start: call{'+' if several else ''}", f"call: {start} body"]
    elif kind == MISTRAL:
        again = '(", " body)*' if several else ""
        rules = [f'start: {start} " "? "[" body {again} "]"']
    else:
        raise invalid(
            "tool_choice: calls can be forced only for models that write arguments as JSON (as "
            "Qwen2.5, Hermes and Mistral do); this one has another format, so use auto.",
            "tool_choice",
        )
    rules.append("body: " + " | ".join(f"body_{place}" for place in range(len(functions))))
    for place, function in enumerate(functions):
        if not headed:
            name = json.dumps(function.name, ensure_ascii=False)
            before = _text(f'{{"name": {name}, "arguments": ')
            body = f'{before} arguments_{place} "}}"'
        elif re.fullmatch(r"[\w-]+", function.name):
            body = f"{_text(function.name)} {_mark(tokenizer, _ARGS)} arguments_{place}"
        else:
            raise invalid(
                f"tool_choice: this model can call functions named by letters, digits, _ and - "
                f"alone, not {function.name!r}.",
                "tools",
            )
        schema = {**(function.parameters or {}), "type": "object", "x-guidance": _JSON}
        rules += [f"body_{place}: {body}", f"arguments_{place}: %json {json.dumps(schema)}"]
    return "\n".join(rules)


def _mark(tokenizer: TokenizerWrapper, mark: str) -> str:
    """Return a mark in Lark: a special token by its number, for letters are not it; else its text."""
    added = tokenizer._tokenizer.added_tokens_decoder
    number = next((n for n, t in added.items() if t.special and t.content == mark), None)
    return _text(mark) if number is None else f"<[{number}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
