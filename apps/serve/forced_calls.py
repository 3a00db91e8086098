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

from ...generation.grammar import lark_mark
from ...generation.json_schema import schema_text
from .errors import invalid
from .messages_schema import FunctionChoice, FunctionDescription, PlainFormat
from .schema import ChatRequest

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .tool_calls import ToolFormat

# mlx-lm's parsers whose calls are marks around a name and JSON.
JSON_TOOLS, MISTRAL = "json_tools", "mistral"
_BLANK = "/ {0,2}/"  # one SentencePiece puts before a text and behind every control token
_ARGS = "[ARGS]"  # of Mistral's newer tokenizers: name[ARGS]{...}; older ones write a list


def forced_calls(
    request: ChatRequest, tokenizer: TokenizerWrapper, form: ToolFormat | None, vocab_size: int
) -> str | None:
    """Return the calls that a request insists on as Lark's rule `answer`, None if it does not.

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
    return _lark(functions, tokenizer, form, vocab_size, several)


def _lark(
    functions: Sequence[FunctionDescription],
    tokenizer: TokenizerWrapper,
    form: ToolFormat | None,
    vocab_size: int,
    several: bool,
) -> str:
    """Return the rules in llguidance's dialect of Lark.

    Every function's parameters are a document of their own, so that `#/$defs` in them means theirs.
    """
    if form is None:
        raise invalid(
            "tool_choice: mlx-lm knows no format in which this model calls tools; leave it out, or "
            "ask for an answer that fits a JSON schema.",
            "tool_choice",
        )
    kind = form.parse.__module__.rpartition(".")[2]
    headed = kind == MISTRAL and _ARGS in tokenizer.get_vocab()
    start = lark_mark(tokenizer, form.start, vocab_size)
    if kind == JSON_TOOLS:
        again = rf'({_BLANK} "\n" call)*' if several else ""
        end = lark_mark(tokenizer, form.end, vocab_size)
        rules = [
            f"answer: {_BLANK} call {again}",
            rf'call: {start} {_BLANK} "\n"? body "\n"? {end}',
        ]
    elif headed:
        rules = [f"answer: call{'+' if several else ''}", f"call: {start} body"]
    elif kind == MISTRAL:
        again = '(", " body)*' if several else ""
        rules = [f'answer: {_BLANK} {start} {_BLANK} "[" body {again} "]"']
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
            arguments_mark = lark_mark(tokenizer, _ARGS, vocab_size)
            body = f"{_text(function.name)} {arguments_mark} arguments_{place}"
        else:
            raise invalid(
                f"tool_choice: this model can call functions named by letters, digits, _ and - "
                f"alone, not {function.name!r}.",
                "tools",
            )
        schema = schema_text({**(function.parameters or {}), "type": "object"})
        rules += [f"body_{place}: {body}", f"arguments_{place}: %json {schema}"]
    return "\n".join(rules)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
