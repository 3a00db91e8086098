"""The web page in a real browser: what it shows, what it asks for, and what it never runs."""

from __future__ import annotations

import json
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
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ):
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


def found(browser: Any, selector: str) -> list[Any]:
    return list(browser.find_elements(By.CSS_SELECTOR, selector))


def answers(browser: Any) -> list[str]:
    """Return the text of every answer."""
    return [a.get_property("textContent") for a in found(browser, "article.assistant .body")]


def press(browser: Any, text: str, within: str = "article.assistant:last-of-type") -> None:
    """Press the button of that text, wherever it is on the screen."""
    for button in found(browser, f"{within} button"):
        if button.get_property("textContent") == text:
            browser.execute_script("arguments[0].click()", button)
            return
    raise AssertionError(f"there is no button {text!r}")


def ask(browser: Any, text: str) -> None:
    at(browser, "question").send_keys(text, Keys.ENTER)


def idle(browser: Any) -> bool:
    return at(browser, "send").is_displayed() and not at(browser, "stop").is_displayed()


def asked(browser: Any, text: str, count: int) -> None:
    """Ask, and wait for the answer, the `count`-th on the page."""
    ask(browser, text)
    until(browser, lambda: len(answers(browser)) == count and idle(browser))


def fresh(browser: Any, url: str) -> None:
    """Open the page as if for the first time."""
    browser.get(url)
    browser.execute_script("localStorage.clear(); sessionStorage.clear()")
    browser.get(url)
    until(browser, lambda: at(browser, "model").text == "markup")


def listen_in(browser: Any) -> None:
    """Remember what the page sends."""
    browser.execute_script(
        "window.sent = []; const real = window.fetch;"
        "window.fetch = (path, options) => {"
        " if (options?.body) window.sent.push(JSON.parse(options.body));"
        " return real(path, options); }"
    )


def script_answer(browser: Any, passes: list[dict[str, Any]]) -> None:
    """Let the server's next answers be these chunks."""
    stream = "".join(f"data: {json.dumps(one)}\n\n" for one in passes) + "data: [DONE]\n\n"
    browser.execute_script(
        "const stream = arguments[0]; window.fetch = async () => new Response(stream)", stream
    )


def chunk(*pieces: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    figures = {"tokens": 2, "passes": 2, "tokens_per_pass": 1.0, "tokens_per_s": 5000.0}
    choice = {"delta": {}, "finish_reason": finish, "specstream": {"pieces": pieces, **figures}}
    return {"choices": [choice]}


@pytest.fixture
def page(browser: Any, make_service: MakeService, go_live: Callable[..., Live], talker: Any) -> Any:
    """The page of a server whose every answer is full of markup."""
    fresh(browser, go_live(make_service(talker, max_tokens=200)).url)
    return browser


def test_a_conversation(
    browser: Any, make_service: MakeService, go_live: Callable[..., Live], talker: Any
) -> None:
    live = go_live(make_service(talker, max_tokens=200))
    fresh(browser, live.url)
    assert at(browser, "welcome").is_displayed()
    until(browser, lambda: "stream 1" in at(browser, "legend").text)
    assert "stream 2" in at(browser, "legend").text
    assert "stream 3" not in at(browser, "legend").text
    for number in (1, 2):
        asked(browser, f"question {number}", number)
        assert answers(browser)[-1] == MARKUP
    # What the model wrote is text: no element of it, no script of it.
    assert not found(browser, "#chat b, #chat img, #chat script")
    assert browser.title == "specstream"
    # Stream 1 of this model is always right, so every other word is its own.
    (span, *_) = spans = found(browser, "article.assistant:last-of-type .body span")
    assert {s.get_attribute("class") for s in spans} == {"s1"}
    assert len("".join(s.text for s in spans)) > len(MARKUP) // 3
    plain = found(browser, "article.assistant .body p")[0].value_of_css_property("color")
    assert span.value_of_css_property("color") != plain
    assert "stream 1" in span.get_attribute("title")
    at(browser, "drafts").click()
    assert span.value_of_css_property("color") == plain
    # The colours say what they mean.
    assert "had been guessed" not in at(browser, "explain").text
    found(browser, ".more")[0].click()
    assert "had been guessed" in at(browser, "explain").text
    assert "tok/s" in found(browser, ".figures")[-1].text
    assert "tokens per pass" in found(browser, ".figures")[-1].text
    # The second request held the whole conversation.
    sent = live.service.metrics.prompt_tokens._value.get()
    assert sent > len("question 1") + len("question 2") + len(MARKUP) // 4
    at(browser, "clear").click()
    assert not answers(browser)
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe  # among others, nothing broke the content policy


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping(
    browser: Any,
    make_service: MakeService,
    go_live: Callable[..., Live],
    talker: Any,
    gate: Gate,
    way: str,
) -> None:
    def stop() -> None:
        if way == "button":
            at(browser, "stop").click()
        else:
            at(browser, "question").send_keys(Keys.ESCAPE)
        until(browser, lambda: idle(browser))

    service = make_service(talker, max_tokens=200)
    live = go_live(service)
    fresh(browser, live.url)
    ask(browser, "tell me")
    # A sign of life before the first token.
    until(browser, lambda: found(browser, ".waiting") and found(browser, ".waiting")[0].text)
    until(browser, lambda: " s" in found(browser, ".waiting")[0].text)
    gate.allow(6)
    until(browser, lambda: answers(browser) and len(answers(browser)[0]) > 10)
    assert not found(browser, ".waiting")[0].is_displayed()
    assert not at(browser, "send").is_displayed()
    stop()
    gate.allow(1)
    until(browser, lambda: service.engine.idle)
    begun = answers(browser)[0]
    assert MARKUP.startswith(begun)
    assert len(begun) < len(MARKUP)
    assert "Stopped." in found(browser, "article.assistant .foot")[0].text
    gate.open()
    asked(browser, "again", 2)
    assert answers(browser)[1] == MARKUP
    assert "Stopped" not in found(browser, "article.assistant .foot")[1].text
    # Stopped before its first word, a question goes back to where it was typed.
    gate.opened = False
    while gate.steps.acquire(blocking=False):
        pass
    ask(browser, "too late")
    until(browser, lambda: at(browser, "stop").is_displayed())
    time.sleep(0.1)
    stop()
    assert at(browser, "question").get_property("value") == "too late"
    assert len(answers(browser)) == 2


def test_a_key_is_asked_for(
    browser: Any, make_service: MakeService, go_live: Callable[..., Live], talker: Any
) -> None:
    live = go_live(make_service(talker, max_tokens=200), Access("correct-key"))
    browser.get(live.url)
    until(browser, lambda: at(browser, "key").is_displayed())
    assert "wants an API key" in at(browser, "key-says").text
    focused = "return document.activeElement.id"
    assert browser.execute_script(focused) == "question"
    ask(browser, "hello")
    until(browser, lambda: idle(browser) and at(browser, "question").get_property("value"))
    assert browser.execute_script(focused) == "question", "who types goes on typing"
    assert at(browser, "question").get_property("value") == "hello"
    at(browser, "key").send_keys("wrong", Keys.ENTER)
    until(browser, lambda: "refuses this API key" in at(browser, "key-says").text)
    at(browser, "key").clear()
    at(browser, "key").send_keys("correct-key", Keys.ENTER)
    until(browser, lambda: not at(browser, "key-form").is_displayed())
    assert at(browser, "model").text == "markup"
    asked(browser, "", 1)
    assert answers(browser)[-1] == MARKUP
    # The key is kept for a reload, in this tab alone.
    browser.refresh()
    until(browser, lambda: at(browser, "model").text == "markup")
    assert not at(browser, "key-form").is_displayed()
    assert not browser.execute_script("return JSON.stringify(localStorage).includes('correct')")


def test_an_answer_that_was_cut_can_be_continued(page: Any) -> None:
    at(page, "settings-button").click()
    at(page, "length").send_keys("5")
    listen_in(page)
    asked(page, "go", 1)
    begun = answers(page)[0]
    assert "Cut at the longest answer" in found(page, "article.assistant .foot")[0].text
    press(page, "Continue")
    until(page, lambda: idle(page) and len(answers(page)[0]) > len(begun))
    assert answers(page)[0].startswith(begun)
    assert len(answers(page)) == 1
    first, second = page.execute_script("return window.sent")
    assert first["max_tokens"] == 5
    assert "continue_final_message" not in first
    assert second["continue_final_message"] is True
    assert second["add_generation_prompt"] is False
    assert second["messages"][-1] == {"role": "assistant", "content": begun}


def test_the_conversation_survives_a_reload(page: Any) -> None:
    asked(page, "one", 1)
    page.refresh()
    until(page, lambda: answers(page) == [MARKUP])
    assert found(page, ".bubble")[0].text == "one"
    assert found(page, "article.assistant .body .s1")
    listen_in(page)
    asked(page, "two", 2)
    (sent,) = page.execute_script("return window.sent")
    assert [m["content"] for m in sent["messages"]] == ["one", MARKUP, "two"]
    page.execute_script("sessionStorage['specstream.chat'] = '[{\"role\": 5}]'")
    page.refresh()
    until(page, lambda: at(page, "welcome").is_displayed())


@pytest.mark.parametrize(
    ("kept", "shown"),
    [
        ([{"role": "assistant", "text": "a"}], ["a"]),
        ([{"role": "assistant", "text": "a", "runs": [["x"]], "thought": 7, "figures": {}}], ["a"]),
        ([{"role": "assistant", "text": "a", "runs": 5, "end": None, "figures": None}], ["a"]),
        ([{"role": "assistant", "text": "abc", "runs": [[1, 2]], "end": "stop"}], ["abc"]),
        ([{"role": "assistant", "text": "abc", "runs": [[9, 2], [1, 0]]}], ["abc"]),
        ([{"role": "assistant"}], []),
        ([None], []),
        ({"role": "user"}, []),
    ],
)
def test_what_another_version_kept_does_not_stop_the_page(
    page: Any, kept: Any, shown: list[str]
) -> None:
    page.execute_script("sessionStorage['specstream.chat'] = arguments[0]", json.dumps(kept))
    page.refresh()
    until(page, lambda: at(page, "model").text == "markup")
    assert answers(page) == shown
    asked(page, "go", len(shown) + 1)
    assert answers(page)[-1] == MARKUP


def test_words_in_tables_stay_whole_on_a_narrow_screen(page: Any) -> None:
    wide = "|".join(["wonderfully"] * 9)
    table = f"|{wide}|\n|{'-|' * 9}\n|{wide}|"
    script_answer(page, [chunk({"text": table, "origin": 0}, finish="stop")])
    asked(page, "go", 1)
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 375, "height": 700, "deviceScaleFactor": 1, "mobile": True},
    )
    sizes = "return [...document.querySelectorAll('th')].map((cell) => cell.clientHeight)"
    whole = "return document.documentElement.scrollWidth"
    heights = page.execute_script(sizes)
    width = page.execute_script(whole)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert max(heights) < 50, "one line each"
    assert width == 375, "the table scrolls, not the page"


def test_a_reload_in_the_middle_keeps_what_came(
    browser: Any, make_service: MakeService, go_live: Callable[..., Live], talker: Any, gate: Gate
) -> None:
    live = go_live(make_service(talker, max_tokens=200))
    fresh(browser, live.url)
    ask(browser, "one")
    gate.allow(6)
    until(browser, lambda: answers(browser) and len(answers(browser)[0]) > 10)
    browser.refresh()
    until(browser, lambda: answers(browser) and answers(browser)[0])
    assert MARKUP.startswith(answers(browser)[0])
    assert "Stopped." in found(browser, "article.assistant .foot")[0].text
    gate.open()


def test_settings_are_sent_and_kept(page: Any) -> None:
    at(page, "settings-button").click()
    for name, value in (("system", "be kind"), ("temperature", "0.5"), ("length", "7")):
        at(page, name).send_keys(value)
    page.refresh()
    until(page, lambda: at(page, "model").text == "markup")
    listen_in(page)
    asked(page, "go", 1)
    (sent,) = page.execute_script("return window.sent")
    assert sent["messages"][0] == {"role": "system", "content": "be kind"}
    assert (sent["temperature"], sent["max_tokens"]) == (0.5, 7)


def test_questions_are_edited_and_answers_retried(page: Any) -> None:
    asked(page, "one", 1)
    asked(page, "two", 2)
    listen_in(page)
    press(page, "Retry")
    until(page, lambda: page.execute_script("return window.sent.length") == 1 and idle(page))
    assert answers(page) == [MARKUP, MARKUP]
    press(page, "Edit", "article.user")
    field = found(page, "form.edit textarea")[0]
    field.clear()
    field.send_keys("three")
    press(page, "Ask this instead", "form.edit")
    until(page, lambda: page.execute_script("return window.sent.length") == 2 and idle(page))
    retried, edited = page.execute_script("return window.sent")
    assert [m["content"] for m in retried["messages"]] == ["one", MARKUP, "two"]
    assert [m["content"] for m in edited["messages"]] == ["three"]
    assert [b.text for b in found(page, ".bubble")] == ["three"]
    press(page, "Edit", "article.user")
    press(page, "Cancel", "form.edit")
    assert [b.text for b in found(page, ".bubble")] == ["three"]


def test_thoughts_are_folded_and_rates_of_two_tokens_are_not_told(page: Any) -> None:
    script_answer(
        page,
        [
            chunk({"text": "Is it <b>?", "origin": 0, "thought": True}),
            chunk({"text": "Yes.", "origin": 1}, finish="stop"),
        ],
    )
    asked(page, "go", 1)
    assert answers(page) == ["Yes."]
    thought = found(page, ".thought")[0]
    assert thought.text == "Thought"
    thought.find_element(By.TAG_NAME, "summary").click()
    assert "Is it <b>?" in thought.text
    assert found(page, ".figures")[0].text == "2 tokens"


def test_code_is_copied_as_it_was_written(page: Any) -> None:
    code = "def f(a):\n\n    return '<b>'  # *no* mark"
    script_answer(
        page, [chunk({"text": f"So:\n```python\n{code}\n```", "origin": 0}, finish="stop")]
    )
    asked(page, "go", 1)
    page.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    found(page, ".code button.copy")[0].click()
    assert until(page, lambda: page.execute_script("return window.copied")) == code
    until(page, lambda: found(page, ".code button.copy")[0].text == "Copied")


def test_an_answer_that_breaks_off_says_so(page: Any) -> None:
    script_answer(
        page,
        [
            chunk({"text": "Half an", "origin": 0}),
            {"error": {"message": "the server is closing."}},
        ],
    )
    asked(page, "go", 1)
    assert answers(page) == ["Half an"]
    assert "Broken off." in found(page, "article.assistant .foot")[0].text
    assert at(page, "says").text == "the server is closing."


RENDERED = """
const [source, done] = [JSON.parse(arguments[0]), arguments[1]];
import("/markdown.js").then(({ linesOf, blocksOf, renderBlocks }) => {
  const box = document.createElement("div"), began = performance.now();
  renderBlocks(box, linesOf(source), (parent, from, to) => parent.append(source.slice(from, to)));
  const all = [...box.querySelectorAll("*")];
  done({
    html: box.innerHTML,
    text: box.textContent,
    names: [...new Set(all.map((e) => e.localName))],
    attributes: [...new Set(all.flatMap((e) => e.getAttributeNames()))],
    addresses: all.filter((e) => e.href).map((e) => e.href),
    ms: performance.now() - began,
  });
});
"""


def rendered(page: Any, source: str) -> dict[str, Any]:
    """Return what the page makes of a Markdown text."""
    made: dict[str, Any] = page.execute_async_script(RENDERED, json.dumps(source))
    return made


MARKDOWN = {
    "a **b** c": "<p>a <strong>b</strong> c</p>",
    "a *b* _c_ ~~d~~": "<p>a <em>b</em> <em>c</em> <del>d</del></p>",
    "snake_case_name 2*3*4 ** x": "<p>snake_case_name 2<em>3</em>4 ** x</p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "`a **b**` ``c`d``": "<p><code>a **b**</code> <code>c`d</code></p>",
    "one\ntwo": "<p>one<br>two</p>",
    "# A #\ntext": "<h3>A</h3><p>text</p>",
    "- a\n- b\n  - c": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n\n   more\n2. b": "<ol><li><p>a</p><p>more</p></li><li>b</li></ol>",
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "---": "<hr>",
    "\\*a\\*": "<p>*a*</p>",
    "**open": "<p>**open</p>",
    "|a|b|\n|-|-|\n|1|**2**|": (
        '<div class="scroll"><table><tr><th>a</th><th>b</th></tr>'
        "<tr><td>1</td><td><strong>2</strong></td></tr></table></div>"
    ),
}


@pytest.mark.parametrize("source", MARKDOWN)
def test_markdown(page: Any, source: str) -> None:
    assert rendered(page, source)["html"] == MARKDOWN[source]


HOSTILE = [
    MARKUP,
    "<script>document.title='taken'</script>",
    "```html\n<script>document.title='taken'</script>\n```",
    "``` <img src=x onerror=alert(1)>\n```",
    "[a](javascript:document.title='taken')",
    "[a](JaVaScRiPt:alert(1)) [b](java\tscript:alert(1)) [c](\x01javascript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>) [b](vbscript:x) [c](file:///etc/passwd)",
    "[a](//evil.example) [b](/health) [c](blob:x)",
    '[a](https://x.example/" onclick="alert(1))',
    "![a](https://x.example/steal.png)",
    "<https://x.example/?a=<script>>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "| <b> | <img src=x onerror=alert(1)> |\n|--|--|\n| <i> | </td><script>1</script> |",
    "1. <svg onload=alert(1)>\n   > <iframe srcdoc='<script>1</script>'>",
    "# <style>*{display:none}</style>",
    "__proto__ **constructor** [toString](https://x.example)",
    "\u202e\u0000 \ufeff",
]
ALLOWED = {
    *("p", "br", "strong", "em", "del", "code", "pre", "a", "h3", "h4", "h5", "h6", "hr"),
    *("ul", "ol", "li", "blockquote", "div", "span", "button", "table", "tr", "th", "td"),
}


@pytest.mark.parametrize("source", HOSTILE)
def test_nothing_hostile_becomes_an_element(page: Any, source: str) -> None:
    made = rendered(page, source)
    assert set(made["names"]) <= ALLOWED
    assert set(made["attributes"]) <= {"class", "type", "href", "title", "target", "rel", "start"}
    assert all(address.startswith("https://x.example") for address in made["addresses"])
    for word in ("script", "alert(1)", "onerror", "onload", "iframe", "style"):
        assert made["text"].count(word) >= source.count(word), "what was written is shown"
    assert page.title == "specstream"


@pytest.mark.parametrize(
    "source",
    [
        "*" * 20000,
        "**a " * 8000,
        "[" * 20000,
        "[a](" * 8000,
        "`" * 20000,
        "` `` " * 6000,
        ">" * 20000,
        "> " * 10000,
        "- " * 10000,
        "\n".join("  " * n + "- a" for n in range(300)),
        "_a " * 10000,
        "~~" * 10000,
        "|" * 20000 + "\n|-|\n" + "|" * 20000,
        "\\" * 20000,
        "https://" * 4000,
        "1. a\n\n" * 3000,
        "```\n" * 8001,
        "-" * 20000 + "x",
        "- " * 5000 + "x\n" + " -" * 5000,
    ],
    ids=lambda source: repr(source[:12]),
)
def test_pathological_text_is_drawn_at_once(page: Any, source: str) -> None:
    assert rendered(page, source)["ms"] < 3000
