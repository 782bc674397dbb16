"""A double of ``tensorrt_llm.bindings.executor``: its signatures, enforced, over a model that is a hash.

As the bindings it takes no keyword that it does not know, no argument of another type and no call on the
wrong rank or after the end. Its KV-cache is the prompt's tokens: a context writes them into a file of
``TRTLLM_DOUBLE_DIR``, a generation takes the file away, so it works between processes, and a hand-over that
went to the wrong request gives other tokens. One iteration is one :meth:`Executor.await_responses`.

The class attributes of :class:`Executor` make it misbehave as a test wants.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VOCABULARY = 128
MAX_SEQ_LEN = 96
_own_rank: list[int] = []


class ModelType(Enum):
    DECODER_ONLY = 0
    ENCODER_ONLY = 1
    ENCODER_DECODER = 2


class CommunicationType(Enum):
    MPI = 0


class CommunicationMode(Enum):
    LEADER = 0
    ORCHESTRATOR = 1


class CacheTransceiverBackendType(Enum):
    DEFAULT = 0
    MPI = 1
    UCX = 2
    NIXL = 3


class RequestType(Enum):
    REQUEST_TYPE_CONTEXT_AND_GENERATION = 0
    REQUEST_TYPE_CONTEXT_ONLY = 1
    REQUEST_TYPE_GENERATION_ONLY = 2


class FinishReason(Enum):
    NOT_FINISHED = 0
    END_ID = 1
    STOP_WORDS = 2
    LENGTH = 3
    TIMED_OUT = 4
    CANCELLED = 5


# ---- types, as a binding looks at them ----


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if isinstance(kind, list):  # [int]: a list of them
        return isinstance(value, list) and all(_is(one, kind[0]) for one in value)
    if kind in (int, float):  # neither a bool nor an enumeration's number
        return type(value) is kind
    return isinstance(value, kind)


def _check(where: str, **given: tuple[Any, ...]) -> None:
    """``name=(value, kind, …)``: raise :class:`TypeError`, as bindings do, unless it is of such a kind."""
    for name, (value, *kinds) in given.items():
        if not any(_is(value, kind) for kind in kinds):
            raise TypeError(f"{where}(): incompatible function arguments: {name} is {value!r}")


class KvCacheConfig:
    def __init__(self, enable_block_reuse: bool = True, max_tokens: int | None = None) -> None:
        _check("KvCacheConfig", enable_block_reuse=(enable_block_reuse, bool),
               max_tokens=(max_tokens, int, None))
        self.enable_block_reuse = enable_block_reuse
        self.max_tokens = max_tokens


class CacheTransceiverConfig:
    def __init__(self, backend: Any = None, max_tokens_in_buffer: int | None = None) -> None:
        _check("CacheTransceiverConfig", backend=(backend, CacheTransceiverBackendType, None),
               max_tokens_in_buffer=(max_tokens_in_buffer, int, None))
        self.backend = backend
        self.max_tokens_in_buffer = max_tokens_in_buffer


class OrchestratorConfig:
    def __init__(self, is_orchestrator: bool = True, worker_executable_path: str = "",
                 orch_leader_comm: Any = None, spawn_processes: bool = True) -> None:
        _check("OrchestratorConfig", is_orchestrator=(is_orchestrator, bool),
               worker_executable_path=(worker_executable_path, str), spawn_processes=(spawn_processes, bool))


class ParallelConfig:
    def __init__(self, communication_type: Any = CommunicationType.MPI,
                 communication_mode: Any = CommunicationMode.LEADER, device_ids: list[int] | None = None,
                 participant_ids: list[int] | None = None, orchestrator_config: Any = None,
                 num_nodes: int | None = None) -> None:
        _check("ParallelConfig", communication_type=(communication_type, CommunicationType),
               communication_mode=(communication_mode, CommunicationMode),
               device_ids=(device_ids, [int], None), participant_ids=(participant_ids, [int], None),
               orchestrator_config=(orchestrator_config, OrchestratorConfig, None),
               num_nodes=(num_nodes, int, None))
        self.communication_mode = communication_mode
        self.device_ids = device_ids
        self.participant_ids = participant_ids


class ExecutorConfig:
    def __init__(self, max_beam_width: int = 1, *, scheduler_config: Any = None, kv_cache_config: Any = None,
                 enable_chunked_context: bool = False, iter_stats_max_iterations: int = 0,
                 request_stats_max_iterations: int = 0, max_batch_size: int | None = None,
                 max_num_tokens: int | None = None, parallel_config: Any = None,
                 max_queue_size: int | None = None, recv_poll_period_ms: int = 0,
                 cache_transceiver_config: Any = None) -> None:
        _check("ExecutorConfig", max_beam_width=(max_beam_width, int),
               scheduler_config=(scheduler_config, None),
               kv_cache_config=(kv_cache_config, KvCacheConfig, None),
               enable_chunked_context=(enable_chunked_context, bool),
               iter_stats_max_iterations=(iter_stats_max_iterations, int),
               request_stats_max_iterations=(request_stats_max_iterations, int),
               max_batch_size=(max_batch_size, int, None), max_num_tokens=(max_num_tokens, int, None),
               parallel_config=(parallel_config, ParallelConfig, None),
               max_queue_size=(max_queue_size, int, None), recv_poll_period_ms=(recv_poll_period_ms, int),
               cache_transceiver_config=(cache_transceiver_config, CacheTransceiverConfig, None))
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})


class SamplingConfig:
    def __init__(self, beam_width: int = 1, *, top_k: int | None = None, top_p: float | None = None,
                 seed: int | None = None, temperature: float | None = None, min_tokens: int | None = None,
                 repetition_penalty: float | None = None, presence_penalty: float | None = None,
                 frequency_penalty: float | None = None) -> None:
        _check("SamplingConfig", beam_width=(beam_width, int), top_k=(top_k, int, None),
               top_p=(top_p, float, None), seed=(seed, int, None), temperature=(temperature, float, None),
               min_tokens=(min_tokens, int, None), repetition_penalty=(repetition_penalty, float, None),
               presence_penalty=(presence_penalty, float, None),
               frequency_penalty=(frequency_penalty, float, None))
        if seed is not None and not 0 <= seed < 2**64:
            raise TypeError(f"SamplingConfig(): incompatible function arguments: seed is {seed}")
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})


class OutputConfig:
    def __init__(self, return_log_probs: bool = False, return_context_logits: bool = False,
                 return_generation_logits: bool = False, exclude_input_from_output: bool = False) -> None:
        _check("OutputConfig", return_log_probs=(return_log_probs, bool),
               return_context_logits=(return_context_logits, bool),
               return_generation_logits=(return_generation_logits, bool),
               exclude_input_from_output=(exclude_input_from_output, bool))
        self.exclude_input_from_output = exclude_input_from_output


class ContextPhaseParams:
    """All four arguments, by position: bindings of some releases know no names."""

    def __init__(self, first_gen_tokens: list[int], req_id: int, opaque_state: bytes | None,
                 draft_tokens: list[int] | None, /) -> None:
        _check("ContextPhaseParams", first_gen_tokens=(first_gen_tokens, [int]), req_id=(req_id, int),
               opaque_state=(opaque_state, bytes, None), draft_tokens=(draft_tokens, [int], None))
        self.first_gen_tokens = first_gen_tokens
        self.req_id = req_id
        self.opaque_state = opaque_state
        self.draft_tokens = draft_tokens


class Request:
    def __init__(self, input_token_ids: list[int], max_tokens: int, *, streaming: bool = False,
                 sampling_config: Any = None, output_config: Any = None, end_id: int | None = None,
                 pad_id: int | None = None, bad_words: list[list[int]] | None = None,
                 stop_words: list[list[int]] | None = None, client_id: int | None = None,
                 priority: float = 0.5, type: Any = RequestType.REQUEST_TYPE_CONTEXT_AND_GENERATION,
                 context_phase_params: Any = None, allotted_time_ms: timedelta | None = None) -> None:
        _check("Request", input_token_ids=(input_token_ids, [int]), max_tokens=(max_tokens, int),
               streaming=(streaming, bool), sampling_config=(sampling_config, SamplingConfig, None),
               output_config=(output_config, OutputConfig, None), end_id=(end_id, int, None),
               pad_id=(pad_id, int, None), bad_words=(bad_words, [[int]], None),
               stop_words=(stop_words, [[int]], None), client_id=(client_id, int, None),
               priority=(priority, float), type=(type, RequestType),
               context_phase_params=(context_phase_params, ContextPhaseParams, None),
               allotted_time_ms=(allotted_time_ms, timedelta, None))
        if not input_token_ids or max_tokens < 1:
            raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: empty input or no tokens to make")
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})
        self.sampling_config = sampling_config or SamplingConfig()
        self.output_config = output_config or OutputConfig()


class Result:
    def __init__(self, tokens: Sequence[int], reason: FinishReason, *, is_final: bool,
                 context_phase_params: ContextPhaseParams | None = None) -> None:
        self.is_final = is_final
        self.output_token_ids = [list(tokens)]
        self.finish_reasons = [reason]
        self.context_phase_params = context_phase_params


class Response:
    def __init__(self, request_id: int, result: Result | None, error: str | None = None) -> None:
        self.request_id = request_id
        self._result = result
        self._error = error

    def has_error(self) -> bool:
        return self._error is not None

    @property
    def error_msg(self) -> str:
        if self._error is None:
            raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: the response has no error")
        return self._error

    @property
    def result(self) -> Result:
        if self._result is None:
            raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: the response has an error")
        return self._result


# ---- the model ----


def next_token(prompt: Sequence[int], output: Sequence[int], seed: int | None = None) -> int:
    text = json.dumps([list(prompt), list(output), seed])
    return zlib.crc32(text.encode()) % VOCABULARY


def text_of(prompt: Sequence[int], count: int, seed: int | None = None) -> list[int]:
    """The first ``count`` tokens that follow ``prompt``."""
    output: list[int] = []
    for _ in range(count):
        output.append(next_token(prompt, output, seed))
    return output


class _Running:
    def __init__(self, number: int, request: Request) -> None:
        self.number = number
        self.request = request
        self.output: list[int] = []
        self.num_sent = 0
        self.kv: list[int] | None = None
        self.is_cancelled = False

    @property
    def num_positions(self) -> int:
        return len(self.request.input_token_ids) + len(self.output)


# ---- the executor ----


@contextlib.contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """Executors made inside are of this rank; in a job the launcher says it."""
    _own_rank.append(rank)
    yield
    _own_rank.pop()


def _rank() -> int:
    if _own_rank:
        return _own_rank[-1]
    return int(next(os.environ[name] for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK") if name in os.environ))


class Executor:
    cannot_start: str | None = None
    refuses: str | None = None
    """What an enqueue throws."""
    fails: str | None = None
    """What the next iteration answers to each request."""
    ignores_cancel = False
    repeats_first_tokens = True
    gives_params = True

    def __init__(self, model_path: Path, model_type: ModelType, executor_config: ExecutorConfig) -> None:
        _check("Executor", model_path=(model_path, Path, str), model_type=(model_type, ModelType),
               executor_config=(executor_config, ExecutorConfig))
        if self.cannot_start:
            raise RuntimeError(self.cannot_start)
        built = json.loads((Path(model_path) / "config.json").read_text())["pretrained_config"]["mapping"]
        parallel = executor_config.parallel_config
        assert parallel is not None and parallel.communication_mode is CommunicationMode.LEADER
        self.rank, self.config = _rank(), executor_config
        if self.rank not in parallel.participant_ids:
            raise RuntimeError(f"rank {self.rank} is no participant of {parallel.participant_ids}")
        size = built["tp_size"] * built["pp_size"]
        if not len(parallel.participant_ids) == len(parallel.device_ids) == size:
            raise RuntimeError("participants, devices and the engine's world size differ")
        self.is_leader = self.rank == parallel.participant_ids[0]
        self.is_shut = False
        self.num_enqueued = 0
        self._numbers = itertools.count(2**63 - 2 if self.rank % 2 else 1)  # 64 bits are the library's right
        self._running: dict[int, _Running] = {}
        self._offered: dict[int, Path] = {}
        self._ready: list[Response] = []
        self._stats: list[Any] = []
        self._iteration = 0

    # what the bindings have

    def enqueue_request(self, request: Request) -> int:
        self._must_lead("enqueue_request")
        _check("enqueue_request", request=(request, Request))
        if self.refuses:
            raise RuntimeError(self.refuses)
        if request.type is not RequestType.REQUEST_TYPE_CONTEXT_AND_GENERATION:
            if self.config.cache_transceiver_config is None:
                raise RuntimeError("a context- or generation-only request needs a cache transceiver")
            if self.config.cache_transceiver_config.backend is None:
                raise RuntimeError("the cache transceiver has no backend")
        is_generation = request.type is RequestType.REQUEST_TYPE_GENERATION_ONLY
        if is_generation != (request.context_phase_params is not None):
            raise RuntimeError("context_phase_params are for generation-only requests, and needed there")
        if len(request.input_token_ids) + request.max_tokens > MAX_SEQ_LEN:
            raise RuntimeError("the request is longer than max_seq_len")
        if request.output_config.exclude_input_from_output is not True and not request.streaming:
            raise RuntimeError("this double gives no input back")
        number = next(self._numbers)
        self._running[number] = _Running(number, request)
        self.num_enqueued += 1
        return number

    def enqueue_requests(self, requests: list[Request]) -> list[int]:
        return [self.enqueue_request(request) for request in requests]

    def await_responses(self, ids: Any = None, timeout: timedelta | None = None) -> list[Response]:
        self._must_lead("await_responses")
        _check("await_responses", ids=(ids, None, int, [int]), timeout=(timeout, timedelta, None))
        self._iterate()
        if timeout is None and not self._ready:
            raise AssertionError("the library would wait for ever")
        if ids is not None:
            wanted = [ids] if isinstance(ids, int) else ids
            taken = [response for response in self._ready if response.request_id in wanted]
            self._ready = [response for response in self._ready if response not in taken]
            return taken
        taken, self._ready = self._ready, []
        return taken

    def cancel_request(self, id: int) -> None:
        self._must_lead("cancel_request")
        _check("cancel_request", id=(id, int))
        if id in self._running and not self.ignores_cancel:
            self._running[id].is_cancelled = True
        if id in self._offered:
            self._offered.pop(id).unlink(missing_ok=True)

    def get_num_responses_ready(self, id: int | None = None) -> int:
        self._must_lead("get_num_responses_ready")
        return sum(id in (None, response.request_id) for response in self._ready)

    def get_latest_iteration_stats(self) -> list[Any]:
        self._must_lead("get_latest_iteration_stats")
        stats, self._stats = self._stats, []
        return stats[-self.config.iter_stats_max_iterations:] if self.config.iter_stats_max_iterations else []

    def get_latest_request_stats(self) -> list[Any]:
        self._must_lead("get_latest_request_stats")
        return []

    def can_enqueue_requests(self) -> bool:
        return self.is_leader and not self.is_shut

    def shutdown(self) -> None:
        """Waits for all contexts to be pulled, as the library's loop does."""
        if self.is_shut:
            raise RuntimeError("shut down twice")
        while self.num_offered:
            time.sleep(0.001)
        self.is_shut = True

    # what tests look at

    @property
    def num_offered(self) -> int:
        self._offered = {number: path for number, path in self._offered.items() if path.exists()}
        return len(self._offered)

    @property
    def num_open(self) -> int:
        return len(self._running) + self.num_offered

    # what it does

    def _must_lead(self, call: str) -> None:
        if not self.is_leader:
            raise RuntimeError(f"{call} on rank {self.rank}, which does not lead")
        if self.is_shut:
            raise RuntimeError(f"{call} after the shutdown")

    def _iterate(self) -> None:
        if not self._running:
            return
        self._iteration += 1
        limit = self.config.max_batch_size
        for one in list(self._running.values())[:limit]:
            if self.fails is not None:
                self._answer(one, None, self.fails)
            elif one.is_cancelled:
                self._answer(one, Result([], FinishReason.CANCELLED, is_final=True))
            else:
                self._step(one)
        blocks = sum(-(-one.num_positions // 32) for one in self._running.values())
        most = self.config.kv_cache_config.max_tokens // 32
        self._stats.append(SimpleNamespace(
            iter=self._iteration, iter_latency_ms=2.0, num_active_requests=len(self._running),
            num_queued_requests=0,
            kv_cache_stats=SimpleNamespace(max_num_blocks=most, free_num_blocks=most - blocks),
            inflight_batching_stats=SimpleNamespace(num_ctx_tokens=0, num_gen_requests=len(self._running))))

    def _step(self, one: _Running) -> None:
        request = one.request
        if request.type is RequestType.REQUEST_TYPE_GENERATION_ONLY and one.kv is None:
            one.kv = self._pull(request.context_phase_params)
            if one.kv is None:
                return  # its context is not there, or was dropped
            one.output += request.context_phase_params.first_gen_tokens
            if not self.repeats_first_tokens:
                one.num_sent = len(one.output)
        sampling = request.sampling_config
        seed = sampling.seed if sampling.temperature else None
        token = next_token(one.kv or request.input_token_ids, one.output, seed)
        reason = FinishReason.NOT_FINISHED
        if token == request.end_id and len(one.output) >= (sampling.min_tokens or 1) - 1:
            reason = FinishReason.END_ID  # which is not part of the output
        else:
            one.output.append(token)
            if any(one.output[-len(word):] == word for word in request.stop_words or ()):
                reason = FinishReason.STOP_WORDS
            elif len(one.output) >= request.max_tokens:
                reason = FinishReason.LENGTH
        if request.type is RequestType.REQUEST_TYPE_CONTEXT_ONLY:
            self._offer(one, reason)
            return
        is_final = reason is not FinishReason.NOT_FINISHED
        new, one.num_sent = one.output[one.num_sent:], len(one.output)
        if request.streaming or is_final:
            self._answer(one, Result(new if request.streaming else one.output, reason, is_final=is_final))

    def _offer(self, one: _Running, reason: FinishReason) -> None:
        path = Path(os.environ["TRTLLM_DOUBLE_DIR"]) / f"{os.getpid()}-{self.rank}-{one.number}"
        path.write_text(json.dumps(one.request.input_token_ids))
        self._offered[one.number] = path
        # The library takes the last token that it has, even if that is still the prompt's.
        first = (one.output or one.request.input_token_ids)[-1]
        params = ContextPhaseParams([first], one.number, str(path).encode(), None)
        if reason is FinishReason.NOT_FINISHED:
            reason = FinishReason.LENGTH
        self._answer(one, Result(one.output, reason, is_final=True,
                                 context_phase_params=params if self.gives_params else None))

    def _pull(self, params: ContextPhaseParams) -> list[int] | None:
        assert params.opaque_state is not None
        path = Path(params.opaque_state.decode())
        assert path.name.endswith(f"-{params.req_id}")
        try:
            tokens = json.loads(path.read_text())
            path.unlink()
        except FileNotFoundError:
            return None
        return tokens

    def _answer(self, one: _Running, result: Result | None, error: str | None = None) -> None:
        self._ready.append(Response(one.number, result, error))
        if result is None or result.is_final:
            del self._running[one.number]


def save_engine(directory: Path, *, tp: int = 1, pp: int = 1, vocab_size: int = VOCABULARY,
                **build: Any) -> Path:
    """An engine's directory as ``trtllm-build`` leaves it, without the engine."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({
        "version": "1.2.1",
        "pretrained_config": {"architecture": "LlamaForCausalLM", "vocab_size": vocab_size,
                              "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}},
        "build_config": {"max_batch_size": 16, "max_num_tokens": 64, "max_seq_len": MAX_SEQ_LEN,
                         "max_input_len": 80, "plugin_config": {"tokens_per_block": 32}, **build}}))
    return directory
