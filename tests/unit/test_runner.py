"""A step on all ranks of an instance: every row that is wanted reaches the leader, whole, in any shape.

Ranks are threads, joined by queues in place of an instance's communicator. The model is a table, so that a
row says which token at which position it is of; that a slice of a real model makes its part of the logits is
:mod:`test_parallel_models`' to say.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import PATIENCE, VOCABULARY, executor_request

from disagg_mpi.comm.messages import Batch
from disagg_mpi.engine.attention import KvPool
from disagg_mpi.engine.logprobs import take_scores
from disagg_mpi.engine.runner import Runner, StageRunner
from disagg_mpi.engine.scheduler import Chunk
from disagg_mpi.engine.sequence import Sequence
from disagg_mpi.engine.tensor_parallel import ModelShard
from disagg_mpi.transfer.layout import CacheView, KvLayout
from disagg_mpi.transfer.partition import shard_of

ROWS = torch.randn(256, VOCABULARY, generator=torch.Generator().manual_seed(3))
LAYOUT = KvLayout(2, 2, 8, 4, 32, "fp32")


class TableModel:
    """The first stage sends token + position on as the hidden state; the last looks its row up."""

    dtype = torch.float32
    hidden_size = 1

    def __init__(self, shard: ModelShard) -> None:
        self.is_first, self.is_last = shard.is_first, shard.is_last
        self.vocab_range = shard.range_of(VOCABULARY) if shard.is_last else (0, 0)

    def __call__(self, tokens: Seq[int], positions: Seq[int], keep: Seq[int], paged: Any,
                 hidden: torch.Tensor | None) -> torch.Tensor:
        if hidden is None:
            hidden = (torch.tensor(tokens) + torch.tensor(positions)).float().unsqueeze(1)
        if not self.is_last:
            return hidden
        start, end = self.vocab_range
        return ROWS[hidden[torch.tensor(keep, dtype=torch.long), 0].long()][:, start:end]


class Link:
    """One rank's end of the queues; what a :class:`disagg_mpi.comm.group.GroupLink` does for a runner."""

    def __init__(self, ranks: Ranks, index: int) -> None:
        self._ranks, self._index = ranks, index
        self.tp, self.pp = ranks.tp, ranks.pp

    def send_hidden(self, array: Any) -> None:
        self._ranks.hidden[self._index + self.tp].put(array.copy())

    def receive_hidden(self, array: Any) -> None:
        array[:] = self._ranks.hidden[self._index].get(timeout=PATIENCE)

    def send_logits(self, array: Any) -> None:
        self._ranks.logits[self._index].put(array.copy())

    def receive_logits(self, arrays: dict[int, Any]) -> Link:
        self._expected = arrays
        return self

    def done(self) -> bool:
        for index, array in self._expected.items():
            array[:] = self._ranks.logits[index].get(timeout=PATIENCE)
        return True


class Ranks:
    """An instance of tp x pp ranks; the leader's runner is used by the test."""

    def __init__(self, tp: int, pp: int) -> None:
        self.tp, self.pp = tp, pp
        size = tp * pp
        self.hidden: list[queue.Queue[Any]] = [queue.Queue() for _ in range(size)]
        self.logits: list[queue.Queue[Any]] = [queue.Queue() for _ in range(size)]
        self._batches: list[queue.Queue[Batch | None]] = [queue.Queue() for _ in range(size)]
        stages = [self._stage(index) for index in range(size)]
        makers = {(pp - 1) * tp + rank: ModelShard(tp, rank, pp, pp - 1).range_of(VOCABULARY)
                  for rank in range(tp)}
        makers.pop(0, None)
        self.runner = Runner(stages[0], layout=LAYOUT, link=Link(self, 0), tell=self._tell,  # type: ignore[arg-type]
                             vocab_ranges=makers)
        self._threads = [threading.Thread(target=self._serve, args=(index, stages[index]), daemon=True)
                         for index in range(1, size)]
        for thread in self._threads:
            thread.start()

    def _stage(self, index: int) -> StageRunner:
        shard = ModelShard(self.tp, index % self.tp, self.pp, index // self.tp)
        view = CacheView(0, 0, "own", 0, LAYOUT, 0, 0, shard_of(2, 2, 1, 1, 0))
        return StageRunner(TableModel(shard), KvPool(bytearray(LAYOUT.pool_bytes), view),  # type: ignore[arg-type]
                           Link(self, index))  # type: ignore[arg-type]

    def _tell(self, message: Any) -> None:
        for batches in self._batches[1:]:
            batches.put(message)

    def _serve(self, index: int, stage: StageRunner) -> None:
        while (batch := self._batches[index].get(timeout=PATIENCE)) is not None:
            stage.serve(batch)

    def close(self) -> None:
        self._tell(None)
        for thread in self._threads:
            thread.join(PATIENCE)


def sequence(number: int, prompt: list[int], **sampling: Any) -> Sequence:
    one = Sequence(executor_request(number, prompt, **sampling))
    one.block_ids = list(range(number * 8, number * 8 + 8))
    return one


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)])
def test_every_wanted_row_reaches_the_leader(tp: int, pp: int) -> None:
    ranks = Ranks(tp, pp)
    scored = sequence(0, list(range(20)), prompt_logprobs=1, return_context_logits=True)
    plain = sequence(1, list(range(50, 60)))
    steps = [
        [Chunk(plain, 0, 6), Chunk(scored, 0, 3, True)],
        [Chunk(scored, 3, 9, True)],
        [Chunk(plain, 6, 4), Chunk(scored, 12, 8, True)],
        [Chunk(plain, 0, 6)],
    ]
    wanted = [[0, 1, 2], list(range(3, 12)), [50 + 9, *range(12, 20)], None]
    for chunks, tokens in zip(steps, wanted, strict=True):
        ranks.runner.launch(chunks)
        over = ranks.runner.poll()
        assert over is not None and over.chunks == over.host_chunks == chunks and not over.tokens
        if tokens is None:
            assert over.logits is None
            continue
        assert over.logits is not None
        rows = [token + (token - 50 if token >= 50 else token) for token in tokens]
        assert torch.equal(over.logits, ROWS[rows])
        left = take_scores(chunks, over.logits, ())
        ends = [2 * chunk.end - 2 + 50 * (chunk.sequence is plain) for chunk in chunks if chunk.samples]
        assert torch.equal(left, ROWS[ends])
    ranks.close()
    scores = scored.prompt_scores
    assert scores is not None and scores.logits is not None and scores.logprobs is not None
    found = np.stack([np.frombuffer(row, np.float32) for row in scores.logits])
    assert np.array_equal(found, ROWS[[2 * token for token in range(20)]].numpy())
    values = torch.log_softmax(ROWS, -1)
    assert [one and one.logprob for one in scores.logprobs] == [None, *(
        pytest.approx(float(values[2 * token, token + 1])) for token in range(19))]
