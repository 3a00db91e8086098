"""A stand-in for the Hugging Face hub on this machine, for the hub's own client."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub._snapshot_download import snapshot_download


@dataclass
class Loopback:
    """Repositories by id and revision, each a commit and its files; `gated` ones give nothing."""

    repositories: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        """Serve a folder's files as one revision; return its commit."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        commit = f"{abs(hash((name, revision))):040x}"[:40]
        self.repositories.setdefault(name, {})[revision] = (commit, files)
        return commit

    @contextmanager
    def served(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
        """Let the hub's client ask here and keep what it gets in `cache`."""
        hub = self

        class Handler(_Handler):
            loopback = hub

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        address = f"http://127.0.0.1:{server.server_port}"

        def fetched(name: str, **options: Any) -> str:
            return str(snapshot_download(name, endpoint=address, cache_dir=cache, **options))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
        real = huggingface_hub.HfApi
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=address, token="x"))
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    loopback: Loopback

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """Make a repository, and take a commit whose files are all in its own lines."""
        hub, path = self.loopback, self.path.partition("?")[0]
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        hub.asked.append(path)
        if path == "/api/repos/create":
            fields = json.loads(sent)
            name = f"{fields.get('organization') or 'owner'}/{fields['name']}"
            hub.repositories.setdefault(name, {"main": ("0" * 40, {})})
            return self._reply(
                200, json.dumps({"url": f"https://huggingface.co/{name}"}).encode(), True
            )
        if path == "/api/validate-yaml":
            return self._reply(200, b'{"errors": [], "warnings": []}', True)
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in hub.repositories or name in hub.gated:
            return self._reply(403, b'{"error": "no access"}', True)
        if "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(sent)["files"]
            ]
            return self._reply(200, json.dumps({"files": files}).encode(), True)
        lines = [json.loads(line) for line in sent.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = f"{abs(hash(sent)):040x}"[:40]
        hub.repositories[name]["main"] = (commit, files)
        told = {"commitUrl": f"https://huggingface.co/{name}/commit/{commit}", "commitOid": commit}
        return self._reply(200, json.dumps(told).encode(), True)

    def _answer(self, body: bool) -> None:
        hub, path = self.loopback, self.path.partition("?")[0]
        hub.asked.append(path)
        if path == "/api/models":  # all carry the tag that is asked for
            listed = [{"id": name, "downloads": len(name)} for name in hub.repositories]
            return self._reply(200, json.dumps(listed).encode(), body)
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name, kind, rest = "/".join(parts[:2]), "".join(parts[2:3]), parts[3:]
        if name not in hub.repositories:
            return self._reply(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})
        if name in hub.gated:
            return self._reply(403, b"{}", body, **{"X-Error-Code": "GatedRepo"})
        revisions = hub.repositories[name]
        by_commit = {commit: (commit, files) for commit, files in revisions.values()}
        revision = rest[0] if rest else "main"
        if revision not in {**revisions, **by_commit}:
            return self._reply(404, b"{}", body, **{"X-Error-Code": "RevisionNotFound"})
        commit, files = {**revisions, **by_commit}[revision]
        commit_header = {"X-Repo-Commit": commit}
        if not api:  # /owner/name/resolve/revision/file
            content = files["/".join(rest[1:])]
            etag = f'"{abs(hash(content)):x}"'
            return self._reply(200, content, body, ETag=etag, **commit_header)
        if kind == "tree":
            tree: Any = [
                {"type": "file", "path": file, "oid": "0" * 40, "size": len(content)}
                for file, content in files.items()
            ]
        else:
            siblings = [{"rfilename": file} for file in files]
            tree = {"id": name, "sha": commit, "siblings": siblings}
        return self._reply(200, json.dumps(tree).encode(), body, **commit_header)

    def _reply(self, status: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
