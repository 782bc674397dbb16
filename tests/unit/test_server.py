"""The server on real ports: real clients, clients that leave, limits, keys, a clean start and end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from inprocess import PATIENCE, VOCABULARY
from serving import NAME, ServedJob, events_of, wait_until

from disagg_mpi.errors import ConfigError, JobFailed
from disagg_mpi.frontend.ports import bind, port_of
from disagg_mpi.frontend.server import Server
from disagg_mpi.orchestrator.table import State

LONG = {"prompt": "hello", "max_tokens": 250, "temperature": 0, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 4}
PHASES = [State.QUEUED, State.CONTEXT, State.GENERATION]


def openai_client(url: str, key: str = "") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=PATIENCE)


@pytest.fixture
def job(serve: Any) -> ServedJob:
    return serve()


# ---- the real client ----


def test_openais_client_completes_streams_and_chats(job: ServedJob) -> None:
    client = openai_client(job.listen())
    whole = client.completions.create(model=NAME, prompt="hello", max_tokens=8, temperature=0, logprobs=2)
    assert whole.usage is not None and whole.usage.total_tokens == 13
    pieces = list(client.completions.create(
        model=NAME, prompt="hello", max_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces[:-1]) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage or pieces[-1].usage.total_tokens == 13  # type: ignore[union-attr]
    messages: Any = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, temperature=0,
                                          logprobs=True, top_logprobs=1)
    stream = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, temperature=0,
                                            stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in stream) == chat.choices[0].message.content
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    job.assert_free()


def test_openais_client_raises_its_own_errors(job: ServedJob) -> None:
    client = openai_client(job.listen())
    with pytest.raises(openai.BadRequestError, match="at least 1"):
        client.completions.create(model=NAME, prompt="hello", max_tokens=0)
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="hello")
    assert error.value.code == "model_not_found"


# ---- clients that leave ----


def hold(job: ServedJob, phase: State) -> None:
    """Bring what comes next into ``phase`` and keep it there."""
    if phase is State.QUEUED:  # the whole pool is somebody else's
        (view,) = job.job.orchestrator._dispatcher._generation
        view.free_blocks -= view.limits.num_blocks
    elif phase is State.CONTEXT:
        job.job.pause()


def let_go(job: ServedJob, phase: State) -> None:
    if phase is State.QUEUED:
        (view,) = job.job.orchestrator._dispatcher._generation
        view.free_blocks += view.limits.num_blocks
    elif phase is State.CONTEXT:
        job.job.resume()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_both_sides_within_a_second(
    job: ServedJob, phase: State, stream: bool
) -> None:
    url = job.listen()
    hold(job, phase)
    body = json.dumps(LONG | {"stream": stream}).encode()
    found = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    found.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body), body))
    orchestrator = job.job.orchestrator
    wait_until(lambda: orchestrator.snapshot().phases[phase.value] == 1)
    found.close()
    wait_until(lambda: all(e.cancel_reason == "cancelled"
                           for e in list(orchestrator._dispatcher._table.values())), 1.0)
    let_go(job, phase)
    job.assert_free(1.0)
    assert job.gate.stats.outcomes["cancelled"] == 1


def test_one_client_that_leaves_takes_its_own_choices_only(job: ServedJob) -> None:
    url = job.listen()
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        body = SHORT | {"max_tokens": 100}
        whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        with client.stream("POST", "/v1/completions",
                           json=LONG | {"stream": True, "n": 2, "prompt": ["hello", "world"]}) as leaving:
            assert next(leaving.iter_lines()).startswith("data: ")
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as staying:
                leaving.close()
                events = events_of(staying.read().decode())
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    job.assert_free()
    assert job.gate.stats.outcomes == {"done": 2, "cancelled": 2, "deadline": 0, "failed": 0}


def test_a_client_that_does_not_read_delays_nobody(job: ServedJob) -> None:
    url = job.listen()
    body = json.dumps(LONG | {"stream": True, "n": 8, "temperature": 1.0, "logprobs": 20}).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        deaf.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (
            len(body), body))
        wait_until(lambda: job.gate.num_open == 1)
        assert httpx.post(f"{url}/v1/completions", json=SHORT, timeout=PATIENCE).status_code == 200
        wait_until(lambda: job.gate.num_open == 0)  # it generates to the end, and waits for its reader
    job.assert_free()


# ---- room ----


def test_429_says_when_to_come_again(serve: Any) -> None:
    job = serve(limits={"max_open_requests": 3})
    url = job.listen()
    job.job.pause()
    post = threading.Thread(target=lambda: httpx.post(
        f"{url}/v1/completions", json=LONG | {"n": 2, "temperature": 1}, timeout=PATIENCE))
    post.start()
    wait_until(lambda: job.gate.stats.num_open == 2)
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        refused = client.post("/v1/completions", json=SHORT | {"prompt": ["a", "b"]})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        never = client.post("/v1/completions", json=SHORT | {"prompt": ["a", "b"], "n": 2})
        assert never.status_code == 400, "what can never fit must not be tried again"
        with pytest.raises(openai.RateLimitError):
            openai_client(url).completions.create(model=NAME, prompt=["a", "b"])
        job.job.resume()
        assert client.post("/v1/completions", json=SHORT).status_code == 200
    post.join(PATIENCE)
    job.assert_free()
    assert job.gate.stats.num_refused == {"overloaded": 2, "invalid": 1}


def read_all(found: socket.socket) -> bytes:
    found.settimeout(PATIENCE)
    parts = []
    while part := found.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.fixture
def small(serve: Any) -> tuple[ServedJob, tuple[str, int]]:
    job = serve(limits={"max_body_bytes": 1000, "header_seconds": 0.2, "max_connections": 4})
    return job, ("127.0.0.1", int(job.listen().rpartition(":")[2]))


POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize("head", [b"content-length: 1001\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
def test_large_bodies_are_refused_while_they_come(small: Any, head: bytes) -> None:
    job, address = small
    with socket.create_connection(address) as found:
        found.sendall(POST + head)
        if b"chunked" in head:
            found.sendall(b"%x\r\n%b\r\n" % (1001, b" " * 1001))  # and the last chunk never comes
        reply = read_all(found)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"larger than 1000 bytes" in reply
    job.assert_free()


def test_slow_and_endless_heads_are_ended(small: Any) -> None:
    _, address = small
    for begin in (b"", b"POST /v1/comple", POST + b"x-a"):
        with socket.create_connection(address) as found:
            found.sendall(begin)
            start = time.monotonic()
            assert read_all(found).startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - start < 2.0
    with socket.create_connection(address) as found:
        found.sendall(POST)
        found.sendall(b"x-a: " + b"y" * 70_000)
        assert b"431" in read_all(found)
    with socket.create_connection(address) as found:  # the second head of a connection, too
        found.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert found.recv(65536).startswith(b"HTTP/1.1 200")
        found.sendall(b"GET /hea")
        assert b"408" in read_all(found)
    with socket.create_connection(address) as found:
        found.sendall(b"nonsense\r\n\r\n")
        assert read_all(found).startswith(b"HTTP/1.1 400 ")


def test_a_slow_answer_is_not_a_slow_head(small: Any) -> None:
    job, (host, port) = small
    job.job.pause()
    threading.Timer(0.5, job.job.resume).start()  # over twice header_seconds
    assert httpx.post(f"http://{host}:{port}/v1/completions", json=SHORT, timeout=PATIENCE).status_code == 200


def test_connections_are_counted(small: Any) -> None:
    _, address = small
    open_ones = [socket.create_connection(address) for _ in range(4)]
    try:
        for found in open_ones:  # the server knows them all
            found.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert found.recv(65536).startswith(b"HTTP/1.1 200")
        with socket.create_connection(address) as one_too_many:
            assert read_all(one_too_many).startswith(b"HTTP/1.1 503 ")
    finally:
        for found in open_ones:
            found.close()
    time.sleep(0.05)
    assert httpx.get("http://{}:{}/health".format(*address)).status_code == 200


# ---- keys ----


def test_a_key_is_asked_for_everywhere_but_at_health_and_metrics(serve: Any) -> None:
    job = serve(api_key="secret")
    url = job.listen()
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        for path in ("/v1/models", "/openapi.json", "/v2/models/x", "/anything"):
            refused = client.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
        assert client.get("/v2/models/x").json() == {
            "error": refused.json()["error"]["message"]}, "KServe's own form"
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        for headers in ({"authorization": "Bearer wrong"}, {"authorization": "Basic secret"},
                        {"authorization": "secret"}, {"authorization": "Bearer secrets"},
                        {"x-api-key": "secre"}, {"authorization": b"Bearer \xff"}, {"x-api-key": ""}):
            assert client.get("/v1/models", headers=headers).status_code == 401, headers
        for headers in ({"authorization": "Bearer secret"}, {"authorization": "bearer  secret"},
                        {"x-api-key": "secret"}, {"x-api-key": "secret", "authorization": "Bearer wrong"}):
            assert client.get("/v1/models", headers=headers).status_code == 200, headers
    assert openai_client(url, "secret").completions.create(model=NAME, prompt="a", max_tokens=2).choices
    with pytest.raises(openai.AuthenticationError):
        openai_client(url, "wrong").models.list()


def test_without_a_key_any_is_ignored(job: ServedJob) -> None:
    url = job.listen()
    for headers in ({"authorization": "Bearer"}, {"authorization": "Bearer x"}, {"x-api-key": "x"}):
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
    # An empty bearer token, as openai's client sends it with an empty key; httpx refuses to.
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as found:
        found.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer \r\n\r\n")
        assert found.recv(65536).startswith(b"HTTP/1.1 200")


# ---- start and end ----


def test_a_port_that_is_taken_is_named_with_its_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port_of(taken)
        with pytest.raises(ConfigError, match=rf"^--http-port {port} on 127.0.0.1 is taken.*0 for any"):
            bind("127.0.0.1", port, "--http-port")
    with pytest.raises(ConfigError, match=r"--host no\.such\.host"):
        bind("no.such.host.invalid", 0, "--http-port")
    with pytest.raises(ConfigError, match="give another --host"):
        bind("192.0.2.1", 0, "--http-port")


def test_a_port_that_is_taken_while_the_model_loads_starts_nothing(job: ServedJob) -> None:
    http, metrics = bind("127.0.0.1", 0, "--http-port"), bind("127.0.0.1", 0, "--metrics-port")
    with socket.socket() as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rival.bind(("127.0.0.1", port_of(metrics)))
        rival.listen()
        server = Server(job.gate, job.app, job.app, http, metrics)
        with pytest.raises(ConfigError, match=r"--metrics-port .* is taken"):
            server.__enter__()
    assert http.fileno() == metrics.fileno() == -1, "both are closed"


class FakeGrpc:
    """The life cycle that the server expects."""

    def __init__(self, error: Exception | None = None) -> None:
        self.port = 1
        self.calls: list[Any] = []
        self._error = error

    async def start(self) -> None:
        if self._error is not None:
            raise self._error
        self.calls.append("start")

    async def stop(self, grace: float) -> None:
        self.calls.append(grace)


def test_a_grpc_server_lives_as_long(job: ServedJob) -> None:
    grpc = FakeGrpc()
    with Server(job.gate, job.app, job.app, bind("127.0.0.1", 0, ""), bind("127.0.0.1", 0, ""),
                make_grpc=lambda: grpc, grace=0.25) as server:
        assert server.grpc is grpc
        assert grpc.calls == ["start"]
    assert grpc.calls == ["start", 0.25]
    bad = FakeGrpc(ConfigError("--grpc-port is taken"))
    sockets = bind("127.0.0.1", 0, ""), bind("127.0.0.1", 0, "")
    with pytest.raises(ConfigError, match="--grpc-port"):
        Server(job.gate, job.app, job.app, *sockets, make_grpc=lambda: bad).__enter__()
    assert all(found.fileno() == -1 for found in sockets)


def test_at_the_end_streams_may_finish(job: ServedJob) -> None:
    url = job.listen(grace=PATIENCE)
    with httpx.Client(base_url=url, timeout=PATIENCE) as client, \
            client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        stopping = threading.Thread(target=job.stop)
        stopping.start()
        wait_until(lambda: job.gate.is_closed)
        assert job.health.problem() == "the server is shutting down"
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        stopping.join(PATIENCE)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    job.assert_free()


def test_after_the_grace_time_streams_are_cancelled_and_told_so(job: ServedJob) -> None:
    url = job.listen(grace=0.2)
    found: list[Any] = []

    def read() -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            found.append(client.post("/v1/completions", json=LONG))

    job.job.pause()
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    wait_until(lambda: job.gate.num_open == 1)
    threading.Timer(0.4, job.job.resume).start()  # after the cancel, which a paused worker cannot see
    start = time.monotonic()
    job.stop()
    assert time.monotonic() - start < 3.0
    wait_until(lambda: len(found) == 1)
    assert found[0].status_code == 503
    assert "cancelled" in found[0].json()["error"]["message"]
    job.assert_free()


def test_a_job_that_fails_ends_its_requests_and_its_health(job: ServedJob, monkeypatch: Any) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    url = job.listen()
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    job.job.pause()
    found: list[httpx.Response] = []
    reader = threading.Thread(target=lambda: found.append(
        httpx.post(f"{url}/v1/completions", json=LONG, timeout=PATIENCE)))
    reader.start()
    wait_until(lambda: job.gate.num_open == 1)

    def broken() -> None:
        raise ValueError("a bug")

    job.job.orchestrator._command(broken)
    reader.join(PATIENCE)
    assert found[0].status_code == 503
    health = httpx.get(f"{url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
    assert "a bug" in health.json()["reason"]
    assert httpx.get(f"{job.metrics_url}/health").status_code == 503
    refused = httpx.post(f"{url}/v1/completions", json=SHORT)
    assert refused.status_code == 503 and "a bug" in refused.json()["error"]["message"]
    with pytest.raises(JobFailed):
        job.job.orchestrator.submit([1])
    assert job.gate.stats.outcomes["failed"] == 1
    assert job.gate.stats.num_open == 0


def test_an_error_within_a_stream_is_its_last_event(job: ServedJob) -> None:
    url = job.listen()
    with httpx.Client(base_url=url, timeout=PATIENCE) as client, \
            client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        job.gate.cancel_all()
        *_, error, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    assert "cancelled" in json.loads(error.removeprefix("data: "))["error"]["message"]
    job.assert_free()


@pytest.fixture
def broken(job: ServedJob, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedJob]:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("disagg_mpi.frontend.openai.completions._Writer.write", fail)
    monkeypatch.setattr("disagg_mpi.frontend.openai.completions.usage_of", fail)
    yield job


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_one_requests_error_and_tells_no_insides(broken: ServedJob, stream: bool) -> None:
    url = broken.listen()
    found = httpx.post(f"{url}/v1/completions", json=LONG | {"stream": stream}, timeout=PATIENCE)
    assert found.status_code == 500
    assert found.json()["error"]["type"] == "server_error"
    assert "bug" not in found.text
    broken.assert_free()
    assert httpx.get(f"{url}/health").status_code == 200


def test_many_streams_at_once_are_each_their_own(job: ServedJob) -> None:
    url = job.listen()
    prompts = [[1 + i % (VOCABULARY - 1), 7, i % 5] for i in range(40)]
    expected = {str(prompt): "" for prompt in prompts}
    for result in job.job.orchestrator.generate(prompts):
        expected[str(result.prompt_token_ids)] = result.text
    found: dict[str, str] = {}

    def read(prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": 64, "temperature": 0, "stream": True}
        text = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).text
        found[str(prompt)] = "".join(event["choices"][0]["text"] for event in events_of(text))

    threads = [threading.Thread(target=read, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == expected
    job.assert_free()
