"""Several processes end together: lost ones, different ones, and ports that are taken."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_specstream.errors import ModelError
from mlx_specstream.loading.load import load
from mlx_specstream.machine import ranks
from mlx_specstream.weights.checkpoint import save_streams
from mlx_specstream.weights.fingerprint import fingerprint
from tests.support.engine import stream_config
from tests.support.random_streams import random_tensors
from tests.support.tiny import save_tiny_model
from tests.support.together import launch

SECONDS = 240  # on a busy machine; on a quiet one the others end within three

DYING = """
import os, signal, sys
from mlx_specstream import load, stream_generate
from mlx_specstream.exit_status import exit_status
from mlx_specstream.loading import load as loading
from mlx_specstream.machine import ranks

folder, phase, who = sys.argv[1], sys.argv[2], int(sys.argv[3])

def die_at(place, *_):
    if place == phase and ranks.rank() == who:
        os.kill(os.getpid(), signal.SIGKILL)

def work():
    checked = loading.check_backbone
    loading.check_backbone = lambda backbone: (die_at("load"), checked(backbone))
    model, tokenizer = load(folder, streams=None)
    ranks.leave_talking_to_leader()
    answer = stream_generate(
        model, tokenizer, [1 + n % 9 for n in range(200)], max_tokens=60, prefill_step_size=16,
        prompt_progress_callback=lambda done, _: die_at("prefill" if done > 100 else ""),
    )
    for number, _ in enumerate(answer):
        die_at("step" if number == 5 else "")
    die_at("end")
    return 0

sys.exit(exit_status(work))
"""

ODD = """
import sys
from mlx_specstream import load
from mlx_specstream.exit_status import exit_status
from mlx_specstream.machine import ranks

what, folder, *own = sys.argv[1:]
mine = own[ranks.rank()] if own else None
if what == "version" and ranks.is_follower():
    ranks._version = lambda name: "9.9"

def work():
    load(mine if what == "model" else folder, streams=mine if what == "streams" else None)
    return 0

sys.exit(exit_status(work))
"""

SERVING = """
import os, signal, sys
from mlx_specstream.apps.serve import scheduler
from mlx_specstream.cli import main
from mlx_specstream.machine import ranks

step, steps = scheduler.Scheduler.step, []

def dying(self):
    steps.append(1)
    if len(steps) == 4 and ranks.is_follower():
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)

scheduler.Scheduler.step = dying
sys.exit(main(["serve", "--model", sys.argv[1], "--streams", "none", "--port", sys.argv[2]]))
"""

REFUSED = """
import sys
from mlx_specstream import load
from mlx_specstream.exit_status import exit_status

sys.exit(exit_status(lambda: load(sys.argv[1], **{sys.argv[2]: sys.argv[3]}) and 0))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", eos_token_id=None)


def ends(ended: Sequence[tuple[int, str, str]], words: str) -> None:
    """Make sure that all ended with status 2, and the leader with one sentence that has `words`."""
    assert [status for status, _, _ in ended] == [2] * len(ended), ended
    said = [line for line in ended[0][2].splitlines() if not line.startswith("[ring]")]
    assert len(said) == 1, ended[0][2]
    assert words in said[0]
    assert "Traceback" not in "".join(errors for _, _, errors in ended)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("phase", ["load", "prefill", "step"])
def test_the_loss_of_one_ends_the_other(folder: Path, phase: str, who: int) -> None:
    begun = time.monotonic()
    ended = launch(2, ["-c", DYING, str(folder), phase, str(who)], timeout=SECONDS)
    assert time.monotonic() - begun < SECONDS
    assert ended[who][0] == -signal.SIGKILL
    ends([ended[1 - who]], "another process was lost")


def test_one_that_is_lost_at_the_end_takes_nothing_with_it(folder: Path) -> None:
    ended = launch(2, ["-c", DYING, str(folder), "end", "1"], timeout=SECONDS)
    assert [status for status, _, _ in ended] == [0, -signal.SIGKILL], ended


def test_a_server_ends_too(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 400}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with ThreadPoolExecutor() as threads:
        ended = threads.submit(launch, 2, ["-c", SERVING, str(folder), str(port)], SECONDS)
        while not ended.done():
            time.sleep(0.2)
            with suppress(OSError):  # not there yet, or gone
                urllib.request.urlopen(request, timeout=SECONDS).close()
    assert ended.result()[1][0] == -signal.SIGKILL
    ends(ended.result()[:1], "another process was lost")


def test_different_versions_are_told(folder: Path) -> None:
    ended = launch(2, ["-c", ODD, "version", str(folder)], timeout=SECONDS)
    ends(ended, "process 1 runs mlx-specstream 9.9, mlx 9.9, mlx-lm 9.9 and process 0 mlx-spec")


def test_different_models_are_told(folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", eos_token_id=None, seed=1)
    words = ["-c", ODD, "model", str(folder), str(folder), str(other)]
    ends(
        launch(2, words, timeout=SECONDS), "process 1 has other files of this model than process 0"
    )


def test_different_streams_are_told(folder: Path, tmp_path: Path) -> None:
    model, _ = load(str(folder), streams=None)
    config = stream_config(num_streams=2, num_msa_layers=2)
    for seed in (0, 1):
        tensors = random_tensors(model.backbone, config, seed)
        own = fingerprint(model.model)
        save_streams(tmp_path / str(seed), config, tensors, base_model=None, fingerprint=own)
    words = ["-c", ODD, "streams", str(folder), str(tmp_path / "0"), str(tmp_path / "1")]
    ends(launch(2, words, timeout=SECONDS), "process 1 has other streams than process 0, or none")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("draft_model", "several processes draft with streams or look-up alone"),
        ("adapter_path", "adapters of mlx-lm cannot be divided"),
    ],
)
def test_what_cannot_be_divided_is_refused(folder: Path, option: str, words: str) -> None:
    ended = launch(2, ["-c", REFUSED, str(folder), option, str(folder)], timeout=SECONDS)
    ends(ended, words)


def test_a_port_in_use_is_told_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken, socket.socket() as free:
        for one in (taken, free):
            one.bind(("127.0.0.1", 0))
        taken.listen()
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in (taken, free)]
        (tmp_path / "hosts.json").write_text(json.dumps(hosts), encoding="utf-8")
        environment = {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
        words = ["-m", "mlx_specstream", "generate", "--model", str(folder), "-p", "a"]
        ended = subprocess.run(
            [sys.executable, *words],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    ends(
        [(ended.returncode, ended.stdout, ended.stderr)],
        "another program uses its port: choose another with mlx.launch --starting-port",
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("[ring] Couldn't connect (error: 111)", "start all of them at about the same time"),
        ("[jaccl] no device", "start all of them again"),
    ],
)
def test_processes_that_do_not_find_each_other_say_so(
    monkeypatch: pytest.MonkeyPatch, error: str, words: str
) -> None:
    def fails() -> None:
        raise RuntimeError(error)

    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setattr(mx.distributed, "init", fails)
    ranks.group.cache_clear()
    with pytest.raises(ModelError, match=words):
        ranks.group()


def test_a_follower_without_a_back_end_does_not_decode_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLX_RANK", "1")
    ranks.group.cache_clear()
    with pytest.raises(ModelError, match="process 1 could not be connected"):
        ranks.group()
