"""Whether other programs keep the machine busy: their time, without our own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_specstream.machine import load
from mlx_specstream.machine.load import Usage, Watch


@pytest.mark.parametrize(
    ("own_s", "all_s", "cores"), [(5.0, 25.0, 2.0), (9.0, 9.0, 0.0), (3.0, 2.0, 0.0)]
)
def test_our_own_time_does_not_count(
    own_s: float, all_s: float, cores: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(Usage(100.0, 1.0, 1000.0))
    monkeypatch.setattr(Usage, "read", lambda: Usage(110.0, 1.0 + own_s, 1000.0 + all_s))
    assert watch.other_cores == cores
    assert watch.is_busy is (cores > 0)
    assert ("other programs kept 2.0 of" in watch.sentence()) is watch.is_busy


def test_a_large_machine_bears_more(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(Usage(0.0, 0.0, 0.0))
    monkeypatch.setattr(Usage, "read", lambda: Usage(10.0, 0.0, 6.0))
    for cores, busy in ((2, True), (4, True), (16, False)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert watch.is_busy is busy


def test_where_nothing_is_counted_the_load_average_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "STAT", tmp_path / "none")
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0, 0))
    monkeypatch.setattr(os, "times", lambda: os.times_result((60.0, 60.0, 0, 0, 0)))
    assert Watch().other_cores == pytest.approx(1.0)


def test_niced_programs_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(load, "STAT", stat)
    tick = os.sysconf("SC_CLK_TCK")
    stat.write_text(f"cpu {tick} {9 * tick} {tick} {9 * tick} {9 * tick} 0 0 {tick} 0 0\ncpu0 1\n")
    assert Usage.read().all_s == 3.0
