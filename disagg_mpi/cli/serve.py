"""``serve``: a job behind HTTP and gRPC, at rank 0, until it is told to stop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from disagg_mpi.cli.options import job_keys, job_options, settings_of
from disagg_mpi.comm.environment import launcher_context
from disagg_mpi.config import JobConfig, convert
from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.ports import Ports, check_writable, is_loopback, written
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
    check: bool = False
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
@click.option("--check", is_flag=True, help="At the end, check that no block or transfer is left over.")
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
    file = options["config_file"]
    serving = convert(settings.command, ServeOptions, "options" if file is None else f"{file} [serve]")
    limits = _limits_of(serving)
    plan = _plan(serving, options)
    job = settings.job if plan is None else plan.job
    is_root = not launcher_context().rank
    # Before the job starts, at rank 0 alone: a port that is taken costs nothing.
    ports = _bind(serving) if is_root else None
    guards.allow_grace(serving.grace)
    with launch(job, progress=_tell) as orchestrator:
        if orchestrator is not None and ports is not None:
            try:
                _serve(_served(orchestrator, job, serving, limits), serving, ports, plan)
            except KeyboardInterrupt:
                if serving.check:
                    orchestrator.check_integrity()
                    _tell("checked: nothing is left over")
                raise
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


def _bind(serving: ServeOptions) -> Ports:
    """The ports, after all else that can be wrong was looked at. Raises :class:`ConfigError`."""
    check_writable(serving.address_file)
    try:
        import disagg_mpi.frontend.assembly  # noqa: F401
    except ImportError as error:
        raise _missing(error) from None
    return Ports.bind(serving.host, serving.http_port, serving.grpc_port, serving.metrics_port)


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


def _serve(served: Served, serving: ServeOptions, ports: Ports, plan: ServePlan | None) -> None:
    """Until a signal."""
    from disagg_mpi.frontend.assembly import make_server

    addresses = ports.addresses()
    server = make_server(served, ports, plan, grace=serving.grace)
    with server, written(serving.address_file, addresses):
        _tell(f"serving {served.name}: OpenAI at {addresses['http']}/v1, KServe at {addresses['http']}/v2 "
              f"and gRPC {addresses['grpc']}, metrics at {addresses['metrics']}; Ctrl-C ends it")
        if served.api_key is None and not is_loopback(serving.host):
            _tell(f"WARNING: anybody who reaches {serving.host} can use this server: set {KEY_VARIABLE}")
        try:
            server.wait()
        except KeyboardInterrupt:
            _tell(f"\nending: {server.num_open} open requests have {serving.grace:g} s; again: now")
            raise


def _tell(line: str) -> None:
    click.echo(line, err=True)
    sys.stderr.flush()
