"""The start of a job whose engine is TensorRT-LLM: what ``launch`` has in place of memory and model.

Every rank reads the engines' configurations; each engine rank then imports the library, and the ranks of an
instance start it together. The tokenizer is ours: texts become tokens at rank 0 and at the leaders, as ever.
"""

from __future__ import annotations

import functools
from pathlib import Path

from disagg_mpi.comm.agree import together
from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ConfigError
from disagg_mpi.executor.base import Executor
from disagg_mpi.executor.follower import FollowerService
from disagg_mpi.executor.prepare import Preparer
from disagg_mpi.executor.trtllm.engine_dir import EngineInfo, read_engines
from disagg_mpi.executor.trtllm.executor import TrtllmExecutor
from disagg_mpi.executor.trtllm.follower import TrtllmFollower
from disagg_mpi.executor.trtllm.library import load_library, make_library_executor
from disagg_mpi.job.instance import load_tokenizer
from disagg_mpi.job.world import World
from disagg_mpi.model.checkpoint import read_eos_token_ids
from disagg_mpi.topology import Group


class TrtllmJob:
    """The engines and the tokenizer of a job; made on every rank alike. Collective over the world."""

    def __init__(self, world: World, config: JobConfig) -> None:
        """Raises :class:`ConfigError`, :class:`LayoutError` or :class:`ModelError`, on all ranks the same."""
        self._world = world
        self._config = config
        self.engines: dict[str, EngineInfo] = together(
            world.comm, lambda: read_engines(config, world.topology))
        self.tokenizer_dir = together(world.comm, lambda: tokenizer_dir(config))
        group = world.topology.group_of(world.rank)
        self._library = together(world.comm, lambda: None if group is None else load_library())

    def make_worker(self, group: Group) -> Executor | FollowerService:
        """This rank's part of its instance; collective over that."""
        world, config, engine = self._world, self._config, self.engines[str(group.role)]
        executor = make_library_executor(
            self._library, engine, config, group, devices_of(world, group))
        if world.rank != group.leader:
            assert world.link is not None
            return TrtllmFollower(executor, world.control, Waiter(world.doorbell), world.link)
        tokenizer = load_tokenizer(self.tokenizer_dir)
        encode = None if tokenizer is None else functools.partial(tokenizer.encode, add_special_tokens=False)
        make_decoder = None
        if tokenizer is not None:
            from disagg_mpi.model.detokenizer import Detokenizer

            make_decoder = functools.partial(Detokenizer, tokenizer)
        return TrtllmExecutor(
            self._library, executor, engine, config.pool_tokens, Waiter(world.doorbell),
            eos_token_ids=read_eos_token_ids(self.tokenizer_dir), make_decoder=make_decoder,
            preparer=Preparer(engine.vocab_size, encode))


def tokenizer_dir(config: JobConfig) -> Path:
    """The directory that ``model`` names. Raises :class:`ConfigError`: nothing is fetched for a tokenizer."""
    if config.model is None:
        raise ConfigError("engine tensorrt_llm needs the model's tokenizer: give --model DIR, the Hugging "
                          "Face directory that the engines were built from (its weights are not read)")
    path = Path(config.model).expanduser()
    if not path.is_dir():
        raise ConfigError(f"--model {config.model}: found no such directory; engine tensorrt_llm needs the "
                          "Hugging Face directory that the engines were built from, for its tokenizer (hf "
                          "download ID --local-dir DIR gets one)")
    return path.absolute()


def devices_of(world: World, group: Group) -> tuple[int, ...]:
    """The device of each rank of ``group``: as configured, else by its place among its host's engine ranks.

    The library would count from 0 in each instance, and two instances of a host would share devices.
    """
    if group.device_ids is not None:
        return group.device_ids
    return tuple(world.engine_ranks(world.host_of[rank]).index(rank) for rank in group.ranks)
