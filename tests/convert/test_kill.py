"""Killed at any moment, the destination is absent or complete."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from mlx_lm.utils import load_model

from mlx_specstream.weights.checkpoint import load_streams
from tests.convert import checkpoints as made

CONVERT_FOREVER = """
import sys
sys.modules["torch"] = None  # imports faster, and the converter must not need it
from pathlib import Path
from mlx_specstream.convert.plan import Options, make_plan
from mlx_specstream.convert.writer import write_plan
source, target = sys.argv[1:]
number = 0
while True:
    write_plan(make_plan(Options(source)), Path(target) / str(number), max_shard_bytes=100_000)
    print(number, flush=True)
    number += 1
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_random_moment_nothing_is_half_there(tmp_path, seed):
    base = made.save_base(tmp_path / "base")
    source = made.save_streams(tmp_path / "streams", base)
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", CONVERT_FOREVER, str(source), str(out)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"0\n"
    started = time.monotonic()
    child.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 2 * (time.monotonic() - started)))
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = [path for path in out.iterdir() if not path.name.startswith(".")]
    assert len(finished) >= 2
    newest = max(finished, key=lambda path: int(path.name))
    for folder in (newest, out / "0"):
        model, _ = load_model(folder)
        load_streams(folder).check_base(model)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert all((folder / name).exists() for name in index["weight_map"].values())
        assert (folder / "README.md").exists()
    assert all(path.name.endswith(".partial") for path in out.iterdir() if path not in finished)
