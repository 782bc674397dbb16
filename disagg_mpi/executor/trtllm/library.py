"""The library's own objects: its module, the executor of one rank, what it is configured with.

Every rank of an instance makes one, in leader mode, at the same time: the library's start is collective over
them. It takes part with its world ranks (``participant_ids``) and hands KV-cache over by its own transceiver.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ConfigError, ModelError
from disagg_mpi.executor.trtllm.engine_dir import EngineInfo
from disagg_mpi.topology import Group

MODULE = "tensorrt_llm.bindings.executor"

# Between two looks for a message of its leader a follower sleeps; at 0, the library's default, each of its
# ranks turns in a loop, also beside our own ranks on one host. Unmeasured.
_RECV_POLL_MS = 1

# Iterations whose statistics the library keeps until they are asked for; its default is none.
_STATS_ITERATIONS = 1000


def load_library() -> Any:
    """The bindings. Raises :class:`ConfigError` where they cannot be imported."""
    try:
        # The package first: it loads the shared libraries that its bindings are linked with.
        importlib.import_module("tensorrt_llm")
        return importlib.import_module(MODULE)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"engine tensorrt_llm: {MODULE} cannot be imported here ({error}); on each host with an instance "
            "(Linux, NVIDIA GPUs) type: pip install 'disagg_mpi[tensorrt_llm]', or give --engine torch"
        ) from None


def make_library_executor(
    library: Any, engine: EngineInfo, config: JobConfig, group: Group, device_ids: tuple[int, ...]
) -> Any:
    """This rank's part of ``group`` in the library; collective over the group.

    ``device_ids``: of each rank of the group. Raises :class:`ModelError` with the library's words.
    """
    try:
        return library.Executor(Path(engine.directory), library.ModelType.DECODER_ONLY,
                                executor_config(library, engine, config, group, device_ids))
    except Exception as error:  # whatever the bindings throw: of CUDA, of MPI, of the engine file
        raise ModelError(f"{group.name}: TensorRT-LLM cannot start {engine.directory}: {error}") from error


def executor_config(
    library: Any, engine: EngineInfo, config: JobConfig, group: Group, device_ids: tuple[int, ...]
) -> Any:
    """What the library is told; the rest stays at its defaults."""
    more: dict[str, Any] = {}
    if not config.is_aggregated:
        more["cache_transceiver_config"] = library.CacheTransceiverConfig(
            backend=library.CacheTransceiverBackendType.MPI,
            # A hand-over of the longest request fits, so that none waits for a part of its own.
            max_tokens_in_buffer=engine.max_seq_len)
    return library.ExecutorConfig(
        max_beam_width=1,
        kv_cache_config=library.KvCacheConfig(
            enable_block_reuse=config.prefix_cache, max_tokens=config.pool_tokens),
        enable_chunked_context=engine.is_chunked,
        iter_stats_max_iterations=_STATS_ITERATIONS,
        max_batch_size=engine.max_batch_size,
        max_num_tokens=engine.max_num_tokens,
        parallel_config=library.ParallelConfig(
            communication_type=library.CommunicationType.MPI,
            communication_mode=library.CommunicationMode.LEADER,
            device_ids=list(device_ids),
            participant_ids=list(group.ranks)),
        recv_poll_period_ms=_RECV_POLL_MS,
        **more)
