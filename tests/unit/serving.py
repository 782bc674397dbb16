"""A whole server over a whole job in one process: its tokenizer, its ports, and clients of all kinds.

:func:`save_byte_tokenizer` writes a real tokenizer for the tiny model: token ``i`` is the byte ``i``.
:class:`ServedJob` puts an :class:`OrchestratedJob` behind a :class:`Gate` and its applications, and behind
real ports on request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from inprocess import PATIENCE, VOCABULARY, Job, OrchestratedJob

from disagg_mpi.frontend.app import make_app, make_metrics_app
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.health import Health
from disagg_mpi.frontend.metrics import Metrics
from disagg_mpi.frontend.ports import bind, port_of
from disagg_mpi.frontend.served import Served, ServerLimits
from disagg_mpi.frontend.server import Server
from disagg_mpi.frontend.stats import ServingStats
from disagg_mpi.model.tokenizer import _BYTE_OF_CHARACTER, Tokenizer
from disagg_mpi.topology import Role

NAME = "tiny"
TEMPLATE = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}{{ suffix or '' }}")


def save_byte_tokenizer(directory: Path) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: byte for character, byte in _BYTE_OF_CHARACTER.items() if byte < VOCABULARY}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return Tokenizer(directory)


class ServedJob:
    """A job and its front ends. ``limits`` go to the server, other options to the job."""

    def __init__(
        self, model: Path, tokenizer: Tokenizer, *roles: Role, limits: dict[str, Any] | None = None,
        api_key: str | None = None, silent_seconds: float = 60.0, **options: Any,
    ) -> None:
        options = {"num_blocks": 256, "max_num_tokens": 64, **options}
        self.job = OrchestratedJob(
            Job(model, roles or (Role.CONTEXT, Role.GENERATION), shared=True, tokenizer=tokenizer, **options),
            tokenizer)
        orchestrator = self.job.orchestrator
        self.served = Served(orchestrator, tokenizer, NAME, orchestrator.limits.max_model_len,
                             ServerLimits(**limits or {}), api_key)
        self.gate = Gate(self.served, ServingStats())
        self.health = Health(self.gate, silent_seconds)
        self.metrics = Metrics(self.gate, self.health)
        self.app = make_app(self.gate, self.health, self.metrics)
        self._server: Server | None = None

    def client(self, **options: Any) -> httpx.AsyncClient:
        """An HTTP client of the application itself: no port, no socket."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://test",
            timeout=PATIENCE, **options)

    def listen(self, grace: float = 0.5, port: int = 0) -> str:
        """Start a real server, on a free port unless one is given; its address."""
        http, metrics = bind("127.0.0.1", port, "--http-port"), bind("127.0.0.1", 0, "--metrics-port")
        self.metrics_url = f"http://127.0.0.1:{port_of(metrics)}"
        self._server = Server(
            self.gate, self.app, make_metrics_app(self.gate, self.health, self.metrics), http, metrics,
            grace=grace)
        self._server.__enter__()
        return f"http://127.0.0.1:{port_of(http)}"

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def close(self) -> None:
        self.stop()
        self.job.close()

    def assert_free(self, seconds: float = 1.0) -> None:
        """Within ``seconds`` nothing is open and no block is held, on either side."""
        wait_until(lambda: not self.job.orchestrator.num_open and not self.gate.num_open, seconds)
        self.job.orchestrator.check_integrity(PATIENCE)
        assert self.gate.stats.num_open == 0


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.002)


def events_of(body: str) -> list[Any]:
    """The events of a whole stream; ``[DONE]``, which must be the last, left out."""
    lines = [line for line in body.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines), body
    assert lines[-1] == "data: [DONE]", body
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def texts_of(events: Sequence[Any]) -> dict[int, str]:
    """What a stream of completions or chats says, by choice."""
    texts: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            text = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts
