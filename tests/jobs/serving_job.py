"""A real server: ``mpirun -n N python -m disagg_mpi serve`` on free ports, and its addresses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import httpx
from mpirun import MpiJob

READY_SECONDS = 120.0


class ServingJob(MpiJob):
    """Waits until clients can come; leaving the block kills what is left of it."""

    def __init__(self, num_ranks: int, folder: Path, *options: str, argv: Sequence[str] = (),
                 env: dict[str, str] | None = None, terminal: bool = False) -> None:
        self._file = folder / "address"
        ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
        super().__init__(
            num_ranks, [*(argv or ["-m", "disagg_mpi", "serve"]), *ports, "--address-file", str(self._file),
                        *options], env={"OMP_NUM_THREADS": "1", **(env or {})}, terminal=terminal)

    def __enter__(self) -> Self:
        super().__enter__()
        end = time.monotonic() + READY_SECONDS
        while not self._file.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"no server\n{self.finish(5).text}")
            time.sleep(0.02)
        lines = self._file.read_text().splitlines()
        self.http, self.grpc, self.metrics = (line.partition("=")[2] for line in lines)
        return self

    @property
    def has_addresses(self) -> bool:
        """Whether the address file is there."""
        return self._file.exists()

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, summed over the labels that are not given."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(httpx.get(self.metrics).text)
        found = [sample.value for family in families for sample in family.samples
                 if sample.name == name and labels.items() <= sample.labels.items()]
        assert found, f"no metric {name} {labels}"
        return sum(found)
