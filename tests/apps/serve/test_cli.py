"""`specstream serve` as it is started: refusals before loading, serving, an orderly end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from mlx_specstream.cli import main
from tests.apps.parrot import ANSWER
from tests.apps.serve.conftest import ask


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "needs an API key"),
        (["--api-key", "short"], "at least 8"),
        (["--port", "99999"], "0 to 65535"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--time-limit", "0"], "--time-limit must be more than 0"),
        (["--temp", "-1"], "--temp must be"),
        (["--kv-bits", "8"], "add --prompt-cache-bytes 0"),
        (["--max-kv-size", "512"], "add --prompt-cache-bytes 0"),
        (["--kv-bits", "7", "--prompt-cache-bytes", "0"], "kv_bits must be"),
        (["--chat-template-args", "[1]"], "--chat-template-args must be a JSON object"),
        (["--host", "no.such.host.invalid"], "no host"),
    ],
)
def test_what_cannot_be_served_is_refused_before_loading(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SPECSTREAM_API_KEY", raising=False)
    assert main(["serve", "--model", "/nowhere", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "loading" not in captured.out


def test_a_taken_port_and_a_missing_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 2
    assert "choose another --port" in capsys.readouterr().err
    assert main(["serve", "--port", "0", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("specstream: ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_told_to_stop(parrot_folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "mlx_specstream.cli", "serve", "--port", "0"]
    command += ["--model", str(parrot_folder), "--max-tokens", "500"]
    key = {"SPECSTREAM_API_KEY": "from-the-environment"}
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **key},
    )
    assert server.stdout is not None
    try:
        line = next(line for line in server.stdout if line.startswith("serving"))
        assert line.startswith("serving parrot with 2 streams (lossless) at http://127.0.0.1:")
        url = line.split(" at ")[1].split(";")[0].strip()
        headers = {"Authorization": "Bearer from-the-environment"}
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        reply = httpx2.post(
            f"{url}/v1/chat/completions", json=ask(), headers=headers, timeout=60
        ).json()
        assert reply["choices"][0]["message"]["content"] == ANSWER
        server.send_signal(number)
        told = time.monotonic()
        _, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert "Traceback" not in errors
    assert time.monotonic() - told < 3, "nothing was left to do"


def test_ctrl_c_while_the_model_is_loaded(parrot_folder: Path) -> None:
    command = [sys.executable, "-m", "mlx_specstream", "serve", "--port", "0"]
    loading = subprocess.Popen(
        [*command, "--model", str(parrot_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert loading.stdout is not None
    try:
        assert next(loading.stdout).startswith("loading")
        loading.send_signal(signal.SIGINT)
        _, errors = loading.communicate(timeout=60)
    finally:
        loading.kill()
    assert (loading.returncode, errors) == (130, "specstream: interrupted.\n")
