"""How a box is cut into messages, and who gets room for them: no MPI."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from disagg_mpi.transfer.cuda.packed import CHUNK_BYTES, NUM_CHUNKS, Arena, Chunk, chunks_of


def test_llama_is_two_messages() -> None:
    """4096 tokens of Llama-3-8B in bf16: the arithmetic is beside the constant."""
    chunks = chunks_of(64, 4096, 2048, CHUNK_BYTES)
    assert chunks == [Chunk(0, 32, 0, 4096), Chunk(32, 32, 0, 4096)]
    assert len(chunks) == NUM_CHUNKS
    assert len(chunks_of(64, 1024, 2048, CHUNK_BYTES)) == 1


def test_planes_are_cut_evenly_and_large_ones_in_parts() -> None:
    assert [chunk.num_planes for chunk in chunks_of(10, 1, 1, 4)] == [3, 3, 4]
    parts = chunks_of(2, 200, 10, 1290)
    assert parts == [Chunk(plane, 1, *part) for plane in range(2) for part in ((0, 128), (128, 72))]
    assert [chunk.num_tokens for chunk in chunks_of(1, 3, 10, 1)] == [1, 1, 1]
    assert chunks_of(6, 0, 10, 100) == []


@pytest.mark.parametrize("seed", range(50))
def test_chunks_are_all_bytes_once_in_order(seed: int) -> None:
    draw = random.Random(seed)
    planes, tokens, row = draw.randint(1, 9), draw.randint(1, 300), draw.choice([1, 6, 64])
    chunk_bytes = draw.randint(1, 2 * planes * tokens * row)
    numbers = np.arange(planes * tokens).reshape(planes, tokens)
    chunks = chunks_of(planes, tokens, row, chunk_bytes)
    found = [numbers[one.first_plane : one.first_plane + one.num_planes,
                     one.first_token : one.first_token + one.num_tokens].ravel() for one in chunks]
    assert np.array_equal(np.concatenate(found), numbers.ravel())
    assert all(part.size and part.size * row <= max(chunk_bytes, row) for part in found)


def test_room_is_given_in_the_order_of_asking() -> None:
    arena = Arena(3 * 512, torch.device("cpu"), has_host=True)
    assert arena.host is not None and arena.message_memory is arena.host
    assert [arena.take(512, who) for who in "ab"] == [0, 512]
    assert arena.take(600, "large") is None
    assert arena.take(10, "small") is None, "there is room for it, but it came later"
    arena.give(0)
    assert arena.take(10, "small") is None
    assert arena.take(600, "large") is None, "not in one piece"
    arena.give(512)
    assert arena.take(600, "large") == 0
    assert arena.take(10, "small") == 1024, "at a multiple of 512"
    assert not arena.is_free
    arena.give(0)
    arena.give(1024)
    assert arena.is_free
