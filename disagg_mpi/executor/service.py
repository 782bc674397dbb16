"""An instance's leader at work for rank 0: messages in, one step, responses out, until told to stop.

Runs in the worker's only thread from the job's start to its end. One message a step goes to rank 0,
whatever the number of requests in it.
"""

from __future__ import annotations

import time

from disagg_mpi.comm.channel import Channel
from disagg_mpi.comm.messages import (
    Cancel,
    DropOffer,
    Enqueue,
    IntegrityCheck,
    IntegrityReport,
    Proceed,
    Ready,
    Shutdown,
    Step,
)
from disagg_mpi.comm.waiting import ACTIVE_SLEEP, Waiter
from disagg_mpi.executor.base import Executor
from disagg_mpi.topology import ORCHESTRATOR_RANK

# A leader at work lets rank 0 hear of it this often, whether or not a request has come to a token: a long
# prompt on a CPU takes minutes, and must not look like a rank that hangs.
HEARTBEAT_SECONDS = 5.0

# How long a step may wait for its message to be taken; small ones are gone at once.
_SEND_SECONDS = 0.002


class LeaderService:
    """Serves one executor to the orchestrator. ``turn`` is one round; ``run`` repeats it."""

    def __init__(
        self, instance_id: int, executor: Executor, channel: Channel, waiter: Waiter
    ) -> None:
        self._instance_id = instance_id
        self._executor = executor
        self._channel = channel
        self._waiter = waiter
        self.stopping = False
        self._said_at = 0.0

    def announce(self, ways: dict[int, str]) -> None:
        """Tell rank 0 that requests can come, and how KV-cache comes here from each context instance."""
        self._channel.send(ORCHESTRATOR_RANK, Ready(
            self._instance_id, self._executor.limits, ways, self._executor.pool))

    def run(self) -> None:
        """Serve until told to stop, then finish what others still pull from here."""
        while not self.stopping:
            if self.turn():
                self._waiter.worked()
            else:
                self._waiter.idle(transferring=self._executor.is_moving
                                  or self._channel.num_pending > 0)
        self._executor.shutdown(timeout=5.0)
        self._channel.flush(timeout=5.0)

    def turn(self) -> bool:
        """Take in messages, run one step, send what it made; whether there was anything to do."""
        messages = self._channel.poll()
        for _, message in messages:
            self._take(message)
        worked = self._executor.advance()
        responses = self._executor.take_ready()
        now = time.monotonic()
        if responses or (worked and now - self._said_at > HEARTBEAT_SECONDS):
            self._said_at = now
            self._channel.send(ORCHESTRATOR_RANK, Step(self._instance_id, responses))
            # A large message (logits) moves only while we call MPI, and the next step is long.
            self._channel.flush(timeout=_SEND_SECONDS)
        return bool(messages or worked or responses)

    def _take(self, message: object) -> None:
        executor = self._executor
        if isinstance(message, Enqueue):
            executor.enqueue_requests(message.requests)
        elif isinstance(message, Proceed):
            executor.proceed(message.request_id, message.params)
        elif isinstance(message, Cancel):
            for request_id in message.request_ids:
                executor.cancel_request(request_id, message.reason)
        elif isinstance(message, DropOffer):
            for request_id in message.request_ids:
                executor.drop_context(request_id)
        elif isinstance(message, IntegrityCheck):
            self._report_integrity(message)
        elif isinstance(message, Shutdown):
            self.stopping = True
        else:
            raise TypeError(f"an instance's leader takes no {type(message).__name__}")

    def _report_integrity(self, check: IntegrityCheck) -> None:
        # A release may still be on its way to us although its request is over: give it a moment.
        end = time.monotonic() + 2.0
        while (problems := self._executor.check_integrity(idle=True)) and time.monotonic() < end:
            self._executor.advance()
            time.sleep(ACTIVE_SLEEP)
        self._channel.send(ORCHESTRATOR_RANK, IntegrityReport(
            check.token, self._instance_id, problems, self._executor.pool_blocks()))
