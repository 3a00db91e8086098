from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.config import (
    MAX_STREAMS,
    DecodeConfig,
    PruneSpec,
    StreamConfig,
    TreeSpec,
)
from mlx_specstream.errors import OptionError, SpecStreamError, StreamsError
from tests.support.engine import examples

GOOD: dict[str, Any] = {"num_streams": 4, "num_msa_layers": 2}


def refused(error: type[SpecStreamError], says: str, make: Any, /, **fields: Any) -> None:
    with pytest.raises(error, match=says) as caught:
        make(**fields)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_streams": 0}, "num_streams must be at least 1, got 0"),
        ({"num_streams": -3}, "num_streams must be at least 1, got -3"),
        ({"num_streams": MAX_STREAMS + 1}, "num_streams must be at most 32, got 33"),
        ({"num_streams": 4.0}, "num_streams must be an integer, got 4.0"),
        ({"num_streams": True}, "num_streams must be an integer, got True"),
        ({"num_streams": "4"}, "num_streams must be an integer, got '4'"),
        ({"num_streams": None}, "num_streams must be an integer, got None"),
        ({"num_msa_layers": 0}, "num_msa_layers must be at least 1"),
        ({"mode": "lossy"}, "mode must be 'lossless' or 'shared', got 'lossy'"),
        ({"mode": ["shared"]}, "mode must be"),
        ({"rope_offset": 1}, "rope_offset must be"),
        ({"stream_init_rank": -1}, "stream_init_rank must be at least 0"),
        ({"pruner_rank": -1}, "pruner_rank must be at least 0"),
        ({"value_rotation": -0.1}, "value_rotation must be a number >= 0"),
        ({"value_rotation": math.nan}, "value_rotation must be a number >= 0"),
        ({"value_rotation": math.inf}, "value_rotation must be a number >= 0"),
        ({"lora_alpha": math.inf}, "lora_alpha must be a number >= 0"),
        ({"lora_alpha": "1"}, "lora_alpha must be a number >= 0"),
        ({"lora_rank": 4}, "lora_rank and target_modules go together"),
        ({"target_modules": ("mlp.up_proj",)}, "lora_rank and target_modules go together"),
        ({"lora_rank": 4, "target_modules": "mlp.up_proj"}, "target_modules must be a list"),
        ({"lora_rank": 4, "target_modules": 7}, "target_modules must be a list"),
        ({"lora_rank": 4, "target_modules": (3,)}, "target_modules must be a list"),
        ({"lora_rank": 4, "target_modules": ("",)}, "target_modules must be a list"),
        ({"lora_rank": 4, "target_modules": ("a.b", "a.b")}, "target_modules names a module twice"),
        ({"conditioner_rank": 4}, "conditioner_rank and conditioner_hidden go together"),
        ({"conditioner_hidden": 4}, "conditioner_rank and conditioner_hidden go together"),
    ],
)
def test_stream_configs_that_make_no_sense(fields: dict[str, Any], says: str) -> None:
    refused(StreamsError, says, StreamConfig, **{**GOOD, **fields})
    if all(isinstance(v, str | int | float | list | None) for v in fields.values()):
        refused(
            StreamsError,
            says,
            lambda **f: StreamConfig.from_dict(f),
            **{"version": 1, **GOOD, **fields},
        )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({**GOOD}, "version None is not known, expected 1"),
        ({**GOOD, "version": 2}, "version 2 is not known, expected 1"),
        ({**GOOD, "version": "1"}, "version '1' is not known"),
        ({**GOOD, "version": 1, "gamma": 3}, "unknown field 'gamma'; known are"),
        ({"version": 1, "num_streams": 3}, "num_msa_layers is missing"),
        ({"version": 1}, "num_streams is missing"),
        ({**GOOD, "version": 1, "target_modules": {"a": 1}}, "target_modules must be a list"),
    ],
)
def test_json_that_is_no_stream_config(fields: dict[str, Any], says: str) -> None:
    refused(StreamsError, says, lambda **f: StreamConfig.from_dict(f), **fields)


@examples(50)
@given(
    st.builds(
        StreamConfig,
        num_streams=st.integers(1, 32),
        num_msa_layers=st.integers(1, 99),
        mode=st.sampled_from(["lossless", "shared"]),
        rope_offset=st.sampled_from(["position_plus_stream", "position"]),
        stream_init_rank=st.integers(0, 9),
        lora_rank=st.just(4),
        lora_alpha=st.floats(0, 100),
        target_modules=st.sets(st.text(min_size=1), min_size=1).map(tuple),
        value_rotation=st.floats(0, 1),
        pruner_rank=st.integers(0, 9),
    )
)
def test_configs_survive_json(config: StreamConfig) -> None:
    assert StreamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.lora_scale == config.lora_alpha / 4


def test_no_adapters_no_scale() -> None:
    assert StreamConfig(4, 2, lora_alpha=8.0).lora_scale == 0.0


@pytest.mark.parametrize(
    ("text", "kind", "rows", "shown"),
    [
        ("auto", "auto", 5, "auto"),
        ("chain", "chain", 5, "chain"),
        (" Chain3 ", "chain", 4, "chain3"),
        ("chain9", "chain", 5, "chain9"),
        ("16", "best", 16, "16"),
        ("1", "best", 1, "1"),
        ("3^2", "product", 13, "3^2"),
        ("2^9", "product", 31, "2^9"),
        ("1^4", "product", 5, "1^4"),
    ],
)
def test_trees_from_the_command_line(text: str, kind: str, rows: int, shown: str) -> None:
    spec = TreeSpec.parse(text)
    assert (spec.kind, spec.num_nodes(4), str(spec)) == (kind, rows, shown)
    assert TreeSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    ["", "tree", "chain-1", "0", "-4", "1025", "99999", "123456", "3^", "^3", "3^0", "0^3", "65^1",
     "2^33", "3.5", "chain99", "16x", "²"],
)  # fmt: skip
def test_trees_that_cannot_be_read(text: str) -> None:
    refused(OptionError, "tree", TreeSpec.parse, text=text)


def test_product_trees_that_are_too_large() -> None:
    assert TreeSpec.parse("31^2").num_nodes(4) == 993
    refused(
        OptionError, "1057 rows; at most 1024", TreeSpec.parse("32^2").level_widths, num_streams=4
    )
    assert sum(TreeSpec.parse("2^32").level_widths(4)) == 30
    refused(OptionError, "at most 1024", TreeSpec.parse("2^32").level_widths, num_streams=32)


@pytest.mark.parametrize(
    ("make", "fields", "says"),
    [
        (TreeSpec, {"kind": "star"}, "tree kind must be auto, chain, best or product, got 'star'"),
        (TreeSpec, {"rows": 0}, "1 to 1024 rows, got 0"),
        (TreeSpec, {"rows": 1025}, "1 to 1024 rows, got 1025"),
        (TreeSpec, {"branching": 0}, "1 to 64 candidates, got 0"),
        (TreeSpec, {"depth": 33}, "depth must be 0 to 32, got 33"),
        (PruneSpec, {"keep": 0}, "at least 1 row"),
        (PruneSpec, {"keep": 4, "threshold": 1.5}, "is a probability, got 1.5"),
        (PruneSpec, {"keep": 4, "threshold": math.nan}, "is a probability, got nan"),
        (DecodeConfig, {"schedule": "later"}, "schedule must be"),
        (DecodeConfig, {"stream_nodes": 2}, "needs the schedule 'inline'"),
        (DecodeConfig, {"stream_nodes": -1}, "at least 0"),
    ],
)
def test_options_out_of_range(make: Any, fields: dict[str, Any], says: str) -> None:
    refused(OptionError, says, make, **fields)


def test_schedules() -> None:
    assert DecodeConfig().resolved_schedule("lossless") == "deferred"
    assert DecodeConfig().resolved_schedule("shared") == "inline"
    for schedule in ("inline", "deferred"):
        assert DecodeConfig(schedule=schedule).resolved_schedule("lossless") == schedule  # type: ignore[arg-type]
    refused(
        OptionError, "needs lossless streams", DecodeConfig(schedule="deferred").resolved_schedule,
        mode="shared",
    )  # fmt: skip
