"""Sums and gathers over the ranks of a stage, on device tensors.

Where each rank has a GPU of its own, NCCL through ``torch.distributed``: its calls are queued like kernels
and can be captured. Where ranks share a GPU NCCL refuses, and the host's link does it, with a copy each way
and a wait: right, not fast.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from disagg_mpi.engine.tensor_parallel import HostCollectives, StageLink
from disagg_mpi.errors import MpiError

# A rank that dies is noticed by the job's guards; this only bounds what NCCL itself waits for at the start.
_START_SECONDS = 120


class DeviceCollectives(Protocol):
    """All ranks of the stage call, in the same order."""

    can_capture: bool

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``part``, in its type; may be in its place."""
        ...

    def joined(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """All ranks' columns beside each other: rank ``i`` has ``[rows, widths[i]]``."""
        ...

    def close(self) -> None:
        """Collective over the stage."""
        ...


class NcclCollectives:
    """Of ranks with a GPU each. Construction is collective over them."""

    can_capture = True

    def __init__(self, rank: int, size: int, tell: Callable[[str], str], place: torch.device,
                 backend: str = "nccl", host: str = "127.0.0.1") -> None:
        """``tell``: gives all ranks what rank 0 says; ``host``: how the others reach rank 0's; ``backend`` is
        for tests. Raises :class:`MpiError` on all of them if they cannot meet."""
        import torch.distributed

        distributed: Any = torch.distributed
        self._distributed = distributed
        self._size = size
        timeout = datetime.timedelta(seconds=_START_SECONDS)

        def meet(host: str, port: int) -> Any:
            return distributed.TCPStore(host, port, size, is_master=rank == 0, timeout=timeout,
                                        wait_for_workers=False)

        if rank == 0:
            port = ""
            try:
                store = meet(host, 0)
                port = str(store.port)
            except RuntimeError as error:
                raise MpiError(f"the ranks of a stage cannot meet at {host}: "
                               f"{str(error).splitlines()[0]}") from None
            finally:
                tell(port)  # the others wait for it, whatever has happened
        else:
            port = tell("")
            if not port:
                raise MpiError(f"the ranks of a stage cannot meet at {host}")
            store = meet(host, int(port))
        options: dict[str, Any] = {"device_id": place} if place.type == "cuda" else {}
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timeout, **options)

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        part = part.contiguous()
        self._distributed.all_reduce(part)
        return part

    def joined(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        widest = max(widths)
        padded = torch.nn.functional.pad(part, (0, widest - part.shape[1])).contiguous()
        # One below the other: beside NCCL no other backend takes them stacked.
        whole = padded.new_empty(self._size * len(padded), widest)
        self._distributed.all_gather_into_tensor(whole, padded)
        parts = whole.view(self._size, len(padded), widest)
        return torch.cat([parts[rank, :, :width] for rank, width in enumerate(widths)], dim=1)

    def close(self) -> None:
        """Collective over the stage."""
        self._distributed.destroy_process_group()


class StagedCollectives:
    """By way of the host, over the link of the stage."""

    can_capture = False

    def __init__(self, link: StageLink, rank: int) -> None:
        self._host = HostCollectives(link)
        self._link = link
        self._rank = rank

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        return self._host.summed(part.cpu()).to(part.device)

    def joined(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        first = sum(widths[: self._rank])
        whole = torch.zeros(len(part), sum(widths))
        whole[:, first : first + widths[self._rank]] = part.cpu()
        self._link.all_reduce(whole.numpy())
        return whole.to(part.device)

    def close(self) -> None:
        """The link is the world's."""
