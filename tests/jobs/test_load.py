"""Two hundred clients at once, good, bad and gone: nothing lost, nothing leaked, nothing left over.

``DISAGG_MPI_LOAD_SECONDS`` makes it longer than the half minute of the suite.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from inprocess import save_tiny_model
from serving import save_byte_tokenizer
from serving_job import ServingJob
from tritonclient.grpc import service_pb2, service_pb2_grpc

SECONDS = float(os.environ.get("DISAGG_MPI_LOAD_SECONDS", "30"))
NUM_CLIENTS = 200
MAX_GROWTH_BYTES = 16 * 2**20
"""Of a rank's memory between two thirds of the load and its end: allocators keep what a burst had. They take
10 to 17 MiB more between the 10th second and the 15th, 1 to 4 between the 20th and the 30th."""
MAX_OPEN = 40
"""Fewer than there are clients: some are told to come again."""
NUM_TOKENS = 24
PROMPTS = ["hello", "abc", "x" * 40, "the quick brown fox"]


class Load:
    """What clients did and saw. What must not be is an exception of its client, and fails the test."""

    def __init__(self, job: ServingJob) -> None:
        self._job = job
        self._end = time.monotonic() + SECONDS
        self._texts: dict[str, str] = {}
        self.seen: Counter[str] = Counter()

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=NUM_CLIENTS)
        async with (httpx.AsyncClient(base_url=self._job.http, timeout=120, limits=limits) as http,
                    grpc.aio.insecure_channel(self._job.grpc) as channel):
            self._http = http
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for prompt in PROMPTS:
                self._texts[prompt] = (await self._answer(prompt)).json()["choices"][0]["text"]
            async with asyncio.TaskGroup() as clients:
                for number in range(NUM_CLIENTS):
                    clients.create_task(self._client(random.Random(number)))

    async def _client(self, rng: random.Random) -> None:
        kinds = [self._stream, self._stream, self._generate, self._grpc, self._leave, self._leave,
                 self._grpc_leave, self._bad]
        while time.monotonic() < self._end:
            kind = rng.choice(kinds)
            self.seen[await kind(rng)] += 1

    async def _answer(self, prompt: str) -> httpx.Response:
        return await self._http.post("/v1/completions", json=self._body(prompt, False))

    def _body(self, prompt: str, stream: bool) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True,
                "stream": stream}

    async def _stream(self, rng: random.Random) -> str:
        prompt = rng.choice(PROMPTS)
        async with self._http.stream("POST", "/v1/completions", json=self._body(prompt, True)) as response:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) > 0
                await response.aread()
                await asyncio.sleep(rng.random() / 10)
                return "overloaded"
            assert response.status_code == 200, await response.aread()
            lines = [line async for line in response.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines[-1]
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert "".join(event["choices"][0]["text"] for event in events) == self._texts[prompt]
        return "whole"

    async def _generate(self, rng: random.Random) -> str:
        prompt = rng.choice(PROMPTS)
        body = {"text_input": prompt, "max_tokens": NUM_TOKENS, "stream": True, "end_id": -1}
        async with self._http.stream(
                "POST", "/v2/models/ensemble/generate_stream", json=body) as response:
            if response.status_code == 429:
                await response.aread()
                await asyncio.sleep(rng.random() / 10)
                return "overloaded"
            lines = [line async for line in response.aiter_lines() if line]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert "".join(event["text_output"] for event in events) == self._texts[prompt]
        return "whole"

    def _tensors(self, prompt: str) -> service_pb2.ModelInferRequest:
        request = service_pb2.ModelInferRequest(model_name="ensemble")
        text = prompt.encode()
        for name, kind, raw in (
                ("text_input", "BYTES", len(text).to_bytes(4, "little") + text),
                ("max_tokens", "INT32", NUM_TOKENS.to_bytes(4, "little")),
                ("end_id", "INT32", b"\xff" * 4), ("stream", "BOOL", b"\1")):
            request.inputs.add(name=name, datatype=kind, shape=[1, 1])
            request.raw_input_contents.append(raw)
        return request

    async def _grpc(self, rng: random.Random) -> str:
        prompt, pieces = rng.choice(PROMPTS), []
        async for reply in self._stub.ModelStreamInfer(iter([self._tensors(prompt)])):
            if reply.error_message:
                assert "try again later" in reply.error_message, reply.error_message
                await asyncio.sleep(rng.random() / 10)
                return "overloaded"
            pieces.append(reply.infer_response.raw_output_contents[0][4:].decode())
        assert "".join(pieces) == self._texts[prompt]
        return "whole"

    async def _leave(self, rng: random.Random) -> str:
        """Gone before the head, or after some tokens."""
        patience, num_pieces = rng.choice([0.0, 0.02, 0.2, 10.0]), rng.randrange(6)

        async def read() -> None:
            body = self._body(rng.choice(PROMPTS), True)
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                count = 0
                async for _ in response.aiter_lines():
                    count += 1
                    if count > num_pieces:
                        return

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(read(), patience)
        return "left"

    async def _grpc_leave(self, rng: random.Random) -> str:
        call = self._stub.ModelStreamInfer(iter([self._tensors(rng.choice(PROMPTS))]))
        await asyncio.sleep(rng.random() / 10)
        call.cancel()
        return "left"

    async def _bad(self, rng: random.Random) -> str:
        path, body, status = rng.choice([
            ("/v1/completions", b"{", 400), ("/v1/completions", b'{"prompt": "a", "n": -1}', 400),
            ("/v1/completions", b'{"prompt": "a", "model": "none"}', 404),
            ("/v1/completions", json.dumps({"prompt": "x" * 5000}).encode(), 400),
            ("/v1/completions", json.dumps({"prompt": "a", "guided_regex": "("}).encode(), 400),
            ("/v2/models/ensemble/infer", b'{"inputs": []}', 400), ("/v2/models/none/infer", b"{}", 404),
            ("/nowhere", b"", 404)])
        response = await self._http.post(path, content=body)
        assert response.status_code in (status, 429), (path, body, response.text)
        return "bad"


def memory(job: ServingJob) -> dict[int, int]:
    """Rank → its own memory in bytes, without what ranks share."""
    return {rank: process.memory_full_info().uss for rank, process in job.ranks().items()}


@pytest.mark.openmpi_only
def test_load(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny", eos_token_id=0)
    save_byte_tokenizer(model)
    options = ("--model", str(model), "--kv-tokens", "8192", "--max-open-requests", str(MAX_OPEN), "--check")
    with ServingJob(3, tmp_path, *options) as job:
        root: psutil.Process = job.ranks()[0]
        files = root.num_fds()
        load = Load(job)
        sizes: list[dict[int, int]] = []

        async def watch() -> None:
            await asyncio.sleep(SECONDS * 2 / 3)
            sizes.append(memory(job))
            await asyncio.sleep(SECONDS / 3 - 0.5)
            sizes.append(memory(job))

        async def both() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(load.run())
                tasks.create_task(watch())

        asyncio.run(both())
        end = time.monotonic() + 2
        while job.metric("disagg_mpi_open_requests") or job.metric("disagg_mpi_kv_blocks_used"):
            assert time.monotonic() < end, "not freed"
            time.sleep(0.05)
        ended = {outcome: job.metric("disagg_mpi_requests_total", outcome=outcome)
                 for outcome in ("done", "cancelled", "deadline", "failed")}
        print(load.seen, ended, sizes)
        assert min(load.seen[kind] for kind in ("whole", "overloaded", "left", "bad")) > 0, load.seen
        # Some of those that left had their whole answer under way, or were never let in.
        assert load.seen["whole"] + len(PROMPTS) <= ended["done"]
        assert ended["done"] + ended["cancelled"] <= load.seen["whole"] + load.seen["left"] + len(PROMPTS)
        # A bad grammar is found by a leader: such a request began, and failed.
        assert ended["deadline"] == 0 and ended["failed"] <= load.seen["bad"]
        for rank, size in sizes[1].items():
            assert size - sizes[0][rank] < MAX_GROWTH_BYTES, (rank, sizes)
        while root.num_fds() > files + 8:  # connections that are kept alive go with their clients
            assert time.monotonic() < end + 10, (root.num_fds(), files)
            time.sleep(0.1)
        job.send_signal(signal.SIGINT, 0)
        result = job.finish(30)
        assert result.returncode == 130, result.text
        assert "checked: nothing is left over" in result.stderr, result.text
        result.assert_clean()
