"""What ``doctor`` measures: this machine, its software, every pair of ranks, and what waiting costs.

    machine.inspect_machine   one process's surroundings; starts no MPI
      traps                   what in them the user should know: a Finding, whose remedy says what to type
      report                  both as plain structs
    job.run_doctor            collective over a communicator: every rank calls it, rank 0 gets the report
      pairs                   latency, wake-up and bandwidth of two ranks, against a memcpy
      hosts                   which ranks can share memory, and which only share a machine
      idle                    what a rank that has nothing to do costs, and how soon it is woken
      library                 what the MPI library says about itself

Buffers, bells and duplicates of the communicator live for the time of the call. Results are plain structs;
``cli.doctor`` renders them.
"""

from disagg_mpi.diagnostics.hosts import Place, divided_machines, name_hosts
from disagg_mpi.diagnostics.job import DoctorReport, run_doctor, world
from disagg_mpi.diagnostics.machine import inspect_machine
from disagg_mpi.diagnostics.pairs import SLOW_RATIO, choose_pairs
from disagg_mpi.diagnostics.report import Finding, MachineReport, would_stop
from disagg_mpi.diagnostics.traps import launcher_finding, mismatch_finding

__all__ = [
    "SLOW_RATIO",
    "DoctorReport",
    "Finding",
    "MachineReport",
    "Place",
    "choose_pairs",
    "divided_machines",
    "inspect_machine",
    "launcher_finding",
    "mismatch_finding",
    "name_hosts",
    "run_doctor",
    "world",
    "would_stop",
]
