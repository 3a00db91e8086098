"""The examples run as they stand, with a tiny model and no network."""

from __future__ import annotations

import json
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_specstream import load
from mlx_specstream.apps.serve.limits import Access, Limits
from mlx_specstream.config import SamplingConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run an example in an empty folder, as a script, and return what it prints."""
    monkeypatch.chdir(tmp_path)

    def started(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words])
        status: object = None
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            status = end.code
        assert not status, capsys.readouterr()
        return capsys.readouterr().out

    return started


def test_api(run: Callable[..., str], folder: str) -> None:
    out = run("api.py", "--model", folder, "--max-tokens", "12", "--prompt", "Hi")
    assert out.splitlines()[-1].startswith("12 tokens in ")


def test_batch(run: Callable[..., str], folder: str) -> None:
    out = run("batch.py", "--model", folder, "--max-tokens", "6", "One?", "Two?")
    assert out.startswith("One?\n    ")
    assert "\nTwo?\n    " in out


def test_train(run: Callable[..., str], tiny_folder: Path, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "user", "content": f"Count to {n}."}]} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--model", str(tiny_folder), "--data", "data.jsonl", "--max-tokens", "8")
    out = run("train.py", *words, "--iters", "2", "--output", "made")
    assert "8 tokens in " in out
    assert (tmp_path / "made" / "streams.safetensors").is_file()


def test_convert(run: Callable[..., str], folder: str, tmp_path: Path) -> None:
    out = run("convert.py", "--model", folder, "--streams", folder, "--output", "made")
    assert "all the same after both ways" in out
    after = mx.load(str(tmp_path / "made" / "mlx" / "streams.safetensors"))
    assert isinstance(after, dict)
    assert len(after) > 10


def test_client(run: Callable[..., str], folder: str) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    from mlx_specstream.apps.serve.app import create_app
    from mlx_specstream.apps.serve.run import DrainingServer, listen, url_of
    from mlx_specstream.apps.serve.service import start_service

    service = start_service(lambda: load(folder), Limits(), SamplingConfig())
    listening = listen("127.0.0.1", 0)
    server = DrainingServer(create_app(service, Access()), service)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        out = run("client.py", "Hi", "--url", url_of(listening), "--max-tokens", "8")
    finally:
        server.should_exit = True
        thread.join(30)
    assert json.loads(out.splitlines()[-1])["completion_tokens"] == 8


def test_every_example_is_tried_and_listed() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert len(names) == 5
    tests = Path(__file__).read_text(encoding="utf-8")
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in names:
        assert f'run("{name}"' in tests.replace("\n        ", "")
        assert f"[{name}]({name})" in listed
        assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 60
