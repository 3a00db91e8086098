"""Where drafts come from, by argument and option: streams, look-up in text and files, or nowhere."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import DecodeConfig, StreamModel, TreeSpec, stream_generate
from mlx_specstream.cli import main
from mlx_specstream.errors import DataError, OptionError
from mlx_specstream.generation.generate import decoder_for
from mlx_specstream.generation.response import GenerationResponse, summary
from mlx_specstream.planner.adaptive import AutoDecoder
from mlx_specstream.speculation.drafting import DraftDecoder, StreamDecoder
from mlx_specstream.speculation.plain import PlainDecoder
from mlx_specstream.speculation.result import LOOK_UP
from mlx_specstream.speculation.sampling import TokenSampler
from tests.support.scripted import script, with_streams

WORDS = ["alpha", "count", "value", "index", "total", "width", "queue", "limit", "cache", "state"]


def program(lines: int = 60) -> str:
    """Return a text of so many lines, as an editor is given."""
    rng = random.Random(5)
    made = []
    for number in range(lines):
        left, right = rng.choice(WORDS), rng.choice(WORDS)
        made.append(f"{left}{number} = {right} * {rng.randrange(100)}")
    return "\n".join(made)


def edited(text: str) -> str:
    """Return the text with one line changed."""
    lines = text.split("\n")
    lines[len(lines) // 2] = "checked = verify(state, limit=7)"
    return "\n".join(lines)


def answer(
    model: StreamModel, tokenizer: TokenizerWrapper, prompt: str, said: str, **options: object
) -> list[GenerationResponse]:
    """Return the responses of a model that answers with `said`."""
    ids, wanted = tokenizer.encode(prompt), tokenizer.encode(said)
    return list(
        stream_generate(
            model,
            tokenizer,
            ids,
            max_tokens=len(wanted),
            logits_processors=[script(wanted, ids)],
            **options,  # type: ignore[arg-type]
        )
    )


@pytest.fixture
def plain_model(tiny_llama: nn.Module) -> StreamModel:
    """A model without streams."""
    return StreamModel.plain(tiny_llama)


def test_an_edit_takes_a_fraction_of_the_passes(
    tiny_model: Callable[..., nn.Module], byte_tokenizer: TokenizerWrapper
) -> None:
    """A text of 60 lines, written again with one line changed, by a model without streams."""
    text = program()
    model = StreamModel.plain(tiny_model("llama", max_position_embeddings=8192))
    responses = answer(model, byte_tokenizer, f"Change one line:\n{text}\n---\n", edited(text))
    last = responses[-1]
    assert "".join(r.text for r in responses) == edited(text)
    assert last.stats.tokens_per_step > 4
    assert last.stats.looked_up == last.stats.accepted > last.stats.tokens // 2
    assert "of them looked up" in summary(last)
    assert {r.origin for r in responses} == {0, LOOK_UP}
    assert sum(r.from_draft for r in responses) == last.stats.accepted


def test_what_quotes_nothing_is_decoded_plainly(
    plain_model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    rng = random.Random(3)
    said = "".join(chr(rng.randrange(33, 127)) for _ in range(150))
    last = answer(plain_model, byte_tokenizer, "Say what nobody said.", said)[-1]
    assert last.stats.tokens_per_step < 1.05
    assert last.stats.drafted < 0.1 * last.stats.tokens


def test_files_are_looked_up_in(
    plain_model: StreamModel, byte_tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    file = tmp_path / "program.txt"
    file.write_text(program(), encoding="utf-8")
    said = "\n".join(program().split("\n")[10:20])
    alone = answer(plain_model, byte_tokenizer, "Quote it.", said)[-1].stats
    found = answer(plain_model, byte_tokenizer, "Quote it.", said, lookup_files=[file])[-1].stats
    assert found.passes < 0.6 * alone.passes
    with pytest.raises(DataError, match=r"look-up file .*missing.* cannot be read as text"):
        answer(plain_model, byte_tokenizer, "Quote it.", said, lookup_files=[tmp_path / "missing"])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as text"):
        answer(plain_model, byte_tokenizer, "Quote it.", said, lookup_files=[file])


def test_drafts_say_where_drafts_come_from(
    tiny_llama: nn.Module, byte_tokenizer: TokenizerWrapper
) -> None:
    model = with_streams(tiny_llama)
    text = program(8)
    passes = {}
    for drafts in ("streams,lookup", "streams", "lookup", "none"):
        responses = answer(model, byte_tokenizer, text, text, drafts=drafts)
        assert "".join(r.text for r in responses) == text
        stats = responses[-1].stats
        passes[drafts] = stats.passes
        assert (stats.looked_up > 0) == ("lookup" in drafts)
    assert passes["none"] == len(text)
    assert passes["streams,lookup"] < 0.5 * passes["streams"]
    assert passes["lookup"] < 0.5 * passes["streams"]
    with pytest.raises(OptionError, match="cannot read the drafts"):
        answer(model, byte_tokenizer, text, text, drafts="ngrams")


def test_which_decoder_is_made(tiny_llama: nn.Module) -> None:
    plain, joined = StreamModel.plain(tiny_llama), with_streams(tiny_llama)
    shared = with_streams(tiny_llama, mode="shared", pruner_rank=0)

    def made(model: StreamModel, words: str, drafts: str | None, speculative: bool = True) -> type:
        config = DecodeConfig.of_words(words, drafts=drafts)
        return type(decoder_for(model, config, TokenSampler(), speculative))

    assert made(plain, "auto", None) is AutoDecoder
    assert made(plain, "8", None) is PlainDecoder
    assert made(plain, "8", "lookup") is DraftDecoder
    assert made(plain, "auto", "streams") is PlainDecoder
    assert made(plain, "auto", None, speculative=False) is PlainDecoder
    assert made(joined, "8", None) is StreamDecoder
    assert made(joined, "auto", "lookup") is AutoDecoder
    assert made(joined, "auto", "none") is PlainDecoder
    assert made(shared, "auto", "none") is StreamDecoder
    with pytest.raises(OptionError, match="shared mode"):
        made(shared, "auto", "lookup")
    with pytest.raises(OptionError, match="name a number of rows"):
        made(plain, "3^2", "lookup")
    decoder = decoder_for(
        joined, DecodeConfig(TreeSpec(), drafts=("streams",)), TokenSampler(), True
    )
    assert decoder.lookup is None


def test_a_conversation_quotes_its_earlier_turns(
    plain_model: StreamModel, byte_tokenizer: TokenizerWrapper
) -> None:
    """What was said before stays known beside the prompt cache, without being given again."""
    text, cache = program(8), plain_model.backbone.new_cache()
    answer(plain_model, byte_tokenizer, text, "Well.\n", prompt_cache=cache)
    again = answer(plain_model, byte_tokenizer, ".\nAgain: ", text, prompt_cache=cache)
    assert "".join(r.text for r in again) == text
    assert again[-1].stats.tokens_per_step > 3
    cache.rewind(0)
    fresh = answer(plain_model, byte_tokenizer, "Again: ", text, prompt_cache=cache)
    assert fresh[-1].stats.passes > 1.5 * again[-1].stats.passes


def test_the_command_line_chooses_drafts(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(program(3), encoding="utf-8")
    command = ["generate", "--model", folder, "--prompt", "abcabcabcabc", "-m", "12", "--json"]
    told = {}
    for drafts in ("none", "lookup", "streams,lookup"):
        assert main([*command, "--drafts", drafts, "--lookup-files", str(file)]) == 0
        told[drafts] = json.loads(capsys.readouterr().out)
    assert len({tuple(record["tokens"]) for record in told.values()}) == 1
    assert told["none"]["config"]["drafts"] == []
    assert told["streams,lookup"]["config"]["drafts"] == ["streams", "lookup"]
    assert main([*command, "--drafts", "some"]) == 2
    assert "cannot read the drafts 'some'" in capsys.readouterr().err
