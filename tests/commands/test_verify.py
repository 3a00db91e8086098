"""`specstream verify`: identical answers pass, a broken engine fails, near-ties are told apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import cli
from mlx_specstream.commands.verify import conditions
from mlx_specstream.config import DecodeConfig, PruneSpec, TreeSpec
from mlx_specstream.errors import DataError
from mlx_specstream.loading.load import StreamModel
from mlx_specstream.machine import Machine
from mlx_specstream.prompts import built_in_prompts, encode_prompt, read_prompts
from mlx_specstream.verify import (
    Replayed,
    compare,
    first_difference,
    judge,
    plain_logits,
    precision_of,
    replay,
    rounding_bound,
)
from tests.support import tiny
from tests.support.scripted import accept_one_draft, with_streams
from tests.support.tiny_models import tiny_random_model

WORDS = ["--num-prompts", "3", "--max-tokens", "12"]


def verified(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert cli.main(["verify", *words]) == status
    return capsys.readouterr().out


def test_identical(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folder, *WORDS, "--tree", "chain", "--tree", "6"]
    out = verified(capsys, *words)
    assert out.count("3 identical, 0 near-tie, 0 mismatch") == 2
    record = json.loads(verified(capsys, *words, "--json"))
    assert [run["config"]["tree"] for run in record["runs"]] == ["chain", "6"]
    for run in record["runs"]:
        assert (run["identical"], run["mismatch"]) == (3, 0)
        for prompt in run["prompts"]:
            assert prompt["divergence"] is None
            assert prompt["plain"]["tokens"] == prompt["speculative"]["tokens"]
            assert len(prompt["plain"]["tokens"]) == prompt["plain"]["figures"]["passes"]
    assert record["dtype"] == "float32"


def test_a_broken_engine_fails(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_one_draft(monkeypatch)
    words = ["--model", folder, *WORDS, "--tree", "chain"]
    assert "a real mismatch" in verified(capsys, *words, status=1)
    record = json.loads(verified(capsys, *words, "--json", status=1))
    run = record["runs"][0]
    assert run["mismatch"] > 0
    for prompt in run["prompts"]:
        divergence = prompt["divergence"]
        if divergence is None:
            continue
        at = divergence["position"]
        plain, ours = prompt["plain"]["tokens"], prompt["speculative"]["tokens"]
        assert plain[:at] == ours[:at]
        assert divergence["plain_token"] == plain[at] != ours[at]
        assert divergence["speculative_token"] == ours[at]
        assert divergence["distance"] >= divergence["gap"] > 0


def test_an_interrupt_keeps_what_was_found(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key comes in the second prompt's speculative answer: one prompt is known by then."""
    calls: list[DecodeConfig] = []

    def interrupted(*arguments: Any, **named: Any) -> Replayed:
        if arguments[4] is not None:
            calls.append(arguments[4])
            if len(calls) == 2:
                raise KeyboardInterrupt
        return replay(*arguments, **named)

    monkeypatch.setattr("mlx_specstream.verify.replay", interrupted)
    words = ["--model", folder, *WORDS, "--tree", "chain"]
    out = verified(capsys, *words, status=130)
    assert "[1/3]" in out
    assert "[2/3]" not in out
    assert "1 identical, 0 near-tie, 0 mismatch" in out
    assert "1 of 3 prompts, answers of up to 12 tokens" in out
    calls.clear()
    record = json.loads(verified(capsys, *words, "--json", status=130))
    assert record["prompts_asked"] == 3
    assert len(record["runs"][0]["prompts"]) == 1


@pytest.mark.parametrize(
    ("token_s", "prompts", "tokens"),
    [
        (0.01, 12, 20),  # a fast machine: everything
        (0.5, 3, 18),  # a slow one: a quarter of 105 s for each prompt, a third of that per answer
        (5.0, 1, 16),  # a very slow one: as much as tells anything
    ],
)
def test_a_quick_comparison_keeps_its_time(
    token_s: float,
    prompts: int,
    tokens: int,
    folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_specstream import verify

    now = [0.0]
    original = verify.stream_generate

    def slow(*arguments: Any, **named: Any) -> Iterator[Any]:
        for response in original(*arguments, **named):
            now[0] += token_s
            yield response

    def clock() -> float:
        now[0] += 1e-6
        return now[0]

    monkeypatch.setattr(verify, "stream_generate", slow)
    monkeypatch.setattr("time.perf_counter", clock)
    words = ["--model", folder, "--quick", "--max-tokens", "20", "--tree", "chain", "--tree", "6"]
    out = verified(capsys, *words)
    count, why = ("all", "\n") if prompts == 12 else (f"{prompts} of", ": the time was up\n")
    assert f"{count} 12 prompts, answers of up to {tokens} tokens{why}" in out
    assert out.count(f"{prompts} identical, 0 near-tie, 0 mismatch") == 2
    assert now[0] < 120 or prompts == 1
    if prompts != 3:
        return
    now[0] = 0.0
    record = json.loads(verified(capsys, *words, "--json"))
    assert record["prompts_asked"] == 12
    assert len(record["runs"][0]["prompts"]) == prompts


def test_what_the_comparison_rests_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that keep a state: that Metal computes drafts with other kernels than one row."""
    hybrid, other = (StreamModel.plain(tiny_random_model(name)) for name in ("qwen3_5", "llama"))
    assert not any("keep a state" in line for line in conditions(hybrid))
    monkeypatch.setattr(Machine, "read", lambda: Machine(backend="metal"))
    assert any("keep a state" in line for line in conditions(hybrid))
    assert not any("keep a state" in line for line in conditions(other))


def test_the_gap_is_the_references(tiny_llama: nn.Module, byte_tokenizer: TokenizerWrapper) -> None:
    model = with_streams(tiny_llama)
    prompt = list(b"some prompt")
    plain = replay(model, byte_tokenizer, prompt, 8, None)
    assert plain.tokens == replay(model, byte_tokenizer, prompt, 8, DecodeConfig()).tokens
    other = (plain.tokens[5] + 1) % 250
    wrong = Replayed([*plain.tokens[:5], other], "", plain.stats, 0.0)
    found = compare(model, byte_tokenizer, prompt, plain, wrong).divergence
    assert found is not None
    logits = tiny_llama(mx.array([[*prompt, *plain.tokens[:5]]]))[0, -1]
    first, second = sorted(logits.tolist())[:-3:-1]  # type: ignore[arg-type]
    assert found.position == 5
    assert found.gap == pytest.approx(first - second, abs=1e-4)
    assert found.distance == pytest.approx(first - logits[other].item(), abs=1e-4)
    assert found.plain_text == byte_tokenizer.decode([plain.tokens[5]])


@pytest.mark.parametrize(
    ("dtype", "gap", "near"),
    [
        (mx.float32, 5e-4, True),
        (mx.float32, 2e-3, False),
        (mx.float16, 0.05, True),
        (mx.float16, 0.2, False),
        (mx.bfloat16, 0.5, True),
        (mx.bfloat16, 1.0, False),
    ],
)
def test_near_ties_depend_on_the_dtype(dtype: mx.Dtype, gap: float, near: bool) -> None:
    logits = mx.array([20.0, 20.0 - gap, 3.0, -1.0])
    found = judge(logits, dtype, 0, 0, 1)
    assert found.near_tie is near
    # A token far below is a mismatch, whatever the two best do.
    assert not judge(logits, dtype, 0, 0, 2).near_tie
    # So is an answer that is over where the other goes on.
    assert not judge(logits, dtype, 0, 0, -1).near_tie


QUANTISED = {
    "affine 2": (2, 32, "affine"),
    "affine 3": (3, 64, "affine"),
    "affine 4": (4, 32, "affine"),
    "affine 6": (6, 64, "affine"),
    "affine 8": (8, 32, "affine"),
    "mxfp4": (4, 32, "mxfp4"),
    "mxfp8": (8, 32, "mxfp8"),
    "nvfp4": (4, 16, "nvfp4"),
}


@pytest.mark.parametrize(
    ("dtype", "weights", "tied"),
    [
        *(("bfloat16", weights, False) for weights in ("full", *QUANTISED)),
        *(("float16", weights, True) for weights in ("full", "affine 4", "mxfp4", "nvfp4")),
    ],
)
def test_other_precisions_differ_at_near_ties_only(
    dtype: str, weights: str, tied: bool, byte_tokenizer: TokenizerWrapper
) -> None:
    """Every way MLX quantises, under streams of 16 bits, pruned too (which reads head rows)."""
    model = tiny.tiny_model(num_hidden_layers=3, tie_word_embeddings=tied)
    model.set_dtype(getattr(mx, dtype))
    if weights != "full":
        bits, group_size, mode = QUANTISED[weights]
        # Widths of 96 (the tiny model's) are no multiple of every group size.
        fits = lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % group_size == 0  # noqa: E731
        nn.quantize(model, group_size=group_size, bits=bits, mode=mode, class_predicate=fits)
        assert f"{bits}-bit {mode}" in precision_of(StreamModel.plain(model))
    joined = with_streams(model)
    prompt = list(b"a prompt")
    plain = replay(joined, byte_tokenizer, prompt, 16, None)
    for config in (DecodeConfig(TreeSpec(rows=6)), DecodeConfig(TreeSpec(rows=8), PruneSpec(5))):
        ours = replay(joined, byte_tokenizer, prompt, 16, config)
        found = compare(joined, byte_tokenizer, prompt, plain, ours)
        assert found.verdict != "mismatch", found.divergence


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_defect_is_told_from_rounding(dtype: str, byte_tokenizer: TokenizerWrapper) -> None:
    """A token a little worse than rounding allows; the measured rounding is far smaller."""
    model = tiny.tiny_model(num_hidden_layers=3)
    model.set_dtype(getattr(mx, dtype))
    joined = with_streams(model)
    prompt = list(b"some prompt")
    plain = replay(joined, byte_tokenizer, prompt, 4, None)
    logits = plain_logits(joined, byte_tokenizer, prompt, 3)
    bound = rounding_bound(getattr(mx, dtype), mx.abs(logits).max().item())
    below = (logits.max() - logits).tolist()
    order = sorted(range(256), key=lambda token: below[token])
    for token in (order[1], order[-1]):
        wrong = Replayed([*plain.tokens[:3], token], "", plain.stats, 0.0)
        found = compare(joined, byte_tokenizer, prompt, plain, wrong).divergence
        assert found is not None
        assert found.margin == pytest.approx(below[token], abs=1e-5)
        assert found.near_tie is (below[token] <= bound)
        assert found.precision == dtype
        assert found.moved is not None
        assert 0 <= found.moved < bound
        assert f"{dtype} rounds by up to" in str(found)
        assert ("not rounding" in str(found)) is not found.near_tie


def test_shared_streams_measure_no_rounding(byte_tokenizer: TokenizerWrapper) -> None:
    joined = with_streams(tiny.tiny_model(num_hidden_layers=3), mode="shared")
    plain = replay(joined, byte_tokenizer, [1, 2], 3, None)
    wrong = Replayed([*plain.tokens[:2], plain.tokens[2] ^ 1], "", plain.stats, 0.0)
    found = compare(joined, byte_tokenizer, [1, 2], plain, wrong).divergence
    assert found is not None
    assert found.moved is None
    assert found.margin >= 0


def test_bound_of_float32_is_fixed() -> None:
    assert rounding_bound(mx.float32, 1000.0) == 1e-3
    assert rounding_bound(mx.bfloat16, 0.0) == 1e-3


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0), ([], [], None)],
)
def test_first_difference(first: list[int], second: list[int], place: int | None) -> None:
    assert first_difference(first, second) == place


# -- prompts ------------------------------------------------------------------------------------


def test_the_built_in_dozen() -> None:
    titles = [prompt.title for prompt in built_in_prompts()]
    assert len(titles) == len(set(titles)) == 12


def test_prompt_files(tmp_path: Path, byte_tokenizer: TokenizerWrapper) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "c", "completion": "d"},
        {"text": "e"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    ids = [encode_prompt(byte_tokenizer, prompt) for prompt in read_prompts(data)]
    chat = [[tiny.USER, ord(x), tiny.EOS, tiny.ASSISTANT] for x in "ac"]
    assert ids == [*chat, [ord("e")]]
    plain = tmp_path / "prompts.txt"
    plain.write_text("one\n\n{not json\nthree\n")
    assert [prompt.title for prompt in read_prompts(plain, 2)] == ["one", "{not json"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"{", "line 1 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n[]', "line 2 holds no prompt"),
        ("a.jsonl", b'{"messages": []}', "line 1 holds no prompt"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": 3}]}',
            "line 1: every message must have its content as a string",
        ),
        ("a.jsonl", b'{"prompt": " "}', "line 1 holds no prompt"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("", b"", "cannot be read"),
    ],
)
def test_bad_prompt_files(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--streams", "none"], "has no streams"),
        (["--prompts", "missing.jsonl"], "cannot be read"),
        (["--tree", "4", "--tree", "?"], "cannot read the tree"),
    ],
)
def test_bad_options(
    words: list[str], sentence: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", "--model", folder, *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
