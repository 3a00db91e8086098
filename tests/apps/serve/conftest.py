"""Services over tiny models, in this process or on a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from starlette.testclient import TestClient

from mlx_specstream import StreamModel, TreeSpec, load
from mlx_specstream.apps.serve.app import create_app
from mlx_specstream.apps.serve.limits import Access, Limits
from mlx_specstream.apps.serve.run import DrainingServer, listen, url_of
from mlx_specstream.apps.serve.scheduler import Scheduler
from mlx_specstream.apps.serve.service import Service, start_service
from mlx_specstream.config import DecodeConfig
from tests.apps.parrot import save_parrot
from tests.support.scripted import with_streams
from tests.support.tiny import byte_tokenizer, hf_byte_tokenizer

TREE = DecodeConfig(tree=TreeSpec(rows=5))
MakeService = Callable[..., Service]

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>'
CALLING = f"Let me see.\n{CALL}"
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def ask(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture(scope="session")
def tiny_stream_model(tiny_llama: nn.Module) -> StreamModel:
    """The tiny llama with random streams, for this thread."""
    return with_streams(tiny_llama)


@pytest.fixture
def make_service(tiny_llama: nn.Module) -> Iterator[MakeService]:
    """The maker of services with given limits, over the tiny model or what `loading` returns.

    Loading is the engine thread's, as it is in earnest: arrays belong to a thread.
    """
    made: list[Service] = []

    def tiny() -> Any:
        return with_streams(tiny_llama), byte_tokenizer()

    def make(loading: Callable[[], Any] = tiny, **limits: Any) -> Service:
        bounds = Limits(**{"max_tokens": 16, "prefill_step_size": 8, **limits})
        made.append(start_service(loading, bounds, config=TREE))
        return made[-1]

    yield make
    for service in made:
        service.stop()


def client_of(service: Service, access: Access | None = None, **options: Any) -> TestClient:
    """Return a client that talks to a service in this process."""
    app = create_app(service, access or Access())
    return TestClient(
        app, base_url="http://127.0.0.1:8080", raise_server_exceptions=False, **options
    )


@pytest.fixture
def client(make_service: MakeService) -> TestClient:
    """A client of a service over the tiny model."""
    return client_of(make_service())


@pytest.fixture(scope="session")
def caller_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every answer calls a tool."""
    return save_parrot(tmp_path_factory.mktemp("models") / "caller", CALLING)


@pytest.fixture(scope="session")
def caller(caller_folder: Path) -> Callable[[], Any]:
    """What loads that model, with mlx-lm's parser of JSON calls."""
    return lambda: load(str(caller_folder), tokenizer_config={"tool_parser_type": "json_tools"})


@pytest.fixture
def tiny_caller(tiny_llama: nn.Module) -> Callable[[], Any]:
    """What loads the tiny model, which writes noise, with a tokenizer that reads calls."""

    def loading() -> Any:
        tokenizer = TokenizerWrapper(
            hf_byte_tokenizer(),
            BPEStreamingDetokenizer,
            tool_call_start=json_tools.tool_call_start,
            tool_call_end=json_tools.tool_call_end,
            tool_parser=json_tools.parse_tool_call,
        )
        return with_streams(tiny_llama), tokenizer

    return loading


@pytest.fixture(scope="session")
def talker(parrot_folder: Path) -> Callable[[], Any]:
    """What loads the parrot."""
    return lambda: load(str(parrot_folder))


class Gate:
    """Holds the model: `allow` lets it do so many more steps, `open` all."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.opened = False

    def allow(self, count: int) -> None:
        self.steps.release(count)

    def open(self) -> None:
        self.opened = True
        self.steps.release(1000)

    def wait(self) -> None:
        if not self.opened:
            assert self.steps.acquire(timeout=60), "nobody opened the gate"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Every step of the model waits for this gate."""
    gate, step = Gate(), Scheduler.step

    def held(self: Scheduler) -> Any:
        if self.requests:
            gate.wait()
        return step(self)

    monkeypatch.setattr(Scheduler, "step", held)
    yield gate
    gate.open()


@dataclass
class Live:
    """A server on a loopback socket, in a thread."""

    service: Service
    url: str
    server: DrainingServer
    thread: threading.Thread


@pytest.fixture
def go_live() -> Iterator[Callable[..., Live]]:
    """What puts a service on a real socket."""
    running: list[Live] = []

    def start(service: Service, access: Access | None = None) -> Live:
        listening = listen("127.0.0.1", 0)
        server = DrainingServer(create_app(service, access or Access()), service)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        running.append(Live(service, url_of(listening), server, thread))
        return running[-1]

    yield start
    for live in running:
        live.server.should_exit = True
        live.thread.join(30)
        assert not live.thread.is_alive()
