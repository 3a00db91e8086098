"""Answers are kept only where asked for, by their owner alone, and whole lines survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_specstream import cli, load
from mlx_specstream.apps import learning
from mlx_specstream.apps.learning import Learner, learned_file, whole_lines
from mlx_specstream.apps.serve.scheduler import Scheduler
from mlx_specstream.commands.adopt import forget


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSTREAM_CACHE", str(tmp_path / "cache"))


def chat(folder: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hello there\nand again\n"))
    return cli.main(["chat", "--model", folder, "--max-tokens", "12", "--tree", "8", *words])


def test_a_chat_keeps_its_answers_if_asked_to(folder, monkeypatch, capsys) -> None:
    path = learned_file(folder, Path(folder))
    assert chat(folder, monkeypatch) == 0
    assert not path.exists()
    assert chat(folder, monkeypatch, "--learn") == 0
    said = "".join(capsys.readouterr())
    assert str(path) in said.replace("\n", "")
    assert "adopt --forget" in said.replace("\n", " ")
    records = [json.loads(line) for line in whole_lines(path)]
    assert [len(record["answer_ids"]) for record in records] == [12, 12]
    _, tokenizer = load(folder)
    assert "hello there" in records[0]["prompt"]
    assert tokenizer.decode(records[1]["prompt_ids"]) == records[1]["prompt"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700

    assert cli.main(["adopt", "--forget"]) == 0
    assert "Deleted the kept answers of 1 models" in capsys.readouterr().out
    assert not path.parent.exists()


def test_a_server_keeps_what_it_answered(folder, tmp_path) -> None:
    from mlx_specstream.apps.serve.request import Request
    from mlx_specstream.apps.serve.settings import Settings

    model, tokenizer = load(folder)
    path = tmp_path / "kept.jsonl"
    for learner in (None, Learner(path, tokenizer)):
        assert not path.exists()
        scheduler = Scheduler(model, tokenizer, learner=learner)
        request = Request(list(b"hello"), Settings(max_tokens=10), lambda _: None, 1e12)
        scheduler.begin(request)
        while not any(getattr(e, "finish_reason", None) for _, e in scheduler.step()):
            pass
        scheduler.end(request)
    (record,) = map(json.loads, whole_lines(path))
    assert record["prompt_ids"] == list(b"hello")
    assert len(record["answer_ids"]) == 10


def test_an_unfinished_line_costs_itself_alone(tmp_path, byte_tokenizer) -> None:
    learner = Learner(tmp_path / "kept.jsonl", byte_tokenizer)
    learner.keep([65] * 3, [66] * 9)
    with learner.path.open("ab") as file:
        file.write(b'{"prompt": "cut o')
    learner.keep([65] * 3, [67] * 9)
    kept = [json.loads(line)["answer_ids"][0] for line in whole_lines(learner.path)]
    assert kept == [66, 67]


def test_what_is_too_short_too_long_or_too_much_is_left_out(
    tmp_path, byte_tokenizer, monkeypatch
) -> None:
    learner = Learner(tmp_path / "kept.jsonl", byte_tokenizer)
    learner.keep([65], [66] * 7)
    learner.keep([65] * 4097, [66] * 9)
    assert not learner.path.exists()
    learner.keep([65], [66] * 8)
    monkeypatch.setattr(learning, "MOST_BYTES", learner.path.stat().st_size + 10)
    learner.keep([65], [66] * 8)
    assert learner.ended
    assert len(list(whole_lines(learner.path))) == 1


def test_a_file_that_cannot_be_written_ends_the_keeping_alone(tmp_path, byte_tokenizer) -> None:
    (tmp_path / "file").write_text("")
    learner = Learner(tmp_path / "file" / "kept.jsonl", byte_tokenizer)
    learner.keep([65], [66] * 8)
    assert learner.ended


def test_nothing_to_forget_is_no_error() -> None:
    assert forget() == "Deleted the kept answers of 0 models, 0.0 MB."
