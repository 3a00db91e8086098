"""`specstream demo` on a tiny model: both ways, the table, and the honest line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_specstream import cli
from mlx_specstream.commands.demo import verdict
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.machine.load import Watch
from mlx_specstream.speculation.statistics import SpeculationStats
from mlx_specstream.verify import Comparison, Replayed
from tests.support.scripted import accept_one_draft


def shown(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    words = ("demo", *words, "--num-prompts", "2", "--max-tokens", "10")
    assert cli.main(list(words)) == status
    return capsys.readouterr().out


def test_both_ways(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--model", folder, "--tree", "chain")
    assert out.count("✓ identical with --tree chain · 10 → ") == 2
    assert out.count("✓ identical with --tree auto · 10 → ") == 2
    assert all(len(line) <= 80 for line in out.splitlines() if "│" in line or "✓" in line)
    assert "--tree auto: " in " ".join(out.rpartition("On this machine (")[2].split())
    assert "4 streams in its upper 2 of 4 layers" in " ".join(out.split())
    assert "On this machine (" in out
    assert "Try next:" in out


def test_a_different_text_fails(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_one_draft(monkeypatch)
    out = shown(capsys, "--model", folder, "--tree", "chain", status=1)
    assert "✗ DIFFERENT" in out
    assert "a real mismatch" in out


def test_the_demo_model_is_resolved_by_name(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_specstream.loading.folders.resolve_demo", lambda: Path(folder))
    out = shown(capsys)
    assert "demo with 4 streams" in out
    assert "specstream generate --model demo" in out


@pytest.mark.demo
def test_sql_is_answered_with_the_streams_made_for_it(
    demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("demo", "--num-prompts", "2", "--max-tokens", "6", "--model", "demo")
    assert cli.main(list(words)) == 0
    out = capsys.readouterr().out
    sql, code = out.partition("2. code")[::2]
    assert "with the streams demo-sql\n" in sql
    assert "with the streams" not in code
    assert out.count("✓ identical") == 4


def test_a_busy_machine_is_named(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watch, "other_cores", property(lambda _: 0.0))
    assert "other programs" not in shown(capsys, "--model", folder)
    monkeypatch.setattr(Watch, "other_cores", property(lambda _: 1.5))
    out = " ".join(shown(capsys, "--model", folder).split())
    assert "But other programs kept 1.5 of" in out


def test_without_streams_there_is_nothing_to_show(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--model", str(tiny_folder), "--streams", "none"]) == 2
    assert "nothing to show" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2.0, "2.00x as fast"), (4.0, "no gain in time"), (8.0, "slower than plain decoding (0.50x)")],
)
def test_the_honest_line(seconds: float, words: str) -> None:
    plain = Replayed([1] * 40, "", SpeculationStats(40, 40), 4.0)
    ours = Replayed([1] * 40, "", SpeculationStats(10, 40, 40, 30), seconds)
    fast = Replayed([1] * 40, "", SpeculationStats(10, 40, 40, 30), 1.0)
    fixed, auto = DecodeConfig(TreeSpec()), DecodeConfig()
    found = [[Comparison(plain, fast, None), Comparison(plain, ours, None)]]
    line = verdict(["SQL"], [fixed, auto], found)
    assert f"--tree auto: {words}" in line
    assert f"(SQL {4 / seconds:.2f}x)" in line
    assert f"Always with the tree '{fixed.tree}': 4.00x as fast" in line
    assert "its passes yield 4.00 tokens and cost 1.00 plain ones" in line
