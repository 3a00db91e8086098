"""`specstream bench` on a tiny model: a full run, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_specstream import cli, exit_status
from mlx_specstream.bench import run as bench_run
from mlx_specstream.bench.result import Result
from tests.bench.conftest import TREES, WORDS
from tests.support.scripted import accept_one_draft

pytestmark = pytest.mark.usefixtures("quick_ceilings")


def bench(*words: str) -> int:
    return cli.main(["bench", *words, "--no-plots"])


def test_every_method_answers_every_prompt_alike(result: Result) -> None:
    names = ["mlx-lm", "plain, ours", "tree chain", "tree 6, inline", "tree 6, drafts lookup"]
    assert list(result.named_methods) == names
    assert [asked.category for asked in result.asked] == ["math", "math", "chat", "chat"]
    assert result.complete
    for asked in result.asked:
        assert sorted(run.method for run in asked.runs) == sorted(names)
        assert {run.verdict for run in asked.runs} == {"identical"}
        assert {run.tokens for run in asked.runs} == {asked.runs[0].tokens}
        assert all(run.prefill_s > 0 and run.decode_s > 0 for run in asked.runs)
    assert [run.method for run in result.cold] == names


def test_turns_rotate(result: Result) -> None:
    firsts = [next(run.method for run in asked.runs if run.order == 0) for asked in result.asked]
    assert len(set(firsts)) == 4


def test_passes_are_counted(result: Result) -> None:
    for asked in result.asked:
        for run in asked.runs:
            if run.method in ("mlx-lm", "plain, ours"):
                assert (run.passes, run.drafted, run.by_accepted) == (run.tokens, 0, [])
            else:
                accepted = sum(n * count for n, count in enumerate(run.by_accepted))
                # The last pass may have had more to give than the answer could hold.
                assert 0 <= run.tokens - run.passes - accepted + 1 <= 1
                assert run.drafted > 0


def test_the_report_can_be_made_again(
    bench_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--from", str(bench_folder), "--output", str(tmp_path / "again")) == 0
    report = (tmp_path / "again" / "report.md").read_text()
    assert report == (bench_folder / "report.md").read_text()
    assert "| math | tree chain | 2 |" in report
    out = capsys.readouterr().out
    assert "tree 6, inline" in out
    assert max(map(len, out.splitlines()[:30])) <= 80


def test_an_interrupted_run_goes_on(
    bench_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = bench_run.Bench._ask
    asked: list[str] = []

    def ask(self: Any, case: Any, number: int) -> Any:
        if len(asked) == 2:
            asked.append("stop")
            raise KeyboardInterrupt
        asked.append(case.sha256)
        return original(self, case, number)

    monkeypatch.setattr(bench_run.Bench, "_ask", ask)
    words = ("--model", bench_model, *WORDS, *TREES)
    assert bench(*words, "--output", str(tmp_path)) == exit_status.EXIT_INTERRUPTED
    path = tmp_path / "result.json"
    assert len(Result.load(path).asked) == 2
    assert f"--resume {path}" in capsys.readouterr().out.replace("\n", "")
    assert bench(*words, "--output", str(tmp_path)) == 2  # never over an earlier result
    assert bench("--resume", str(tmp_path)) == 0
    found = Result.load(path)
    assert found.complete
    assert len({one.sha256 for one in found.asked}) == len(found.asked) == 4
    assert len(asked) == 5


def test_a_different_output_fails(
    bench_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accept_one_draft(monkeypatch)
    words = ("--model", bench_model, "--categories", "chat", "--num-prompts", "1", "-m", "8")
    assert bench(*words, "--tree", "chain", "--output", str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "Different output, a failure: tree chain, chat prompt" in out
    failed = Result.load(tmp_path / "result.json").failures
    assert [run.method for _, run in failed] == ["tree chain"]
    assert failed[0][1].position >= 0


def test_again_with_the_same_settings(bench_folder: Path, result: Result, tmp_path: Path) -> None:
    assert bench("--rerun", str(bench_folder), "--output", str(tmp_path)) == 0
    again = Result.load(tmp_path / "result.json")
    assert again.settings == result.settings
    assert [asked.sha256 for asked in again.asked] == [asked.sha256 for asked in result.asked]
    assert again.started >= result.started


def test_again_needs_the_same_prompts(
    bench_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"category": "a", "prompt": "one"}\n')
    words = ("--model", bench_model, "--prompts", str(prompts), "-m", "4", "--streams", "none")
    assert bench(*words, "--output", str(tmp_path / "out")) == 0
    prompts.write_text('{"category": "a", "prompt": "two"}\n')
    assert bench("--rerun", str(tmp_path / "out"), "--output", str(tmp_path / "b")) == 2
    assert "no longer in" in capsys.readouterr().err


def test_quick_says_what_it_leaves_out(
    bench_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mlx_specstream.bench.options.QUICK_LIMIT_S", 1e-6)
    words = ("--model", bench_model, "--quick", "-m", "4", "--tree", "2")
    assert bench(*words, "--output", str(tmp_path)) == 0
    out = capsys.readouterr().out
    found = Result.load(tmp_path / "result.json")
    assert len(found.asked) == 1
    assert "Left out:" in out
    assert any("the time was up" in line for line in found.left_out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tree", "x"], "cannot read the tree"),
        (["--setting", "rows=3"], "cannot read 'rows=3' in a setting"),
        (["--setting", "schedule=inline"], "a setting needs a tree"),
        (["--setting", "tree=8 schedule=later"], "cannot read the schedule"),
        (["--tree", "8", "--tree", "8"], "named twice"),
        (["--max-tokens", "1"], "--max-tokens must be at least 2"),
        (["--streams", "a,b"], "cannot read the streams"),
        (["--streams", "sql=a"], "leave other categories without"),
        (["--categories", "poetry"], "no prompt has the category 'poetry'"),
        (["--prompts", "nowhere.jsonl"], "cannot be read"),
        (["--from", "nowhere.json"], "cannot be read"),
        (["--from", "a", "--rerun", "b"], "exclude each other"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"version": 99},
        {"asked": [{"category": "x"}]},
        {"settings": {"model": "x"}},
        {"machine": None},
        {"model": {"name": "x"}},
    ],
)
def test_damaged_results(
    bench_folder: Path, tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((bench_folder / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**values, **change}))
    assert bench("--from", str(tmp_path)) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_no_prompt_fits(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", str(tiny_folder), "--streams", "none", "-m", "600")
    assert bench(*words, "--output", str(tmp_path)) == 2
    assert "no prompt fits" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_planned_trees(
    bench_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SPECSTREAM_PLAN_SECONDS", "0.5")
    monkeypatch.setenv("SPECSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mlx_specstream.bench.trees.MEASURE_S", 0.5)
    words = ("--model", bench_model, "--categories", "chat", "--num-prompts", "1", "-m", "6")
    assert bench(*words, "--tree", "auto", "--exhaustive", "3", "--output", str(tmp_path)) == 0
    found = Result.load(tmp_path / "result.json")
    (planned,) = found.plans.values()
    forecasts = {one["plan"]: one for one in planned["forecasts"]}
    assert forecasts["plain"]["speedup"] == 1.0
    assert planned["chosen"] in forecasts
    assert len(forecasts) > 1
    rows = {row["plan"]: row for row in found.trees["chat"]["rows"]}
    assert set(rows) == {"plain", "chain1", "chain2", "3"}
    assert all(row["identical"] for row in rows.values())
    report = (tmp_path / "report.md").read_text()
    assert "## What the planner expects" in report
    assert "| chat | chain2" in report
    assert "chat: the planner takes" in " ".join(capsys.readouterr().out.split())
