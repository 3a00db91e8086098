"""The learning curve: runs end to end, a picture that is one, and a sentence for what is no log."""

from __future__ import annotations

import json
import re

import pytest

from mlx_specstream.convert.pytorch import curve
from mlx_specstream.errors import DataError
from mlx_specstream.train.curve import read_curve


def test_runs_are_drawn_end_to_end(tmp_path):
    pytest.importorskip("matplotlib")
    held_out = {"marginal_chain": 1.5, "conditioned_chain": 1.9}
    run = [{"positions": 10, "loss": [3.0, 4.0]}, {"positions": 20, "held_out": held_out}]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in run + run))
    assert [r["x"] for r in read_curve(log)] == [10, 20, 30, 40]
    assert curve.main([str(log), "--output", str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "{}", "no log"])
def test_what_is_no_log_is_said(tmp_path, text):
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    with pytest.raises(DataError, match=re.escape(str(log))):
        curve.main([str(log), "--output", str(tmp_path / "curve.png")])
    assert not (tmp_path / "curve.png").exists()
