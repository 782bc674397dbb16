"""TensorRT-LLM's executor behind ours, over a double that enforces its signatures; the library itself is not
here, and nothing of this has run on it."""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trtllm_double as library
from click.testing import CliRunner
from inprocess import WordDecoder, assert_ended_once, executor_request, replace, tokens_of, word

from disagg_mpi.cli.layout import layout
from disagg_mpi.cli.options import settings_of
from disagg_mpi.comm import messages
from disagg_mpi.comm.channel import MemoryNetwork
from disagg_mpi.comm.messages import Cancel, DropOffer, Enqueue, IntegrityCheck, Ready, Shutdown, Step
from disagg_mpi.comm.waiting import Doorbell, Waiter
from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ConfigError, JobFailed, LayoutError, ModelError
from disagg_mpi.executor.prepare import Preparer
from disagg_mpi.executor.service import LeaderService
from disagg_mpi.executor.trtllm import executor as adapter
from disagg_mpi.executor.trtllm.engine_dir import EngineInfo, read_engines
from disagg_mpi.executor.trtllm.executor import TrtllmExecutor
from disagg_mpi.executor.trtllm.follower import TrtllmFollower
from disagg_mpi.executor.trtllm.library import load_library, make_library_executor
from disagg_mpi.executor.trtllm.translate import params_to_library
from disagg_mpi.job.trtllm import tokenizer_dir
from disagg_mpi.request import ContextPhaseParams, ExecutorRequest, Guided, RequestType, Response
from disagg_mpi.topology import build_topology

PROMPT = [5, 9, 100, 3, 77, 21]
OPTIONS = {"engine": "tensorrt_llm", "kv_tokens": 1024}


def text(token_ids: Sequence[int]) -> str:
    return "".join(map(word, token_ids))


@dataclasses.dataclass
class Instances:
    """A context instance on rank 1 and a generation instance on rank 2, or an aggregated one on rank 1."""

    config: JobConfig
    waiter: Waiter
    engines: dict[str, EngineInfo]
    executors: list[TrtllmExecutor] = dataclasses.field(default_factory=list)

    def make(self, eos: Sequence[int] = ()) -> Instances:
        for group in build_topology(self.config).groups:
            engine = self.engines[str(group.role)]
            with library.as_rank(group.leader):
                theirs = make_library_executor(library, engine, self.config, group, (0,))
            self.executors.append(TrtllmExecutor(
                library, theirs, engine, self.config.kv_tokens, self.waiter, eos_token_ids=eos,
                make_decoder=WordDecoder,
                preparer=Preparer(engine.vocab_size, lambda text: [ord(letter) for letter in text])))
        return self

    @property
    def context(self) -> TrtllmExecutor:
        return self.executors[0]

    @property
    def generation(self) -> TrtllmExecutor:
        return self.executors[-1]

    def double(self, number: int) -> library.Executor:
        return self.executors[number]._executor  # type: ignore[no-any-return]

    def run(self, *requests: ExecutorRequest) -> dict[int, list[Response]]:
        """Through both phases, with every message encoded on its way."""
        found: dict[int, list[Response]] = {request.request_id: [] for request in requests}
        of = {request.request_id: request for request in requests}
        is_split = not self.config.is_aggregated
        self.context.enqueue_requests(
            [passed_on(replace(request, type=RequestType.CONTEXT_ONLY) if is_split else request)
             for request in requests])
        left, end = len(requests), time.monotonic() + 10
        while left:
            assert time.monotonic() < end, found
            for executor in self.executors:
                executor.advance()
                for response in passed_back(executor.take_ready()):
                    found[response.request_id].append(response)
                    left -= response.is_final and response.context_phase_params is None
                    if response.context_phase_params is not None:
                        self.generation.enqueue_request(passed_on(replace(
                            of[response.request_id], type=RequestType.GENERATION_ONLY,
                            context_phase_params=response.context_phase_params)))
        return found

    def one(self, **sampling: Any) -> list[Response]:
        return self.run(executor_request(7, PROMPT, **sampling))[7]

    def problems(self) -> list[str]:
        """What is left over, here and in the library."""
        found = [problem for executor in self.executors for problem in executor.check_integrity(idle=True)]
        return found + [f"rank {executor._executor.rank} has {executor._executor.num_open} open"
                        for executor in self.executors if executor._executor.num_open]


def passed_on(request: ExecutorRequest) -> ExecutorRequest:
    return messages.decode(messages.encode(Enqueue([request]))).requests[0]  # type: ignore[no-any-return]


def passed_back(responses: list[Response]) -> list[Response]:
    return messages.decode(messages.encode(Step(0, responses))).responses  # type: ignore[no-any-return]


@pytest.fixture
def engines(tmp_path: Path) -> dict[str, str]:
    """An engine for each role, as keys of a configuration."""
    return {f"{role}_engine_dir": str(library.save_engine(tmp_path / role))
            for role in ("context", "generation", "aggregated")} | {"model": str(tmp_path)}


@pytest.fixture
def make(engines: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    kv = tmp_path / "kv"
    kv.mkdir()
    monkeypatch.setenv("TRTLLM_DOUBLE_DIR", str(kv))
    bell = Doorbell(uuid.uuid4().hex, 0, [0], True)

    def start(eos: Sequence[int] = (), **options: Any) -> Instances:
        config = JobConfig(**{**OPTIONS, **engines, **options})
        return Instances(config, Waiter(bell), read_engines(config, build_topology(config))).make(eos)

    yield start
    bell.close()


@pytest.fixture
def pair(make: Any) -> Instances:
    return make()


# ---- tokens ----


@pytest.mark.parametrize("shape", [{}, {"aggregated": 1}], ids=["split", "aggregated"])
def test_tokens_and_text_come_one_by_one_and_end_once(make: Any, shape: dict[str, Any]) -> None:
    instances = make(**shape)
    responses = instances.one(max_tokens=8)
    final = assert_ended_once(responses)
    expected = library.text_of(PROMPT, 8)
    assert tokens_of(responses) == expected
    assert "".join(response.text for response in responses) == text(expected)
    assert [len(response.token_ids) for response in responses] == [1] * 8
    assert (final.finish_reason, final.error) == ("length", None)
    assert final.timing is not None
    assert instances.problems() == []


def test_many_at_once_each_get_their_own_cache_and_their_own_text(pair: Instances) -> None:
    requests = [executor_request(2**62 + n, [n + 1, *PROMPT[n % 5:]], max_tokens=3 + n % 7)
                for n in range(40)]
    found = pair.run(*requests)
    for request in requests:
        assert_ended_once(found[request.request_id])
        assert tokens_of(found[request.request_id]) == library.text_of(
            request.prompt_token_ids, request.sampling.max_tokens)
    assert pair.problems() == []
    assert not pair.context._ids and not pair.generation._ids and not pair.context._open


def test_the_first_token_comes_from_the_context_before_generation_knows_of_the_request(
        pair: Instances) -> None:
    pair.context.enqueue_request(replace(executor_request(7, PROMPT), type=RequestType.CONTEXT_ONLY))
    (response,) = pair.context.await_responses(timeout=1.0)
    assert response.token_ids == library.text_of(PROMPT, 1)
    assert response.text == text(response.token_ids)
    assert response.is_final and response.finish_reason is None
    params = response.context_phase_params
    assert params is not None and params.first_gen_tokens == tuple(response.token_ids) and params.req_id == 7
    assert pair.double(1).num_enqueued == 0
    assert pair.double(0).num_offered == 1


def test_a_context_whose_first_token_is_the_last_hands_nothing_over(pair: Instances) -> None:
    (final,) = pair.one(max_tokens=1)
    assert (final.token_ids, final.finish_reason) == (library.text_of(PROMPT, 1), "length")
    assert pair.problems() == []


@pytest.mark.parametrize("position", [0, 1, 4])
@pytest.mark.parametrize("shape", [{}, {"aggregated": 1}], ids=["split", "aggregated"])
def test_the_end_token_ends_the_output_in_either_phase(
        make: Any, shape: dict[str, Any], position: int) -> None:
    tokens = library.text_of(PROMPT, 8)
    instances = make(eos=[tokens[position]], **shape)
    responses = instances.one(max_tokens=8)
    assert assert_ended_once(responses).finish_reason == "stop"
    assert tokens_of(responses) == tokens[:position]  # the library keeps it to itself
    assert instances.problems() == []
    assert tokens_of(instances.one(max_tokens=8, ignore_eos=True)) == tokens


@pytest.mark.parametrize("position", [0, 3])
def test_further_end_tokens_and_stop_tokens_are_stop_words(make: Any, position: int) -> None:
    tokens = library.text_of(PROMPT, 8)
    for eos, sampling in (([126, tokens[position]], {}), ([126], {"stop_token_ids": (tokens[position],)})):
        instances = make(eos=eos)
        responses = instances.one(max_tokens=8, **sampling)
        assert assert_ended_once(responses).finish_reason == "stop"
        assert tokens_of(responses) == tokens[: position + 1]
        assert instances.problems() == []


@pytest.mark.parametrize("position", [0, 3, 7])
@pytest.mark.parametrize("shape", [{}, {"aggregated": 1}], ids=["split", "aggregated"])
def test_a_stop_text_ends_it_here_and_gives_the_request_up_there(
        make: Any, shape: dict[str, Any], position: int) -> None:
    tokens = library.text_of(PROMPT, 8)
    letter = word(tokens[position])
    instances = make(**shape)
    responses = instances.one(max_tokens=8, stop=(letter,))
    first = text(tokens).index(letter)
    assert "".join(response.text for response in responses) == text(tokens)[:first]
    final = assert_ended_once(responses)
    assert (final.finish_reason, final.error) == ("stop", None)
    assert instances.problems() == []


@pytest.mark.parametrize("shape", [{}, {"aggregated": 1}], ids=["split", "aggregated"])
def test_a_stop_text_may_begin_in_the_context_and_end_in_the_generation(
        make: Any, shape: dict[str, Any]) -> None:
    tokens = library.text_of(PROMPT, 8)
    responses = make(**shape).one(max_tokens=8, stop=(text(tokens[:2]),))
    assert "".join(response.text for response in responses) == ""
    assert tokens_of(responses) == tokens[:2] and responses[-1].finish_reason == "stop"


class LateDecoder(WordDecoder):
    """Gives each text with the next token, as for characters of several tokens."""

    def __init__(self) -> None:
        self._late: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        known = [*self._late, *token_ids]
        self._late = known[-1:]
        return super().push(known[:-1])

    def flush(self) -> str:
        return super().push(self._late)


def test_what_a_decoder_holds_back_comes_at_the_end_but_never_behind_a_stop_text(make: Any) -> None:
    tokens = library.text_of(PROMPT, 8)
    for stop, expected in (((), tokens), ((word(tokens[3]),), tokens[:3])):
        whole = make(aggregated=1)
        whole.context._make_decoder = LateDecoder
        assert "".join(response.text for response in whole.one(max_tokens=8, stop=stop)) == text(expected)


def test_what_could_become_a_stop_text_is_held_back_and_given_at_the_end(pair: Instances) -> None:
    tokens = library.text_of(PROMPT, 8)
    responses = pair.one(max_tokens=8, stop=(word(tokens[-1]) + "!",))
    assert responses[-2].text or responses[-1].text
    assert "".join(response.text for response in responses) == text(tokens)


def test_a_seed_draws_alike_and_the_continuations_of_a_prompt_draw_apart(make: Any) -> None:
    requests = [executor_request(n, PROMPT, n, max_tokens=6, temperature=1, seed=2**63 - 1) for n in range(3)]
    split, whole = make().run(*requests), make(aggregated=1).run(*requests)
    assert {n: tokens_of(found) for n, found in split.items()} == {
        n: tokens_of(found) for n, found in whole.items()}
    assert len({tuple(tokens_of(found)) for found in split.values()}) == 3
    assert tokens_of(split[0]) == library.text_of(PROMPT, 6, 2**63 - 1)


def test_without_a_seed_each_request_draws_its_own(make: Any) -> None:
    whole = make(aggregated=1)
    found = whole.run(*(executor_request(n, PROMPT, max_tokens=6, temperature=0.5) for n in range(4)))
    assert len({tuple(tokens_of(one)) for one in found.values()}) == 4


# ---- what the library is told ----


class Recorder:
    """An executor that notes the requests and answers nothing."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def enqueue_request(self, request: Any) -> int:
        self.requests.append(request)
        return len(self.requests)


def told(instances: Instances, **sampling: Any) -> Any:
    recorder = Recorder()
    instances.context._executor = recorder
    instances.context.enqueue_request(executor_request(len(instances.context._open), PROMPT, **sampling))
    assert not instances.context.take_ready()
    return recorder.requests[0]


def test_sampling_fields_reach_the_library(make: Any) -> None:
    whole = make(eos=[3, 4], aggregated=1)
    plain = told(whole, max_tokens=5)
    assert (plain.input_token_ids, plain.max_tokens, plain.streaming) == (PROMPT, 5, True)
    assert (plain.end_id, plain.stop_words, plain.bad_words) == (3, [[4]], None)
    config = plain.sampling_config
    assert (config.top_k, config.temperature, config.seed, config.min_tokens) == (1, None, None, None)
    drawn = told(whole, temperature=2, top_k=7, top_p=1, seed=9, repetition_penalty=2, presence_penalty=1,
                 frequency_penalty=-1, min_tokens=4, ignore_eos=True, bad=("ab",),
                 bad_token_ids=((1, 2), (3,)))
    config = drawn.sampling_config
    assert (config.temperature, config.top_k, config.top_p, config.seed) == (2.0, 7, 1.0, 9)
    assert (config.repetition_penalty, config.presence_penalty, config.frequency_penalty) == (2.0, 1.0, -1.0)
    assert (config.min_tokens, drawn.end_id, drawn.stop_words) == (4, None, None)
    assert drawn.bad_words == [[1, 2], [3], [97, 98], [32, 97, 98]]


def test_an_instance_is_started_as_a_leader_of_its_ranks(make: Any, engines: dict[str, str]) -> None:
    config = make(prefix_cache=False, max_batch_size=4).double(1).config
    assert (config.parallel_config.participant_ids, config.parallel_config.device_ids) == ([2], [0])
    assert (config.kv_cache_config.enable_block_reuse, config.kv_cache_config.max_tokens) == (False, 1024)
    assert config.cache_transceiver_config.backend is library.CacheTransceiverBackendType.MPI
    assert config.cache_transceiver_config.max_tokens_in_buffer == library.MAX_SEQ_LEN
    assert (config.max_batch_size, config.max_num_tokens, config.enable_chunked_context) == (4, 64, False)
    whole = make(aggregated=1).double(0).config
    assert whole.cache_transceiver_config is None
    assert whole.max_batch_size == 16


# ---- what is refused ----


@pytest.mark.parametrize(("sampling", "words"), [
    ({"guided": Guided(regex="a+")}, "guided is not to be had with engine tensorrt_llm"),
    ({"logit_bias": {3: 1.0}}, "logit_bias is not to be had"),
    ({"logprobs": 0}, "logprobs is not to be had"),
    ({"prompt_logprobs": 1}, "prompt_logprobs is not to be had"),
    ({"return_generation_logits": True}, "return_generation_logits is not to be had"),
    ({"return_context_logits": True}, "return_context_logits is not to be had"),
    ({"min_tokens": 2, "stop_token_ids": (9,)}, "min_tokens is 2: with engine tensorrt_llm token 9"),
    ({"max_tokens": 95}, "exceed the model's context length of 96; max_tokens can be 90"),
    ({"stop_token_ids": (128,)}, "token id 128 is outside the model's vocabulary of 128"),
    ({"temperature": 1}, "needs a seed"),
])
def test_what_the_library_cannot_do_is_refused_by_name(
        pair: Instances, sampling: dict[str, Any], words: str) -> None:
    (final,) = pair.one(**sampling)
    assert final.is_refused and final.finish_reason == "error"
    assert words in (final.error or "")
    assert pair.double(0).num_enqueued == 0
    assert pair.problems() == []


def test_a_prompt_beyond_the_engine_is_refused_before_the_library_sees_it(make: Any, tmp_path: Path) -> None:
    long = executor_request(1, [1] * 65, max_tokens=2)
    (final,) = make().run(long)[1]
    assert "the prompt has 65 tokens" in (final.error or "") and "takes 64 at most" in (final.error or "")
    assert "build the engine with use_paged_context_fmha" in (final.error or "")
    chunked = str(library.save_engine(tmp_path / "chunked", plugin_config={"use_paged_context_fmha": True}))
    able = make(context_engine_dir=chunked, generation_engine_dir=chunked)
    assert able.double(0).config.enable_chunked_context is True
    assert tokens_of(able.run(long)[1]) == library.text_of([1] * 65, 2)


def test_a_request_id_in_use_early_sources_and_strange_params_are_refused(pair: Instances) -> None:
    request = executor_request(1, PROMPT)
    whole = pair.generation
    for one in (replace(request, type=RequestType.GENERATION_ONLY),
                replace(request, type=RequestType.GENERATION_ONLY, early_source=0),
                replace(request, type=RequestType.GENERATION_ONLY,
                        context_phase_params=ContextPhaseParams((3,), 1, b"\x80not ours"))):
        whole.enqueue_request(one)
    errors = [response.error for response in whole.take_ready()]
    assert "needs the context_phase_params" in errors[0]
    assert "takes no request whose context phase still runs" in errors[1]
    assert "are not of a context instance of TensorRT-LLM" in errors[2]
    pair.context.enqueue_requests([request, request])
    (refused,) = pair.context.take_ready()
    assert refused.error == "request id 1 is in use" and refused.is_refused


def test_the_wire_holds_no_pickle_and_no_truncated_state_is_taken(pair: Instances) -> None:
    pair.context.enqueue_request(replace(executor_request(7, PROMPT), type=RequestType.CONTEXT_ONLY))
    params = pair.context.await_responses(timeout=1.0)[0].context_phase_params
    assert params is not None
    assert msgspec.msgpack.decode(params.opaque_state)[1:] == [
        2**63 - 2, str(next(iter(pair.double(0)._offered.values()))).encode(), None]
    made = params_to_library(library, params)
    assert (made.first_gen_tokens, made.req_id) == (list(params.first_gen_tokens), 2**63 - 2)
    for cut in range(len(params.opaque_state)):
        short = msgspec.structs.replace(params, opaque_state=params.opaque_state[:cut])
        with pytest.raises(Exception, match="are not of a context instance"):
            params_to_library(library, short)


# ---- cancel, deadline, errors ----


def drive(executor: TrtllmExecutor) -> list[Response]:
    executor.advance()
    return executor.take_ready()


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_cancelled_in_the_context_phase(pair: Instances, reason: Any) -> None:
    pair.context.enqueue_request(replace(executor_request(7, PROMPT), type=RequestType.CONTEXT_ONLY))
    pair.context.cancel_request(7, reason)
    pair.context.cancel_request(7, "deadline")  # the first word holds
    pair.context.cancel_request(8)
    (final,) = drive(pair.context)
    assert (final.finish_reason, final.context_phase_params) == (reason, None)
    assert final.is_final and final.error is not None
    assert pair.problems() == []


def test_a_context_that_nobody_pulls_can_be_dropped(pair: Instances) -> None:
    pair.context.enqueue_request(replace(executor_request(7, PROMPT), type=RequestType.CONTEXT_ONLY))
    assert drive(pair.context)[0].context_phase_params is not None
    pair.context.drop_context(8)
    assert pair.double(0).num_offered == 1
    pair.context.drop_context(7)
    assert pair.double(0).num_offered == 0 and not pair.context._offers
    pair.context.drop_context(7)
    assert pair.problems() == []


def test_cancelled_while_it_waits_for_the_cache_and_while_it_generates(pair: Instances) -> None:
    lost = replace(executor_request(1, PROMPT), type=RequestType.CONTEXT_ONLY)
    pair.context.enqueue_requests([lost, replace(lost, request_id=2)])
    handed = {response.request_id: response for response in drive(pair.context)}
    pair.context.drop_context(1)
    for number in (1, 2):
        pair.generation.enqueue_request(replace(
            lost, request_id=number, type=RequestType.GENERATION_ONLY,
            context_phase_params=handed[number].context_phase_params))
    assert [response.request_id for response in drive(pair.generation)] == [2]
    assert pair.generation.is_moving
    pair.generation.cancel_request(1, "deadline")
    pair.generation.cancel_request(2)
    found = {response.request_id: response for response in drive(pair.generation)}
    assert (found[1].finish_reason, found[1].error) == ("deadline", "the deadline passed before it was done")
    assert (found[2].finish_reason, found[2].token_ids) == ("cancelled", [])
    assert not pair.generation.is_moving
    assert pair.problems() == []


def test_a_library_that_does_not_answer_a_cancel_keeps_no_client_waiting(
        make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_GIVE_UP_SECONDS", 0.05)
    monkeypatch.setattr(library.Executor, "ignores_cancel", True)
    whole = make(aggregated=1).context
    whole.enqueue_request(executor_request(1, PROMPT, max_tokens=80))
    drive(whole)
    whole.cancel_request(1)
    assert drive(whole) == []  # what it still makes is nobody's
    time.sleep(0.06)
    (final,) = drive(whole)
    assert (final.finish_reason, final.is_final) == ("cancelled", True)
    assert drive(whole) == [] and whole.check_integrity(idle=True) == []


def test_a_cancel_that_crosses_the_end_gives_one_response(make: Any) -> None:
    whole = make(aggregated=1).context
    whole.enqueue_request(executor_request(1, PROMPT, max_tokens=1))
    assert drive(whole)[-1].finish_reason == "length"
    whole.cancel_request(1)
    assert drive(whole) == []


@pytest.mark.parametrize("shape", [{}, {"aggregated": 1}], ids=["split", "aggregated"])
def test_errors_of_the_library_are_responses(
        make: Any, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    instances = make(**shape)
    monkeypatch.setattr(library.Executor, "refuses", "no room")
    (final,) = instances.one()
    assert final.error == "TensorRT-LLM does not take the request: no room" and not final.is_refused
    monkeypatch.setattr(library.Executor, "refuses", None)
    with monkeypatch.context() as patch:
        patch.setattr(library, "OutputConfig", lambda: None)  # a release without exclude_input_from_output
        (final,) = instances.one()
        assert "unexpected keyword" in (final.error or "") and not final.is_refused
    monkeypatch.setattr(library.Executor, "fails", "CUDA error")
    (final,) = instances.one()
    assert (final.error, final.finish_reason) == ("TensorRT-LLM: CUDA error", "error")
    monkeypatch.setattr(library.Executor, "fails", None)
    assert tokens_of(instances.one()) == library.text_of(PROMPT, 8)
    assert instances.problems() == []


def test_a_generation_that_does_not_go_on_where_the_context_stopped_is_an_error(
        pair: Instances, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Executor, "repeats_first_tokens", False)
    final = pair.one()[-1]
    assert final.finish_reason == "error" and "generation begins with" in (final.error or "")
    pair.generation.advance()
    assert pair.problems() == []


def test_a_context_without_params_is_an_error(pair: Instances, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Executor, "gives_params", False)
    (final,) = pair.one()
    assert "gave no context_phase_params" in (final.error or "")


# ---- limits, statistics, end ----


def test_limits_are_the_engines(make: Any) -> None:
    limits = make().context.limits
    assert (limits.max_batch_size, limits.max_num_tokens, limits.max_model_len) == (16, 64, 96)
    assert (limits.num_blocks, limits.tokens_per_block, limits.vocab_size) == (32, 32, 128)
    assert limits.reserved_output == 96


def test_statistics_show_blocks_and_progress(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_STATS_SECONDS", 0.0)
    whole = make(aggregated=1).context
    assert whole.num_free_blocks == 32 and whole.get_latest_iteration_stats() == []
    assert not whole.advance()  # nothing to do is no work
    whole.enqueue_request(executor_request(1, PROMPT, max_tokens=60))
    whole.await_responses(timeout=0.0)
    assert whole.num_free_blocks == 31
    for _ in range(40):
        whole.await_responses(timeout=0.0)
    assert whole.num_free_blocks == 30
    stats = whole.get_latest_iteration_stats()
    assert [step.iteration for step in stats] == list(range(1, 42))
    assert (stats[0].num_active_requests, stats[0].num_blocks, stats[0].seconds) == (1, 32, 0.002)
    assert whole.get_latest_iteration_stats() == []


def test_shutdown_waits_for_open_requests_and_for_contexts_to_be_pulled(pair: Instances) -> None:
    request = replace(executor_request(7, PROMPT), type=RequestType.CONTEXT_ONLY)
    pair.context.enqueue_request(request)
    given: list[Response] = []

    def generate() -> None:
        while pair.double(0).num_offered == 0:
            time.sleep(0.001)
        time.sleep(0.05)
        given.extend(pair.context.take_ready())
        pair.generation.enqueue_request(replace(
            request, type=RequestType.GENERATION_ONLY, context_phase_params=given[0].context_phase_params))
        pair.generation.shutdown()

    other = threading.Thread(target=generate)
    other.start()
    pair.context.shutdown()
    assert pair.double(0).is_shut and not pair.context.can_enqueue_requests()
    other.join()
    responses = given + pair.generation.take_ready()
    assert tokens_of(responses) == library.text_of(PROMPT, 8)
    for executor in pair.executors:
        executor.close()  # a second end is none
        executor.enqueue_request(executor_request(8, PROMPT))
        assert executor.take_ready()[0].error == "the instance has shut down"
        assert not executor.advance()
    assert pair.problems() == []


def test_a_context_that_is_never_pulled_does_not_hold_the_end_up_for_ever(pair: Instances) -> None:
    pair.context.enqueue_request(replace(executor_request(7, PROMPT), type=RequestType.CONTEXT_ONLY))
    drive(pair.context)
    with pytest.raises(JobFailed, match="does not shut down: 0 requests are open, and of 1 contexts"):
        pair.context.shutdown(timeout=0.2)
    pair.context._executor._offered.clear()


def test_offers_are_not_kept_for_ever(pair: Instances, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_MAX_OFFERS", 3)
    for number in range(5):
        pair.run(executor_request(number, PROMPT))
    assert sorted(pair.context._offers) == [2, 3, 4]


# ---- in the service loops ----


def test_a_leader_serves_it_to_rank_0(pair: Instances) -> None:
    network = MemoryNetwork()
    rank0 = network.channel(0)
    services = [LeaderService(number, executor, network.channel(number + 1), pair.waiter)
                for number, executor in enumerate(pair.executors)]
    for service in services:
        service.announce({})
    ready = [message for _, message in rank0.poll()]
    assert all(isinstance(one, Ready) for one in ready)
    assert [(one.instance_id, one.limits.vocab_size, one.pool) for one in ready] == [
        (0, 128, ""), (1, 128, "")]
    request = replace(executor_request(2**62, PROMPT, max_tokens=5), type=RequestType.CONTEXT_ONLY)
    rank0.send(1, Enqueue([request, replace(request, request_id=4)]))
    found: dict[int, list[Response]] = {2**62: [], 4: []}
    for _ in range(30):
        for service in services:
            service.turn()
        for _, message in rank0.poll():
            assert isinstance(message, Step)
            for response in message.responses:
                found[response.request_id].append(response)
                if response.context_phase_params is None:
                    continue
                if response.request_id == 4:
                    rank0.send(1, DropOffer([4]))
                else:
                    rank0.send(2, Enqueue([replace(
                        request, type=RequestType.GENERATION_ONLY,
                        context_phase_params=response.context_phase_params)]))
                    rank0.send(2, Cancel([99]))
    assert tokens_of(found[2**62]) == library.text_of(PROMPT, 5)
    assert_ended_once(found[2**62])
    for number, service in enumerate(services):
        rank0.send(number + 1, IntegrityCheck(1))
        rank0.send(number + 1, Shutdown())
        service.run()
    assert [message.problems for _, message in rank0.poll()] == [[], []]
    assert pair.double(0).is_shut and pair.double(1).is_shut


def test_a_follower_starts_the_library_and_waits_for_its_leaders_word(
        make: Any, tmp_path: Path) -> None:
    wide = str(library.save_engine(tmp_path / "wide", tp=2))
    config = JobConfig(**OPTIONS, model=str(tmp_path), aggregated="tp2", aggregated_engine_dir=wide)
    group = build_topology(config).groups[0]
    engine = read_engines(config, build_topology(config))["aggregated"]
    with library.as_rank(2):
        theirs = make_library_executor(library, engine, config, group, (0, 1))
    assert not theirs.is_leader and theirs.config.parallel_config.participant_ids == [1, 2]
    with pytest.raises(RuntimeError, match="does not lead"):
        theirs.await_responses()
    network = MemoryNetwork()
    link: Any = None
    follower = TrtllmFollower(theirs, network.channel(2), make().waiter, link)
    assert not follower.turn()
    network.channel(1).send(2, Shutdown())
    follower.run()
    follower.close()
    assert theirs.is_shut
    with library.as_rank(3), pytest.raises(ModelError, match=r"^aggregated 0: TensorRT-LLM cannot start"):
        make_library_executor(library, engine, config, group, (0, 1))


# ---- configuration ----


@pytest.mark.parametrize(("options", "words"), [
    ({"engine": "torch"}, "context_engine_dir is for engine tensorrt_llm, and this is torch; give --engine "),
    ({"generation_engine_dir": 3}, "generation_engine_dir is 3; it is the path"),
    ({"transport": "mpi"}, "transport means nothing to engine tensorrt_llm: it hands over by itself"),
    ({"dtype": "bf16"}, "dtype means nothing"),
    ({"kv_dtype": "bf16"}, "kv_dtype means nothing"),
    ({"tokens_per_block": 64}, "tokens_per_block means nothing"),
    ({"generation_tokens_per_block": 32}, "generation_tokens_per_block means nothing"),
    ({"overlap_tokens": 1}, "overlap_tokens means nothing"),
    ({"reserved_output": 1}, "reserved_output means nothing"),
    ({"threads": 1}, "threads means nothing"),
    ({"local_context": "auto"}, "local_context is auto, and engine tensorrt_llm does not say"),
])
def test_options_that_do_not_fit_the_engine(
        engines: dict[str, str], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        JobConfig(**{**OPTIONS, **engines, **options})


def test_directories_of_roles_without_instances_may_stay_in_a_file(
        engines: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    said = {**engines, "engine": "tensorrt_llm"}
    file.write_text("".join(f'{key} = "{value}"\n' for key, value in said.items()))
    split, whole = (settings_of({"config_file": file, **more}).job for more in ({}, {"aggregated": 2}))
    assert not split.is_aggregated and whole.is_aggregated


def fault(kind: type[Exception], engines: dict[str, str], **options: Any) -> str:
    config = JobConfig(**{**OPTIONS, **engines, **options})
    with pytest.raises(kind) as caught:
        read_engines(config, build_topology(config))
    return str(caught.value)


def test_engine_directories_that_are_none(engines: dict[str, str], tmp_path: Path) -> None:
    assert "needs the context instances' engine: give --context-engine-dir DIR" in fault(
        ConfigError, engines, context_engine_dir=None)
    assert "give --aggregated-engine-dir DIR" in fault(
        ConfigError, engines, aggregated=1, aggregated_engine_dir=None)
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("")
    assert "--context-engine-dir" in fault(ConfigError, engines, context_engine_dir=str(tmp_path / "no"))
    assert "found nothing there" in fault(ConfigError, engines, context_engine_dir=str(tmp_path / "no"))
    assert "found a file" in fault(ConfigError, engines, context_engine_dir=str(file))
    assert "found no config.json" in fault(ConfigError, engines, context_engine_dir=str(empty))
    (empty / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "is no engine's" in fault(ConfigError, engines, context_engine_dir=str(empty))
    (empty / "config.json").write_text("{")
    assert "not JSON" in fault(ModelError, engines, context_engine_dir=str(empty))
    for part, words in (('{"pretrained_config": {"hidden_size": 3}}', "found no vocab_size"),
                        ('{"pretrained_config": {"vocab_size": 3}}', "found no max_seq_len"),
                        ('{"pretrained_config": {"vocab_size": true}}', "found vocab_size = True"),
                        ('{"pretrained_config": {"mapping": 3, "vocab_size": 3}}', "found mapping = 3")):
        (empty / "config.json").write_text(part)
        assert words in fault(ModelError, engines, context_engine_dir=str(empty))


def test_engines_that_do_not_fit_the_job(engines: dict[str, str], tmp_path: Path) -> None:
    wide = str(library.save_engine(tmp_path / "wide", tp=2, pp=2))
    told = fault(LayoutError, engines, generation_engine_dir=wide, generation="tp4")
    assert "generation 0 is tp4, but" in told and "built for tp 2 x pp 2; give --generation tp2pp2" in told
    assert "rank 2" in told and "its engine is tp2pp2" in told
    other = str(library.save_engine(tmp_path / "other", vocab_size=129))
    assert "different models: vocabularies of 128" in fault(LayoutError, engines, generation_engine_dir=other)
    assert "max_batch_size is 17, but" in fault(ConfigError, engines, max_batch_size=17)
    assert "--max-num-tokens 64 at most" in fault(ConfigError, engines, max_num_tokens=100)


def test_what_an_engine_does_not_say_is_the_jobs(tmp_path: Path, engines: dict[str, str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(
        '{"pretrained_config": {"vocab_size": 9, "max_position_embeddings": 50}}')
    config = JobConfig(**{**OPTIONS, **engines, "aggregated": "tp2", "aggregated_engine_dir": str(bare)})
    engine = read_engines(config, build_topology(config))["aggregated"]
    assert (engine.tp, engine.max_seq_len, engine.max_prompt_len, engine.tokens_per_block) == (
        None, 50, 50, 32)
    assert (engine.max_batch_size, engine.max_num_tokens) == (64, 512)


def test_a_library_that_is_not_here_is_named_with_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"cannot be imported here .*'disagg_mpi\[tensorrt_llm\]'"):
        load_library()


def test_a_tokenizer_is_not_fetched(engines: dict[str, str]) -> None:
    config = JobConfig(**{**OPTIONS, **engines, "model": "meta-llama/Llama-3.1-8B"})
    with pytest.raises(ConfigError, match="found no such directory; engine tensorrt_llm needs the"):
        tokenizer_dir(config)


def test_a_job_needs_to_be_told_where_its_tokenizer_is(engines: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="needs the model's tokenizer: give --model DIR"):
        tokenizer_dir(JobConfig(**{**OPTIONS, **engines, "model": None}))


def test_layout_shows_the_engines(engines: dict[str, str]) -> None:
    words = [f"--{key.replace('_', '-')}={value}" for key, value in engines.items()]
    done = CliRunner().invoke(layout, ["--engine", "tensorrt_llm", *words])
    assert done.exit_code == 0, done.output
    assert "TensorRT-LLM's own, over MPI" in done.output and engines["context_engine_dir"] in done.output
