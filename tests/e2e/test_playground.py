"""The page at / in headless Chromium, against the server with a text engine that needs no model."""

import os
from pathlib import Path

import pytest

from tests.control.server_calls import served, wait_for
from tests.control.server_fakes import make_state
from tests.e2e.browser import CHROMIUM, browser

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian package: chromium)"),
    pytest.mark.timeout(120),
]
IS_OVER = "document.getElementById('send').textContent === 'Send'"
LAST = "[...document.querySelectorAll('.assistant .said')].at(-1)?.textContent"


@pytest.fixture
def page(tmp_path):
    with browser(tmp_path / "profile") as opened:
        yield opened


def say(page, text: str) -> None:
    page.evaluate(f"document.getElementById('prompt').value = {text!r}; document.getElementById('send').click()")


def set_(page, name: str, value: str) -> None:
    page.evaluate(f"document.getElementById({name!r}).value = {value!r}")


def picture(page, name: str) -> None:
    """Kept where somebody wants to look at it."""
    if folder := os.environ.get("PLAYGROUND_PICTURES"):
        page.screenshot(Path(folder) / f"{name}.png")


def test_a_conversation_streams(page):
    state = make_state()
    with served(state) as url:
        page.open(url)
        assert "tiny" in page.wait(
            "(text => text.includes('tiny') && text)(document.getElementById('model').textContent)"
        )
        picture(page, "empty")
        state.text_engine.pause_s = 0.03
        set_(page, "max_tokens", "20")
        set_(page, "temperature", "0.5")
        set_(page, "system", "S")
        say(page, "hi")
        part = page.wait(f"({LAST} || '').length > 2 && {LAST}")
        assert "Paris is nice. Paris".startswith(part) and len(part) < 20  # seen while it grows
        assert page.evaluate("document.getElementById('send').textContent") == "Stop"
        page.wait(IS_OVER)
        assert page.evaluate(LAST) == "Paris is nice. Paris"
        numbers = page.evaluate("document.querySelector('.numbers').textContent")
        assert (
            "20 tokens" in numbers
            and "first after" in numbers
            and "tokens/s" in numbers
            and "cut at max tokens" in numbers
        )
        assert state.text_engine.seen[0].params.temperature == 0.5
        say(page, "<b>x</b>")
        page.wait(f"document.querySelectorAll('.assistant').length === 2 && {IS_OVER}")
        said = [(m["role"], m["content"]) for m in state.text_engine.rendered[-1]["messages"]]
        assert said == [("system", "S"), ("user", "hi"), ("assistant", "Paris is nice. Paris"), ("user", "<b>x</b>")]
        assert page.evaluate("document.querySelectorAll('.user')[1].textContent") == "<b>x</b>"  # text, never markup
        picture(page, "conversation")
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        picture(page, "dark")
        page.evaluate("document.getElementById('clear').click()")
        assert page.evaluate("document.querySelectorAll('.turn').length") == 0
    assert page.messages == []


def test_stop_aborts_in_the_engine_and_keeps_what_came(page):
    state = make_state()
    with served(state) as url:
        state.text_engine.pause_s = 0.03
        page.open(url)
        page.wait("document.getElementById('dot').className === 'up'")
        say(page, "hi")
        page.wait(f"({LAST} || '').length > 2")
        page.evaluate("document.getElementById('send').click()")
        page.wait(IS_OVER)
        wait_for(lambda: len(state.text_engine.aborted) == 1)
        assert "stopped" in page.evaluate("document.querySelector('.numbers').textContent")
        assert page.evaluate(f"{LAST}.length") < 40


def test_it_asks_for_the_key(page):
    with served(make_state(api_key=("secret",))) as url:
        page.open(url)
        page.wait("document.getElementById('ask-key').open")
        picture(page, "key")
        for key in ("wrong", "secret"):
            page.evaluate(
                f"document.getElementById('key').value = {key!r}; document.querySelector('#key-form button').click()"
            )
            if key == "wrong":
                page.wait(
                    "document.getElementById('ask-key').open"
                    " && document.getElementById('key-why').textContent.includes('not accepted')"
                )
        page.wait("document.getElementById('dot').className === 'up'")
        set_(page, "max_tokens", "5")
        say(page, "hi")
        page.wait(f"{LAST} === 'Paris'")


def test_errors_are_shown_and_the_question_is_not_kept(page):
    state = make_state()
    with served(state) as url:
        page.open(url)
        page.wait("document.getElementById('dot').className === 'up'")
        set_(page, "temperature", "3")
        say(page, "hi")
        assert "temperature must be in [0, 2]" in page.wait("document.querySelector('.error')?.textContent")
        set_(page, "temperature", "")
        state.text_engine.fail_after = (3, "non-finite logits")
        say(page, "again")
        page.wait("[...document.querySelectorAll('.error')].some((e) => e.textContent === 'non-finite logits')")
        assert len(state.text_engine.rendered[-1]["messages"]) == 1
        picture(page, "errors")


def test_it_waits_for_a_server_that_starts(page):
    state = make_state()
    state.engine.status.phase, state.engine.status.detail = "compiling", "3 of 12 programs"
    with served(state) as url:
        page.open(url)
        page.wait("document.getElementById('model').textContent.includes('3 of 12 programs')")
        state.engine.status.phase = "ready"
        page.wait("document.getElementById('dot').className === 'up'")
