"""A tiny model with random streams in a folder, and one small benchmark of it that tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_specstream import cli
from mlx_specstream.bench import session
from mlx_specstream.bench.result import Result
from mlx_specstream.bench.roofline import Ceilings
from mlx_specstream.commands import bench as command
from tests.support import tiny
from tests.support.scripted import save_random_streams

WORDS = ["--categories", "math,chat", "--num-prompts", "2", "--max-tokens", "8", "--seed", "1"]
TREES = [
    "--tree",
    "chain",
    "--setting",
    "tree=6 schedule=inline",
    "--setting",
    "tree=6 drafts=lookup",
]


@pytest.fixture(scope="session")
def bench_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    tiny.save_tiny_model(folder, num_hidden_layers=2, max_position_embeddings=1024)
    model = tiny.tiny_model(num_hidden_layers=2, max_position_embeddings=1024)
    return str(save_random_streams(folder, model, num_msa_layers=1))


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    return Ceilings("float32", 20e9, 400e9)


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch, ceilings: Ceilings) -> None:
    """Do not spend seconds on measuring the machine."""
    monkeypatch.setattr(session, "measure_ceilings", lambda _: ceilings)


@pytest.fixture(scope="session")
def bench_folder(
    bench_model: str, ceilings: Ceilings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished benchmark, with report and without plots."""
    folder = tmp_path_factory.mktemp("result") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "measure_ceilings", lambda _: ceilings)
        words = ["bench", "--model", bench_model, *WORDS, *TREES, "--no-plots"]
        assert cli.main([*words, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def result(bench_folder: Path) -> Result:
    return Result.load(command.result_path(str(bench_folder)))
