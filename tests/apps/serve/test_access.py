"""Who may ask: Host, Origin and key."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from mlx_specstream.apps.serve.limits import Access
from mlx_specstream.apps.serve.run import check_access
from mlx_specstream.errors import OptionError
from tests.apps.serve.conftest import MakeService, ask, client_of

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8080", "localhost", "LOCALHOST.:99", "[::1]:8080", "192.168.1.7", "chat.lan"],
)
def test_own_names_are_hosts(make_service: MakeService, host: str) -> None:
    client = client_of(make_service(), Access(allowed_hosts=("Chat.lan",)))
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "evil.example/localhost",
        "[::1",
        "localhost:x",
        "",
    ],
)
def test_other_names_are_not(client: TestClient, host: str) -> None:
    for path in ("/", "/v1/models", "/health"):
        response = client.get(path, headers={"Host": host})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_pages_from_elsewhere_are_refused(client: TestClient) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8080"):
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("OPTIONS", CHAT)):
            response = client.request(method, path, headers={"Origin": origin})
            assert response.status_code == 403
            assert "access-control-allow-origin" not in response.headers
    own = client.post(CHAT, json=ask(), headers={"Origin": "http://127.0.0.1:8080"})
    assert own.status_code == 200
    image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.get("/v1/models", headers=image).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200


def test_an_allowed_page_may_ask(make_service: MakeService) -> None:
    access = Access("correct-key", allowed_origins=("https://chat.example",))
    client = client_of(make_service(), access)
    origin = {"Origin": "https://chat.example"}
    preflight = client.options(CHAT, headers=origin)
    assert preflight.status_code == 204
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    refused = client.post(CHAT, json=ask(), headers=origin)
    assert refused.status_code == 401
    answered = client.post(
        CHAT, json=ask(), headers={**origin, "Authorization": "Bearer correct-key"}
    )
    assert answered.status_code == 200
    for response in (preflight, refused, answered):
        assert response.headers["access-control-allow-origin"] == "https://chat.example"


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer wrong-key", "Basic correct-key", "Bearer correct-keys", "é"],
)
def test_a_wrong_key_is_refused(make_service: MakeService, given: str | None) -> None:
    client = client_of(make_service(), Access("correct-key"))
    headers = {} if given is None else {"Authorization": given.encode()}
    for path in ("/v1/models", "/metrics", "/nothing"):
        response = client.get(path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/page.js", "/markdown.js", "/health", "/openapi.json"):
        assert client.get(path, headers=headers).status_code == 200


def test_the_right_key_is_let_in(make_service: MakeService) -> None:
    client = client_of(make_service(), Access("correct-key"))
    headers = {"Authorization": "bearer correct-key"}
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_other_machines_need_a_key() -> None:
    check_access("127.0.0.1", Access())
    check_access("::1", Access())
    check_access("0.0.0.0", Access("long enough"))
    with pytest.raises(OptionError, match="needs an API key"):
        check_access("0.0.0.0", Access())
    with pytest.raises(OptionError, match="at least 8"):
        check_access("127.0.0.1", Access("short"))
