"""Where the front ends of a job are put together: one gate, and behind each port what it serves.

Pure wiring, done once at rank 0 when the job is ready. Importing it needs all of the extra ``serve``.
"""

from __future__ import annotations

from disagg_mpi.frontend.app import make_app, make_metrics_app
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.health import Health
from disagg_mpi.frontend.kserve.models import Models, default_models, repository_models
from disagg_mpi.frontend.kserve.rest import routes as kserve_routes
from disagg_mpi.frontend.kserve.rpc import make_grpc_server
from disagg_mpi.frontend.kserve.statistics import Statistics
from disagg_mpi.frontend.metrics import GUIDE_NAMES, Metrics
from disagg_mpi.frontend.ports import Ports, port_of
from disagg_mpi.frontend.served import Served
from disagg_mpi.frontend.server import GrpcServer, Server
from disagg_mpi.frontend.stats import ServingStats
from disagg_mpi.frontend.triton.plan import ServePlan


def make_server(served: Served, ports: Ports, plan: ServePlan | None = None, *, grace: float) -> Server:
    """A server that is not started; ``ports`` are its own from now on.

    ``plan``: the model repository that names the models; without one they have the guide's names.
    """
    gate = Gate(served, ServingStats())
    health = Health(gate)
    models = _models(served, plan)
    statistics = Statistics(models)
    metrics = Metrics(gate, health, {
        model.kind: model.name for model in models if model.kind in GUIDE_NAMES})
    app = make_app(gate, health, metrics, kserve_routes(gate, models, statistics, health.problem))

    def make_grpc() -> GrpcServer:
        port = port_of(ports.grpc)
        ports.grpc.close()
        return make_grpc_server(gate, models, statistics, ports.host, port, health.problem)

    return Server(gate, app, make_metrics_app(gate, health, metrics), ports.http, ports.metrics,
                  make_grpc=make_grpc, grace=grace)


def _models(served: Served, plan: ServePlan | None) -> Models:
    tokens_per_block = served.orchestrator.limits.tokens_per_block
    if plan is not None:
        return repository_models(plan, tokens_per_block)
    roles = {instance.role for instance in served.orchestrator.snapshot().instances}
    return default_models(is_aggregated="aggregated" in roles, tokens_per_block=tokens_per_block)
