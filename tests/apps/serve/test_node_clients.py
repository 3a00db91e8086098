"""The JavaScript clients of OpenAI, Anthropic and Vercel against servers on sockets.

Skipped unless `npm install` was run in tests/apps/serve/node.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_specstream.apps.serve.limits import Access
from tests.apps.parrot import ANSWER
from tests.apps.serve.conftest import Live, MakeService

FOLDER = Path(__file__).parent / "node"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(
    NODE is None or not (FOLDER / "node_modules").exists(),
    reason="needs node, and npm install in tests/apps/serve/node",
)
CLIENTS = (
    *("openai chat", "openai responses", "anthropic"),
    *("vercel openai", "vercel openai chat", "vercel openai-compatible", "vercel anthropic"),
)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_talks_and_calls(
    make_service: MakeService, go_live: Callable[..., Live], talker: Any, caller: Any, client: str
) -> None:
    urls = [
        go_live(make_service(loading, max_tokens=400), Access("a-test-key")).url
        for loading in (talker, caller)
    ]
    assert NODE is not None
    words = [NODE, str(FOLDER / "clients.mjs"), client, *urls]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["text"] == ANSWER
    assert len(found["calls"]) >= 2
    assert all(call == {"a": 1, "b": "ü"} for call in found["calls"])
    if client.startswith("vercel"):
        assert "text" in found["refusal"]
