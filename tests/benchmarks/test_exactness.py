"""A seeded part of the random cases, as many as tests have time for."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_specstream.model.cache import Span
from tests.support.exactness import __main__ as command
from tests.support.exactness import play as play_module
from tests.support.exactness.compare import rows_differ
from tests.support.exactness.draw import draw_case
from tests.support.exactness.models import streams_for
from tests.support.exactness.play import play, reference_turns

FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3"]


@pytest.mark.parametrize("group", range(6))
def test_cases_are_mlx_lms(group: int) -> None:
    outcomes = [play(draw_case(7, 20 * group + number, FAMILIES)) for number in range(15)]
    assert [o.told for o in outcomes if o.verdict == "mismatch"] == []
    assert sum(o.tokens for o in outcomes) > 50


@pytest.mark.parametrize("group", range(3))
def test_cases_of_shared_mode_are_those_of_a_token_per_pass(group: int) -> None:
    cases = [draw_case(8, 20 * group + number, FAMILIES, "shared") for number in range(10)]
    outcomes = [play(case) for case in cases]
    assert {case.decode.schedule for case in cases} == {"inline"}
    assert [o.told for o in outcomes if o.verdict == "mismatch"] == []
    assert sum(o.accepted for o in outcomes) > 10


@pytest.mark.parametrize("number", [1900, 5590])
def test_layers_without_attention_and_an_answer_that_ends_where_rows_turn_quantised(
    number: int,
) -> None:
    family = {1900: "nemotron-nas", 5590: "olmo2"}[number]
    case = draw_case(2, number, [family])
    assert case.scene.cache == "quantised"
    assert play(case).verdict == "identical"


def test_a_wrong_code_may_move_what_stands_on_it_and_nothing_else() -> None:
    scene = draw_case(23, 558, ["llama"]).scene
    assert scene.cache == "quantised"
    backbone = streams_for("olmo2", 0, "float32", True).backbone

    def differ(layer: int, row: int, share: float, above: bool = False) -> str:
        ours, theirs = (backbone.new_cache(scene.cache_config) for _ in range(2))
        for kv, length in ((ours, 12), (theirs, 13)):
            backbone.forward(mx.array([n % 7 for n in range(length)]), kv)
            kv.advance(length)
            kv.turn_quantized()
        for index, other in enumerate(theirs.layers):
            keys, values = other.read(12)
            width = keys.shape[3]
            if index == layer:
                keys[:, :, row, : round(width * share)] += 0.3
            elif index > layer and above:
                keys[:, :, row:] += 0.01
            other.read = lambda _, found=(keys, values): found  # type: ignore[method-assign]
        return rows_differ(ours, theirs, mx.float32)

    assert differ(0, 5, 0.0) == ""
    assert differ(0, 5, 1 / 32, above=True) == ""
    assert "layer 0: 100.0% of row 5" in differ(0, 5, 1.0)
    assert "layer 1" in differ(1, 5, 0.5)


def test_what_is_raised_is_a_mismatch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        raise KeyError("oh")

    monkeypatch.setattr(play_module, "play", broken)
    assert command.main(["--cases", "2", "--families", "llama"]) == 1
    assert "2 mismatch" in capsys.readouterr().out


def test_a_case_depends_on_its_numbers_alone() -> None:
    cases = [draw_case(3, number, FAMILIES) for number in range(60)]
    assert cases == [draw_case(3, number, FAMILIES) for number in range(60)]
    assert len({case.scene for case in cases}) == 12
    assert {case.scene.cache for case in cases} == {"model", "rotating", "quantised"}


def test_a_row_too_many_in_sight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Span.near
    reference_turns.cache_clear()
    monkeypatch.setattr(
        Span, "near", lambda s, rows, keys: real(Span(s.size + 1, s.keep, s.length), rows, keys)
    )
    told = []
    for number in range(100):
        case = draw_case(5, number, ["llama"])
        if case.scene.cache == "rotating":
            told.append(play_module.play(case).verdict)
        if "mismatch" in told:
            break
    assert "mismatch" in told


def test_the_command_counts_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    words = ["--cases", "3", "--seed", "1", "--families", "llama", "--out", str(out)]
    assert command.main(words) == 0
    assert "3 cases" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["cases"] == sum(record["cache"].values()) == 3
    assert record["verdicts"] == {"identical": 3}
    assert record["versions"]["mlx-lm"]
