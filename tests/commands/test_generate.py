"""`specstream generate`: flags, output, and wrong ones in one line with exit status 2."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from mlx_specstream import cli
from mlx_specstream.generation import run
from mlx_specstream.generation.run import GenerationRun
from tests.support import tiny


def spoken(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[str, str]:
    """Run `specstream generate` and return what it printed on stdout and stderr."""
    assert cli.main(["generate", *words]) == status
    printed = capsys.readouterr()
    return printed.out, printed.err


def expected(folder: str, prompt: list[int], max_tokens: int) -> str:
    model, tokenizer = mlx_lm.load(folder)[:2]
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=max_tokens)


def test_text_is_mlx_lms(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = [tiny.SYSTEM, *b"be brief", tiny.EOS, tiny.USER, *b"hi\nyou", tiny.EOS, tiny.ASSISTANT]
    words = ["--model", folder, "-p", "hi\\nyou", "--system-prompt", "be brief", "-m", "12"]
    text = expected(folder, prompt, 12)
    for extra in ([], ["--tree", "chain2"], ["--no-speculation"], ["--streams", "none"]):
        out, _ = spoken(capsys, *words, "--verbose", "F", *extra)
        assert out == text + "\n"


def test_verbose_figures(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = spoken(capsys, "--model", folder, "-p", "hi", "-m", "5")
    assert out.startswith("==========\n")
    assert "Generation: 5 tokens" in out
    assert "Speculation: 5 tokens in" in out
    assert not err


def test_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folder, "-p", "hi", "-m", "7", "--ignore-chat-template", "--json"]
    record = json.loads(spoken(capsys, *words, "--tree", "2^3", "--no-conditioning")[0])
    assert record["text"] == expected(folder, list(b"hi"), 7)
    assert len(record["tokens"]) == record["generation_tokens"] == 7
    assert record["finish_reason"] == "length"
    assert record["speculation"]["tokens"] == 7
    assert sum(record["speculation"]["histogram"]) == record["speculation"]["passes"]
    assert record["config"]["tree"] == "2^3"
    assert record["config"]["use_conditioner"] is False
    assert record["streams"] == Path(folder).name


@pytest.mark.parametrize(("count", "known"), [(1, False), (2, False), (3, True)])
def test_a_rate_of_one_or_two_tokens_is_not_told(
    folder: str, capsys: pytest.CaptureFixture[str], count: int, known: bool
) -> None:
    words = ["--model", folder, "-p", "hello", "-m", str(count), "--no-speculation"]
    out, _ = spoken(capsys, *words)
    (line,) = [line for line in out.splitlines() if line.startswith("Generation:")]
    assert line.startswith(f"Generation: {count} tokens")
    assert ("tokens-per-sec" in line) == known
    record = json.loads(spoken(capsys, *words, "--json")[0])
    assert (record["generation_tps"] is not None) == known
    assert record["prompt_tps"] is not None
    words += ["--ignore-chat-template", "--prompt", "hi"]
    assert json.loads(spoken(capsys, *words, "--json")[0])["prompt_tps"] is None


class Tty(io.StringIO):
    """A terminal that remembers all it was sent."""

    def isatty(self) -> bool:
        return True


def test_progress_of_a_long_prompt_at_a_terminal(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", folder, "-p", "hello" * 20, "-m", "2", "--verbose", "F"]
    words += ["--prefill-step-size", "40"]
    plain = spoken(capsys, *words)
    assert plain[1] == ""
    err = Tty()
    monkeypatch.setattr("sys.stderr", err)
    assert spoken(capsys, *words)[0] == plain[0]
    lines = err.getvalue().split("\r")
    assert [line for line in lines if "reading" in line] == [
        f"\x1b[Kreading {done}/103 tokens" for done in (0, 40, 80, 102)
    ]
    assert lines[-1] == "\x1b[K", "the line is taken away"


def test_a_terminal_gets_paced_chunks(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[object] = []
    given = GenerationRun.responses

    def noted(self: Any, decoder: Any, module: Any, lent: Any, chunk: Any, progress: Any) -> Any:
        chunks.append(chunk)
        return given(self, decoder, module, lent, chunk, progress)

    monkeypatch.setattr(GenerationRun, "responses", noted)
    words = ["--model", folder, "-p", "hello", "-m", "1"]
    spoken(capsys, *words)
    monkeypatch.setattr("sys.stdout", Tty())
    spoken(capsys, *words)
    spoken(capsys, *words, "--prefill-step-size", "300")
    assert [type(chunk).__name__ for chunk in chunks] == ["int", "PacedChunks", "int"]
    assert chunks[::2] == [2048, 300]


def test_stop_strings_and_tokens(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folder, "-p", "hi", "-m", "20", "--json"]
    whole = json.loads(spoken(capsys, *words)[0])
    third = whole["tokens"][2]
    record = json.loads(spoken(capsys, *words, "--extra-eos-token", str(third))[0])
    cut = whole["tokens"].index(third) + 1
    assert record["tokens"] == whole["tokens"][:cut]
    assert record["finish_reason"] == "stop"
    stop = whole["text"][3:5]
    record = json.loads(spoken(capsys, *words, "--stop", stop, "never-said")[0])
    assert record["text"] == whole["text"][: whole["text"].index(stop)]


def test_sampling_and_seed(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folder, "-p", "hi", "-m", "12", "--json", "--temp", "1", "--top-k", "30"]
    words += ["--top-p", "0.95", "--min-p", "0.01"]
    runs = [json.loads(spoken(capsys, *words, "--seed", seed)[0])["tokens"] for seed in "112"]
    assert runs[0] == runs[1] != runs[2]


def test_a_seed_gives_the_plain_text_too(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folder, "-p", "hi", "-m", "20", "--json", "--temp", "1", "--seed", "3"]
    words += ["--xtc-probability", "0.5", "--xtc-threshold", "0.1", "--repetition-penalty", "1.2"]
    words += ["--presence-penalty", "0.3", "--frequency-penalty", "0.2"]
    words += ["--logit-bias", '{"101": 3.5, "32": -1}']
    ways = (["--no-speculation"], ["--tree", "12"], ["--tree", "chain"])
    runs = [json.loads(spoken(capsys, *words, *way)[0])["tokens"] for way in ways]
    assert runs[0] == runs[1] == runs[2]
    words[words.index("--repetition-penalty") + 1] = "1.0"
    assert json.loads(spoken(capsys, *words, *ways[0])[0])["tokens"] != runs[0]


def test_typical_acceptance_is_called_lossy(
    folder: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--model", folder, "-p", "hi", "-m", "6", "--tree", "8"]
    record = json.loads(spoken(capsys, *words, "--json")[0])
    assert (record["config"]["lossy"], record["speculation"]["lossy"]) == (False, False)
    out, _ = spoken(capsys, *words, "--json", "--lossy-typical")
    record = json.loads(out)
    assert (record["config"]["lossy"], record["speculation"]["lossy"]) == (True, True)
    assert record["config"]["typical"] == {"epsilon": 0.09, "delta": 0.3}
    assert "typical acceptance is lossy" in caplog.text
    out, _ = spoken(capsys, *words, "--lossy-typical", "0.2:0.5")
    assert "Speculation (lossy): " in out
    assert "lossy" not in spoken(capsys, *words)[0]
    assert cli.main(["verify", "--model", folder, "--lossy-typical"]) == 2
    assert "verify compares with plain decoding" in capsys.readouterr().err
    for verb in ("demo", "serve", "bench"):  # their outputs would not say so
        assert cli.main([verb, "--lossy-typical"]) == 2


def test_constrained_answers(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance")
    words = ["--model", folder, "-p", "hi", "--json", "--tree", "8", "-m", "30"]
    record = json.loads(spoken(capsys, *words, "--regex", "(yes|no)!")[0])
    assert record["text"] in ("yes!", "no!")
    (tmp_path / "schema.json").write_text('{"enum": ["red", "green"]}')
    words += ["--json-schema", str(tmp_path / "schema.json")]
    assert json.loads(json.loads(spoken(capsys, *words)[0])["text"]) in ("red", "green")


def test_prompt_from_standard_input(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", folder, "-m", "4", "--verbose", "F"]
    from_option = spoken(capsys, *words, "-p", "hello there")[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello there"))
    assert spoken(capsys, *words, "-p", "-")[0] == from_option


def test_the_answers_beginning(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folder, "-p", "hi", "-m", "4", "--json", "--prefill-response", "Well"]
    record = json.loads(spoken(capsys, *words)[0])
    # The template closes a turn with its end token, which a continued turn must not have.
    assert record["prompt_tokens"] == len([tiny.USER, *b"hi", tiny.EOS, tiny.ASSISTANT, *b"Well"])


def test_an_interrupt_exits_130(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.GenerationRun, "should_continue", interrupted)
    _, err = spoken(capsys, "--model", folder, "-p", "hi", status=130)
    assert err == "specstream: interrupted.\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", " \n "], "the prompt is empty"),
        (["-p", "hi" * 300], "the model's context holds 512"),
        (["-p", "hi", "-m", "0"], "max_tokens must be at least 1"),
        (["-p", "hi", "--tree", "bush"], "cannot read the tree 'bush'"),
        (["-p", "hi", "--tree", "0"], "a tree has 1 to 1024 rows"),
        (["-p", "hi", "--prune", "x"], "cannot read the pruning 'x'"),
        (["-p", "hi", "--prune", "0"], "pruning keeps at least 1 row"),
        (["-p", "hi", "--prune", "4:2"], "threshold is a probability"),
        (["-p", "hi", "--temp", "-1"], "--temp must be"),
        (["-p", "hi", "--temp", "nan"], "--temp must be"),
        (["-p", "hi", "--top-p", "1.5"], "--top-p must be"),
        (["-p", "hi", "--min-p", "-0.1"], "--min-p must be"),
        (["-p", "hi", "--top-k", "-1"], "--top-k must be"),
        (["-p", "hi", "--temp", "1", "--top-k", "256"], "top-k must be below"),
        (["-p", "hi", "--xtc-threshold", "0.7"], "--xtc-threshold must be between 0 and 0.5"),
        (["-p", "hi", "--repetition-penalty", "0"], "--repetition-penalty must be"),
        (["-p", "hi", "--presence-penalty", "inf"], "--presence-penalty must be"),
        (["-p", "hi", "--logit-bias", "[1]"], "--logit-bias must be a JSON object"),
        (["-p", "hi", "--logit-bias", '{"1": null}'], "--logit-bias must be a JSON object"),
        (["-p", "hi", "--logit-bias", '{"256": 1}'], "ids are 0 to 255"),
        (["-p", "hi", "--lossy-typical", "x"], "cannot read the typical acceptance 'x'"),
        (["-p", "hi", "--lossy-typical", "2"], "epsilon must be above 0"),
        (["-p", "hi", "--json-schema", "nowhere.json"], "nowhere.json cannot be read"),
        (["-p", "hi", "--stop", ""], "stop strings"),
        (["-p", "hi", "--extra-eos-token", "nope"], "no single token 'nope'"),
        (["-p", "hi", "--chat-template-config", "[1"], "--chat-template-config must be"),
        (["-p", "hi", "--max-kv-size", "4"], "max_kv_size must be above 4"),
        (["-p", "hi", "--kv-bits", "4"], "cannot use a cache of 4 bits in groups of 64"),
        (["-p", "hi", "--prompt-cache-file", "no.safetensors"], "there is no prompt cache no"),
        (["-p", "hi", "--draft-model", "x/y z"], "the path x/y z does not exist"),
        (["-p", "hi", "--num-draft-tokens", "99"], "tree depth must be 0 to"),
        (["-p", "hi", "--image", "x"], "--image of mlx-lm is not supported"),
        (["-p", "hi", "--streams", "nowhere"], "there are no streams 'nowhere'"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], sentence: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = spoken(capsys, "--model", folder, *words, status=2)
    assert sentence in err
    assert err.startswith("specstream: ")
    assert err.count("\n") == 1
