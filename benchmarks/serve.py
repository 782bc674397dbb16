"""What a streamed token costs rank 0 as a server, against a bare server that streams constants.

Run by ``run_all.py``. Side by side: rank 0 of a real job whose executors compute nothing (all of its threads:
pump, server, main), and starlette on uvicorn with the same event loop and parser, whose generator gives the
same bytes again and again: once as fast as it can, once at our pace, sleeping between two tokens of a stream
as long as ours takes for a step. 32 or more clients, in this process, stream at once. CPU seconds of the
server's process are what counts, since all share the cores.

    python benchmarks/serve.py                        one JSON object a line
    python benchmarks/serve.py bare PORT PACE EVENT   the bare server itself
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NUM_TOKENS = 600
NUM_ROUNDS = 5
STREAMS = (32, 128, 256)
CALLS = {
    "completions": ("/v1/completions", {"prompt": "a", "max_tokens": NUM_TOKENS, "stream": True}),
    "chat": ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "a"}], "max_tokens": NUM_TOKENS, "stream": True}),
    "generate_stream": ("/v2/models/ensemble/generate_stream", {
        "text_input": "a", "max_tokens": NUM_TOKENS, "stream": True}),
}


async def stream(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    """One client: how many events came, and one from the middle."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    writer.write(b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\n"
                 b"content-length: %d\r\n\r\n%b" % (path.encode(), len(body), body))
    count, middle, rest = 0, b"", b""
    while data := await reader.read(65536):
        rest += data
        found = rest.count(b"data: ")
        count += found
        if found > 1 and not middle:
            middle = b"data: " + rest.split(b"data: ")[1].split(b"\n\n")[0] + b"\n\n"
        rest = rest[-5:] if b"data: " not in rest[-5:] else b""
    writer.close()
    return count, middle


async def streams(port: int, path: str, body: bytes, count: int) -> tuple[int, bytes]:
    found = await asyncio.gather(*(stream(port, path, body) for _ in range(count)))
    return sum(events for events, _ in found), next((event for _, event in found if event), b"")


def measure(pid: int, port: int, path: str, body: bytes, count: int) -> dict[str, float]:
    """CPU seconds of the server for each event, and events a second."""
    import psutil

    process = psutil.Process(pid)

    def used() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    cpu, start = used(), time.perf_counter()
    events, _ = asyncio.run(streams(port, path, body, count))
    assert events >= count * NUM_TOKENS, (events, path)
    return {"cpu": (used() - cpu) / events, "per_second": events / (time.perf_counter() - start)}


@contextmanager
def bare(event: bytes, pace: float) -> Iterator[tuple[int, int]]:
    """The bare server's process and port. ``pace``: seconds between two tokens of a stream."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, "bare", str(port), str(pace), event.decode()])
    try:
        _wait_for(port)
        yield server.pid, port
    finally:
        server.kill()
        server.wait()


@contextmanager
def ours() -> Iterator[tuple[int, int]]:
    """Rank 0's process and HTTP port."""
    from disagg_mpi.cli.relay import find_rank_0

    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder) / "address"
        most = max(STREAMS)
        server = subprocess.Popen(
            [sys.executable, "-m", "disagg_mpi", "launch", "-n", "2", "--", "serve", "--aggregated", "1",
             "--engine", "null", "--max-batch-size", str(most), "--max-num-tokens", "512",
             "--kv-tokens", str(most * 512), *(word for name in ("http", "grpc", "metrics")
                                               for word in (f"--{name}-port", "0")),
             "--address-file", str(address)], stderr=subprocess.DEVNULL)
        try:
            while not address.exists():
                assert server.poll() is None, "the server has not started"
                time.sleep(0.05)
            rank_0 = find_rank_0(f"{socket.gethostname()}:{server.pid}")
            assert rank_0 is not None
            yield rank_0, int(address.read_text().splitlines()[0].rpartition(":")[2])
        finally:
            server.terminate()
            server.wait()


def _wait_for(port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def serve_bare(port: int, pace: float, event: bytes) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    async def answer(request: Request) -> StreamingResponse:
        await request.body()

        async def events() -> object:
            for _ in range(NUM_TOKENS):
                yield event
                await asyncio.sleep(pace)  # one token at a time, as the other

        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


def main() -> None:
    with ours() as (our_pid, our_port):
        for name, (path, fields) in CALLS.items():
            body = json.dumps(fields).encode()
            _, event = asyncio.run(streams(our_port, path, body, 4))
            for count in STREAMS if name == "completions" else STREAMS[:1]:
                pace = count / measure(our_pid, our_port, path, body, count)["per_second"]
                with bare(event, 0.0) as fast, bare(event, pace) as paced:
                    servers = ((our_pid, our_port), fast, paced)
                    rounds = [[measure(pid, port, path, body, count) for pid, port in servers]
                              for _ in range(NUM_ROUNDS)]
                own, of_fast, of_paced = (
                    statistics.median(side[i]["cpu"] for side in rounds) for i in range(3))
                print(json.dumps({
                    "call": name, "streams": count, "cpu": own, "bare_cpu": of_fast, "paced_cpu": of_paced,
                    "of_bare": statistics.median(mine["cpu"] / other["cpu"] for mine, other, _ in rounds),
                    "of_paced": statistics.median(mine["cpu"] / other["cpu"] for mine, _, other in rounds),
                    "per_second": statistics.median(side[0]["per_second"] for side in rounds)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        serve_bare(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4].encode())
    else:
        main()
