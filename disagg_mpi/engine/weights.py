"""A transformers model whose weights are the checkpoint's own pages.

The model is built without memory and each parameter is then a view into the memory-mapped safetensors
files, so all ranks of a host read the same physical pages: weights are held once a host, and loading
costs a mapping, not a copy. The files must hold the type that is computed with; :func:`ensure_dtype
<disagg_mpi.model.variants.ensure_dtype>` writes such a copy into the cache once where they do not.

Linear layers go through oneDNN where torch has it: with the checkpoint's ``[out, in]`` weights as they
are, one thread, the default model's layers take 28 against MKL's 45 ms for 8 tokens and 513 against
1206 ms for 512 (EPYC with AVX-512; MKL does not use its full width on AMD).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from disagg_mpi.engine import attention
from disagg_mpi.engine.fused import FusedLlama
from disagg_mpi.errors import ModelError
from disagg_mpi.model.checkpoint import weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNSUPPORTED = {
    "attn_logit_softcapping": "softcapped attention logits",
    "attention_chunk_size": "chunked attention",
}


def load_model(path: Path, dtype: str) -> nn.Module:
    """The causal language model in ``path``, ready for packed steps. Raises :class:`ModelError`."""
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
    _assign_weights(model, path, DTYPES[dtype])
    _fill_buffers(model, config)
    for module in model.modules():
        if type(module) is nn.Linear and _has_onednn(dtype):
            module.__class__ = OneDnnLinear
    ready: nn.Module = model.eval().requires_grad_(False)
    # In bf16 its fewer roundings would give other tokens than transformers' modules do.
    fits = dtype == "fp32" and _has_onednn(dtype) and FusedLlama.fits(ready)
    return FusedLlama(ready) if fits else ready


def _assign_weights(model: nn.Module, path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    for file in weight_files(path):
        tensors = load_file(file)  # memory-mapped
        other = next((name for name, tensor in tensors.items()
                      if tensor.is_floating_point() and tensor.dtype != dtype), None)
        if other is not None:
            raise ModelError(f"{file}: {other} is {tensors[other].dtype}, {dtype} is needed")
        unexpected = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
        if unexpected:
            raise ModelError(f"{file} holds tensors that {type(model).__name__} does not have: "
                             + ", ".join(unexpected[:5]))
    model.tie_weights()  # type: ignore[operator]
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent:
        raise ModelError(f"{path}: the safetensors files lack {len(absent)} tensors of "
                         f"{type(model).__name__}, {absent[0]} among them")


def _fill_buffers(model: nn.Module, config: Any) -> None:
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


def _has_onednn(dtype: str) -> bool:
    return (bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (dtype == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` through oneDNN's inner product; loaded layers are turned into it in place."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            input, self.weight, self.bias, "none", [], "")
