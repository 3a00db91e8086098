"""Two processes train as one does with all of the batch, on MLX's own back end and launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from mlx_specstream.weights.checkpoint import load_streams
from tests.train.tiny_run import read_log

ROOT = Path(__file__).parents[2]


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(folder: Path, rank: int | None = None, hosts: Path | None = None) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_")}
    if rank is not None:  # what mlx.launch sets for its ring
        environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
    command = [sys.executable, "-m", "tests.train.tiny_run", str(folder), "--whole"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def test_two_processes_equal_one(tmp_path) -> None:
    hosts = tmp_path / "hosts.json"
    addresses = ",".join(f'["127.0.0.1:{port}"]' for port in free_ports(2))
    hosts.write_text(f"[{addresses}]")
    pair = [start(tmp_path / "two", rank, hosts) for rank in range(2)]
    assert [process.wait(timeout=300) for process in pair] == [0, 0]
    assert start(tmp_path / "one").wait(timeout=300) == 0
    one, two = (load_streams(tmp_path / name).tensors for name in ("one", "two"))
    assert one.keys() == two.keys()
    logs = [[r for r in read_log(tmp_path / name) if "loss" in r] for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 12
    for a, b in zip(*logs, strict=True):
        assert np.isclose(a["loss"], b["loss"], rtol=2e-3)
    for name, value in one.items():
        difference = np.abs(np.array(value) - np.array(two[name])).max()
        assert difference < 2e-3, (name, difference)
