"""Brings blocks out of another rank's pool, which is opened here, straight to their place: one kernel.

For ranks of one GPU, or of GPUs of one host that reach each other; the other rank does nothing. Made at start
for one rank's view, with the pools that ``memory.share`` opened. It owns its stream and none of the pools. It
keeps what all copies from one rank have in common: a request waits for whatever is made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from disagg_mpi.transfer.cuda import kernels
from disagg_mpi.transfer.cuda.lanes import Lane, Mark
from disagg_mpi.transfer.layout import Box, CacheView
from disagg_mpi.transfer.transports import Transfer, check_alike, check_pool


class GatherTransport:
    """As :class:`~disagg_mpi.transfer.transports.CopyTransport`, for device memory.

    What is read must be complete on the device: whoever offers blocks has waited for its stream before it
    says so. Nothing on another stream here may still use the blocks that are written; when the transfer is
    done they may be used on any.
    """

    name = "gather"

    def __init__(self, pool: torch.Tensor, view: CacheView, peers: Mapping[str, torch.Tensor]) -> None:
        """``peers``: opened pools by the name of their memory; one's own need not be among them."""
        check_pool(pool.nbytes, view)
        self._pool = pool
        self._view = view
        self._peers = {**peers, view.memory: pool}
        self._lane = Lane(pool.device)
        # By source, layers, heads and tokens a cell: as many as there are pairs of ranks, about.
        self._copies: dict[tuple[object, ...], kernels.Copy] = {}

    def receive(
        self, source: CacheView, source_block_ids: Sequence[int], block_ids: Sequence[int], box: Box
    ) -> Transfer:
        """Copy ``box`` out of ``source``; raises :class:`ValueError` if its memory is not open here, or its
        heads have another size or type."""
        target = self._view
        cells = kernels.cells_between(source, source_block_ids, target, block_ids, box)
        key = source, box.first_layer, box.end_layer, box.first_head, box.end_head, cells.tokens
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = self._copy(source, box, cells.tokens)
        with self._lane.use():
            copy.run(cells)
            return _Gather(self._lane.mark(cells))

    def _copy(self, source: CacheView, box: Box, tokens: int) -> kernels.Copy:
        target = self._view
        peer = self._peers.get(source.memory)
        if peer is None or source.host != target.host:
            raise ValueError(
                f"rank {source.rank}'s blocks lie in {source.memory} of host {source.host}, open at rank "
                f"{target.rank} of host {target.host}: {', '.join(sorted(self._peers))}")
        check_alike(source, target)
        check_pool(peer.nbytes, source)
        return kernels.Copy(
            kernels.pool_planes(peer, source, box), kernels.pool_planes(self._pool, target, box), tokens,
            2 * box.num_layers, target.row_bytes(box))


class _Gather:
    def __init__(self, mark: Mark) -> None:
        self._mark = mark

    def done(self, looks: int = 1) -> bool:
        """Looks once, however many ``looks``: the device does not need us to go on."""
        return self._mark.is_reached()
