"""A whole job in one process: real engines on a tiny random model, no MPI.

:class:`TinyModel` makes model directories with random weights. :class:`Job` lays instances out as a real job
does, over a :class:`MemoryNetwork` and either one pool for all (blocks are exchanged) or one each (bytes
are copied), and is driven by ``turn``. :class:`OrchestratedJob` puts the orchestrator's pump thread and one
worker thread around it.
"""

from __future__ import annotations

import functools
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from disagg_mpi.comm.channel import MemoryNetwork
from disagg_mpi.comm.waiting import Doorbell, Waiter
from disagg_mpi.engine import runner as runner_module
from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.engine.engine import Engine
from disagg_mpi.engine.runner import ModelRunner
from disagg_mpi.engine.sampler import Sampler
from disagg_mpi.engine.scheduler import Scheduler
from disagg_mpi.executor.builtin import BuiltinExecutor
from disagg_mpi.executor.service import LeaderService
from disagg_mpi.orchestrator.orchestrator import Orchestrator
from disagg_mpi.orchestrator.table import InstanceView
from disagg_mpi.request import (
    ExecutorLimits,
    ExecutorRequest,
    RequestType,
    Response,
    SamplingParams,
)
from disagg_mpi.topology import Role
from disagg_mpi.transfer.layout import KvLayout
from disagg_mpi.transfer.memory import private_pool
from disagg_mpi.transfer.transceiver import Transceiver
from disagg_mpi.transfer.transports import MemoryTransport, MemoryWire

# Instances of one test share the module: it holds weights, never state.
runner_module.load_model = functools.cache(runner_module.load_model)

VOCABULARY = 128
PATIENCE = 60.0
"""Seconds after which a wait in a test has failed."""


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


class Instance:
    """One rank's instance, with its parts at hand."""

    def __init__(self, rank: int, role: Role, index: int, executor: BuiltinExecutor,
                 engine: Engine, blocks: BlockManager, transceiver: Transceiver) -> None:
        self.rank = rank
        self.role = role
        self.index = index
        self.executor = executor
        self.engine = engine
        self.blocks = blocks
        self.transceiver = transceiver


class Job:
    """Instances on ranks 1, 2, …; ``shared``: one pool for all, else one each and bytes are copied."""

    def __init__(
        self,
        path: Path,
        roles: Sequence[Role] = (Role.CONTEXT, Role.GENERATION),
        *,
        shared: bool,
        num_blocks: int = 32,
        tokens_per_block: int = 4,
        max_batch_size: int = 8,
        max_num_tokens: int = 16,
        eos: Sequence[int] = (),
        make_decoder: Callable[[], Any] | None = WordDecoder,
        with_shared_rooms: bool = True,
        num_layers: int = 2,
        num_kv_heads: int = 2,
        head_dim: int = 8,
        max_model_len: int = 256,
    ) -> None:
        self.network = MemoryNetwork()  # the hand-over's
        self.wire = MemoryWire()
        self.shared = shared
        self.instances: list[Instance] = []
        pool_blocks = num_blocks * len(roles) if shared else num_blocks
        layout = KvLayout(num_layers, num_kv_heads, head_dim, tokens_per_block, pool_blocks, "fp32")
        one_pool = private_pool(layout.pool_bytes)
        self.bells = [Doorbell(uuid.uuid4().hex, 0, [0], True)]
        count: dict[Role, int] = {}
        has_split = Role.GENERATION in roles
        for position, role in enumerate(roles):
            rank = position + 1
            pool = one_pool if shared else private_pool(layout.pool_bytes)
            first = position * num_blocks if shared else 0
            blocks = BlockManager(range(first, first + num_blocks))
            scheduler = Scheduler(
                blocks, tokens_per_block=tokens_per_block, max_batch_size=max_batch_size,
                max_num_tokens=max_num_tokens,
                reserve_output_in_context=shared and has_split and with_shared_rooms)
            transceiver = Transceiver(
                rank, self.network.channel(rank),
                MemoryTransport(rank, self.wire, pool, layout), layout,
                pool="host" if shared else f"rank {rank}", use_shared=shared)
            runner = ModelRunner(path, dtype="fp32", layout=layout, memory=pool, num_threads=1)
            engine = Engine(runner=runner, sampler=Sampler(eos), scheduler=scheduler, blocks=blocks,
                            transceiver=transceiver, eos_token_ids=eos)
            executor = BuiltinExecutor(
                engine,
                ExecutorLimits(num_blocks, tokens_per_block, max_batch_size, max_num_tokens,
                               max_model_len, VOCABULARY),
                Waiter(self.bells[0]), make_decoder)
            index = count.get(role, 0)
            count[role] = index + 1
            self.instances.append(
                Instance(rank, role, index, executor, engine, blocks, transceiver))

    @property
    def context(self) -> BuiltinExecutor:
        return self.instances[0].executor

    @property
    def generation(self) -> BuiltinExecutor:
        return self.instances[-1].executor

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
        if self.shared:
            seen: list[int] = []
            for instance in self.instances:
                seen += free_ids(instance.blocks)
                for owner in instance.blocks.owners:
                    seen += instance.blocks.table(owner)
            if idle and sorted(seen) != list(range(len(seen))):
                problems.append(f"shared pool: ids {sorted(seen)}")
        return problems

    def close(self) -> None:
        for bell in self.bells:
            bell.close()

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
            LeaderService(position, instance.executor, channels[instance.rank],
                          Waiter(job.bells[0]))
            for position, instance in enumerate(job.instances)]
        views = [
            InstanceView(position, instance.role, f"{instance.role} {instance.index}",
                         instance.rank, instance.executor.limits)
            for position, instance in enumerate(job.instances)]
        self.worker_error: BaseException | None = None
        self._stop = threading.Event()
        self._may_run = threading.Event()
        self._may_run.set()
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()
        self.orchestrator = Orchestrator(views, channels[0], self._bell, tokenizer)

    def pause(self) -> None:
        """Workers stop before their next turn: what is open stays open."""
        self._may_run.clear()

    def resume(self) -> None:
        self._may_run.set()

    def _work(self) -> None:
        waiter = Waiter(self.job.bells[0])
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


def free_ids(blocks: BlockManager) -> list[int]:
    return [block for block, mark in enumerate(blocks._map) if mark == 1]


def replace(request: ExecutorRequest, **changes: Any) -> ExecutorRequest:
    import msgspec

    return msgspec.structs.replace(request, **changes)


def executor_request(
    request_id: int, prompt: Sequence[int], sequence_index: int = 0, **sampling: Any
) -> ExecutorRequest:
    return ExecutorRequest(request_id=request_id, prompt_token_ids=list(prompt),
                           sequence_index=sequence_index,
                           sampling=SamplingParams(**{"max_tokens": 8, **sampling}))


def tokens_of(responses: Sequence[Response]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


def text_of(responses: Sequence[Response]) -> str:
    return "".join(response.text for response in responses)
