"""One grammar for decode settings: what is written can be read, and the other way round."""

from __future__ import annotations

import pytest

from mlx_specstream.config import DecodeConfig, PruneSpec, TreeSpec, TypicalSpec
from mlx_specstream.errors import OptionError


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("auto", DecodeConfig()),
        ("chain3", DecodeConfig(TreeSpec("chain", branching=1, depth=3))),
        ("16:8", DecodeConfig(TreeSpec(rows=16), PruneSpec(8))),
        ("16:8:0.02 deferred", DecodeConfig(TreeSpec(rows=16), PruneSpec(8, 0.02), "deferred")),
        ("8 inline:2", DecodeConfig(TreeSpec(rows=8), schedule="inline", stream_nodes=2)),
        ("3^4 inline", DecodeConfig(TreeSpec.parse("3^4"), schedule="inline")),
    ],
)
def test_words_and_config_are_the_same_thing(text: str, config: DecodeConfig) -> None:
    assert DecodeConfig.parse(text) == config
    assert str(config) == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "cannot read the tree ''"),
        ("x", "cannot read the tree 'x'"),
        ("16:", "cannot read the pruning ''"),
        ("16:x", "cannot read the pruning 'x'"),
        ("16:0", "at least 1 row"),
        ("16:8:2", "threshold is a probability"),
        ("8 later", "cannot read the schedule 'later'"),
        ("8 deferred:2", "cannot read the schedule 'deferred:2'"),
        ("8 inline:x", "cannot read the schedule 'inline:x'"),
    ],
)
def test_what_cannot_be_read(text: str, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        DecodeConfig.parse(text)


def test_typical_acceptance_has_words_of_its_own() -> None:
    assert TypicalSpec.parse("0.2") == TypicalSpec(0.2)
    assert TypicalSpec.parse(str(TypicalSpec(0.2, 0.5))) == TypicalSpec(0.2, 0.5)
    for text in ("x", "0.1:x", "2"):
        with pytest.raises(OptionError):
            TypicalSpec.parse(text)
