"""Fixtures every test may use; the functions behind them are in `tests/support/`.

Tests promise exact tokens, so they run on MLX's CPU device, and float32 stays float32, whatever the
machine. Those marked `mac` take the GPU where there is one (`tests/mac/`).
"""

from __future__ import annotations

import os
import signal
import tempfile

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX computes anything: it reads this once
# What this machine's user made with `specstream adopt` is no part of a test.
os.environ["SPECSTREAM_STATE"] = tempfile.mkdtemp(prefix="specstream-state-")

from collections.abc import Callable
from pathlib import Path

import hypothesis
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_specstream.errors import SpecStreamError
from mlx_specstream.loading.demo import resolve_demo
from mlx_specstream.planner import costs
from tests.support import tiny
from tests.support.scripted import save_random_streams

mx.set_default_device(mx.cpu)
# What is started in the background ignores Ctrl-C, and Python and its children keep to that.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn measuring off, so that `--tree auto` is its fixed fallback on every machine."""
    monkeypatch.setenv("SPECSTREAM_PLAN_SECONDS", "0")
    monkeypatch.setattr(costs, "published_costs", lambda *_: None)


@pytest.fixture(scope="session")
def tiny_llama() -> nn.Module:
    """A float32 llama: 4 layers, width 64, 4 query heads on 2 key heads, 256 tokens."""
    return tiny.tiny_model("llama")


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def tiny_family(request: pytest.FixtureRequest) -> nn.Module:
    """One tiny model of each family in turn."""
    return tiny.tiny_model(request.param)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """The maker of tiny models: `tiny_model("qwen3", num_hidden_layers=2)`."""
    return tiny.tiny_model


@pytest.fixture(scope="session")
def byte_tokenizer() -> TokenizerWrapper:
    """Ids are bytes; has a chat template and an end-of-turn token."""
    return tiny.byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny llama and the byte tokenizer that `mlx_lm.load` reads."""
    return tiny.save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def folder(tiny_llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny llama, the byte tokenizer and random streams, which `load` finds there."""
    folder = tiny.save_tiny_model(tmp_path_factory.mktemp("with-streams") / "tiny")
    return str(save_random_streams(folder, tiny_llama))


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model's folder; its tests are marked `demo` and skipped where the model cannot be had."""
    try:
        return resolve_demo()
    except SpecStreamError as error:
        pytest.skip(f"the demo model cannot be had here: {error}")
