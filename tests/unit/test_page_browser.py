"""The page in a real headless browser, over a real server: what somebody sees who opens it.

Needs the Python package playwright and a Chromium (Debian's ``chromium``, Chrome, or the one that the
environment variable DISAGG_MPI_BROWSER names); skipped otherwise. Each test leaves screenshots in its
``tmp_path``, and in the folder that DISAGG_MPI_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from inprocess import PATIENCE
from serving import ServedJob, wait_until

from disagg_mpi.comm.messages import Step

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("DISAGG_MPI_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
PROMPT = "who is there?"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium, or "
                                                        "DISAGG_MPI_BROWSER=/path/to/chrome")
expect = playwright.expect


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """A page in a session of its own, and all that went wrong in it."""

    def __init__(self, browser: Any, url: str, shots: list[Path], **options: Any) -> None:
        self.url = url
        self._shots = shots
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 960}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def _on_console(self, line: Any) -> None:
        if line.type == "error":
            self.problems.append(line.text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.page, name)

    def expect(self, selector: str) -> Any:
        return expect(self.page.locator(selector))

    def send(self, prompt: str, max_tokens: int, api: str = "completion") -> None:
        self.page.fill("#prompt", prompt)
        self.page.select_option("#api", api)
        self.page.fill("#max-tokens", str(max_tokens))
        self.page.click("#send")

    def shoot(self, name: str) -> None:
        for folder in self._shots:
            self.page.screenshot(path=folder / f"{name}.png", full_page=True)

    def is_as_wide_as_its_window(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


@pytest.fixture
def open_tab(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    """``open_tab(url)`` makes a :class:`Tab`; at the end none may have met anything that went wrong."""
    expect.set_options(timeout=PATIENCE * 1000)
    shots, kept = [tmp_path], os.environ.get("DISAGG_MPI_SCREENSHOTS")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        shots.append(Path(kept))
    tabs: list[Tab] = []

    def make(url: str, **options: Any) -> Tab:
        tabs.append(Tab(chromium, url, shots, **options))
        return tabs[-1]

    yield make
    for tab in tabs:
        assert not tab.problems
        assert all(request.startswith(tab.url) for request in tab.requests), "nothing comes from elsewhere"
        tab.context.close()


@pytest.fixture
def job(serve: Any) -> ServedJob:
    return serve()


def pause_after(job: ServedJob, num_steps: int) -> None:
    """The workers stop once that many steps with tokens have been sent."""
    seen = 0

    def on_send(_source: int, _rank: int, message: object) -> None:
        nonlocal seen
        if isinstance(message, Step) and any(response.token_ids for response in message.responses):
            seen += 1
            if seen == num_steps:
                job.job.pause()

    job.job.network.on_send = on_send


def kv_blocks(tab: Tab) -> list[int]:
    """Those in use at each instance, as the meters show them."""
    found: list[int] = tab.locator("[role=meter]").evaluate_all(
        "meters => meters.map(meter => Number(meter.ariaValueNow))")
    return found


def test_a_prompt_streams_and_its_way_is_shown(job: ServedJob, open_tab: Any) -> None:
    tab = open_tab(job.listen())
    tab.expect("#health").to_have_text("healthy")
    tab.expect("#recent-empty").to_be_visible()
    assert tab.locator(".instance h3").all_inner_texts() == ["orchestrator\nHTTP", "context 0\ntp1",
                                                             "generation 0\ntp1"]
    assert kv_blocks(tab) == [0, 0]
    tab.shoot("page-empty")

    pause_after(job, 40)
    tab.send(PROMPT, 200)
    tab.expect("#open").to_have_text("1")
    tab.expect("#phases").to_contain_text("generation 1")
    wait_until(lambda: len(tab.locator("#answer").text_content()) > 20)
    wait_until(lambda: kv_blocks(tab)[1] > 0)
    early = tab.locator("#answer").text_content()
    assert tab.locator("#measured").inner_text().startswith("TTFT ")
    assert tab.locator("#stop").is_enabled()
    assert not tab.locator("#send").is_enabled()
    tab.shoot("page-streaming")

    job.job.resume()
    tab.expect("#measured").to_contain_text("200 tokens")
    tab.expect("#send").to_be_enabled()
    whole = httpx.post(f"{tab.url}/v1/completions", timeout=PATIENCE, json={
        "prompt": PROMPT, "max_tokens": 200, "temperature": 0}).json()["choices"][0]["text"]
    assert tab.locator("#answer").text_content() == whole
    assert whole.startswith(early)
    assert len(early) < len(whole)

    tab.expect("#recent tbody tr").to_have_count(2)
    row = tab.locator("#recent tbody tr[data-number='1']")
    assert re.sub(r"\s+", " ", row.inner_text())[9:].startswith(f"openai done {len(PROMPT)} → 200 ")
    parts = row.locator(".bar div").evaluate_all(
        "bars => bars.map(bar => [bar.className, bar.getBoundingClientRect().width])")
    assert [name for name, _ in parts if name != "other"] == ["queued", "context", "handover", "generation"]
    assert all(width > 0 for _, width in parts)
    assert "first token after" in row.locator(".bar").get_attribute("title")
    wait_until(lambda: kv_blocks(tab) == [0, 0])
    for name, number in (("TTFT", 2), ("ITL", 398), ("TPOT", 2)):
        tab.expect(f"#latency tr:has-text('{name}') td:last-child").to_have_text(str(number))
    assert tab.locator("#rate-graph .rate").get_attribute("d")
    tab.shoot("page-done")


def test_stop_gives_the_request_up(job: ServedJob, open_tab: Any) -> None:
    tab = open_tab(job.listen())
    pause_after(job, 10)
    tab.send(PROMPT, 200, "chat")
    wait_until(lambda: bool(tab.locator("#answer").text_content()))
    tab.click("#stop")
    tab.expect("#measured").to_contain_text("stopped")
    job.job.resume()
    tab.expect("#recent tbody .outcome-cancelled").to_have_count(1)
    tab.expect("#send").to_be_enabled()
    job.assert_free()


def test_what_was_written_is_never_markup(job: ServedJob, open_tab: Any) -> None:
    tab = open_tab(job.listen())
    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    event = json.dumps({"choices": [{"index": 0, "text": markup}]})
    tab.route("**/v1/completions", lambda route: route.fulfill(
        content_type="text/event-stream", body=f"data: {event}\n\ndata: [DONE]\n\n"))
    tab.send(markup, 4)
    tab.expect("#answer").to_have_text(markup)
    assert tab.locator("#answer *").count() == 0


def test_a_refusal_is_shown_in_the_servers_words(serve: Any, open_tab: Any) -> None:
    tab = open_tab(serve(limits={"max_prompt_tokens": 4}).listen())
    tab.send(PROMPT, 4)
    tab.expect("#answer .problem").to_have_text("the prompt has 13 tokens; this server takes 4 at most")
    tab.expect("#totals").to_contain_text("1 refused")
    assert any("400 (Bad Request)" in problem for problem in tab.problems), "the browser's own log of it"
    tab.problems.clear()


def test_the_key_is_asked_for_and_goes_with_the_tab(serve: Any, open_tab: Any) -> None:
    tab = open_tab(serve(api_key="secret").listen())
    tab.expect("#key-form").to_be_visible()
    tab.expect("#prompt").to_be_hidden()
    tab.shoot("page-key")
    tab.fill("#key", "wrong")
    tab.keyboard.press("Enter")
    tab.expect("#key-problem").to_have_text("The server does not take that key.")
    tab.fill("#key", "secret")
    tab.keyboard.press("Enter")
    tab.expect("#health").to_have_text("healthy")
    tab.expect("#key-form").to_be_hidden()
    tab.send(PROMPT, 8)
    tab.expect("#recent tbody tr").to_have_count(1)
    tab.reload()
    tab.expect("#health").to_have_text("healthy")
    assert tab.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    assert all("401 (Unauthorized)" in problem for problem in tab.problems), "the browser's own log of it"
    tab.problems.clear()


def test_a_server_that_goes_away_is_waited_for(serve: Any, open_tab: Any) -> None:
    first = serve()
    tab = open_tab(first.listen())
    tab.send(PROMPT, 8)
    tab.expect("#recent tbody tr").to_have_count(1)
    first.stop()
    tab.expect("#gone").to_contain_text("trying again")
    tab.expect("#health").to_have_text("gone")
    assert tab.locator("#recent tbody tr").count() == 1, "what was is left to read"
    tab.send(PROMPT, 8)
    tab.expect("#answer .problem").to_have_text("the server does not answer")
    tab.shoot("page-gone")
    assert all("ERR_CONNECTION" in problem for problem in tab.problems), "the browser's own log of it"
    tab.problems.clear()
    serve().listen(port=int(tab.url.rpartition(":")[2]))
    tab.expect("#gone").to_be_hidden()
    tab.expect("#health").to_have_text("healthy")
    tab.expect("#recent-empty").to_be_visible()
    assert not [problem for problem in tab.problems if "ERR_CONNECTION" not in problem]
    tab.problems.clear()


@pytest.mark.parametrize(("scheme", "background"), [
    ("light", "rgb(243, 245, 248)"), ("dark", "rgb(16, 22, 29)")])
def test_it_fits_any_window_in_both_themes(
    job: ServedJob, open_tab: Any, scheme: str, background: str
) -> None:
    tab = open_tab(job.listen(), color_scheme=scheme)
    tab.send(PROMPT, 30, "chat")
    tab.expect("#recent tbody tr").to_have_count(1)
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == background
    for width in (1600, 1100, 800, 360):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.is_as_wide_as_its_window()
        assert tab.locator(".scroll").evaluate_all(
            "tables => tables.every(table => table.scrollWidth <= table.clientWidth)")
        tab.shoot(f"page-{scheme}-{width}")
