"""``layout``: which rank does what and the memory it takes; starts no MPI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from disagg_mpi.cli.options import job_options, settings_of
from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ModelError
from disagg_mpi.job.plan import MemoryPlan, available_bytes, plan_memory
from disagg_mpi.topology import Topology, build_topology


@click.command()
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def layout(as_json: bool, **options: Any) -> None:
    """Print the rank map and the memory estimate of a job, without MPI.

    \b
      python -m disagg_mpi layout --context 2 --generation 2
      python -m disagg_mpi layout --config job.toml
    """
    config = settings_of(options).job
    topology = build_topology(config)
    plan, note = _plan(config)
    if as_json:
        click.echo(json.dumps(as_data(config, topology, plan)))
        return
    click.echo(render(config, topology, plan))
    if note:
        click.echo(note)


def _plan(config: JobConfig) -> tuple[MemoryPlan | None, str]:
    """Sizes, where the model is at hand: ``layout`` downloads nothing."""
    from disagg_mpi.model.cache import cache_dir
    from disagg_mpi.model.checkpoint import read_model_spec
    from disagg_mpi.model.fetch import DEFAULT_MODEL_NAME

    path = (cache_dir() / "models" / DEFAULT_MODEL_NAME) if config.model in (None, "default") \
        else Path(str(config.model))
    if config.model in (None, "default") and not path.exists():
        return None, ("sizes: the default model is not here yet; "
                      "python -m disagg_mpi fetch gets it")
    if not path.is_dir():
        if path.suffix == ".gguf" and path.exists():
            return None, "sizes: known once the GGUF file has been converted (by the first run)"
        raise ModelError(f"{path} is not a directory; sizes need a local model")
    return plan_memory(config, read_model_spec(path)), ""


def as_data(config: JobConfig, topology: Topology, plan: MemoryPlan | None) -> dict[str, Any]:
    """The layout as plain data."""
    data: dict[str, Any] = {
        "world_size": topology.world_size,
        "sum": topology.sum_text(),
        "ranks": [{"rank": rank, "role": topology.label(rank).split(" · ", 1)[1]}
                  for rank in range(topology.world_size)],
        "transport": {"same host": "mpi" if config.transport == "mpi" else "shared",
                      "other host": "mpi"},
    }
    if plan is not None:
        data["memory"] = {
            "weights_bytes_per_host": plan.spec.parameter_bytes,
            "pool_bytes_per_instance": plan.pool_bytes,
            "blocks_per_instance": plan.blocks_per_instance,
            "bytes_per_token": plan.layout(1).kv_bytes(1),
            "available_bytes": available_bytes(),
        }
    return data


def render(config: JobConfig, topology: Topology, plan: MemoryPlan | None) -> str:
    """The layout for reading."""
    lines = [f"{topology.sum_text()}        mpirun -n {topology.world_size} "
             "python -m disagg_mpi …", ""]
    for group in (None, *topology.groups):
        ranks = (0,) if group is None else group.ranks
        what = "orchestrator" if group is None else group.name
        bar = "─" if group is None else ("▶" if group.role.does_context else "◀")
        if group is not None and group.role.does_context and group.role.does_generation:
            bar = "◆"
        for rank in ranks:
            leader = " (leader)" if group is not None and rank == group.leader and len(ranks) > 1 else ""
            pool = f"   KV pool {_size(plan.pool_bytes)}" if plan and group else ""
            lines.append(f"  rank {rank:<3} {bar} {what}{leader}{pool}")
    lines.append("")
    if not config.is_aggregated:
        same = "MPI messages" if config.transport == "mpi" else \
            "one shared pool: the block table moves, the bytes stay"
        lines.append(f"  hand-over    same host: {same}")
        if config.transport != "shared":
            lines.append("               other host: MPI messages, one a request")
    if plan is not None:
        spec = plan.spec
        num_instances = len(topology.groups)
        total = num_instances * plan.pool_bytes + spec.parameter_bytes
        lines += [
            f"  model        {spec.architecture}, {spec.num_layers} layers, "
            f"{spec.num_heads} heads, {spec.num_kv_heads} KV heads",
            f"  weights      {_size(spec.parameter_bytes)}, once a host",
            f"  KV pool      {_size(plan.pool_bytes)} an instance = {plan.blocks_per_instance} blocks "
            f"of {plan.tokens_per_block} tokens, {_size(plan.layout(1).kv_bytes(1))} a token",
            f"  together     {_size(total)} if all ranks are on one host"
            + (f", {_size(free)} available here" if (free := available_bytes()) else ""),
        ]
    return "\n".join(lines)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
