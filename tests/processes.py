"""Whether a process is still there: what every test asks that ends one."""

from __future__ import annotations

import time
from collections.abc import Collection

import psutil


def is_alive(process: psutil.Process | int) -> bool:
    """Not ended; what ended and was not yet reaped by whoever adopted it is not alive.

    A number stands for whatever process has it now. A process is that one and no later one of its number.
    """
    try:
        if isinstance(process, int):
            process = psutil.Process(process)
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def still_alive(processes: Collection[psutil.Process | int], within: float) -> list[psutil.Process | int]:
    """Those that are alive ``within`` seconds from now; empty as soon as there are none."""
    end = time.monotonic() + within
    while (left := [process for process in processes if is_alive(process)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def assert_gone(*processes: psutil.Process | int, within: float = 10.0) -> None:
    """It takes hundredths of a second; a busy machine may need some."""
    left = still_alive(processes, within)
    assert not left, f"still there: {left}"
