"""Training texts as token ids, from mlx-lm's data formats: chat, completions, tools, text.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}        either with "tools": [...]
    {"text": "..."}

Every record is checked first, so that a bad one is named by file and line, and the completion is
told from the prompt (`rendering.py`). Records of `specstream distill` also carry the exact ids that
the model wrote; these are used if they spell the record's text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, brief
from ..prompts.lines import json_lines
from ..prompts.read import is_turn
from .hub_data import hub_rows
from .rendering import conversation_tokens, end_tokens, has_chat_template

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

SPLITS = ("train", "valid", "test")
MIN_PROMPT = 2
"""A stream never starts at the first token: its hidden state is an outlier a hundred times larger."""


Key = tuple[str, int]


@dataclass(frozen=True)
class Example:
    """One text. The streams start at its last prompt token and at every later one.

    tokens: the whole text. prompt_length: how many of them are given. where: file and line.
    key: the name of its source and its place there.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    where: str = ""
    key: Key = ("", 0)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.tokens[: self.prompt_length]

    @property
    def answer(self) -> tuple[int, ...]:
        return self.tokens[self.prompt_length :]

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
    """A checked record and where it stands. source, number: of its file."""

    fields: dict[str, Any]
    where: str
    source: str = ""
    number: int = 0

    @property
    def key(self) -> Key:
        """Return the name of the record's source and its place there, as it says or as it stands."""
        source, index = self.fields.get("source"), self.fields.get("index")
        return (
            source if isinstance(source, str) else self.source,
            index if type(index) is int else self.number,
        )


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
    for number, (fields, where) in enumerate(json_lines(path)):
        yield Record(check_record(fields, where, need_answer), where, path.stem, number)


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
    if _are_ids(fields.get("prompt_ids")) and _are_ids(fields.get("answer_ids")):
        texts = []
    elif "prompt" in fields and "completion" in fields:
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
    tokenizer: TokenizerWrapper | None,
    *,
    max_length: int,
    mask_prompt: bool = True,
    cut: bool = True,
) -> tuple[list[Example], DataReport]:
    """Turn records into examples of at most `max_length` tokens; empty ones drop out.

    Without `cut`, longer ones drop out too. No tokenizer: records must hold exact ids.

    Raises:
        DataError: a record that the chat template refuses, or no completion tokens anywhere.
    """
    examples: list[Example] = []
    truncated = no_completion = 0
    for record in records:
        tokens, prompt_length = record_tokens(record, tokenizer, mask_prompt)
        if tokenizer is not None:
            tokens = _until_end(tokens, prompt_length, tokenizer)
        too_long = len(tokens) > max_length
        kept = tuple(tokens[:max_length])
        example = Example(kept, max(MIN_PROMPT, prompt_length), record.where, record.key)
        if len(example.positions) == 0:
            no_completion += 1
            continue
        truncated += too_long
        if too_long and not cut:
            continue
        examples.append(example)
    if records and not examples:
        raise DataError(
            f"none of the {len(records)} records has two completion tokens within {max_length} "
            f"tokens (first: {records[0].where}); give records that end with an answer, or raise "
            "--max-seq-length."
        )
    return examples, DataReport(len(examples), truncated, no_completion)


def record_tokens(
    record: Record, tokenizer: TokenizerWrapper | None, mask_prompt: bool = True
) -> tuple[list[int], int]:
    """Return a record's tokens and how many of them are the prompt.

    A chat is trained on up to its last answer, of which decoding sees the same tokens; one without
    any has no tokens. Without a chat template a completion follows its bare prompt.

    Raises:
        DataError: the chat template refuses the record, or the tokenizer has none.
    """
    fields = record.fields
    if (exact := _exact_ids(fields, tokenizer)) is not None:
        prompt, answer = exact
    elif tokenizer is None:
        raise DataError(f"{record.where} holds text, not ids; a tokenizer is needed.")
    elif "messages" not in fields and "completion" not in fields:
        return _text_tokens(fields["text"], tokenizer), 0
    else:
        try:
            prompt, answer = _chat_tokens(fields, tokenizer)
        except Exception as error:  # templates are programs and raise what they like
            raise DataError(
                f"{record.where} cannot be turned into tokens: {brief(error)}; the model's "
                "chat template refuses it, or the tokenizer has none."
            ) from error
    return prompt + answer, len(prompt) if mask_prompt else 0


def _text_tokens(text: str, tokenizer: TokenizerWrapper) -> list[int]:
    tokens = list(tokenizer.encode(text)) if text else []
    return (
        tokens
        if not tokens or tokens[-1] == tokenizer.eos_token_id
        else [*tokens, tokenizer.eos_token_id]
    )


def _chat_tokens(
    fields: dict[str, Any], tokenizer: TokenizerWrapper
) -> tuple[list[int], list[int]]:
    if "completion" in fields and "prompt" in fields:
        if not has_chat_template(tokenizer):
            answer = tokenizer.encode(fields["completion"], add_special_tokens=False)
            return list(tokenizer.encode(fields["prompt"])), [*answer, tokenizer.eos_token_id]
        messages = [
            {"role": "user", "content": fields["prompt"]},
            {"role": "assistant", "content": fields["completion"]},
        ]
    else:
        messages = fields["messages"]
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    if last < 0:
        return [], []
    return conversation_tokens(messages[: last + 1], fields.get("tools"), tokenizer)


def _exact_ids(
    fields: dict[str, Any], tokenizer: TokenizerWrapper | None
) -> tuple[list[int], list[int]] | None:
    """Return the ids of a distilled record, if they spell its text under this tokenizer.

    A record of ids alone is taken as it is, and so is every one where there is no tokenizer.
    """
    prompt, answer = fields.get("prompt_ids"), fields.get("answer_ids")
    if not _are_ids(prompt) or not _are_ids(answer):
        return None
    assert isinstance(prompt, list)
    assert isinstance(answer, list)
    if tokenizer is None or "messages" not in fields:
        return prompt, answer
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
    ends = end_tokens(tokenizer)
    last = next((i for i in range(len(tokens) - 1, -1, -1) if tokens[i] in ends), None)
    if last is None or last < prompt_length:
        return tokens
    rest = tokens[last + 1 :]
    return tokens[: last + 1] if rest and not tokenizer.decode(rest).strip() else tokens


def read_distilled(
    files: Iterable[str | Path], tokenizer: Any = None, max_length: int = 1024
) -> list[Example]:
    """Read the training texts of several files; those of more than `max_length` tokens are left out.

    Raises:
        DataError: a line is not JSON or holds no text in a known form.
    """
    examples = []
    for file in files:
        records = read_records(file, "train")
        examples += tokenize(records, tokenizer, max_length=max_length, cut=False)[0]
    return examples


def split_held_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Return (train, held out): the prompts whose hash is lowest, so the split outlives new data."""

    def rank(example: Example) -> bytes:
        return hashlib.sha256(json.dumps(example.prompt).encode()).digest()

    chosen = {rank(example) for example in sorted(examples, key=rank)[:count]}
    train = [example for example in examples if rank(example) not in chosen]
    return train, [example for example in examples if rank(example) in chosen]


def digest(examples: Sequence[Example]) -> str:
    """Return a fingerprint of the texts, to notice that a run is resumed on other data."""
    seen = hashlib.sha256()
    for example in examples:
        seen.update(json.dumps([example.prompt_length, *example.tokens]).encode())
    return seen.hexdigest()[:32]
