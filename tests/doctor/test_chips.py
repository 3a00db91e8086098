"""Predictions: the published figures come out of the tables, and are called predictions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_specstream.doctor import chips
from mlx_specstream.doctor.chips import _curves, compare_steps, main, predict
from mlx_specstream.errors import DataError, OptionError
from mlx_specstream.machine import Machine
from mlx_specstream.planner import CostCurve, StepSetting
from mlx_specstream.planner.acceptance import assumed_profile
from mlx_specstream.planner.prior import CHIPS, SIZES, Chip, at, chip_named, chip_of, prior_curve
from tests.planner.test_planner import curve

M4_PRO = next(chip for chip in CHIPS if chip.name == "M4 Pro")
M1 = next(chip for chip in CHIPS if chip.name == "M1")


def test_tables_hold_what_was_published() -> None:
    assert [at(M4_PRO.rows(4), rows) for rows in (2, 4, 8)] == [1.03, 1.47, 2.69]
    assert at(M4_PRO.rows(4), 7) == pytest.approx((2.07 + 2.69) / 2)
    assert at(M4_PRO.rows(4), 32) == at(M4_PRO.rows(4), 64) == 4.33
    assert at(M4_PRO.rows(4), 128) == pytest.approx(8.66)
    assert at(M4_PRO.rows(16), 5) < 1.1 < at(M1.rows(16), 2)
    assert at(M1.rows(16), 2) == at(M1.rows(16), 40)
    assert at(M1.rows(4), 4) == 4.0
    neo, m5 = chip_named("A18 Pro"), chip_named("M5")
    assert neo is not None
    assert m5 is not None
    assert neo.rows(4) is M4_PRO.rows(4) is not m5.rows(4)
    for chip in CHIPS:
        for bits in (4, 8, 16):
            assert at(chip.rows(bits), 1) == 1.0


def test_chips_are_known_by_apples_names() -> None:
    assert chip_named("Apple M4 Pro") is M4_PRO
    assert chip_named("m1") is M1
    assert chip_named("Apple M99") is None
    assert [chip.generation for chip in (M1, M4_PRO)] == [13, 16]
    for name in ("A18 Pro", "M5 Pro", "M5 Max", "M6"):
        assert chip_named(f"Apple {name}") is not None


@pytest.mark.parametrize(
    ("name", "cores", "memory_gb", "bandwidth"),
    [
        ("Apple M3 Max", 16, 48, 400e9),
        ("Apple M3 Max", 14, 36, 300e9),
        ("Apple M4 Max", 16, 128, 546e9),
        ("Apple M4 Max", 14, 36, 410e9),
        ("Apple M4 Pro", 14, 24, 273e9),
        ("Apple M5 Max", 18, 36, 460e9),
        ("Apple M5 Max", 18, 48, 614e9),
        ("Apple M5 Max", 18, 0, 614e9),
        ("Apple M5", 10, 16, 153e9),
        ("Apple A18 Pro", 6, 8, 60e9),
    ],
)
def test_smaller_chips_of_one_name_are_told_apart(
    name: str, cores: int, memory_gb: int, bandwidth: float
) -> None:
    chip = chip_of(Machine(chip=name, cores=cores, memory_bytes=memory_gb << 30))
    assert chip is not None
    assert chip.bandwidth == bandwidth


def test_rows_of_float32_share_no_reading_but_fill_a_matrix_product() -> None:
    """What no kernel for few rows serves costs the same from two rows on, on every chip."""
    for chip in CHIPS:
        assert at(chip.rows(32), 2) == at(chip.rows(32), 16) == 1.44
        assert at(chip.rows(32), 5) != at(chip.rows(16), 5)
    (found,) = predict(M4_PRO, 32, SIZES[0], assumed_profile(4).only("chat"))
    assert StepSetting.parse(found.plan).rows(4) >= 10


def test_a_step_costs_its_parts() -> None:
    """On a chip where rows are free, deferred streams cost their layers and the head once more."""
    size, plans = SIZES[2], [StepSetting.parse("4"), StepSetting.parse("4 inline")]
    costs = prior_curve(M1, 16, size, 4, plans)
    token, flat = costs.plain.seconds, 2.9
    head = size.head_params / (size.head_params + size.layer_params)
    upper = (1 - head) * size.msa_layers / size.layers
    host = 2e-3 + 32 * 5e-5
    inline, deferred = (1 + head) * flat, (1 + head + upper) * flat
    assert costs.seconds(plans[0]) == pytest.approx(deferred * token + host)
    assert costs.seconds(plans[1]) == pytest.approx(inline * token + host)


def test_predictions_say_what_is_known_of_chips() -> None:
    """4-bit weights on M1 are read anew for every row: parked. 16 bits on M4: clear gains."""
    profile = assumed_profile(4).only("chat")
    (poor,) = predict(M1, 4, SIZES[2], profile)
    (good,) = predict(M4_PRO, 16, SIZES[2], profile)
    assert (poor.plan, poor.speedup) == ("plain", 1.0)
    assert good.speedup > 1.4
    assert good.tokens_per_s == pytest.approx(good.speedup * good.plain_tokens_per_s)


def test_streams_that_cannot_run_inline_are_not_predicted_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[set[str]] = []

    def curve(
        chip: Chip, bits: int, size: object, num_streams: int, plans: list[StepSetting]
    ) -> CostCurve:
        asked.append({plan.schedule for plan in plans})
        return prior_curve(chip, bits, size, num_streams, plans)  # type: ignore[arg-type]

    monkeypatch.setattr(chips, "prior_curve", curve)
    profile = assumed_profile(4).only("chat")
    for deferred_only in (False, True):
        predict(M4_PRO, 16, SIZES[2], replace(profile, deferred_only=deferred_only))
    assert asked == [{"deferred", "inline"}, {"deferred"}]


def test_the_command_labels_its_output(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--streams", "demo-chat", "--chip", "M4 Pro", "--bits", "4"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "Predictions" in text
    assert "nothing here ran" in " ".join(text.split())
    assert main([*options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "predictions"
    assert {row["chip"] for row in record["predictions"]} == {"M4 Pro"}
    with pytest.raises(OptionError, match="no figures for the chip 'M99'"):
        main(["--chip", "M99"])
    with pytest.raises(DataError):
        main(["--streams", "nowhere"])


def test_measured_costs_stand_beside_predicted(tmp_path: Path) -> None:
    rows = compare_steps(curve(c4=1.6, r8=2.9), M4_PRO, 4, SIZES[2])
    assert [(row.plan, row.measured) for row in rows] == [("chain4", 1.6), ("8", 2.9)]
    assert 2.5 < rows[1].predicted < 6
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"plans": {"s": {"curve": curve(r8=2.9).to_dict()}}}))
    assert _curves(path)["s"].relative(StepSetting.parse("8")) == pytest.approx(2.9)
    for damage in ({}, {"plans": {"s": {}}}, {"plans": {"s": {"curve": {"steps": 1}}}}):
        path.write_text(json.dumps(damage))
        with pytest.raises(DataError, match="cost curve"):
            _curves(path)


def test_every_chip_has_a_bandwidth_and_a_size() -> None:
    assert all(isinstance(chip, Chip) and 60e9 <= chip.bandwidth < 1e12 for chip in CHIPS)
    assert all(0 < size.msa_layers < size.layers for size in SIZES)
