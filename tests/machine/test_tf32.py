"""float32 whose factors have 10 bits in passes of several rows: no fault, and told from one."""

from __future__ import annotations

import os

import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream import cli
from mlx_specstream.config import DecodeConfig, TreeSpec
from mlx_specstream.errors import ModelError
from mlx_specstream.machine import TF32, Machine, rounds_float32
from mlx_specstream.model.backbone import Backbone
from mlx_specstream.model.probe import check_backbone
from mlx_specstream.verify import FLOAT32_BOUND, Replayed, compare, replay
from tests.support import tiny
from tests.support.scripted import with_streams
from tests.support.tf32 import imitate_m5


def rounding_model() -> nn.Module:
    """A model that rounding moves far: deep, with sharp attention."""
    model = tiny.tiny_model(num_hidden_layers=12)
    for layer in model.layers:
        layer.self_attn.q_proj.weight = layer.self_attn.q_proj.weight * 8
    return model


@pytest.mark.parametrize(
    ("machine", "rounds"),
    [
        (Machine(backend="metal", gpu="applegpu_g17s", os_version="26.2"), True),
        (Machine(backend="metal", gpu="applegpu_g17g", os_version="26.1"), False),
        (Machine(backend="metal", gpu="applegpu_g18g", os_version="27.0"), True),
        (Machine(backend="metal", gpu="applegpu_g16s", os_version="26.3"), False),
        (Machine(backend="metal", gpu="applegpu_g17s", os_version="26.3", tf32=False), False),
        # The phones' chips have neural accelerators one generation later: A18 Pro none, A19 Pro does.
        (Machine(backend="metal", gpu="applegpu_g17p", os_version="26.3"), False),
        (Machine(backend="metal", gpu="applegpu_g18p", os_version="26.3"), True),
        (Machine(backend="metal", gpu="air64_v27", os_version="26.3"), False),  # a virtual one
        (Machine(backend="cuda", gpu="NVIDIA H100", os_version="6.8"), True),
        (Machine(backend="cuda", gpu="NVIDIA H100", os_version="6.8", tf32=False), False),
        (Machine(backend="cpu", os_version="26.3"), False),
        (Machine(), False),
    ],
)
def test_which_machines_round(machine: Machine, rounds: bool) -> None:
    assert machine.rounds_float32 is rounds


@pytest.mark.parametrize(
    ("value", "rounds"),
    [("1", True), ("0", False), ("00", False), ("", False), ("no", False), ("10", True)],
)
def test_the_variable_is_read_as_mlx_reads_it(
    value: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    imitate_m5(monkeypatch, "0")
    monkeypatch.setenv(TF32, value)
    assert rounds_float32() is Machine.read().rounds_float32 is rounds


def test_verify_calls_a_correct_engine_correct(
    monkeypatch: pytest.MonkeyPatch, byte_tokenizer: TokenizerWrapper
) -> None:
    imitate_m5(monkeypatch)
    model, prompt = with_streams(rounding_model()), list(b"prompt 0")
    plain = replay(model, byte_tokenizer, prompt, 32, None)
    ours = replay(model, byte_tokenizer, prompt, 32, DecodeConfig(TreeSpec(rows=6)))
    found = compare(model, byte_tokenizer, prompt, plain, ours)
    assert found.divergence is not None
    assert found.divergence.distance > FLOAT32_BOUND
    assert found.verdict == "near-tie"
    assert "float32 (TF32) rounds by up to" in str(found.divergence)
    # A token that no rounding explains is a mismatch here, too.
    other = (plain.tokens[2] + 1) % 250
    wrong = Replayed([*plain.tokens[:2], other], "", plain.stats, 0.0)
    assert compare(model, byte_tokenizer, prompt, plain, wrong).verdict == "mismatch"


def test_the_load_probe_lets_a_correct_model_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate_m5(monkeypatch)
    backbone = Backbone(rounding_model())
    check_backbone(backbone)
    monkeypatch.setattr("mlx_specstream.model.probe.rounds_float32", lambda: False)
    with pytest.raises(ModelError, match="does not compute the same"):
        check_backbone(backbone)


@pytest.mark.parametrize("verb", ["verify", "demo"])
def test_verbs_that_promise_exactness_keep_float32_exact(
    verb: str, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TF32, "1")  # so that it is put back afterwards
    monkeypatch.delenv(TF32)
    words = [verb, "--model", folder, "--num-prompts", "1", "--max-tokens", "4"]
    assert cli.main(words) == 0
    assert os.environ[TF32] == "0"
    if verb == "verify":
        assert "compared in float32\n" in capsys.readouterr().out


def test_verify_says_so_where_the_user_left_it_on(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imitate_m5(monkeypatch)
    assert cli.main(["verify", "--model", folder, "--num-prompts", "1", "-m", "4"]) == 0
    assert os.environ[TF32] == "1"
    assert "compared in float32 (TF32): MLX_ENABLE_TF32 lets" in capsys.readouterr().out
