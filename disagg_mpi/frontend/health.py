"""Whether a job makes progress, and if not, why: one answer for every health check of every front end."""

from __future__ import annotations

from disagg_mpi.frontend.gate import Gate

SILENT_SECONDS = 60.0
"""A leader that owes a word and says nothing for so long has stopped: at work it speaks every 5 s
(``executor.service.HEARTBEAT_SECONDS``) or after each step, and a step is bounded by ``max_num_tokens``."""


class Health:
    """Asked by ``/health`` and ``/v2/health/*``. Cheap, from any thread; waits for nothing."""

    def __init__(self, gate: Gate, silent_seconds: float = SILENT_SECONDS) -> None:
        self._gate = gate
        self._silent_seconds = silent_seconds

    def problem(self) -> str | None:
        """Why the job cannot make progress, in words; ``None`` while it can."""
        job = self._gate.served.orchestrator.snapshot()
        if job.failure is not None:
            return f"the job has failed: {job.failure}"
        if self._gate.is_closed or job.is_closing:
            return "the server is shutting down"
        silent = [i for i in job.instances if i.silent_seconds > self._silent_seconds]
        if silent:
            worst = max(silent, key=lambda instance: instance.silent_seconds)
            return (f"{worst.name} (rank {worst.ranks[0]}) has said nothing for "
                    f"{worst.silent_seconds:.0f} s although it has work"
                    + (f", and so {len(silent) - 1} more" if len(silent) > 1 else ""))
        return None
