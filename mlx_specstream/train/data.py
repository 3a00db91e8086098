"""Training texts as token ids, from mlx-lm's data formats: chat, completions, tools, text.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}        either with "tools": [...]
    {"text": "..."}

mlx-lm's own dataset classes turn records into tokens; here every record is checked first, so
that a bad one is named by file and line, and the completion is told from the prompt. Records of
`specstream distill` also carry the exact ids the model wrote; these are used if they spell the
record's text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..prompts.lines import json_lines
from ..prompts.read import is_turn
from ..weights.hub import first_line
from .hub_data import hub_rows

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

SPLITS = ("train", "valid", "test")
MIN_PROMPT = 2
"""A stream never starts at the first token: its hidden state is an outlier a hundred times larger."""


@dataclass(frozen=True)
class Example:
    """One text. The streams start at its last prompt token and at every later one.

    tokens: the whole text. prompt_length: how many of them are given. where: file and line.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    where: str

    @property
    def positions(self) -> range:
        """Return the positions t that get streams: stream 1 has a target x_{t+2}."""
        return range(self.prompt_length - 1, len(self.tokens) - 2)


@dataclass(frozen=True)
class DataReport:
    """What became of the records of a file."""

    examples: int = 0
    truncated: int = 0
    no_completion: int = 0

    def __str__(self) -> str:
        parts = [f"{self.examples} examples"]
        if self.truncated:
            parts.append(f"{self.truncated} cut to the maximum length")
        if self.no_completion:
            parts.append(f"{self.no_completion} left out (fewer than two completion tokens)")
        return ", ".join(parts)


@dataclass(frozen=True)
class Record:
    """A checked record and where it stands."""

    fields: dict[str, Any]
    where: str


def read_records(source: str | Path, split: str, *, need_answer: bool = True) -> list[Record]:
    """Read one split of a JSON-lines file, a folder of them, or a data set on the hub.

    A single file is the `train` split. A split that does not exist gives an empty list.
    Without `need_answer`, a prompt alone is a record too.

    Raises:
        DataError: nothing of that name, an unreadable file, or a record in no known form.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not any((path / f"{name}.jsonl").exists() for name in SPLITS):
            raise DataError(
                f"the folder {path} holds no train.jsonl, valid.jsonl or test.jsonl; name a folder "
                "in mlx-lm's layout or a single .jsonl file."
            )
        file = path / f"{split}.jsonl"
        return list(_lines(file, need_answer)) if file.exists() else []
    if path.exists():
        return list(_lines(path, need_answer)) if split == "train" else []
    rows = hub_rows(str(source), split)
    return [Record(check_record(fields, where, need_answer), where) for fields, where in rows]


def _lines(path: Path, need_answer: bool) -> Iterator[Record]:
    for fields, where in json_lines(path):
        yield Record(check_record(fields, where, need_answer), where)


def check_record(fields: object, where: str, need_answer: bool = True) -> dict[str, Any]:
    """Return the record if it has one of the known forms.

    Raises:
        DataError: it has none, or a part has the wrong type; `where` is named.
    """
    if not isinstance(fields, dict):
        raise DataError(f"{where} must be a JSON object, got {type(fields).__name__}.")
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: tools must be a list, got {type(tools).__name__}.")
    if "prompt" in fields and "completion" in fields:
        texts = [("prompt", fields["prompt"]), ("completion", fields["completion"])]
    elif "messages" in fields:
        _check_messages(fields["messages"], where)
        texts = []
    elif "text" in fields:
        texts = [("text", fields["text"])]
    elif "prompt" in fields and not need_answer:
        texts = [("prompt", fields["prompt"])]
    else:
        known = ", ".join(sorted(map(str, fields))) or "no keys"
        raise DataError(
            f"{where} has neither messages, nor prompt and completion, nor text; it has {known}."
        )
    for name, value in texts:
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} must be a string, got {type(value).__name__}.")
    return fields


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one message.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: every message must be an object with a role.")
        if not is_turn(message):
            raise DataError(
                f"{where}: every message must have its content as a string, or tool_calls."
            )


def tokenize(
    records: Sequence[Record],
    tokenizer: TokenizerWrapper,
    *,
    max_length: int,
    mask_prompt: bool = True,
) -> tuple[list[Example], DataReport]:
    """Turn records into examples of at most `max_length` tokens; shorter and empty ones drop out.

    Raises:
        DataError: a record that the chat template refuses, or no completion tokens anywhere.
    """
    examples: list[Example] = []
    truncated = no_completion = 0
    for record in records:
        tokens, prompt_length = record_tokens(record, tokenizer, mask_prompt)
        tokens = _until_end(tokens, prompt_length, tokenizer)
        cut = len(tokens) > max_length
        example = Example(tuple(tokens[:max_length]), max(MIN_PROMPT, prompt_length), record.where)
        if len(example.positions) == 0:
            no_completion += 1
            continue
        truncated += cut
        examples.append(example)
    if records and not examples:
        raise DataError(
            f"none of the {len(records)} records has two completion tokens within {max_length} "
            f"tokens (first: {records[0].where}); give completions, or raise --max-seq-length."
        )
    return examples, DataReport(len(examples), truncated, no_completion)


def record_tokens(
    record: Record, tokenizer: TokenizerWrapper, mask_prompt: bool = True
) -> tuple[list[int], int]:
    """Return a record's tokens and how many of them are the prompt, by mlx-lm's dataset classes.

    Without a chat template, which mlx-lm's classes insist on, a completion follows its bare prompt.

    Raises:
        DataError: the chat template refuses the record, or the tokenizer has none.
    """
    from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset

    fields = record.fields
    if (exact := _exact_ids(fields, tokenizer)) is not None:
        prompt, answer = exact
        return prompt + answer, len(prompt) if mask_prompt else 0
    rows = [fields]
    try:
        if "completion" in fields and "prompt" in fields and not tokenizer.has_chat_template:
            said = list(tokenizer.encode(fields["prompt"]))
            answer = tokenizer.encode(fields["completion"], add_special_tokens=False)
            return [*said, *answer, tokenizer.eos_token_id], len(said) if mask_prompt else 0
        if "completion" in fields and "prompt" in fields:
            data = CompletionsDataset(rows, tokenizer, "prompt", "completion", mask_prompt)
        elif "messages" in fields:
            data = ChatDataset(rows, tokenizer, mask_prompt=mask_prompt)
        elif not fields["text"]:
            return [], 0
        else:
            data = TextDataset(rows, tokenizer)
        tokens, offset = data.process(fields)
    except Exception as error:  # templates are programs and raise what they like
        raise DataError(
            f"{record.where} cannot be turned into tokens: {first_line(error)}; the model's chat "
            "template refuses it, or the tokenizer has none."
        ) from error
    return list(tokens), int(offset)


def _exact_ids(
    fields: dict[str, Any], tokenizer: TokenizerWrapper
) -> tuple[list[int], list[int]] | None:
    """Return the ids of a distilled record, if they spell its text under this tokenizer."""
    prompt, answer = fields.get("prompt_ids"), fields.get("answer_ids")
    if not _are_ids(prompt) or not _are_ids(answer) or "messages" not in fields:
        return None
    assert isinstance(prompt, list)
    assert isinstance(answer, list)
    try:
        said = tokenizer.decode(answer, skip_special_tokens=True)
    except Exception:  # ids that this tokenizer does not have
        return None
    return (prompt, answer) if said == fields["messages"][-1].get("content") else None


def _are_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(v) is int and 0 <= v < 1 << 31 for v in value)
    )


def _until_end(tokens: list[int], prompt_length: int, tokenizer: TokenizerWrapper) -> list[int]:
    """Drop what a chat template adds behind the end-of-turn token: decoding stops before it."""
    ends = set(tokenizer.eos_token_ids)
    last = next((i for i in range(len(tokens) - 1, -1, -1) if tokens[i] in ends), None)
    if last is None or last < prompt_length:
        return tokens
    rest = tokens[last + 1 :]
    return tokens[: last + 1] if rest and not tokenizer.decode(rest).strip() else tokens


def split_held_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Return (train, held out): the prompts whose hash is lowest, so the split outlives new data."""

    def rank(example: Example) -> bytes:
        prompt = example.tokens[: example.prompt_length]
        return hashlib.sha256(json.dumps(prompt).encode()).digest()

    chosen = {rank(example) for example in sorted(examples, key=rank)[:count]}
    train = [example for example in examples if rank(example) not in chosen]
    return train, [example for example in examples if rank(example) in chosen]


def digest(examples: Sequence[Example]) -> str:
    """Return a fingerprint of the texts, to notice that a run is resumed on other data."""
    seen = hashlib.sha256()
    for example in examples:
        seen.update(json.dumps([example.prompt_length, *example.tokens]).encode())
    return seen.hexdigest()[:32]
