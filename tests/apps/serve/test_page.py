"""The web page in a real browser: a conversation, its colours and figures, stopping, a key."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mlx_specstream.apps.serve.limits import Access
from tests.apps.parrot import save_parrot
from tests.apps.serve.conftest import Gate, Live, MakeService

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="needs chromium and chromedriver (Debian: apt install chromium chromium-driver)",
    ),
]

MARKUP = (
    "First <b>bold</b>, then <img src=x onerror=\"document.title='taken'\"> and "
    "<script>document.title='taken'</script> & that is all there is to say about it."
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """A model whose every answer is full of markup."""
    from mlx_specstream import load

    folder = save_parrot(tmp_path_factory.mktemp("models") / "markup", MARKUP)
    return lambda: load(str(folder))


def until(browser: Any, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, 60, 0.05).until(lambda _: condition())


def at(browser: Any, name: str) -> Any:
    return browser.find_element(By.ID, name)


def answers(browser: Any) -> list[Any]:
    return list(browser.find_elements(By.CSS_SELECTOR, "article.assistant"))


def ask(browser: Any, text: str) -> None:
    at(browser, "question").send_keys(text, Keys.ENTER)


def idle(browser: Any) -> bool:
    return at(browser, "send").is_displayed() and not at(browser, "stop").is_displayed()


def test_a_conversation(
    browser: Any, make_service: MakeService, go_live: Callable[..., Live], talker: Any
) -> None:
    live = go_live(make_service(talker, max_tokens=200))
    browser.get(live.url)
    until(browser, lambda: at(browser, "model").text == "markup")
    assert at(browser, "legend").text.split() == ["main", "stream", "1", "stream", "2"]
    for number in (1, 2):
        ask(browser, f"question {number}")
        until(browser, lambda number=number: len(answers(browser)) == number and idle(browser))
        assert answers(browser)[-1].get_property("textContent") == MARKUP
    # What the model wrote is text: no element of it, no script of it.
    assert not browser.find_elements(By.CSS_SELECTOR, "#chat b, #chat img, #chat script")
    assert browser.title == "specstream"
    # Stream 1 of this model is always right, so every other word is its own.
    spans = answers(browser)[-1].find_elements(By.TAG_NAME, "span")
    styles = [span.get_attribute("class") for span in spans]
    assert styles[:5] == ["s0", "s1", "s0", "s1", "s0"]
    colours = {span.value_of_css_property("color") for span in spans[:2]}
    assert len(colours) == 2
    at(browser, "drafts").click()
    colours = {span.value_of_css_property("color") for span in spans[:2]}
    assert len(colours) == 1
    assert "tok/s" in at(browser, "figures").text
    assert "tokens/pass" in at(browser, "figures").text
    # The second request held the whole conversation.
    sent = live.service.metrics.prompt_tokens._value.get()
    assert sent > len("question 1") + len("question 2") + len(MARKUP) // 4
    at(browser, "clear").click()
    assert not answers(browser)
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe  # among others, nothing broke the content policy


def test_stopping(
    browser: Any, make_service: MakeService, go_live: Callable[..., Live], talker: Any, gate: Gate
) -> None:
    service = make_service(talker, max_tokens=200)
    live = go_live(service)
    browser.get(live.url)
    ask(browser, "tell me")
    gate.allow(6)
    until(browser, lambda: answers(browser) and len(answers(browser)[0].text) > 10)
    assert not at(browser, "send").is_displayed()
    at(browser, "stop").click()
    until(browser, lambda: idle(browser))
    gate.allow(1)
    until(browser, lambda: service.engine.idle)
    begun = answers(browser)[0].get_property("textContent")
    assert MARKUP.startswith(begun)
    assert len(begun) < len(MARKUP)
    gate.open()
    ask(browser, "again")
    until(browser, lambda: len(answers(browser)) == 2 and idle(browser))
    assert answers(browser)[1].get_property("textContent") == MARKUP
    # Stopped before its first word, a question goes back to where it was typed.
    gate.opened = False
    while gate.steps.acquire(blocking=False):
        pass
    ask(browser, "too late")
    until(browser, lambda: at(browser, "stop").is_displayed())
    time.sleep(0.1)
    at(browser, "stop").click()
    until(browser, lambda: idle(browser))
    assert at(browser, "question").get_property("value") == "too late"
    assert len(answers(browser)) == 2


def test_a_key_is_asked_for(
    browser: Any, make_service: MakeService, go_live: Callable[..., Live], talker: Any
) -> None:
    live = go_live(make_service(talker, max_tokens=200), Access("correct-key"))
    browser.get(live.url)
    until(browser, lambda: at(browser, "key").is_displayed())
    ask(browser, "hello")
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "article.error"))
    assert "API key" in browser.find_element(By.CSS_SELECTOR, "article.error").text
    at(browser, "key").send_keys("correct-key")
    at(browser, "question").send_keys(Keys.ENTER)
    until(browser, lambda: answers(browser) and idle(browser))
    assert answers(browser)[-1].get_property("textContent") == MARKUP
