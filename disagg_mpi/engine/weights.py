"""A rank's part of a transformers model, whose weights are the checkpoint's own pages.

The model is built without memory, with the layers of the rank's pipeline stage, and each parameter is then
the rank's slice of a tensor in the memory-mapped safetensors files (:mod:`.mapped_weights`), so all ranks
of a host read the same physical pages: weights are held once a host, loading costs a mapping, and no rank
of several ever holds the whole model. The files must hold the type that is computed with; :func:`ensure_dtype
<disagg_mpi.model.variants.ensure_dtype>` writes such a copy into the cache once where they do not.

Linear layers go through oneDNN where torch has it: with the checkpoint's ``[out, in]`` weights as they
are, one thread, the default model's layers take 28 against MKL's 45 ms for 8 tokens and 513 against
1206 ms for 512 (EPYC with AVX-512; MKL does not use its full width on AMD).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from disagg_mpi.engine import attention, tensor_parallel
from disagg_mpi.engine.mapped_weights import MappedWeights
from disagg_mpi.engine.tensor_parallel import Collectives, ModelShard, Slice
from disagg_mpi.errors import ModelError
from disagg_mpi.model.checkpoint import weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNSUPPORTED = {
    "attn_logit_softcapping": "softcapped attention logits",
    "attention_chunk_size": "chunked attention",
}
# Families that do nothing to hidden states but pass them through ``model.layers`` and ``model.norm``.
PIPELINED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class LoadedModel(NamedTuple):
    """A stage's model; its layers count from 0, ``first_layer`` is the first one's number in the whole."""

    module: nn.Module
    first_layer: int


class ModelPlan(NamedTuple):
    """A stage's model without memory, and what is needed to give it some."""

    path: Path
    dtype: str
    module: Any
    config: Any
    first_layer: int
    names: _Names
    slices: dict[str, Slice]
    """Of the parameters that the rank holds a part of."""


def load_model(
    path: Path,
    dtype: str,
    shard: ModelShard = ModelShard(),  # noqa: B008
    collectives: Collectives | None = None,
) -> LoadedModel:
    """This rank's part of the causal language model in ``path``, on the host and ready for packed steps.

    What :func:`plan_model` raises, it does.
    """
    if shard.tp > 1 and collectives is None:
        raise ValueError(f"tp={shard.tp} needs collectives")
    plan = plan_model(path, dtype, shard)
    parameters = dict(plan.module.named_parameters(remove_duplicate=False))
    for name, tensor in mapped_tensors(plan):
        set_tensor(plan.module, name, tensor, is_parameter=name in parameters)
    fill_buffers(plan.module, plan.config)
    for module in plan.module.modules():
        if type(module) is nn.Linear and has_onednn(dtype):
            module.__class__ = OneDnnLinear
    if collectives is not None and shard.tp > 1:
        tensor_parallel.connect(plan.module, plan.slices, collectives)
    return LoadedModel(plan.module.eval().requires_grad_(False), plan.first_layer)


def plan_model(path: Path, dtype: str, shard: ModelShard) -> ModelPlan:
    """The rank's part of the causal language model in ``path``, its tensors still without memory.

    A stage that is not the first has no embedding and takes ``inputs_embeds``; one that is not the last has
    neither final norm nor output layer: its hidden states are those of the module's ``model``. Raises
    :class:`ModelError`, also for a model that cannot be cut into ``shard``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{path}: transformers does not know this architecture: "
                         f"{str(error).splitlines()[0]}") from None
    for name, what in _UNSUPPORTED.items():
        if getattr(config, name, None):
            raise ModelError(f"{path}: {config.model_type} uses {what}, which the paged attention "
                             "does not do; supported are plain and sliding-window causal decoders")
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        raise ModelError(f"{path}: {config.model_type} has layers of kind {', '.join(sorted(odd))}, which "
                         "keep state outside the KV-cache; supported are plain and sliding-window "
                         "causal decoders")
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):
        # Their frequencies follow the longest position of a forward: of whoever else is in the step.
        if isinstance(each, dict) and each.get("rope_type") in ("dynamic", "longrope"):
            raise ModelError(f"{path}: {config.model_type} uses {each['rope_type']} rotary positions, "
                             "which change with the length of the text and cannot be batched")
    num_layers = config.num_hidden_layers
    first_layer, _ = shard.layers_of(num_layers)
    if shard.pp > 1:
        config = _stage_config(path, config, shard)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[dtype], attn_implementation=attention.NAME)
    except (ValueError, KeyError) as error:
        raise ModelError(f"{path}: {config.model_type} cannot run on the paged attention: "
                         f"{str(error).splitlines()[0]}") from None
    if getattr(model, "_is_stateful", False):
        raise ModelError(f"{path}: {config.model_type} keeps state outside the KV-cache; supported are "
                         "plain and sliding-window causal decoders")
    names = _Names(model, first_layer, num_layers)
    slices = tensor_parallel.split(model, shard) if shard.tp > 1 else {}
    if not shard.is_first:
        model.model.embed_tokens = None
    if not shard.is_last:
        model.model.norm, model.lm_head = nn.Identity(), None
    return ModelPlan(path, dtype, model, config, first_layer, names, slices)


def _stage_config(path: Path, config: Any, shard: ModelShard) -> Any:
    """The configuration of a model of the stage's layers alone."""
    if config.model_type not in PIPELINED:
        raise ModelError(f"{path}: {config.model_type} cannot be cut into pp={shard.pp} pipeline stages; "
                         f"that is known to be right for {', '.join(PIPELINED)}; use pp=1 for it")
    if shard.pp > config.num_hidden_layers:
        raise ModelError(f"{path}: {config.num_hidden_layers} layers cannot be cut into pp={shard.pp} "
                         "pipeline stages: a stage needs at least one")
    first, end = shard.layers_of(config.num_hidden_layers)
    config = copy.deepcopy(config)
    config.num_hidden_layers = end - first
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[first:end]
    return config


class _Names:
    """How the files call the tensors of a stage, whose own layers count from 0."""

    def __init__(self, model: Any, first_layer: int, num_layers: int) -> None:
        own = model.config.num_hidden_layers
        self._first_layer = first_layer
        self._others = {*range(num_layers)} - {*range(first_layer, first_layer + own)}
        self._known = {self._shifted(name) for name in model.state_dict()}
        self._tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self._tied |= {source: target for target, source in self._tied.items()}

    def in_files(self, name: str, weights: MappedWeights) -> str | None:
        """The tensor of the stage's ``name``: its own, else the one that it is tied to, if there."""
        own = self._shifted(name)
        found = own if own in weights else self._tied.get(own, own)
        return found if found in weights else None

    def is_known(self, tensor: str) -> bool:
        """Whether ``tensor`` is this stage's, or of another one's layers (which may be of another kind)."""
        layer = _LAYER.match(tensor)
        return tensor in self._known or (layer is not None and int(layer[1]) in self._others)

    def _shifted(self, name: str) -> str:
        return _LAYER.sub(lambda m: f"model.layers.{int(m[1]) + self._first_layer}.", name)


def mapped_tensors(plan: ModelPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the plan's state, the rank's slice of it, as a view of the mapped files.

    A tensor that is tied to another comes under both names. Raises :class:`ModelError`, before the first, for
    files that do not fit the model.
    """
    path, model, names = plan.path, plan.module, plan.names
    weights = MappedWeights(weight_files(path), DTYPES[plan.dtype])
    unexpected = [name for name in weights.names if not names.is_known(name)]
    if unexpected:
        raise ModelError(f"{weights.path_of(unexpected[0])} holds tensors that {type(model).__name__} does "
                         "not have: " + ", ".join(unexpected[:5]))
    found = {name: names.in_files(name, weights) for name in model.state_dict()}
    absent = [name for name, tensor in found.items() if tensor is None]
    if absent:
        raise ModelError(f"{path}: the safetensors files lack {len(absent)} tensors of "
                         f"{type(model).__name__}, {absent[0]} among them")
    for name, wanted in model.state_dict().items():
        tensor = found[name]
        assert tensor is not None  # or it is absent
        if weights.shape_of(tensor) != wanted.shape:
            raise ModelError(f"{weights.path_of(tensor)}: found {tensor} with shape "
                             f"{weights.shape_of(tensor)}, config.json needs {tuple(wanted.shape)}")
        part = plan.slices.get(name)
        if part is None:
            yield name, weights.whole(tensor)
        elif part.dim == 0:
            yield name, weights.rows(tensor, part.start, part.end)
        else:
            yield name, weights.columns(tensor, part.start, part.end)


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor, *, is_parameter: bool) -> None:
    """Put ``tensor`` in the place of the one called ``name``."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf,
            nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def fill_buffers(model: nn.Module, config: Any) -> None:
    """Buffers that no checkpoint holds (rotary frequencies): made anew from the configuration."""
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not names:
            continue
        if names == ["embed_scale"] and hasattr(module, "scalar_embed_scale"):  # the Gemma family
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
            continue
        try:
            fresh = type(module)(getattr(module, "config", config))
        except TypeError as error:
            raise ModelError(f"{type(module).__name__} has buffers that are in no file and cannot "
                             f"be made from the configuration: {error}") from None
        for name in names:
            setattr(module, name, getattr(fresh, name))


def has_onednn(dtype: str) -> bool:
    return (bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (dtype == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` through oneDNN's inner product; loaded layers are turned into it in place."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            input, self.weight, self.bias, "none", [], "")
