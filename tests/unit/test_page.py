"""What the page is told, and how its files are served; the page itself is in ``test_page_browser.py``."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, TypeVar

import httpx
import pytest
from inprocess import PATIENCE
from serving import NAME, ServedJob, wait_until

from disagg_mpi.frontend.page import recent as recent_module
from disagg_mpi.frontend.page.recent import NUM_TIMELINES, RecentRequests, percentiles_of
from disagg_mpi.frontend.page.routes import OPEN_PAGE_PATHS
from disagg_mpi.frontend.page.state import PageState
from disagg_mpi.frontend.stats import Ended
from disagg_mpi.request import Choice, Result, Timing

T = TypeVar("T")
PROMPT = {"prompt": "hello", "max_tokens": 8, "temperature": 0}


def talk(job: ServedJob, with_client: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with job.client() as client:
            return await with_client(client)

    return asyncio.run(asyncio.wait_for(run(), PATIENCE))


def get(job: ServedJob, path: str, **options: Any) -> httpx.Response:
    return talk(job, lambda client: client.get(path, **options))


def ask(job: ServedJob, **options: Any) -> None:
    """One request, to its end in the books."""
    async def complete(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/completions", json=PROMPT | options)).status_code == 200
        while job.gate.num_open:
            await asyncio.sleep(0.001)

    talk(job, complete)


@pytest.fixture
def job(serve: Any) -> ServedJob:
    return serve()


def ended(*timings: Timing, seconds: float = 1.0, **options: Any) -> Ended:
    choices = [Choice(index, token_ids=[1, 2], finish_reason="stop", timing=timing)
               for index, timing in enumerate(timings)]
    result = Result(id=None, request_id=1, prompt_token_ids=[1] * 5, choices=choices)
    return Ended(result, options.get("outcome", "done"), "test", 1e9, seconds)


# ---- timelines ----


def test_a_timeline_has_all_of_a_requests_time() -> None:
    recent = RecentRequests(60.0)
    recent.observe(ended(
        Timing(queue=0.1, context=0.2, handover=0.05, ttft=0.4, total=1.0, tpot=0.01, cached_tokens=3),
        Timing(queue=0.1, context=0.2, handover=0.05, ttft=0.4, total=0.9, tpot=0.01)))
    (line,) = recent.timelines
    assert (line.number, line.api, line.outcome, line.num_choices) == (1, "test", "done", 2)
    assert (line.prompt_tokens, line.cached_tokens, line.output_tokens) == (5, 3, 4)
    assert (line.queue, line.context, line.handover) == (0.1, 0.2, 0.05)
    assert line.generation == pytest.approx(1.0 - 0.4 - 0.05), "after the first token and the hand-over"
    assert line.other == pytest.approx(0.4 - 0.2 - 0.1), "before the first token"


def test_a_request_that_never_began_was_not_generating() -> None:
    recent = RecentRequests(60.0)
    recent.observe(ended(Timing(queue=0.1, total=0.5), outcome="cancelled"))
    recent.observe(ended(Timing(), seconds=2.0, outcome="failed"))  # the job's end came first
    failed, cancelled = recent.timelines
    assert (cancelled.generation, cancelled.other) == (0.0, pytest.approx(0.4))
    assert (failed.total, failed.generation, failed.other) == (2.0, 0.0, 2.0)
    assert recent.percentiles()[0].count == 0, "what had no first token has no TTFT"


def test_timelines_are_bounded_and_the_latest_comes_first() -> None:
    recent = RecentRequests(60.0)
    for _ in range(NUM_TIMELINES + 5):
        recent.observe(ended(Timing(ttft=0.1, total=0.2)))
    numbers = [line.number for line in recent.timelines]
    assert numbers == list(range(NUM_TIMELINES + 5, 5, -1))


def test_percentiles_are_of_each_choice_within_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(recent_module.time, "monotonic", lambda: now)
    recent = RecentRequests(60.0)
    recent.observe(ended(Timing(ttft=9.0, total=9.0)))
    now += 50
    recent.observe(ended(*(Timing(ttft=i / 100, tpot=i / 1000, total=1.0) for i in range(1, 101))))
    ttft, tpot = recent.percentiles()
    assert (ttft.count, ttft.p50, ttft.p90, ttft.p99) == (101, 0.51, 0.91, 1.0)
    assert (tpot.count, tpot.p50, tpot.p90, tpot.p99) == (100, 0.05, 0.09, 0.099)
    now += 11
    assert recent.percentiles()[0].count == 100, "the first is older than the window"
    now += 60
    assert recent.percentiles()[0] == percentiles_of([])


def test_samples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_module, "NUM_SAMPLES", 10)
    recent = RecentRequests(60.0)
    for _ in range(30):
        recent.observe(ended(Timing(ttft=0.1, total=0.2)))
    assert recent.percentiles()[0].count == 10


# ---- the state ----


def test_the_state_tells_what_took_place(job: ServedJob) -> None:
    empty = get(job, "/page/state").json()
    assert (empty["model"], empty["problem"], empty["recent"], empty["num_tokens"]) == (NAME, None, [], 0)
    assert [(i["name"], i["ranks"], i["shape"], i["promised_blocks"]) for i in empty["instances"]] == [
        ("context 0", [1], "tp1", 0), ("generation 0", [2], "tp1", 0)]
    assert empty["phases"] == {"queued": 0, "context": 0, "hand-over": 0, "generation": 0}
    assert empty["ttft"] == empty["itl"] == empty["tpot"] == {"count": 0, "p50": 0, "p90": 0, "p99": 0}
    ask(job, prompt="a secret", n=2)
    time.sleep(0.5)  # one state an interval
    full = get(job, "/page/state").json()
    (line,) = full["recent"]
    assert (line["api"], line["outcome"], line["num_choices"]) == ("openai", "done", 2)
    assert (line["prompt_tokens"], line["output_tokens"], full["num_tokens"]) == (8, 16, 16)
    assert 0 < line["context"] < line["ttft"] < line["total"]
    assert line["generation"] > 0
    assert (full["ttft"]["count"], full["tpot"]["count"], full["itl"]["count"]) == (2, 2, 14)
    assert full["outcomes"]["done"] == 1
    assert "secret" not in str(full)


def test_the_state_is_made_once_an_interval(job: ServedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    make = PageState._state
    monkeypatch.setattr(PageState, "_state", lambda self, now: made.append(now) or make(self, now))
    page = PageState(job.gate, job.health, interval=0.2)
    ask(job)
    assert not made, "nobody looks"
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        page.render()
    assert len(made) in (2, 3)
    assert len({page.render() for _ in range(5)}) == 1


def test_the_state_is_no_request(job: ServedJob) -> None:
    for path in ("/", "/page/page.js", "/page/state"):
        assert get(job, path).status_code == 200
    stats = job.gate.stats
    assert (stats.num_open, stats.success.count, stats.fail.count, stats.num_refused) == (0, 0, 0, {})


def test_the_state_says_what_is_wrong(serve: Any) -> None:
    job = serve(silent_seconds=0.05)
    job.job.pause()
    handle = job.job.orchestrator.submit([1, 2])
    wait_until(lambda: job.health.problem() is not None)
    assert "has said nothing for" in get(job, "/page/state").json()["problem"]
    job.job.resume()
    handle.result(PATIENCE)


def test_open_pages_do_not_keep_a_server(job: ServedJob) -> None:
    url = job.listen(grace=5.0)
    with httpx.Client(base_url=url) as client:  # keeps its connection
        assert client.get("/page/state").status_code == 200
        began = time.monotonic()
        job.stop()
        assert time.monotonic() - began < 1.0


# ---- files and keys ----


def test_every_file_is_there_with_a_strict_policy(job: ServedJob) -> None:
    types = {"/": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path in OPEN_PAGE_PATHS:
        found = get(job, path)
        assert found.status_code == 200
        assert found.headers["content-type"].startswith(types[path.rpartition(".")[2]])
        assert found.headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in found.headers["content-security-policy"]
        assert found.headers["x-content-type-options"] == "nosniff"
    assert get(job, "/page/state").headers["cache-control"] == "no-store"


def test_no_file_is_left_out_and_none_asks_for_more() -> None:
    folder = resources.files("disagg_mpi.frontend.page")
    names = {file.name for file in folder.iterdir() if file.name.endswith((".html", ".css", ".js", ".svg"))}
    assert {path.removeprefix("/page/") for path in OPEN_PAGE_PATHS - {"/"}} == names - {"index.html"}
    forbidden = r"https?://|\binnerHTML\b|insertAdjacentHTML|\beval\(|document\.write"
    for name in names:
        text = folder.joinpath(name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(forbidden, text), name
    html = folder.joinpath("index.html").read_text()
    assert not re.search(r"<style|<script(?! type=\"module\" src=)|\son\w+=|\sstyle=", html)


@pytest.mark.parametrize("path", ["/page/", "/page/routes.py", "/page/../app.py", "/page/%2e%2e/app.py",
                                  "/page//etc/passwd", "/page/index.html"])
def test_there_is_nothing_else(job: ServedJob, path: str) -> None:
    assert get(job, path).status_code == 404


def test_with_a_key_the_files_are_open_and_the_state_is_not(serve: Any) -> None:
    job = serve(api_key="secret")
    for path in OPEN_PAGE_PATHS:
        assert get(job, path).status_code == 200
    assert get(job, "/page/state").status_code == 401
    assert get(job, "/page/state", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert get(job, "/page/state", headers={"authorization": "Bearer secret"}).status_code == 200
