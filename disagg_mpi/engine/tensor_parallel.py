"""One model on several ranks: which part of each parameter a rank holds, and what the ranks add up.

Layers come in pairs (Shoeybi et al. 2019, Megatron-LM). Of the first (Q, K, V, gate, up: *colwise* in
transformers' plans) a rank holds some rows and so makes some of the outputs, with nobody's help. Of the
second (O, down: *rowwise*) it holds the columns that take those, and the ranks' products are summed in fp32,
twice a layer; the one bias is added by rank 0. Q, K and V are cut between heads, and where there are more
ranks than KV heads, neighbours hold the same one. Embedding and output layer are cut by the vocabulary:
tokens of other ranks' rows embed to zero before the sum, and each rank makes its slice of the logits.

The split is transformers' own ``base_model_tp_plan``. What that cannot say of a model, or says in ways that
are not the above, is refused by name: nothing is split by guess.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from disagg_mpi.errors import ModelError
from disagg_mpi.transfer.partition import KvShard, shard_of

_REPLICATED = (None, "replicated_with_grad_allreduce")


class ModelShard(msgspec.Struct, frozen=True):
    """Which part of the model a rank computes: slice ``tp_rank`` of stage ``pp_rank``."""

    tp: int = 1
    tp_rank: int = 0
    pp: int = 1
    pp_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether the stage takes tokens."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage makes logits."""
        return self.pp_rank == self.pp - 1

    def layers_of(self, num_layers: int) -> tuple[int, int]:
        """First and end layer of its stage, of a model's ``num_layers``."""
        return num_layers * self.pp_rank // self.pp, num_layers * (self.pp_rank + 1) // self.pp

    def kv(self, num_layers: int, num_kv_heads: int) -> KvShard:
        """Its layers and KV heads. Raises :class:`ValueError` if they cannot be divided so."""
        return shard_of(num_layers, num_kv_heads, self.tp, self.pp, self.pp_rank * self.tp + self.tp_rank)

    def range_of(self, size: int) -> tuple[int, int]:
        """Its share of ``size`` things that need not divide evenly: ``[size*r//tp, size*(r+1)//tp)``."""
        return size * self.tp_rank // self.tp, size * (self.tp_rank + 1) // self.tp


class StageLink(Protocol):
    """What joins the ranks of one stage on the host: all of them call, in the same order."""

    def all_reduce(self, array: npt.NDArray[np.float32]) -> None:
        """Sum over the ranks, in place; ``array`` is contiguous."""
        ...


class Collectives(Protocol):
    """Of the ranks of one stage, over tensors: all of them call, in the same order."""

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``part``, in its type; may be in its place."""
        ...


class HostCollectives:
    """By messages of a link, summed in fp32."""

    def __init__(self, link: StageLink) -> None:
        self._link = link

    def summed(self, part: torch.Tensor) -> torch.Tensor:
        exact = part.float().contiguous()
        self._link.all_reduce(exact.numpy())
        return exact.to(part.dtype)


class Slice(msgspec.Struct, frozen=True):
    """What of a parameter a rank holds: indices ``[start, end)`` of dimension ``dim``."""

    dim: int
    start: int
    end: int


def split(model: nn.Module, shard: ModelShard) -> dict[str, Slice]:
    """The slice of each parameter of ``model`` (of its full width) that is not held whole.

    Drops the biases that another rank adds. Raises :class:`ModelError` for a model that cannot be split.
    """
    config: Any = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % shard.tp:
        raise _unsupported(model, shard, f"its {heads} attention heads cannot be divided by that")
    try:
        kv = shard.kv(config.num_hidden_layers * shard.pp, kv_heads)  # the model has a stage's layers
    except ValueError as error:
        raise _unsupported(model, shard, str(error)) from None
    plan: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    if not any(".layers." in f".{name}" for name in plan):
        raise _unsupported(model, shard, "transformers has no tensor-parallel plan for it")
    by_vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    slices: dict[str, Slice] = {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters:
            continue
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if module in by_vocabulary:
            start, end = shard.range_of(len(parameters["weight"]))
        elif style in _REPLICATED:
            _check_replicated(model, shard, name, module)
            continue
        elif style == "colwise" and type(module) is nn.Linear:
            start, end = _rows_of(model, shard, name, module, heads, kv_heads, kv)
        elif style == "rowwise" and type(module) is nn.Linear:
            slices[f"{name}.weight"] = Slice(1, *shard.range_of(module.in_features))
            if shard.tp_rank:
                module.register_parameter("bias", None)
            continue
        else:
            raise _unsupported(model, shard, f"{name} is a {type(module).__name__} of style {style}")
        for parameter in parameters:
            slices[f"{name}.{parameter}"] = Slice(0, start, end)
    return slices


def connect(model: nn.Module, slices: dict[str, Slice], collectives: Collectives) -> None:
    """Put the sums into ``model``, which has its slices by now."""
    for name, part in slices.items():
        if part.dim == 1:
            model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
                lambda _module, _inputs, output: collectives.summed(output))
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(embedding, nn.Embedding):
        name = next(name for name, module in model.named_modules() if module is embedding)
        model.set_input_embeddings(  # type: ignore[operator]
            VocabParallelEmbedding(embedding, slices[f"{name}.weight"], collectives))


class VocabParallelEmbedding(nn.Module):
    """An embedding of which this rank holds some rows."""

    def __init__(self, inner: nn.Embedding, rows: Slice, collectives: Collectives) -> None:
        super().__init__()
        inner.padding_idx = None  # a matter of training, and perhaps not a row of this rank
        self.inner = inner
        self._rows = rows
        self._collectives = collectives

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        others = (input_ids < self._rows.start) | (input_ids >= self._rows.end)
        hidden = self.inner((input_ids - self._rows.start).masked_fill(others, 0))
        return self._collectives.summed(hidden.masked_fill(others.unsqueeze(-1), 0.0))


def _rows_of(model: nn.Module, shard: ModelShard, name: str, module: nn.Linear, heads: int, kv_heads: int,
             kv: KvShard) -> tuple[int, int]:
    """The rows of a colwise layer: whole heads where it is of attention, else an even share."""
    head_dim, leaf = _head_dim(model, name), name.rpartition(".")[2]
    num_heads = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}.get(leaf)
    if head_dim is None and num_heads is None:
        return shard.range_of(module.out_features)
    if head_dim is None or num_heads is None or module.out_features != num_heads * head_dim:
        raise _unsupported(model, shard, f"{name} with {module.out_features} rows is not one of Q, K, V")
    if leaf == "q_proj":
        return shard.range_of(module.out_features)
    return kv.first_head * head_dim, kv.end_head * head_dim


def _check_replicated(model: nn.Module, shard: ModelShard, name: str, module: nn.Module) -> None:
    """Held whole are only norms: of hidden states, or of one head. Else a rank would need others' parts."""
    config: Any = model.config
    size = _head_dim(model, name) or config.hidden_size
    for parameter in module.parameters(recurse=False):
        if "norm" not in type(module).__name__.lower() or parameter.shape != (size,):
            raise _unsupported(model, shard, f"its plan does not say how to split {name}, a "
                               f"{type(module).__name__} of {tuple(parameter.shape)}")


def _head_dim(model: nn.Module, name: str) -> int | None:
    """Of the attention that the layer ``name`` is part of; ``None`` if it is of none."""
    parent = model.get_submodule(name.rpartition(".")[0])
    found: Any = getattr(parent, "head_dim", None) if hasattr(parent, "layer_idx") else None
    return found  # type: ignore[no-any-return]


def _unsupported(model: nn.Module, shard: ModelShard, why: str) -> ModelError:
    config: Any = model.config
    return ModelError(f"{type(model).__name__} ({config.model_type}) cannot be split over tp={shard.tp} "
                      f"ranks: {why}; use tp=1 for it")
