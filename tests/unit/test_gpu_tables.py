"""A step as arrays, against a reference written token by token, and those arrays on a device that is late."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_mpi.comm.messages import Batch, PagedStep
from disagg_mpi.engine.gpu.buffers import StepBuffers, blank_step
from disagg_mpi.engine.gpu.device import HostDevice, Mark
from disagg_mpi.engine.gpu.tables import SeatTables, StepArrays, arrays_of
from disagg_mpi.transfer.layout import KvLayout

NAMES = ("token_ids", "positions", "slots", "chunk_of", "seats", "token_starts", "page_starts",
         "last_page_lengths", "pages", "rows")


class Piece(NamedTuple):
    """One chunk, and the blocks of its request."""

    seat: int
    start: int
    length: int
    blocks: Sequence[int]


def reference(pieces: Sequence[Piece], size: int, tokens: list[int], drawn: Sequence[int],
              keep: Sequence[int]) -> dict[str, list[int]]:
    """What :class:`StepArrays` says of its fields, one token after the other."""
    found: dict[str, list[int]] = {name: [] for name in NAMES}
    found["token_starts"], found["page_starts"] = [0], [0]
    last = []
    for number, piece in enumerate(pieces):
        end = piece.start + piece.length
        for position in range(piece.start, end):
            found["positions"].append(position)
            found["slots"].append(piece.blocks[position // size] * size + position % size)
            found["chunk_of"].append(number)
        last.append(len(found["positions"]) - 1)
        found["seats"].append(piece.seat)
        found["token_starts"].append(len(found["positions"]))
        pages = [piece.blocks[page] for page in range(len(piece.blocks)) if page * size < end]
        found["pages"] += pages
        found["page_starts"].append(len(found["pages"]))
        found["last_page_lengths"].append(sum(1 for p in range(end) if p // size == len(pages) - 1))
    found["token_ids"] = tokens
    found["rows"] = [last[place] for place in drawn] + list(keep)
    return found


def check(arrays: StepArrays, expected: dict[str, list[int]]) -> None:
    for name in NAMES:
        array = getattr(arrays, name)
        assert array.dtype == np.int32, name
        assert array.tolist() == expected[name], name


@st.composite
def pieces(draw: st.DrawFn, size: int, tables: dict[int, list[int]]) -> list[Piece]:
    """Chunks of some of the seats with blocks."""
    seats = draw(st.lists(st.sampled_from(sorted(tables)), min_size=1, unique=True))
    found = []
    only_ones = draw(st.booleans())
    for seat in seats:
        room = len(tables[seat]) * size
        start = draw(st.integers(0, room - 1))
        found.append(Piece(seat, start, 1 if only_ones else draw(st.integers(1, room - start)), tables[seat]))
    return found


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_step_is_laid_out_as_its_tables_say(data: st.DataObject) -> None:
    """Step after step: tables grow, move and are another request's; the ranks are told of changes only."""
    num_seats, room, size = (data.draw(st.integers(1, most)) for most in (5, 6, 5))
    scratch = data.draw(st.integers(0, 99))
    tables = SeatTables(num_seats, room, size, scratch)
    assert tables.nobody == num_seats
    known: dict[int, list[int]] = {}
    for number in range(data.draw(st.integers(1, 4))):
        told = []
        for seat in data.draw(st.lists(st.integers(0, num_seats - 1), min_size=number == 0, unique=True)):
            first = data.draw(st.integers(0, len(known.get(seat, []))))
            if first == room:
                continue
            new = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=room - first))
            told.append((seat, first, new))
            known[seat] = known.get(seat, [])[:first] + new
        chunks = data.draw(pieces(size, known))
        total = sum(piece.length for piece in chunks)
        tokens = data.draw(st.lists(st.integers(-1, 50), min_size=total, max_size=total))
        drawn = data.draw(st.lists(st.integers(0, len(chunks) - 1), unique=True).map(sorted))
        keep = data.draw(st.lists(st.integers(0, total - 1), unique=True))
        arrays = tables.arrays(PagedStep(
            number, [p.seat for p in chunks], [p.start for p in chunks], [p.length for p in chunks], tokens,
            told, drawn, [], keep))
        check(arrays, reference(chunks, size, tokens, drawn, keep))
        assert arrays.num_tokens == total and arrays.num_chunks == len(chunks)
        assert arrays.kv_lengths.tolist() == [p.start + p.length for p in chunks]
        assert arrays.is_generation == (
            all(p.length == 1 for p in chunks) and len(drawn) + len(keep) == len(chunks))
        if not (total == len(chunks) and arrays.is_generation):
            continue
        wider = data.draw(st.integers(len(chunks), len(chunks) + 3))
        padded = [*chunks, *[Piece(num_seats, 0, 1, [scratch])] * (wider - len(chunks))]
        more = reference(padded, size, tokens + [0] * (wider - len(chunks)), drawn,
                         keep + list(range(len(chunks), wider)))
        check(tables.padded(arrays, wider), more)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_step_that_names_its_slots_is_laid_out_alike(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    tables = data.draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=5))
    chunks = [piece._replace(seat=0) for piece in data.draw(pieces(size, dict(enumerate(tables))))]
    total = sum(piece.length for piece in chunks)
    tokens = data.draw(st.lists(st.integers(0, 50), min_size=total, max_size=total))
    keep = data.draw(st.lists(st.integers(0, total - 1), unique=True))
    layout = KvLayout(1, 1, 1, size, 100, "fp32")
    arrays = arrays_of(Batch(0, tokens, [
        (p.start, p.length, layout.token_runs(p.blocks, p.start + p.length)) for p in chunks], keep), size)
    check(arrays, reference(chunks, size, tokens, [], keep))


def test_a_blank_step_writes_the_scratch_block_alone() -> None:
    blank = blank_step(3, seat=8, slot=5 * 4, page=5)
    check(blank, reference([Piece(8, 0, 1, [5])] * 3, 4, [0] * 3, [0, 1, 2], []))
    assert blank.is_generation


# ---- on the way to the device ----


class Late(torch.Tensor):
    """Host memory that copies read when the device comes to them, not when they are asked for."""

    queue: ClassVar[list[Callable[[], Any]]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_ and isinstance(args[1], Late):
            target, source = args[0], args[1].as_subclass(torch.Tensor)
            cls.queue.append(lambda: target.copy_(source))
            return target
        return super().__torch_function__(func, types, args, kwargs or {})


class LateDevice(HostDevice):
    """Does what is queued when somebody waits for a mark behind it."""

    def __init__(self) -> None:
        super().__init__()
        Late.queue.clear()
        self.done = 0

    def host_empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype).as_subclass(Late)

    def mark(self) -> Mark:
        return LateMark(self, len(Late.queue))

    def run(self, end: int) -> None:
        while self.done < end:
            Late.queue[self.done]()
            self.done += 1


class LateMark:
    def __init__(self, device: LateDevice, end: int) -> None:
        self._device, self._end = device, end

    def is_past(self) -> bool:
        return self._device.done >= self._end

    def wait(self) -> None:
        self._device.run(self._end)


def random_arrays(chooser: Any, most: int) -> StepArrays:
    """Of any sizes; what is in them matters to nobody here."""
    chunks = chooser.randint(1, most)
    sizes = {"seats": chunks, "last_page_lengths": chunks, "token_starts": chunks + 1,
             "page_starts": chunks + 1, "pages": chooser.randint(1, 2 * most),
             "rows": chooser.randint(0, most)}
    tokens = chooser.randint(chunks, 3 * most)
    return StepArrays(*[np.array([chooser.randrange(-1, 2**31 - 1) for _ in range(sizes.get(name, tokens))],
                                 dtype=np.int32) for name in NAMES])


def buffers(device: HostDevice, most: int = 4) -> StepBuffers:
    return StepBuffers(device, num_tokens=3 * most, num_chunks=most, num_rows=most, num_pages=2 * most)


@given(st.randoms(use_true_random=False), st.lists(st.booleans(), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_each_step_finds_its_own_values_however_late_the_device_is(chooser: Any, waits: list[bool]) -> None:
    """Steps are queued one behind the other; each one's kernels read what was uploaded for it."""
    device = LateDevice()
    ring = buffers(device)
    steps: list[StepArrays] = []
    read: list[dict[str, list[int]]] = []
    for is_waited_for in waits:
        steps.append(random_arrays(chooser, 4))
        on_device = ring.upload(steps[-1])
        assert on_device.host is steps[-1]
        Late.queue.append(lambda step=on_device: read.append(  # type: ignore[misc]
            {name: getattr(step, name).tolist() for name in NAMES}))
        if is_waited_for:
            device.mark().wait()
    device.mark().wait()
    assert read == [{name: getattr(step, name).tolist() for name in NAMES} for step in steps]


def test_arrays_are_where_the_step_before_had_them() -> None:
    """Captured steps read them there; vectorised loads want them aligned."""
    ring = buffers(HostDevice())
    ones = [ring.upload(blank_step(size, 9, 1, 2)) for size in (4, 1)]
    for name in NAMES:
        first, second = (getattr(one, name) for one in ones)
        assert first.data_ptr() == second.data_ptr()
        assert (first.data_ptr() - ones[0].token_ids.data_ptr()) % 64 == 0
        assert first.dtype == torch.int32
    assert ring.upload(blank_step(4, 9, 1, 2)).pages.data_ptr() == ones[0].pages.data_ptr()
    ends = sorted((getattr(ones[0], name).data_ptr(), getattr(ones[0], name).nbytes) for name in NAMES)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(ends)), "no two overlap"


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_too_large_is_refused(name: str) -> None:
    fits = random_arrays(random.Random(1), 4)
    sizes = {"token_ids": 12, "positions": 12, "slots": 12, "chunk_of": 12, "pages": 8, "token_starts": 5,
             "page_starts": 5}
    most = sizes.get(name, 4)

    def with_length(length: int) -> StepArrays:
        arrays = {each: getattr(fits, each) for each in NAMES}
        return StepArrays(**{**arrays, name: np.zeros(length, dtype=np.int32)})

    ring = buffers(HostDevice())
    ring.upload(with_length(most))
    with pytest.raises(ValueError, match=f"{most + 1} {name}; there is room for {most}"):
        ring.upload(with_length(most + 1))
