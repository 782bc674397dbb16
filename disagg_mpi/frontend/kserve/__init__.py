"""KServe v2 at rank 0, as Triton speaks it: gRPC and HTTP before one orchestrator.

```
   rpc (gRPC)  rest (HTTP)     a protocol each: calls, and who is cancelled when a client leaves
        │             │
 rpc_messages  rest_messages   bytes in, bytes out; rules: what holds for both
        └──────┬──────┘
            service            one request: admission, prompts, replies in order, cancellation, statistics
        ┌──────┼──────────┐
    ensemble  replies  models, statistics
        └──┬───┘
        tensors                what tensors are on the wire
```

``tensors``, ``ensemble``, the messages and ``rules`` are pure. A server makes one
:class:`~disagg_mpi.frontend.kserve.models.Models` and one
:class:`~disagg_mpi.frontend.kserve.statistics.Statistics` and gives both to ``rpc.make_grpc_server`` and
``rest.routes``; all of it runs on one event loop. Needs the extra ``serve`` (grpcio, tritonclient,
starlette), so nothing outside imports these modules before a server starts.
"""
