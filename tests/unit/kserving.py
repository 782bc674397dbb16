"""KServe servers on free ports, in an event loop of their own thread, and what clients send them.

:class:`KserveServers` serves any :class:`Served`; :class:`KserveJob` gives it that of a whole job in this
process.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
import uvicorn
from starlette.applications import Starlette
from tritonclient.utils import np_to_triton_dtype

from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.kserve.models import Models, default_models
from disagg_mpi.frontend.kserve.rest import routes
from disagg_mpi.frontend.kserve.rpc import make_grpc_server
from disagg_mpi.frontend.kserve.statistics import Statistics
from disagg_mpi.frontend.served import Served, ServerLimits
from disagg_mpi.frontend.stats import ServingStats
from disagg_mpi.request import Request, SamplingParams

PATIENCE = 60.0
"""Seconds after which a wait in a test has failed."""
TOKENS_PER_BLOCK = 4
MAX_MODEL_LEN = 256
"""Of the tiny model."""


class KserveServers:
    """gRPC and HTTP on free ports, until :meth:`close`."""

    def __init__(self, served: Served, models: Models | None = None,
                 why_not_ready: Callable[[], str | None] = lambda: None) -> None:
        self.served = served
        self.gate = gate = Gate(served, ServingStats())
        self.models = models or default_models(is_aggregated=False, tokens_per_block=TOKENS_PER_BLOCK)
        self.statistics = Statistics(self.models)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.grpc = make_grpc_server(
            gate, self.models, self.statistics, "127.0.0.1", 0, why_not_ready)
        app = Starlette(routes=routes(gate, self.models, self.statistics, why_not_ready))
        self._http = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.http_port: int = self._socket.getsockname()[1]
        self.run(self.grpc.start())
        self._serving = asyncio.run_coroutine_threadsafe(self._http.serve([self._socket]), self.loop)
        wait_until(lambda: self._http.started)

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc.port}"

    @property
    def http_url(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """``work`` in the servers' loop: where asyncio's clients are used from."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def close(self) -> None:
        self._http.should_exit = self._http.force_exit = True
        self.run(self.grpc.stop(0))
        self._serving.result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()


class KserveJob:
    """A whole job in this process, and its servers. ``limits`` are the servers', ``options`` the job's."""

    def __init__(self, model: Path, directory: Path, *, limits: dict[str, Any] | None = None,
                 api_key: str | None = None, why_not_ready: Callable[[], str | None] = lambda: None,
                 **options: Any) -> None:
        from inprocess import Job, OrchestratedJob
        from serving import save_byte_tokenizer

        tokenizer = save_byte_tokenizer(directory)
        options = {"num_blocks": 256, "max_num_tokens": 64, "tokens_per_block": TOKENS_PER_BLOCK, **options}
        self.job = OrchestratedJob(
            Job(model, shared=True, tokenizer=tokenizer, **options), tokenizer)
        self.orchestrator = self.job.orchestrator
        served = Served(self.orchestrator, tokenizer, "tiny", MAX_MODEL_LEN, ServerLimits(**limits or {}),
                        api_key)
        self.servers = KserveServers(served, why_not_ready=why_not_ready)

    def answer(self, text: str, **sampling: Any) -> Any:
        """What the job says without a server between."""
        request = Request(prompt_token_ids=list(text.encode()), sampling=SamplingParams(**sampling))
        return self.orchestrator.submit(request).result(PATIENCE)

    def assert_free(self, seconds: float = PATIENCE) -> None:
        """Within ``seconds`` nothing is open and no block is held, on either side."""
        wait_until(lambda: not self.orchestrator.num_open, seconds)
        self.orchestrator.check_integrity(PATIENCE)

    def close(self) -> None:
        self.servers.close()
        self.job.close()


def arrays(text: str | list[str] = "Machine", max_tokens: int | None = 8, **others: Any) -> dict[str, Any]:
    """The tensors of a request, one row for each text. A list is one row's; ``None`` leaves a tensor out."""
    texts = [text] if isinstance(text, str) else text
    found: dict[str, Any] = {
        "text_input": np.array([[each] for each in texts], object)}
    for name, value in {"max_tokens": max_tokens, **others}.items():
        if value is None:
            continue
        row = value if isinstance(value, list) else [value]
        kind = {bool: np.bool_, int: np.int32, float: np.float32, str: np.object_}[type(row[0])]
        if name == "seed":
            kind = np.uint64
        found[name] = np.array([row] * len(texts), kind)
    return found


def grpc_inputs(tensors: dict[str, Any]) -> list[Any]:
    return _inputs(grpcclient, tensors)


def http_inputs(tensors: dict[str, Any], **options: Any) -> list[Any]:
    return _inputs(httpclient, tensors, **options)


def _inputs(client: Any, tensors: dict[str, Any], **options: Any) -> list[Any]:
    made = []
    for name, value in tensors.items():
        made.append(client.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)))
        made[-1].set_data_from_numpy(value, **options)
    return made


def stream(url: str, *requests: tuple[str, dict[str, Any]], outputs: list[str] | None = None,
           model: str = "ensemble") -> list[Any]:
    """Send ``(id, tensors)`` each over one stream, half-close, and give all results and errors, in order."""
    answers: list[Any] = []
    wanted = None if outputs is None else [grpcclient.InferRequestedOutput(name) for name in outputs]
    with grpcclient.InferenceServerClient(url) as client:
        client.start_stream(callback=lambda result, error: answers.append(error or result))
        for identity, tensors in requests:
            client.async_stream_infer(
                model, grpc_inputs(tensors), request_id=identity, outputs=wanted)
        client.stop_stream()
    return answers


def text_of(results: list[Any]) -> str:
    return "".join(result.as_numpy("text_output")[0].decode() for result in results)


def is_final(result: Any) -> bool:
    found: bool = result.get_response().parameters["triton_final_response"].bool_param
    return found


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.002)
