"""``layout``: which rank does what and the memory it takes; starts no MPI."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import click

from disagg_mpi.cli.options import job_options, settings_of
from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ModelError
from disagg_mpi.executor.trtllm.engine_dir import read_engines
from disagg_mpi.gpus import emulated_gpus, torch_takes_gpus, visible_gpus
from disagg_mpi.job.devices import place_ranks, plan_pools, positions_for, uses_of, wants_gpus
from disagg_mpi.job.plan import MemoryPlan, available_bytes, plan_memory
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.shapes import format_instances
from disagg_mpi.topology import Group, Role, Topology, build_topology, check_model_fits
from disagg_mpi.transfer.partition import shard_of

# The ways of a hand-over, by where two instances are; see docs/architecture.md.
_HANDOVER_TEXT = {
    "shared": "one shared pool: the block table moves, the bytes stay",
    "copy": "copied within the shared window",
    "gather": "one kernel copies from pool to pool",
    "mpi": "MPI messages",
}


@click.command()
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--ranks", is_flag=True, help="Print the number of ranks alone, for scripts.")
def layout(as_json: bool, ranks: bool, **options: Any) -> None:
    """Print the rank map and the memory estimate of a job, without MPI.

    \b
      python -m disagg_mpi layout --context 2 --generation tp3
      python -m disagg_mpi layout --config job.toml
    """
    config = settings_of(options).job
    topology = build_topology(config)
    if ranks:
        click.echo(topology.world_size)
        return
    plan, note = _plan(config, topology)
    shares: list[str] = []
    if plan is not None:
        check_model_fits(topology, plan.spec.num_layers, plan.spec.num_heads, plan.spec.num_kv_heads)
        config, shares = _gpu_shares(config, topology, plan.spec)
        plan = plan_memory(config, plan.spec)
    if as_json:
        click.echo(json.dumps(as_data(config, topology, plan)))
        return
    click.echo(render(config, topology, plan))
    for line in filter(None, (*shares, note)):
        click.echo(line)


def _gpu_shares(config: JobConfig, topology: Topology, spec: ModelSpec) -> tuple[JobConfig, list[str]]:
    """What would be on each GPU if all ranks were on this host, and the pools that this leaves room for.

    As if nothing else was on them: what is free is known when the job starts.
    """
    gpus = emulated_gpus() if config.device == "emulated" else visible_gpus()
    if config.device == "auto" and not torch_takes_gpus():
        gpus = []
    seen = dict.fromkeys(range(topology.world_size), gpus)
    if config.device == "cpu" or not gpus or not wants_gpus(config, topology, seen):
        return config.replace(device="cpu") if config.device == "auto" else config, []
    config = config.replace(device="cuda") if config.device == "auto" else config
    names = [socket.gethostname()] * topology.world_size
    places = place_ranks(topology, [0] * topology.world_size, names, seen)
    free = {rank: place.gpu.total_bytes for rank, place in places.items()}
    uses = uses_of(config, topology, spec, places, free, names)
    tokens = plan_pools(config, uses)
    positions = positions_for(config, tokens)
    return config.replace(kv_tokens=tokens), [f"  {use.sum_text(tokens, positions)}" for use in uses]


def _plan(config: JobConfig, topology: Topology) -> tuple[MemoryPlan | None, str]:
    """Sizes, where the model is at hand: ``layout`` downloads nothing."""
    if config.engine == "tensorrt_llm":
        engines = read_engines(config, topology)
        return None, "\n".join(f"  {role:<12} {engine.directory}" for role, engine in engines.items())
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
        "ranks": [_rank_data(topology, plan, rank) for rank in range(topology.world_size)],
        "instances": [{"name": group.name, "shape": str(group.shape), "ranks": group.ranks}
                      for group in topology.groups],
        "transport": {} if config.engine == "tensorrt_llm" else _transports(config),
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
    rows = [_row(topology, plan, rank) for rank in range(topology.world_size)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines += ["  " + "   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
                                if width).rstrip() for row in rows]
    lines.append("")
    if any(group.shape.num_ranks > 1 for group in topology.groups):
        shapes = ", ".join(f"{role} {format_instances(config.instances(role))}"
                           for role in Role if config.instances(role))
        lines.append(f"  instances    {shapes}")
    if not config.is_aggregated and config.engine == "tensorrt_llm":
        lines.append("  hand-over    TensorRT-LLM's own, over MPI")
    elif not config.is_aggregated:
        ways = [f"{where}: {_HANDOVER_TEXT[way]}" for where, way in _transports(config).items()]
        lines += [f"  {'' if at else 'hand-over':<12} {text}" for at, text in enumerate(ways)]
    if plan is not None:
        spec = plan.spec
        num_instances = len(topology.groups)
        total = num_instances * plan.pool_bytes + spec.parameter_bytes
        lines += [
            f"  model        {spec.architecture}, {spec.num_layers} layers, "
            f"{spec.num_heads} heads, {spec.num_kv_heads} KV heads",
            f"  weights      {_size(spec.parameter_bytes)}, once a {'GPU' if config.uses_gpus else 'host'}",
            f"  KV pool      {_size(plan.pool_bytes)} an instance = {plan.blocks_per_instance} blocks "
            f"of {plan.tokens_per_block} tokens, {_size(plan.layout(1).kv_bytes(1))} a token",
        ]
        if config.block_size(Role.GENERATION) != plan.tokens_per_block and not config.is_aggregated:
            size = config.block_size(Role.GENERATION)
            lines.append(f"               generation: blocks of {size} tokens")
        if not config.uses_gpus:
            lines.append(f"  together     {_size(total)} if all ranks are on one host"
                         + (f", {_size(free)} available here" if (free := available_bytes()) else ""))
    return "\n".join(lines)


def _row(topology: Topology, plan: MemoryPlan | None, rank: int) -> tuple[str, str, str, str, str]:
    """Rank, instance, place in it, device, memory; empty where there is nothing to say."""
    group = topology.group_of(rank)
    if group is None:
        return (f"rank {rank}", "─ orchestrator", "", "", "")
    is_wide = group.shape.num_ranks > 1
    arrow = {Role.CONTEXT: "▶", Role.GENERATION: "◀", Role.AGGREGATED: "◆"}[group.role]
    leader = " (leader)" if is_wide and rank == group.leader else ""
    place = (f"stage {group.pp_rank(rank)}/{group.shape.pp} · tp {group.tp_rank(rank)}/{group.shape.tp}"
             if is_wide else "")
    device = "" if group.device_ids is None else f"device {group.device_of(rank)}"
    pool = "" if plan is None else f"KV pool {_size(_pool_bytes(plan, group, rank))}"
    return (f"rank {rank}", f"{arrow} {group.name}{leader}", place, device, pool)


def _rank_data(topology: Topology, plan: MemoryPlan | None, rank: int) -> dict[str, Any]:
    data: dict[str, Any] = {"rank": rank, "role": topology.label(rank).split(" · ", 1)[1]}
    group = topology.group_of(rank)
    if group is not None:
        data |= {"pp_rank": group.pp_rank(rank), "tp_rank": group.tp_rank(rank)}
        if group.device_ids is not None:
            data["device_id"] = group.device_of(rank)
        if plan is not None:
            data["pool_bytes"] = _pool_bytes(plan, group, rank)
    return data


def _pool_bytes(plan: MemoryPlan, group: Group, rank: int) -> int:
    """Bytes of the part of its instance's pool that ``rank`` holds: its layers, its KV heads."""
    spec = plan.spec
    shard = shard_of(spec.num_layers, spec.num_kv_heads, group.shape.tp, group.shape.pp, group.index_of(rank))
    planes = spec.num_layers * spec.num_kv_heads
    return plan.pool_bytes * shard.num_layers * shard.num_heads // planes


def _transports(config: JobConfig) -> dict[str, str]:
    """How a hand-over goes, by where the two instances are."""
    sizes_differ = config.block_size(Role.CONTEXT) != config.block_size(Role.GENERATION)
    together = "mpi" if config.transport == "mpi" else "copy" if sizes_differ else "shared"
    apart = {} if config.transport == "shared" else {"other host": "mpi"}
    if config.uses_gpus:
        copied = "mpi" if config.transport == "mpi" else "gather"
        return {"same GPU": together if together == "shared" else copied, "other GPU": copied, **apart}
    return {"same host": together, **apart}


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
