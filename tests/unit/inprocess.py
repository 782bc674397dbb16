"""A whole job in one process: real engines on a tiny random model, no MPI.

:func:`save_tiny_model` makes model directories with random weights. :class:`Job` lays instances of one rank
each out as a real job does (:mod:`disagg_mpi.job.arrangement`), over a :class:`MemoryNetwork`, and is driven
by ``turn``. :class:`LedJob` adds rank 0's dispatcher, :class:`OrchestratedJob` the whole orchestrator, with
its pump thread and one worker thread.
"""

from __future__ import annotations

import functools
import json
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from disagg_mpi.comm.channel import MemoryNetwork
from disagg_mpi.comm.messages import Message
from disagg_mpi.comm.waiting import Doorbell, Waiter
from disagg_mpi.config import JobConfig
from disagg_mpi.engine.attention import KvPool
from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.engine.engine import Engine
from disagg_mpi.engine.gpu.attention import DevicePool, HeadShape, SdpaAttention, make_attention
from disagg_mpi.engine.gpu.device import HostDevice
from disagg_mpi.engine.gpu.model import DeviceModel, head_shape
from disagg_mpi.engine.gpu.operations import make_operations
from disagg_mpi.engine.gpu.runner import GpuRunner
from disagg_mpi.engine.gpu.stage import DeviceStage
from disagg_mpi.engine.gpu.weights import WeightArena
from disagg_mpi.engine.guided import GrammarCompiler
from disagg_mpi.engine.model import StageModel
from disagg_mpi.engine.reuse import PrefixReuse
from disagg_mpi.engine.runner import Runner, StageRunner
from disagg_mpi.engine.sampler import Sampler
from disagg_mpi.engine.scheduler import Scheduler
from disagg_mpi.engine.tensor_parallel import ModelShard
from disagg_mpi.engine.weights import plan_model
from disagg_mpi.executor.builtin import BuiltinExecutor
from disagg_mpi.executor.prepare import Preparer
from disagg_mpi.executor.service import LeaderService
from disagg_mpi.job.arrangement import arrange
from disagg_mpi.model.checkpoint import read_model_spec
from disagg_mpi.model.detokenizer import Detokenizer
from disagg_mpi.model.tokenizer import Tokenizer
from disagg_mpi.orchestrator.dispatcher import Dispatcher, Policy
from disagg_mpi.orchestrator.orchestrator import Orchestrator
from disagg_mpi.orchestrator.table import Entry, InstanceView, State, find_shared_blocks
from disagg_mpi.prefix import BlockHasher, PrefixTags
from disagg_mpi.request import (
    ExecutorLimits,
    ExecutorRequest,
    RequestType,
    Response,
    SamplingParams,
)
from disagg_mpi.topology import Group, Role, build_topology
from disagg_mpi.transfer.cuda.gather import GatherTransport
from disagg_mpi.transfer.directory import CacheDirectory
from disagg_mpi.transfer.layout import KvLayout
from disagg_mpi.transfer.memory import private_memory
from disagg_mpi.transfer.mover import Mover
from disagg_mpi.transfer.transceiver import Transceiver
from disagg_mpi.transfer.transports import Copies, CopyTransport, MemoryTransport, MemoryWire

VOCABULARY = 128
PATIENCE = 60.0
"""Seconds after which a wait in a test has failed."""
HASH_KEY = b"a job's own"


@functools.cache
def load_device_model(path: Path) -> tuple[DeviceModel, HeadShape]:
    """The whole model, as on a GPU, on the processor."""
    plan = plan_model(path, "fp32", ModelShard())
    arena = WeightArena(plan)
    memory = torch.zeros(arena.num_bytes, dtype=torch.uint8)
    arena.fill_from_files(memory)
    device = HostDevice()
    arena.attach(memory, device)
    return DeviceModel(plan, ModelShard(), None, make_operations(device, torch.float32)), head_shape(plan)


@functools.cache
def load_stage(path: Path) -> StageModel:
    """The whole model; instances share it, for it holds weights and never state."""
    return StageModel(path, dtype="fp32", shard=ModelShard(), link=None)


def save_tiny_model(directory: Path, kind: str = "Llama", seed: int = 0, **changes: Any) -> Path:
    """A random model of a transformers family (``Llama``, ``Qwen2``, …) with a vocabulary of 128."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, "initializer_range": 0.6, "tie_word_embeddings": False, **changes}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**shape)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1: they must matter
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return directory


END = 110
"""End-of-sequence of :func:`save_ascii_tokenizer`'s tokenizer."""


def save_ascii_tokenizer(directory: Path) -> Path:
    """A byte-level ``tokenizer.json``: printable ASCII and line breaks, some pairs, and :data:`END`.

    It knows fewer tokens than the tiny models can make, as many a real one does.
    """
    space, line = "\u0120", "\u010a"  # as byte-level vocabularies write them
    letters = [space, *map(chr, range(33, 127)), line]
    pairs = ["{ \"", "\" :", "\" }", "} ,", "[ [", "] ]", "t r", "u e", "f a", "1 2", f"{space} a",
             "a b", "o o", "b a"]
    vocabulary = {text: at for at, text in enumerate([*letters, *(p.replace(" ", "") for p in pairs)])}
    data = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": END, "content": "<|end|>", "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": {**vocabulary, "<|end|>": END}, "merges": pairs}}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(data))
    return directory


class WordDecoder:
    """Token ``i`` is ``chr(97 + i % 26)``, or for every 13th the two characters ``<``, ``>``; exact."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(word(token) for token in token_ids)

    def flush(self) -> str:
        return ""


def word(token: int) -> str:
    return "<>" if token % 13 == 0 else chr(97 + token % 26)


class LetterTokenizer:
    """Text in, token ids out: the code points modulo the vocabulary."""

    def encode(self, text: str) -> list[int]:
        return [byte % VOCABULARY for byte in text.encode()]

    def apply_chat_template(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return self.encode("".join(str(message["content"]) for message in messages))


class StagedRunner(Runner):
    """As with ``num_stages`` pipeline stages: so many steps in flight, each over only when asked twice."""

    def __init__(self, stage: StageRunner, layout: KvLayout, num_stages: int) -> None:
        super().__init__(stage, layout=layout)
        self._num_stages = num_stages
        self._is_asked_again = False

    @property
    def num_stages(self) -> int:
        return self._num_stages

    def poll(self) -> Any:
        self._is_asked_again = not self._is_asked_again
        return None if self._is_asked_again and self._num_stages > 1 else super().poll()


class SteadyAttention(SdpaAttention):
    """May be captured: the processor's replay is another run of the same Python."""

    can_capture = True


class Instance:
    """One instance, on one rank, with its parts at hand."""

    def __init__(self, group: Group, executor: BuiltinExecutor, engine: Engine, blocks: BlockManager,
                 transceiver: Transceiver, ways: dict[int, str]) -> None:
        self.id = group.instance_id
        self.rank = group.leader
        self.role = group.role
        self.name = group.name
        self.executor = executor
        self.engine = engine
        self.blocks = blocks
        self.transceiver = transceiver
        self.ways = ways


class Job:
    """Instances on ranks 1, 2, …, contexts first.

    ``shared``: all on one host, where blocks change hands, or bytes are copied with another
    ``generation_tokens_per_block``; else bytes go in messages, and each rank has memory of its own. With
    ``hosts`` (each rank's, rank 0's too) it is one memory a host. ``options`` are :class:`JobConfig`'s.
    """

    def __init__(
        self,
        path: Path,
        roles: Sequence[Role] = (Role.CONTEXT, Role.GENERATION),
        *,
        shared: bool,
        hosts: Sequence[int] | None = None,
        gpus: Sequence[int] | None = None,
        num_blocks: int = 32,
        eos: Sequence[int] = (),
        make_decoder: Callable[[], Any] | None = WordDecoder,
        num_stages: int = 1,
        tokenizer: Tokenizer | None = None,
        make_device: Callable[[], HostDevice] = HostDevice,
        **options: Any,
    ) -> None:
        """``gpus``: each rank's, rank 0's too, with ``device="emulated"``; by default all share one.
        ``num_blocks``: of a context or aggregated instance; a generation instance has as many tokens.
        ``num_stages``: pretend that every instance has so many pipeline stages. ``tokenizer``: instead of
        ``make_decoder``, for bad texts and guided output too. ``make_device``: what stands in for a
        GPU."""
        options = {"tokens_per_block": 4, "max_batch_size": 8, "max_num_tokens": 16, **options}
        counts = {role.value: roles.count(role) for role in Role if role in roles}
        if options.get("device") == "emulated":
            assert num_stages == 1  # stages on GPUs are driven as those on processors are
        self.config = JobConfig(
            **counts, transport="auto" if shared or hosts else "mpi",
            kv_tokens=num_blocks * options["tokens_per_block"], **options)
        self.topology = build_topology(self.config)
        self.spec = read_model_spec(path)
        size = self.topology.world_size
        gpu_of = {rank: f"GPU {gpu}" for rank, gpu in enumerate(gpus or [0] * size)}
        self.arrangement = arrange(
            self.config, self.topology, hosts or [0] * size, self.spec,
            gpu_of if self.config.uses_gpus else {})
        self.directory = CacheDirectory(
            self.arrangement.views, [group.ranks for group in self.topology.groups],
            use_memory=self.config.transport != "mpi")
        self._memories = {f"host {host}": private_memory(size)
                          for host, size in self.arrangement.window_bytes.items()}
        self._memories |= {f"rank {rank}": private_memory(size)
                           for rank, size in self.arrangement.private_bytes.items()}
        self._memories |= {name: private_memory(pool.num_bytes)
                           for name, pool in self.arrangement.device_pools.items()}
        self._num_stages = num_stages
        self._tokenizer = tokenizer
        self._make_device = make_device
        self.network = MemoryNetwork()  # the hand-over's
        self.wire = MemoryWire()
        self.bell = Doorbell(uuid.uuid4().hex, 0, [0], True)
        self.instances = [self._make_instance(path, group, eos, make_decoder)
                          for group in self.topology.groups]

    def _make_instance(self, path: Path, group: Group, eos: Sequence[int],
                       make_decoder: Callable[[], Any] | None) -> Instance:
        """As ``job.instance`` does for a real one."""
        config, rank = self.config, group.leader
        view = self.arrangement.views[rank]
        memory = self._memories[view.memory]
        block_size = view.layout.tokens_per_block
        channel = self.network.channel(rank)
        copies: Copies | None = None
        if config.transport != "mpi":
            copies = GatherTransport(torch.from_numpy(memory), view, {
                name: torch.from_numpy(self._memories[name]) for name in self.arrangement.device_pools
            }) if config.uses_gpus else CopyTransport(memory, view)
        mover = Mover(self.directory, group.instance_id, rank, channel,
                      MemoryTransport(rank, self.wire, memory, view), copies)
        transceiver = Transceiver(rank, group.instance_id, channel, self.directory, mover)
        runner: StagedRunner | GpuRunner
        if config.uses_gpus:
            runner = GpuRunner(self._device_stage(path, group, memory))
        else:
            runner = StagedRunner(StageRunner(load_stage(path), KvPool(memory, view), None), view.layout,
                                  self._num_stages)
        tags = self._tags(group.instance_id) if config.prefix_cache else None
        blocks = BlockManager(self.arrangement.block_ids[group.instance_id], tags)
        reuse = None
        if tags is not None:
            reuse = PrefixReuse(blocks, tags, BlockHasher(HASH_KEY, block_size), runner.copy_blocks,
                                tokens_per_block=block_size, fetches=transceiver.fetches)
        takers = [other for other in self.topology.groups if other.role is Role.GENERATION]
        scheduler = Scheduler(
            blocks, tokens_per_block=block_size, max_batch_size=config.max_batch_size,
            max_num_tokens=config.token_budget, reserved_output=config.reserved_output,
            reserve_output_in_context=group.role.does_context and any(
                self.directory.is_exchange(group.instance_id, taker.instance_id) for taker in takers),
            num_stages=self._num_stages, place=None if reuse is None else reuse.place)
        engine = Engine(runner=runner, sampler=Sampler(eos), scheduler=scheduler, blocks=blocks,
                        transceiver=transceiver, eos_token_ids=eos, reuse=reuse,
                        announces_layers=runner.is_done_at_launch)
        limits = ExecutorLimits(
            num_blocks=blocks.num_blocks, tokens_per_block=block_size,
            max_batch_size=config.max_batch_size, max_num_tokens=config.token_budget,
            max_model_len=self.spec.max_position_embeddings, vocab_size=VOCABULARY,
            reserved_output=config.reserved_output)
        preparer = None
        if (tokenizer := self._tokenizer) is not None:
            make_decoder = functools.partial(Detokenizer, tokenizer)
            preparer = Preparer(
                VOCABULARY, functools.partial(tokenizer.encode, add_special_tokens=False),
                GrammarCompiler(tokenizer, VOCABULARY, eos))
        executor = BuiltinExecutor(engine, limits, Waiter(self.bell), make_decoder, preparer=preparer)
        ways = {} if group.role is not Role.GENERATION else {
            other.instance_id: self.directory.way(other.instance_id, group.instance_id)
            for other in self.topology.groups if other.role is Role.CONTEXT}
        return Instance(group, executor, engine, blocks, transceiver, ways)

    def _device_stage(self, path: Path, group: Group, memory: Any) -> DeviceStage:
        config, view, device = self.config, self.arrangement.views[group.leader], self._make_device()
        model, shape = load_device_model(path)
        tensor = torch.from_numpy(memory)
        pool, host_pool = DevicePool(tensor, view, torch.float32), KvPool(memory, view)
        stage = DeviceStage(
            device, model, pool, SteadyAttention(pool) if config.cuda_graphs else make_attention(
                "auto", device, pool, shape, torch.float32, max_requests=config.max_batch_size),
            None, lambda sources, targets: host_pool.copy_blocks(list(sources), list(targets)),
            scratch=self.arrangement.scratch[group.instance_id], max_batch_size=config.max_batch_size,
            max_num_tokens=config.token_budget, max_model_len=self.spec.max_position_embeddings,
            captures=config.cuda_graphs)
        stage.warm_up()
        return stage

    def _tags(self, instance: int) -> PrefixTags:
        place = self.arrangement.tags[instance]
        num_bytes = PrefixTags.bytes_needed(place.num_blocks)
        if place.offset is None:
            return PrefixTags(np.zeros(num_bytes, dtype=np.uint8), place.num_blocks)
        leader = self.arrangement.views[self.topology.groups[instance].leader]
        window = self._memories[f"host {leader.host}"]
        return PrefixTags(window[place.offset : place.offset + num_bytes], place.num_blocks)

    @property
    def context(self) -> BuiltinExecutor:
        return self.instances[0].executor

    @property
    def generation(self) -> BuiltinExecutor:
        return self.instances[-1].executor

    def views(self) -> list[InstanceView]:
        """What rank 0 knows of the instances at first."""
        return [InstanceView(i.id, i.role, i.name, i.rank, i.executor.limits, i.ways,
                             i.executor.pool if self.config.prefix_cache else "") for i in self.instances]

    @property
    def policy(self) -> Policy:
        return Policy(hash_key=HASH_KEY, overlap_tokens=self.config.overlap_tokens,
                      local_context=self.config.local_context, router=self.config.router)

    def turn(self) -> dict[int, list[Response]]:
        """One step of every instance; responses by rank."""
        made = {}
        for instance in self.instances:
            instance.executor.advance()
            made[instance.rank] = instance.executor.take_ready()
        return made

    def settle(self) -> None:
        """Let what is on its way arrive."""
        for _ in range(4):
            for instance in self.instances:
                instance.executor.advance()

    def problems(self, idle: bool = True) -> list[str]:
        """All that is wrong with the books: each instance's own, and blocks with two owners or none."""
        self.settle()
        problems = [f"rank {i.rank}: {problem}" for i in self.instances
                    for problem in i.executor.check_integrity(idle)]
        problems += [f"rank {i.rank}: {len(ready)} responses were never taken"
                     for i in self.instances if (ready := i.executor.take_ready())]
        return problems + find_shared_blocks((i.name, i.engine.pool_blocks()) for i in self.instances)

    def close(self) -> None:
        self.bell.close()

    def run(
        self, requests: Sequence[ExecutorRequest], *, max_turns: int = 2000
    ) -> dict[int, list[Response]]:
        """Answer requests to the end, handing each over where it was split; all responses by id."""
        found: dict[int, list[Response]] = {request.request_id: [] for request in requests}
        by_id = {request.request_id: request for request in requests}
        split = self.instances[0].role is Role.CONTEXT
        kind = RequestType.CONTEXT_ONLY if split else RequestType.CONTEXT_AND_GENERATION
        for request in requests:
            self.context.enqueue_request(replace(request, type=kind))
        left = set(found)
        for _ in range(max_turns):
            for responses in self.turn().values():
                for response in responses:
                    found[response.request_id].append(response)
                    if response.context_phase_params is not None:
                        self.generation.enqueue_request(replace(
                            by_id[response.request_id], type=RequestType.GENERATION_ONLY,
                            context_phase_params=response.context_phase_params))
                    elif response.is_final:
                        left.discard(response.request_id)
            if not left:
                return found
        raise AssertionError(f"requests {sorted(left)} are not over after {max_turns} turns")


class Sink:
    """Keeps what rank 0 tells of one request."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.ends: list[State] = []

    def on_response(self, entry: Entry, response: Response) -> None:
        self.responses.append(response)
        if entry.is_over:
            self.ends.append(entry.state)

    @property
    def end(self) -> State:
        """How it ended: once, with the last thing that was said."""
        (state,) = self.ends
        assert self.responses[-1].finish_reason is not None
        assert all(response.finish_reason is None for response in self.responses[:-1])
        return state

    @property
    def token_ids(self) -> list[int]:
        return tokens_of(self.responses)


class LedJob:
    """A :class:`Job` led by rank 0's dispatcher in one thread, turn by turn."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.network = MemoryNetwork()  # control
        self.sent: list[tuple[int, Message]] = []
        """What rank 0 has sent: destination and message."""
        self._channel = self.network.channel(0)
        self.services = [
            LeaderService(instance.id, instance.executor, self.network.channel(instance.rank),
                          Waiter(job.bell))
            for instance in job.instances]
        self.dispatcher = Dispatcher(job.views(), self._send, job.policy)
        self.entries: dict[int, Entry] = {}

    def submit(self, request: ExecutorRequest) -> Sink:
        sink = Sink()
        self.entries[request.request_id] = Entry(request, sink, None)
        self.dispatcher.submit(self.entries[request.request_id])
        return sink

    def lead(self) -> None:
        """Rank 0's turn."""
        for _, message in self._channel.poll():
            self.dispatcher.on_step(message)
        self.dispatcher.turn()

    def turn(self, *instances: int) -> None:
        """Rank 0's turn, then that of ``instances``, by default of all."""
        self.lead()
        for position in instances or range(len(self.services)):
            self.services[position].turn()

    def finish(self, max_turns: int = 2000) -> None:
        """Turns until every request is over."""
        for _ in range(max_turns):
            self.turn()
            if not self.dispatcher.num_open:
                return
        raise AssertionError(f"{self.dispatcher.num_open} requests are not over after {max_turns} turns")

    def problems(self) -> list[str]:
        """All that is wrong with the books of rank 0 and of the instances when nothing is open."""
        for _ in range(4):
            self.turn()
        return self.dispatcher.check() + self.job.problems()

    def _send(self, rank: int, message: Message) -> None:
        self.sent.append((rank, message))
        self._channel.send(rank, message)


class OrchestratedJob:
    """A :class:`Job` under a real orchestrator: its pump thread, and one thread for all workers."""

    def __init__(self, job: Job, tokenizer: Any = None) -> None:
        self.job = job
        self.network = MemoryNetwork()  # control
        job_id = uuid.uuid4().hex
        ranks = range(len(job.instances) + 1)
        self._bell = Doorbell(job_id, 0, ranks, True)
        channels = {rank: self.network.channel(rank) for rank in ranks}
        self.services = [
            LeaderService(instance.id, instance.executor, channels[instance.rank], Waiter(job.bell))
            for instance in job.instances]
        self.worker_error: BaseException | None = None
        self._stop = threading.Event()
        self._may_run = threading.Event()
        self._may_run.set()
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()
        self.orchestrator = Orchestrator(job.views(), channels[0], self._bell, tokenizer, job.policy)

    def pause(self) -> None:
        """Workers stop before their next turn: what is open stays open."""
        self._may_run.clear()

    def resume(self) -> None:
        self._may_run.set()

    def _work(self) -> None:
        waiter = Waiter(self.job.bell)
        try:
            while not self._stop.is_set() and not all(s.stopping for s in self.services):
                if not self._may_run.wait(0.01):
                    continue
                if any(service.turn() for service in self.services):
                    self._bell.ring_self()
                    waiter.worked()
                else:
                    waiter.idle(at_most=0.001)
        except BaseException as error:
            self.worker_error = error

    def close(self) -> None:
        self.resume()
        try:
            self.orchestrator.close()
        finally:
            self._stop.set()
            self._worker.join(PATIENCE)
            self._bell.close()
            self.job.close()
        assert self.worker_error is None, self.worker_error


def replace(struct: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(struct, **changes)


def executor_request(
    request_id: int, prompt: Sequence[int], sequence_index: int = 0, **sampling: Any
) -> ExecutorRequest:
    return ExecutorRequest(request_id=request_id, prompt_token_ids=list(prompt),
                           sequence_index=sequence_index,
                           sampling=SamplingParams(**{"max_tokens": 8, **sampling}))


def tokens_of(responses: Sequence[Response]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


def assert_ended_once(responses: Sequence[Response]) -> Response:
    """One last response, at the end; a hand-over in between does not count."""
    finals = [r for r in responses if r.is_final and r.context_phase_params is None]
    assert len(finals) == 1
    assert responses[-1] is finals[0]
    assert all(r.finish_reason is None for r in responses[:-1])
    assert finals[0].finish_reason is not None
    return finals[0]


class Undisturbed:
    """The tokens of requests that run alone, with room for all they need and nothing to reuse."""

    def __init__(self, path: Path) -> None:
        self._job = Job(path, (Role.AGGREGATED,), shared=True, num_blocks=64, max_num_tokens=64,
                        prefix_cache=False)
        self._known: dict[bytes, list[int]] = {}

    def tokens(self, request: ExecutorRequest) -> list[int]:
        key = msgspec.msgpack.encode(replace(request, request_id=0))
        if key not in self._known:
            self._known[key] = tokens_of(self._job.run([replace(request, request_id=0)])[0])
        return self._known[key]

    def close(self) -> None:
        self._job.close()


def text_of(responses: Sequence[Response]) -> str:
    return "".join(response.text for response in responses)
