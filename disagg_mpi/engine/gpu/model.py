"""The forward of one rank's slice of its stage, on a device.

The family that :class:`LlamaSteps` knows goes its short way: joined matrices, and one operation for what lies
between two of them. All others are transformers' own modules, whose attention is ours. Made with its stage,
over weights that lie in the device's allocation; knows nothing of requests, and gives the same kernels for
every step of one size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from disagg_mpi.engine import tensor_parallel
from disagg_mpi.engine.fused import FusedLlama, joined
from disagg_mpi.engine.gpu.attention import AttendUnturned, DeviceAttention, HeadShape
from disagg_mpi.engine.gpu.collectives import DeviceCollectives
from disagg_mpi.engine.gpu.operations import Operations
from disagg_mpi.engine.gpu.products import AllProducts, Products
from disagg_mpi.engine.tensor_parallel import ModelShard
from disagg_mpi.engine.weights import DTYPES, ModelPlan
from disagg_mpi.errors import ModelError


def head_shape(plan: ModelPlan) -> HeadShape:
    """What attention must know of the rank's layers. Raises :class:`ModelError` if they are not alike."""
    module = plan.module
    attentions = [each for each in module.modules() if hasattr(each, "layer_idx") and hasattr(each, "q_proj")]
    shapes = set()
    for name, each in module.named_modules():
        if each in attentions:
            rows = {leaf: plan.slices.get(f"{name}.{leaf}.weight") for leaf in ("q_proj", "k_proj")}
            counts = [(part.end - part.start if part is not None else getattr(each, leaf).out_features)
                      // each.head_dim for leaf, part in rows.items()]
            shapes.add((*counts, each.head_dim, each.scaling))
    if len(shapes) != 1:
        raise ModelError(f"{plan.path}: {type(module).__name__} has layers with other heads than others; the "
                         "engine for GPUs takes models whose layers are alike; give --device cpu")
    # Some families (Mistral) have layers that look the window up where they attend.
    everywhere = getattr(module.config, "sliding_window", None)
    windows = [getattr(each, "sliding_window", everywhere) for each in attentions]
    num_heads, num_kv_heads, head_dim, scaling = shapes.pop()
    return HeadShape(num_heads, num_kv_heads, head_dim, scaling, windows)


class DeviceModel:
    """Callable with a packed step."""

    def __init__(self, plan: ModelPlan, shard: ModelShard, collectives: DeviceCollectives | None,
                 operations: Operations) -> None:
        """``plan``'s module has its weights by now."""
        self._module: Any = plan.module
        self.is_first, self.is_last = shard.is_first, shard.is_last
        self.hidden_size: int = plan.config.hidden_size
        self.vocab_size: int = plan.config.vocab_size
        self.dtype = DTYPES[plan.dtype]
        """Of weights and hidden states; the pool may have another."""
        self.vocab_range = shard.range_of(plan.config.vocab_size) if shard.is_last else (0, 0)
        """First and end token of the logits that this rank makes."""
        vocab = plan.config.vocab_size
        self._widths = [vocab * (i + 1) // shard.tp - vocab * i // shard.tp for i in range(shard.tp)]
        self._collectives = collectives if shard.tp > 1 else None
        self._llama = LlamaSteps(
            plan.module, self._collectives, operations, is_last=self.is_last,
            is_whole=self.is_first and self.is_last and shard.tp == 1,
        ) if FusedLlama.fits(plan.module) else None
        if self._collectives is not None:
            tensor_parallel.connect(plan.module, plan.slices, self._collectives)

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None,
        attention: DeviceAttention, hidden: torch.Tensor | None = None, out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """K and V of the rank's layers go to the pool.

        ``token_ids`` ``[tokens]`` matter to the first stage and ``hidden`` ``[tokens, hidden_size]`` to the
        others. The last stage returns this rank's logits at ``rows`` (``None``: of all tokens), ``[rows,
        vocab_range's length]``, in ``out`` where that is given and can be used; the others hidden states for
        the next.
        """
        if self._llama is not None:
            if self.is_first:
                hidden = self._module.get_input_embeddings()(token_ids)
            assert hidden is not None  # the caller's plan of stages
            return self._llama(hidden, positions, rows, attention, out)
        inputs = {"input_ids": token_ids.unsqueeze(0)} if self.is_first else {
            "inputs_embeds": hidden.unsqueeze(0)}  # type: ignore[union-attr]
        if self.is_last:
            output = self._module(**inputs, position_ids=positions.unsqueeze(0), use_cache=False,
                                  logits_to_keep=0 if rows is None else rows.long(), paged=attention)
            return output.logits[0]  # type: ignore[no-any-return]
        output = self._module.model(**inputs, position_ids=positions.unsqueeze(0), use_cache=False,
                                    paged=attention)
        return output.last_hidden_state[0].contiguous()  # type: ignore[no-any-return]

    @property
    def sizes(self) -> list[int]:
        """Numbers of requests with one token each that between them need all kernels there are for such."""
        products = self._llama.products if self._llama is not None else None
        return products.sizes if products is not None else []

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """All ranks' slices of the logits, beside each other."""
        return logits if self._collectives is None else self._collectives.joined(logits, self._widths)


class LlamaSteps:
    """The layers of a stage, and its logits, for the Llama family."""

    def __init__(self, model: nn.Module, collectives: DeviceCollectives | None, operations: Operations, *,
                 is_last: bool, is_whole: bool) -> None:
        """``is_last`` of the stages; ``is_whole``: of one stage and one rank."""
        config: Any = model.config
        self._model: Any = model
        self._is_last = is_last
        self._collectives = collectives
        self._operations = operations
        self._eps: float = config.rms_norm_eps
        self._layers: list[Any] = list(self._model.model.layers)  # type: ignore[arg-type, union-attr]
        attention = self._layers[0].self_attn
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._q = len(attention.q_proj.weight)
        self._kv = len(attention.k_proj.weight)
        self._qkv = [_lying_together(a.q_proj, a.k_proj, a.v_proj)
                     for a in (layer.self_attn for layer in self._layers)]
        self._gate_up = [_lying_together(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in self._layers]
        self._rotary = _rotary_table(self._model, config.max_position_embeddings)
        self.products = self._make_products() if is_whole else None

    def _make_products(self) -> AllProducts | None:
        layers = [(qkv, layer.self_attn.o_proj, gate_up, layer.mlp.down_proj)
                  for qkv, layer, gate_up in zip(self._qkv, self._layers, self._gate_up, strict=True)]
        if not AllProducts.fit(layers, self._model.lm_head):
            return None
        try:
            return AllProducts(layers, self._eps)
        except ImportError:
            return None  # attention says that this Triton is too old

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None,
                 attention: DeviceAttention, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[rows, this rank's vocabulary]``, or ``[tokens, hidden_size]`` for the next stage. Logits
        may go into ``out``."""
        operations, eps = self._operations, self._eps
        unturned = attention.unturned
        products = self.products.of(len(hidden)) if self.products is not None else None
        if products is not None and unturned is not None and rows is None:
            return self._generate(hidden, unturned, products, out)
        residual = hidden
        normed = operations.norm(hidden, self._layers[0].input_layernorm.weight, eps)
        added = normed
        for index, layer in enumerate(self._layers):
            if index:
                normed = operations.add_norm(added, residual, layer.input_layernorm.weight, eps)
            attended = self._attend(index, _linear(normed, self._qkv[index]), positions, attention)
            added = self._summed(_linear(attended, layer.self_attn.o_proj))
            normed = operations.add_norm(added, residual, layer.post_attention_layernorm.weight, eps)
            gated = operations.gated(_linear(normed, self._gate_up[index]))
            added = self._summed(_linear(gated, layer.mlp.down_proj))
        if not self._is_last:
            return residual + added
        if rows is not None and not len(rows):  # a chunk of a prompt and no token: kernels take no empty grid
            return added.new_empty(0, len(self._model.lm_head.weight))
        last = residual + added if rows is None else residual[rows] + added[rows]
        return _linear(operations.norm(last, self._model.model.norm.weight, eps), self._model.lm_head)

    def _generate(self, hidden: torch.Tensor, attend: AttendUnturned, products: Products,
                  out: torch.Tensor | None) -> torch.Tensor:
        """Logits of all rows; ``hidden`` is written."""
        for index, layer in enumerate(self._layers):
            output = layer.self_attn.o_proj
            qkv = products.normed(hidden, layer.input_layernorm.weight, self._qkv[index])
            products.add(attend(index, qkv, self._rotary, output.weight), output, hidden)
            gated = products.gated(hidden, layer.post_attention_layernorm.weight, self._gate_up[index])
            products.add(gated, layer.mlp.down_proj, hidden)
        return products.logits(hidden, self._model.model.norm.weight, self._model.lm_head, out)

    def _attend(self, index: int, qkv: torch.Tensor, positions: torch.Tensor,
                attention: DeviceAttention) -> torch.Tensor:
        unturned = attention.unturned
        if unturned is not None:
            return unturned(index, qkv, self._rotary, None)
        query, key, value = torch.split(qkv, [self._q, self._kv, self._kv], dim=-1)
        self._operations.rotate(query, key, positions, self._rotary)
        return attention.attend(index, *(x.view(len(x), -1, self._head_dim) for x in (query, key, value)),
                                scaling=self._scaling).flatten(1)

    def _summed(self, part: torch.Tensor) -> torch.Tensor:
        return part if self._collectives is None else self._collectives.summed(part)


def _linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _lying_together(*layers: nn.Linear) -> nn.Linear:
    whole = joined(*layers)
    assert whole is not None  # the allocation of the weights is made so
    return whole


def _rotary_table(model: Any, num_positions: int) -> torch.Tensor:
    """fp32 ``[positions, head_dim]``: cosines, then sines, of half the head each."""
    rotary = model.model.rotary_emb
    place = rotary.inv_freq.device
    positions = torch.arange(num_positions, device=place)
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=place), positions.unsqueeze(0))
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).float().contiguous()
