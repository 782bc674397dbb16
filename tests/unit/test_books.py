"""The books across instances, stale hand-over params, and other things that a review once found."""

from __future__ import annotations

from pathlib import Path

import pytest
from inprocess import Job, executor_request, replace

from disagg_mpi.config import Instance, JobConfig
from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.errors import ConfigError, IntegrityError, ModelError
from disagg_mpi.orchestrator.table import find_shared_blocks
from disagg_mpi.request import PoolBlocks, RequestType, SamplingParams


def test_a_block_that_two_instances_take_for_theirs_is_named() -> None:
    mine, theirs = PoolBlocks("host 0", [(0, 4), (9, 1)]), PoolBlocks("host 0", [(4, 5), (10, 2)])
    elsewhere = PoolBlocks("host 3", [(0, 12)])
    assert find_shared_blocks([("context 0", mine), ("generation 0", theirs), ("context 1", elsewhere)]) == []
    (problem,) = find_shared_blocks([("context 0", mine), ("generation 0", PoolBlocks("host 0", [(3, 2)]))])
    assert problem == "block 3 of pool host 0 is both context 0's and generation 0's"


def test_a_managers_blocks_follow_an_exchange() -> None:
    context, generation = BlockManager(range(4)), BlockManager(range(4, 8))
    taken, given = list(context.allocate(1, 2)), list(generation.allocate(1, 2))
    generation.exchange(1, taken)
    context.free_exchanged(1, given)
    assert context.block_ids == [2, 3, 4, 5]
    assert generation.block_ids == [0, 1, 6, 7]


@pytest.mark.parametrize("shared", [True, False])
def test_params_that_are_used_twice_are_an_error_not_wrong_tokens(tiny_llama: Path, shared: bool) -> None:
    job = Job(tiny_llama, shared=shared)
    params = job.run([executor_request(7, [1, 2, 3])])[7][0].context_phase_params
    job.generation.enqueue_request(replace(
        executor_request(7, [1, 2, 3]), type=RequestType.GENERATION_ONLY, context_phase_params=params))
    with pytest.raises(IntegrityError, match="rank 2 took over request 7, whose context is no longer held"):
        for _ in range(10):
            job.turn()
    job.close()


@pytest.mark.parametrize("shared", [True, False])
def test_letting_go_of_what_is_gone_is_harmless(tiny_llama: Path, shared: bool) -> None:
    job = Job(tiny_llama, shared=shared)
    params = job.run([executor_request(7, [1, 2, 3])])[7][0].context_phase_params
    job.generation.enqueue_request(replace(  # refused: its prompt is empty
        executor_request(7, []), type=RequestType.GENERATION_ONLY, context_phase_params=params))
    assert job.turn()[2][0].finish_reason == "error"
    assert job.problems() == []
    job.close()


def test_numbers_that_no_message_can_carry_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_k"):
        SamplingParams(top_k=2**70)


def test_aggregated_excludes_the_other_two() -> None:
    assert JobConfig(aggregated=2).instances("context") == ()
    assert JobConfig().instances("generation") == (Instance(),)
    with pytest.raises(ConfigError, match="aggregated and context exclude each other"):
        JobConfig(aggregated=1, context=4)


def test_layers_with_a_state_of_their_own_are_refused(tmp_path: Path) -> None:
    from transformers import Lfm2Config

    from disagg_mpi.engine.weights import load_model

    Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="layers of kind conv"):
        load_model(tmp_path, "fp32")
