"""A data set from the hub: fetched from a stand-in on this machine, cut off in the middle, then from the cache."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("datasets")

COMMIT = "1" * 40
ROOT = Path(__file__).resolve().parents[2]
READ = """
import json, sys
from mlx_specstream.errors import DataError
from mlx_specstream.train.data import read_records
try:
    print(json.dumps([[r.where, r.fields] for s in ("train", "valid") for r in read_records(sys.argv[1], s)]))
except DataError as error:
    sys.exit(f"DataError: {error}")
"""


def lines(*prompts: str) -> bytes:
    records = [{"prompt": prompt, "completion": "so it is " * 40} for prompt in prompts]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


class Hub(http.server.BaseHTTPRequestHandler):
    """Enough of the hub for one data set; `cut` ends the connection in the middle of a data file."""

    files: dict[str, bytes] = {  # noqa: RUF012
        "train.jsonl": lines("one", "two", "three"),
        "validation.jsonl": lines("four"),
    }
    cut = False

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/datasets/o/n/tree/") and name == COMMIT:
            tree = [
                {"type": "file", "path": name, "oid": f"{i}" * 40, "size": len(content)}
                for i, (name, content) in enumerate(self.files.items())
            ]
            self.reply(json.dumps(tree).encode(), body)
        elif path in ("/api/datasets/o/n", f"/api/datasets/o/n/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            self.reply(
                json.dumps({"id": "o/n", "sha": COMMIT, "siblings": siblings}).encode(), body
            )
        elif path.startswith("/datasets/o/n/resolve/") and name in self.files:
            self.reply(self.files[name], body, cut=self.cut, ETag=f'"{name}"')
        else:
            self.reply(b"", body, 404, **{"X-Error-Code": "EntryNotFound"})

    def reply(
        self, content: bytes, body: bool, status: int = 200, cut: bool = False, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    Hub.cut = False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def read(name: str, port: int, cache: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Read a data set in a process of its own: the hub's address is fixed when its client is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "PYTHONPATH": str(ROOT),
        **settings,
    }
    command = [sys.executable, "-c", READ, name]
    return subprocess.run(
        command, env=kept | own, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
def test_a_data_set_is_fetched_kept_and_an_interrupted_one_continued(hub, tmp_path) -> None:
    Hub.cut = True
    broken = read("o/n", hub.server_port, tmp_path)
    assert broken.returncode == 1
    assert "DataError: the data set o/n could not be fetched (" in broken.stderr
    assert "continued next time" in broken.stderr
    Hub.cut = False
    found = read("o/n", hub.server_port, tmp_path)
    assert found.returncode == 0, found.stderr
    records = json.loads(found.stdout.splitlines()[-1])
    assert [fields["prompt"] for _, fields in records] == ["one", "two", "three", "four"]
    assert (records[0][0], records[-1][0]) == ("o/n train, record 1", "o/n validation, record 1")

    hub.shutdown()
    kept = read("o/n", hub.server_port, tmp_path, HF_HUB_OFFLINE="1")
    assert json.loads(kept.stdout.splitlines()[-1]) == records
    missing = read("o/other", hub.server_port, tmp_path, HF_HUB_OFFLINE="1")
    assert "DataError: the data set o/other could not be fetched" in missing.stderr
