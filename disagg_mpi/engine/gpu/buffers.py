"""A step's arrays on their way to the device, without a wait: one copy a step from host memory of our own.

Each array has a fixed place on the device, because captured steps read it there. The host's side is a ring:
what the device has not read yet is not written again. Made once a rank, by its stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from disagg_mpi.engine.gpu.device import Device, Mark
from disagg_mpi.engine.gpu.tables import Ints, StepArrays

# Steps whose arrays may be on their way: one runs, one is queued, one is being prepared.
_RING = 3

# Places begin at so many bytes, as vectorised loads want it.
_ALIGNED = 64


@dataclass(frozen=True)
class DeviceStep:
    """The arrays of :class:`~disagg_mpi.engine.gpu.tables.StepArrays`, on the device, and there as they
    were."""

    host: StepArrays
    pinned: dict[str, torch.Tensor]
    """The same in host memory that the device can read at its own time, until two more steps are uploaded."""
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    chunk_of: torch.Tensor
    seats: torch.Tensor
    token_starts: torch.Tensor
    page_starts: torch.Tensor
    last_page_lengths: torch.Tensor
    pages: torch.Tensor
    rows: torch.Tensor


class StepBuffers:
    """Room for steps of so many tokens, chunks, rows and pages."""

    def __init__(
        self, device: Device, *, num_tokens: int, num_chunks: int, num_rows: int, num_pages: int
    ) -> None:
        sizes = {**dict.fromkeys(("token_ids", "positions", "slots", "chunk_of"), num_tokens),
                 **dict.fromkeys(("seats", "last_page_lengths"), num_chunks),
                 **dict.fromkeys(("token_starts", "page_starts"), num_chunks + 1),
                 "rows": num_rows, "pages": num_pages}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, size in sizes.items():
            self._places[name] = (end, size)
            end += -(-4 * size // _ALIGNED) * _ALIGNED // 4
        self._device = device
        self._last = self._places["pages"][0]
        self._arena = torch.zeros(end, dtype=torch.int32, device=device.place)
        self._ring = [device.host_empty(end, dtype=torch.int32).zero_() for _ in range(_RING)]
        self._read: list[Mark | None] = [None] * _RING
        self._next = 0

    def upload(self, arrays: StepArrays) -> DeviceStep:
        """Start the copies; the step's arrays are good for what is queued after this call."""
        slot, self._next = self._next, (self._next + 1) % _RING
        before = self._read[slot]
        if before is not None:
            before.wait()
        host = self._ring[slot]
        into = host.numpy()
        for name, (first, size) in self._places.items():
            values: Ints = getattr(arrays, name)
            if len(values) > size:
                raise ValueError(f"a step with {len(values)} {name}; there is room for {size}")
            into[first : first + len(values)] = values
        # The last place is the largest by far, and its end is mostly unused.
        end = self._last + len(arrays.pages)
        self._arena[:end].copy_(host[:end], non_blocking=True)
        self._read[slot] = self._device.mark()
        places = {name: slice(first, first + len(getattr(arrays, name)))
                  for name, (first, _) in self._places.items()}
        return DeviceStep(arrays, {name: host[place] for name, place in places.items()},
                          **{name: self._arena[place] for name, place in places.items()})


def blank_step(num_chunks: int, seat: int, slot: int, page: int) -> StepArrays:
    """A generation step of nobody's chunks, to capture with."""
    ones = np.ones(num_chunks, dtype=np.int32)
    order = np.arange(num_chunks + 1, dtype=np.int32)
    return StepArrays(0 * ones, 0 * ones, slot * ones, order[:-1], seat * ones, order, order, ones,
                      page * ones, order[:-1])
