"""`specstream demo` on a tiny model: both ways, the table, and the honest line."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from mlx_specstream import cli
from mlx_specstream.commands.demo import verdict
from mlx_specstream.config import DecodeConfig
from mlx_specstream.machine import Machine
from mlx_specstream.speculation.statistics import SpeculationStats
from mlx_specstream.verify import Comparison, Replayed
from tests.support.scripted import accept_one_draft


def shown(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    words = ("demo", *words, "--num-prompts", "2", "--max-tokens", "10")
    assert cli.main(list(words)) == status
    return capsys.readouterr().out


def test_both_ways(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "--model", folder, "--tree", "chain")
    assert out.count("✓ identical both ways · 10 → ") == 2
    assert "4 streams in its upper 2 of 4 layers" in out
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
    # By its module: the package's own `load` is the function.
    module = importlib.import_module("mlx_specstream.loading.load")
    monkeypatch.setattr(module, "resolve_demo", lambda: Path(folder))
    out = shown(capsys)
    assert "demo with 4 streams" in out
    assert "specstream generate --model demo" in out


def test_without_streams_there_is_nothing_to_show(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--model", str(tiny_folder), "--streams", "none"]) == 2
    assert "nothing to show" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (2.0, "it is 2.00x as fast: 4.00 tokens per pass, and a pass with the tree"),
        (4.0, "it gains nothing in time: 4.00 tokens per pass, but"),
        (8.0, "it is slower (0.50x): 4.00 tokens per pass, but a pass with the tree"),
    ],
)
def test_the_honest_line(seconds: float, words: str) -> None:
    plain = Replayed([1] * 40, "", SpeculationStats(40, 40), 4.0, 1.0)
    ours = Replayed([1] * 40, "", SpeculationStats(10, 40, 40, 30), seconds, 1.0)
    line = verdict([Comparison(plain, ours, None)], DecodeConfig(), 32)
    assert words in line
    assert f"costs {seconds:.2f} plain passes" in line


@pytest.mark.parametrize(
    ("backend", "bits", "words"),
    [
        ("metal", 32, "in float32 no kernel shares a reading among few rows"),
        ("cuda", 32, "try --tree 16"),
        ("metal", 16, "Try another --tree: '16' suits 16-bit weights"),
        ("metal", 4, "Try another --tree: 'chain2' suits 4-bit weights"),
        ("cpu", 32, "On this CPU a pass costs more with every row"),
    ],
)
def test_the_advice_fits_the_precision(
    backend: str, bits: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(system="Darwin", backend=backend, chip="Apple M4")
    monkeypatch.setattr(Machine, "read", classmethod(lambda _: machine))
    plain = Replayed([1] * 40, "", SpeculationStats(40, 40), 4.0, 1.0)
    ours = Replayed([1] * 40, "", SpeculationStats(10, 40, 40, 30), 5.0, 1.0)
    assert words in verdict([Comparison(plain, ours, None)], DecodeConfig(), bits)
