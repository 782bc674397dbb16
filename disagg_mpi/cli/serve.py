"""``serve``: a job behind HTTP and gRPC, at rank 0, until it is told to stop."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click
import msgspec

from disagg_mpi.cli.options import job_keys, job_options, settings_of
from disagg_mpi.comm.environment import launcher_context
from disagg_mpi.config import JobConfig, convert
from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.served import Served, ServerLimits
from disagg_mpi.job import guards
from disagg_mpi.job.launch import launch
from disagg_mpi.orchestrator.orchestrator import Orchestrator

if TYPE_CHECKING:
    from disagg_mpi.frontend.triton.plan import ServePlan

KEY_VARIABLE = "DISAGG_MPI_API_KEY"


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``serve`` needs beside the job: the file's table ``[serve]``."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    model_repository: Path | None = None
    model_name: str | None = None
    api_key: str | None = None
    address_file: Path | None = None
    grace: float = 10.0
    max_body_bytes: int | None = None
    max_prompt_tokens: int | None = None
    max_n: int | None = None
    max_open_requests: int | None = None
    max_connections: int | None = None
    header_seconds: float | None = None

    def __post_init__(self) -> None:
        ports = {name: getattr(self, name) for name in ("http_port", "grpc_port", "metrics_port")}
        for name, port in ports.items():
            if not 0 <= port < 65536:
                raise ConfigError(f"{name} is {port}; ports are 1 to 65535, or 0 for any that is free")
        chosen = [port for port in ports.values() if port]
        if len(set(chosen)) < len(chosen):
            raise ConfigError("two of " + ", ".join(f"{name} {port}" for name, port in ports.items())
                              + " are the same port; give each its own")
        if not 0 <= self.grace < 3600:
            raise ConfigError(f"grace is {self.grace}; it must be seconds, 0 or more")
        key = self.api_key
        if key is not None and not (key.isascii() and key and key == key.strip()):
            raise ConfigError("api_key must be ASCII text without blanks around it, and not empty")


@click.command()
@click.option("--host", metavar="ADDRESS",
              help="Interface to listen on. 0.0.0.0 lets other hosts in: give an API key then. "
                   "[default: 127.0.0.1]")
@click.option("--model-repository", type=click.Path(path_type=Path), metavar="DIR",
              help="A Triton model repository (context, generation, disaggregated_serving_bls, ensemble, …): "
                   "its config.pbtxt files say model, ranks, sizes and names. Options typed here win.")
@click.option("--http-port", type=int, metavar="PORT",
              help="The OpenAI API (/v1/…), KServe v2 (/v2/…), the page (/), /health and /metrics. "
                   "0: any free port. [default: 8000]")
@click.option("--grpc-port", type=int, metavar="PORT",
              help="KServe v2 for Triton's gRPC clients. 0: any free port. [default: 8001]")
@click.option("--metrics-port", type=int, metavar="PORT",
              help="Prometheus metrics, without a key. 0: any free port. [default: 8002]")
@click.option("--address-file", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the addresses here once clients can come, a line each (http=http://host:port), and "
                   "remove the file at the end: for scripts, and for port 0.")
@click.option("--model-name", metavar="NAME",
              help="What clients call the model. [default: the model directory's name]")
@click.option("--api-key", metavar="KEY", envvar=KEY_VARIABLE, show_envvar=True,
              help="Clients must send it: authorization: Bearer KEY, or x-api-key: KEY. Others on this host "
                   "can see a command line, so rather use the variable.")
@click.option("--grace", type=float, metavar="S",
              help="At Ctrl-C or SIGTERM, seconds that open requests have to end before they are cancelled; "
                   "a second signal ends all at once. [default: 10]")
@click.option("--max-open-requests", type=int, metavar="N",
              help="Sequences that are open at once, waiting ones included; clients beyond get 429 and "
                   "try again. [default: 512]")
@click.option("--max-prompt-tokens", type=int, metavar="N",
              help="Longest prompt. [default: the model's context length]")
@click.option("--max-n", type=int, metavar="N", help="Most continuations of one prompt. [default: 16]")
@click.option("--max-body-bytes", type=int, metavar="N", help="Largest request. [default: 8388608]")
@click.option("--max-connections", type=int, metavar="N", help="Open connections. [default: 1024]")
@click.option("--header-seconds", type=float, metavar="S",
              help="Time within which a request's head must be there. [default: 10]")
@job_options
def serve(**options: Any) -> int:
    """Serve a job with context and generation in different ranks to HTTP and gRPC clients.

    \b
      mpirun -n 3 python -m disagg_mpi serve
      curl localhost:8000/v1/completions -d '{"prompt": "Machine learning is", "stream": true}'
      mpirun -n 5 python -m disagg_mpi serve --context 2 --generation 2 --model DIR
      mpirun -n 3 python -m disagg_mpi serve --host 0.0.0.0 --http-port 0 --address-file address
      mpirun -n 3 python -m disagg_mpi serve --model-repository DIR

    Every OpenAI client works with base_url http://localhost:8000/v1, Triton's clients with localhost:8000
    and localhost:8001. Rank 0 is the server; it prints its addresses when clients can come, and /health says
    whether the job makes progress.

    A file for --config:

    \b
      model = "path/to/model"
      context = 2
      [serve]
      http_port = 9000
      max_open_requests = 1000
    """
    settings = settings_of(options, "serve")
    serving = convert(settings.command, ServeOptions, "[serve]")
    limits = _limits_of(serving)
    plan = _plan(serving, options)
    job = settings.job if plan is None else plan.job
    is_root = not launcher_context().rank
    # Before the job starts, at rank 0 alone: a port that is taken costs nothing.
    ports = _Ports.bind(serving) if is_root else None
    guards.allow_grace(serving.grace)
    with launch(job, progress=_tell) as orchestrator:
        if orchestrator is not None and ports is not None:
            _serve(_served(orchestrator, job, serving, limits), serving, ports, plan)
    return 0


def _plan(serving: ServeOptions, options: dict[str, Any]) -> ServePlan | None:
    """What the model repository says, told once at rank 0; ``None`` without one."""
    if serving.model_repository is None:
        return None
    try:
        from disagg_mpi.frontend.triton.plan import plan_of
    except ImportError as error:
        raise _missing(error) from None
    plan = plan_of(serving.model_repository, job_keys(options))
    if not launcher_context().rank:
        for line in plan.lines():
            _tell(line)
    return plan


@dataclass(frozen=True)
class _Ports:
    """Sockets that are bound and do not listen yet."""

    http: socket.socket
    grpc: socket.socket
    """Holds the number until gRPC, which binds by itself, takes the port over."""
    metrics: socket.socket

    @classmethod
    def bind(cls, serving: ServeOptions) -> Self:
        """After all else that can be wrong was looked at. Raises :class:`ConfigError`."""
        file = serving.address_file
        if file is not None and not os.access(file.absolute().parent, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write --address-file {file}: give a file in a folder that is there "
                              "and that you may write to")
        try:
            import disagg_mpi.frontend.app
            import disagg_mpi.frontend.kserve.rpc  # noqa: F401
            from disagg_mpi.frontend.server import bind
        except ImportError as error:
            raise _missing(error) from None
        with contextlib.ExitStack() as bound:
            sockets = []
            for name in ("http_port", "grpc_port", "metrics_port"):
                sockets.append(bind(serving.host, getattr(serving, name), f"--{name.replace('_', '-')}"))
                bound.callback(sockets[-1].close)
            bound.pop_all()
        return cls(*sockets)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(f"serve needs {error.name}: pip install 'disagg_mpi[serve]'")


def _limits_of(serving: ServeOptions) -> ServerLimits:
    given = {field.name: value for field in msgspec.structs.fields(ServerLimits)
             if (value := getattr(serving, field.name)) is not None}
    return ServerLimits(**given)


def _served(
    orchestrator: Orchestrator, job: JobConfig, serving: ServeOptions, limits: ServerLimits
) -> Served:
    from disagg_mpi.model.resolve import resolve_model
    from disagg_mpi.model.tokenizer import Tokenizer

    tokenizer = orchestrator.tokenizer
    if not isinstance(tokenizer, Tokenizer):  # --engine null has no model, but clients send text
        tokenizer = Tokenizer(resolve_model(job.model))
    return Served(orchestrator, tokenizer, serving.model_name or _model_name(job.model),
                  orchestrator.limits.max_model_len, limits, serving.api_key)


def _model_name(model: str | None) -> str:
    from disagg_mpi.model.fetch import DEFAULT_MODEL_NAME
    from disagg_mpi.model.resolve import DEFAULT

    if model is None or model == DEFAULT:
        return DEFAULT_MODEL_NAME
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


def _serve(served: Served, serving: ServeOptions, ports: _Ports, plan: ServePlan | None) -> None:
    """Until a signal: the front ends are put together here."""
    from disagg_mpi.frontend.app import make_app, make_metrics_app
    from disagg_mpi.frontend.gate import Gate
    from disagg_mpi.frontend.health import Health
    from disagg_mpi.frontend.kserve import models as kserve_models
    from disagg_mpi.frontend.kserve.rest import routes as kserve_routes
    from disagg_mpi.frontend.kserve.rpc import make_grpc_server
    from disagg_mpi.frontend.kserve.statistics import Statistics
    from disagg_mpi.frontend.metrics import GUIDE_NAMES, Metrics
    from disagg_mpi.frontend.server import GrpcServer, Server, port_of
    from disagg_mpi.frontend.stats import ServingStats

    gate = Gate(served, ServingStats())
    health = Health(gate)
    limits = served.orchestrator.limits
    if plan is None:
        roles = {instance.role for instance in served.orchestrator.snapshot().instances}
        models = kserve_models.default_models(
            is_aggregated="aggregated" in roles, tokens_per_block=limits.tokens_per_block)
    else:
        models = kserve_models.repository_models(plan, limits.tokens_per_block)
    statistics = Statistics(models)
    rendered = Metrics(gate, health, {
        model.kind: model.name for model in models if model.kind in GUIDE_NAMES})
    app = make_app(gate, health, rendered, kserve_routes(gate, models, statistics, health.problem))
    grpc_port = port_of(ports.grpc)

    def make_grpc() -> GrpcServer:
        ports.grpc.close()
        return make_grpc_server(gate, models, statistics, serving.host, grpc_port, health.problem)

    addresses = {"http": f"http://{_reachable(serving.host, port_of(ports.http))}",
                 "grpc": _reachable(serving.host, grpc_port),
                 "metrics": f"http://{_reachable(serving.host, port_of(ports.metrics))}/metrics"}
    server = Server(gate, app, make_metrics_app(gate, health, rendered), ports.http, ports.metrics,
                    make_grpc=make_grpc, grace=serving.grace)
    with server, _written(serving.address_file, addresses):
        _tell(f"serving {served.name}: OpenAI at {addresses['http']}/v1, KServe at {addresses['http']}/v2 "
              f"and gRPC {addresses['grpc']}, metrics at {addresses['metrics']}; Ctrl-C ends it")
        if served.api_key is None and not _is_loopback(serving.host):
            _tell(f"WARNING: anybody who reaches {serving.host} can use this server: set {KEY_VARIABLE}")
        try:
            server.wait()
        except KeyboardInterrupt:
            _tell(f"\nending: {gate.num_open} open requests have {serving.grace:g} s; again ends all at once")
            raise


def _reachable(host: str, port: int) -> str:
    """An address for clients; where the server listens on all interfaces, by this host's name."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _written(file: Path | None, addresses: dict[str, str]) -> Iterator[None]:
    """``file`` with the addresses, whole or not there, while the block runs."""
    if file is None:
        yield
        return
    scratch = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text("".join(f"{name}={address}\n" for name, address in addresses.items()))
        os.replace(scratch, file)
    except OSError as error:
        raise ConfigError(f"cannot write --address-file {file}: {error.strerror}") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _tell(line: str) -> None:
    click.echo(line, err=True)
    sys.stderr.flush()
