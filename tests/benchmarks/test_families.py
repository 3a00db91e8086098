from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.families import PROMPT
from mlx_specstream.errors import OptionError
from mlx_specstream.model.backbone import Backbone
from tests.support.against_mlx_lm import Tried, compare_with_mlx_lm
from tests.support.tiny_models import tiny_random_model


def test_the_table_says_what_works_and_why_others_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "families.md"
    names = ["qwen3_moe", "mamba", "kimi_k3"]
    assert families.main([*names, "--max-tokens", "6", "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert page.read_text() == printed
    supported, refused, not_tried = printed.splitlines()[-3:]
    assert supported.startswith("| `qwen3_moe` | supported | ")
    assert refused.startswith("| `mamba` | refused |  | it has no attention layers")
    assert not_tried.startswith("| `kimi_k3` | not tried |  | no tiny model: ")


def test_kinds_of_models_of_a_family_have_lines_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert families.main(["gemma4_text", "--max-tokens", "4"]) == 0
    usual, experts, shared_values, per_layer = capsys.readouterr().out.splitlines()[-4:]
    assert usual.startswith("| `gemma4_text` | supported | ")
    assert "| 26B-A4B: chain and tree" in experts
    assert "| 31B: chain and tree" in shared_values
    assert "| refused |  | E2B, E4B: it hands its layers inputs of their own" in per_layer


def test_a_wrong_family_is_shown_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Tried(6, 2, "token 3 is 1, in mlx-lm 2 | tree chain")
    monkeypatch.setattr(families, "compare_with_mlx_lm", lambda *_: wrong)
    assert families.main(["llama", "--max-tokens", "6"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| `llama` | **wrong** | 2 | token 3 is 1, in mlx-lm 2 \\| tree chain |"


def test_the_comparison_sees_a_window_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Backbone.__init__

    def blind(self: Backbone, model: object) -> None:
        original(self, model)  # type: ignore[arg-type]
        self.windows = [None] * self.num_layers

    monkeypatch.setattr(Backbone, "__init__", blind)
    found = compare_with_mlx_lm(tiny_random_model("olmo3", sliding_window=9), PROMPT, 40)
    assert found.differs is not None


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(OptionError, match="no model module 'lama'"):
        families.main(["lama"])
    with pytest.raises(OptionError, match="at least 1"):
        families.main(["llama", "--max-tokens", "0"])
