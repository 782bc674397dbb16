"""Tiny random models cut into tp x pp parts, against transformers' logits of the whole one.

All ranks are in this process: the slices of a stage are threads that meet in a barrier for each sum, stages
are chained by hand.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from inprocess import PATIENCE, save_tiny_model

from disagg_mpi.engine.attention import KvPool, StepLayout
from disagg_mpi.engine.model import StageModel
from disagg_mpi.engine.tensor_parallel import ModelShard
from disagg_mpi.engine.weights import PIPELINED, load_model
from disagg_mpi.errors import ModelError
from disagg_mpi.model.variants import ensure_dtype
from disagg_mpi.transfer.layout import CacheView, KvLayout
from disagg_mpi.transfer.partition import shard_of

VOCABULARY, LAYERS, HEAD_DIM, PER_BLOCK = 131, 5, 8, 4  # neither divides evenly
TABLES = [[3, 4, 5, 9, 10, 0], [20, 19, 7, 8, 6]]
LENGTHS = [22, 17]
STEPS = [[(0, 0, 13)], [(0, 13, 6), (1, 0, 9)], [(0, 19, 1), (1, 9, 7)], [(0, 20, 1), (1, 16, 1)],
         [(0, 21, 1)]]
"""Chunks (request, start, length)."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-9-heads": ("Llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72,
                                "intermediate_size": 50}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "mistral-sliding": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {}),
    "gemma3": ("Gemma3Text", {}),
}
SHAPES = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 5), (2, 2), (4, 3)]
NINE_HEADS = [(1, 1), (3, 1), (9, 1), (3, 2)]
CASES = [(name, tp, pp) for name in MODELS
         for tp, pp in (NINE_HEADS if name == "llama-9-heads" else SHAPES)]


def save_gemma3(folder: Path) -> Path:
    """The family whose configuration and model are not named alike; its stages have either kind of layers."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.3, sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")])
    transformers.Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


class Sum:
    """``all_reduce`` among threads: :meth:`of` gives each its own end."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._parts: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)] * size
        self.count = 0

    def of(self, index: int) -> SumEnd:
        return SumEnd(self, index)

    def add(self, index: int, array: npt.NDArray[np.float32]) -> None:
        assert array.dtype == np.float32 and array.flags.c_contiguous
        self._parts[index] = array.copy()
        self._barrier.wait(PATIENCE)
        array[...] = sum(self._parts)
        self._barrier.wait(PATIENCE)
        self.count += index == 0


class SumEnd:
    def __init__(self, whole: Sum, index: int) -> None:
        self._sum, self._index = whole, index

    def all_reduce(self, array: npt.NDArray[np.float32]) -> None:
        self._sum.add(self._index, array)


class Group:
    """All ranks of an instance. ``shared``: views into one pool of the whole model, else a pool each."""

    def __init__(self, path: Path, tp: int, pp: int, *, kv_heads: int, shared: bool,
                 dtype: str = "fp32") -> None:
        self.sums = [Sum(tp) for _ in range(pp)]
        self.stages: list[list[StageModel]] = []
        self._pools: list[list[KvPool]] = []
        whole = KvLayout(LAYERS, kv_heads, HEAD_DIM, PER_BLOCK, 32, dtype)
        host = bytearray(whole.pool_bytes)
        for stage in range(pp):
            models, pools = [], []
            for rank in range(tp):
                models.append(StageModel(path, dtype=dtype, shard=ModelShard(tp, rank, pp, stage),
                                         link=self.sums[stage].of(rank) if tp > 1 else None))
                shard = shard_of(LAYERS, kv_heads, tp, pp, stage * tp + rank)
                assert models[-1].first_layer == shard.first_layer
                assert models[-1].num_layers == shard.num_layers
                layout = KvLayout(shard.num_layers, shard.num_heads, HEAD_DIM, PER_BLOCK, 32, dtype)
                if shared:
                    pools.append(KvPool(host, CacheView(0, 0, "host", 0, whole, 0, 0, shard)))
                else:
                    pools.append(KvPool(bytearray(layout.pool_bytes), CacheView(
                        0, 0, "own", 0, layout, shard.first_layer, shard.first_head, shard)))
            self.stages.append(models)
            self._pools.append(pools)
        self._threads = ThreadPoolExecutor(tp)

    def step(
        self, sequences: Sequence[Sequence[int]], chunks: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor:
        """Logits of all tokens of the step, ``[tokens, vocabulary]``."""
        tokens = [token for r, start, length in chunks for token in sequences[r][start : start + length]]
        positions = [p for _, start, length in chunks for p in range(start, start + length)]
        layout = self._pools[0][0].view.layout
        places = [(start, n, layout.token_runs(TABLES[r], start + n)) for r, start, n in chunks]
        hidden: torch.Tensor | None = None
        for models, pools in zip(self.stages, self._pools, strict=True):
            outs = list(self._threads.map(
                lambda model, pool, given: model(tokens, positions, list(range(len(tokens))),
                                                 StepLayout(pool, places), given),
                models, pools, [None if hidden is None else hidden.clone() for _ in models]))
            hidden = outs[0]
            if not models[0].is_last:
                assert all(torch.equal(hidden, out) for out in outs)
                assert hidden.is_contiguous() and hidden.shape == (len(tokens), models[0].hidden_size)
                assert hidden.dtype == models[0].dtype
        ranges = [model.vocab_range for model in self.stages[-1]]
        assert ranges[0][0] == 0 and ranges[-1][1] == self.stages[-1][0].vocab_size == VOCABULARY
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        assert [out.shape[1] for out in outs] == [end - start for start, end in ranges]
        return torch.cat(outs, dim=1)

    def all_logits(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Of each sequence ``[tokens, vocabulary]``, computed in :data:`STEPS`."""
        found: list[list[torch.Tensor]] = [[] for _ in sequences]
        for chunks in STEPS:
            parts = self.step(sequences, chunks).split([length for _, _, length in chunks])
            for (request, _, _), part in zip(chunks, parts, strict=True):
                found[request].append(part)
        return [torch.cat(parts) for parts in found]


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def path(name: str) -> Path:
        kind, changes = MODELS[name]
        folder = tmp_path_factory.mktemp(name)
        if kind == "Gemma3Text":
            return save_gemma3(folder)
        return save_tiny_model(folder, kind, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, **changes)
    return path


@cache
def reference(path: Path) -> list[torch.Tensor]:
    """transformers' logits of the whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([tokens])).logits[0] for tokens in sequences()]


def check_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        error = (mine - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, error
        top = theirs.topk(2).values
        clear = (top[:, 0] - top[:, 1]) > 4 * tolerance * theirs.abs().max()
        assert clear.float().mean() > 0.5 and torch.equal(mine.argmax(-1)[clear], theirs.argmax(-1)[clear])


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_the_parts_together_are_the_model(model_path: Any, name: str, tp: int, pp: int) -> None:
    path = model_path(name)
    kv_heads = MODELS[name][1].get("num_key_value_heads", 2)
    found = [Group(path, tp, pp, kv_heads=kv_heads, shared=shared).all_logits(sequences())
             for shared in (False, True)]
    check_close(found[0], reference(path), 1e-4)
    check_close(found[1], reference(path), 1e-4)


def test_all_families_that_are_cut_into_stages_are_tested(model_path: Any) -> None:
    configs = [transformers.AutoConfig.from_pretrained(model_path(name)) for name in MODELS]
    assert {config.model_type for config in configs} == set(PIPELINED)


def test_a_layer_takes_two_sums_and_the_embedding_one(model_path: Any) -> None:
    for name in ("llama", "qwen3"):  # fused, and transformers' own modules
        group = Group(model_path(name), 2, 2, kv_heads=2, shared=True)
        group.step(sequences(), STEPS[0])
        assert [total.count for total in group.sums] == [1 + 2 * 2, 2 * 3]


@pytest.mark.parametrize("name", ["llama-tied-bias", "qwen3"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (4, 3)])
def test_bf16_is_close(model_path: Any, name: str, tp: int, pp: int, tmp_path: Path,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_MPI_CACHE", str(tmp_path))
    path = ensure_dtype(model_path(name), "bf16")
    group = Group(path, tp, pp, kv_heads=2, shared=True, dtype="bf16")
    whole = Group(path, 1, 1, kv_heads=2, shared=True, dtype="bf16")
    for mine, theirs in zip(group.all_logits(sequences()), whole.all_logits(sequences()), strict=True):
        assert (mine - theirs).abs().mean() < 0.05 * theirs.abs().mean()


def test_steps_that_sample_nothing_make_no_logits(model_path: Any) -> None:
    model = StageModel(model_path("llama"), dtype="fp32", shard=ModelShard(), link=None)
    layout = KvLayout(LAYERS, 2, HEAD_DIM, PER_BLOCK, 32, "fp32")
    view = CacheView(0, 0, "own", 0, layout, 0, 0, shard_of(LAYERS, 2, 1, 1, 0))
    paged = StepLayout(KvPool(bytearray(layout.pool_bytes), view), [(0, 3, [(8, 3)])])
    assert model([1, 2, 3], [0, 1, 2], [], paged, None).shape == (0, VOCABULARY)


@pytest.mark.parametrize(("kind", "changes", "tp", "message"), [
    ("Llama", {}, 3, r"LlamaForCausalLM \(llama\) .* tp=3 .* 4 attention heads .*; use tp=1"),
    ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}, 3,
     "2 KV heads on tp=3 ranks"),
    ("Phi3", {}, 2, r"phi3.*o_proj is a Linear of style rowwise_split_input"),
    ("Olmo2", {}, 2, r"olmo2.*q_proj is a Linear of style colwise_gather_output"),
    ("Cohere", {"use_qk_norm": True}, 2, r"cohere.*does not say how to split model\.layers\.0\.self_attn\."),
    ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, 2,
     r"qwen3_moe.*mlp\."),
    ("StableLm", {}, 2, "has no tensor-parallel plan"),
])
def test_what_cannot_be_split_is_refused_by_name(
        tmp_path: Path, kind: str, changes: dict[str, Any], tp: int, message: str) -> None:
    path = save_tiny_model(tmp_path / "m", kind, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(path, "fp32", ModelShard(tp, 0), Sum(1).of(0))


@pytest.mark.parametrize("kind", ["Gemma", "Granite", "Starcoder2"])
def test_other_plans_split_too(tmp_path: Path, kind: str) -> None:
    path = save_tiny_model(tmp_path / "m", kind, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    check_close(Group(path, 2, 1, kv_heads=2, shared=True).all_logits(sequences()), reference(path), 1e-4)


def test_a_family_whose_stages_are_not_known_to_be_right_is_refused(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "m", "Granite")
    with pytest.raises(ModelError, match=r"granite cannot be cut into pp=2 pipeline stages; .* use pp=1"):
        load_model(path, "fp32", ModelShard(pp=2))


def test_more_stages_than_layers_are_refused(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "m", num_hidden_layers=2)
    with pytest.raises(ModelError, match="2 layers cannot be cut into pp=3"):
        load_model(path, "fp32", ModelShard(pp=3))


def test_a_stage_misses_only_its_own_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save_tiny_model(tmp_path / "m", num_hidden_layers=4)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file({**tensors, "model.layers.4.mlp.up_proj.weight": torch.zeros(1)}, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"does not have: model\.layers\.4\.mlp\.up_proj\.weight"):
        load_model(path, "fp32", ModelShard(pp=2))
    save_file(tensors, path / "model.safetensors")
    assert load_model(path, "fp32", ModelShard(pp=2)).first_layer == 0
    with pytest.raises(ModelError, match=r"lack 1 tensors .*up_proj"):
        load_model(path, "fp32", ModelShard(pp=2, pp_rank=1))


_RESIDENT = """
import sys
from pathlib import Path
import torch
from disagg_mpi.engine.attention import KvPool, StepLayout
from disagg_mpi.engine.model import StageModel
from disagg_mpi.engine.tensor_parallel import ModelShard
from disagg_mpi.transfer.layout import CacheView, KvLayout

class Alone:
    def all_reduce(self, array): pass

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))) * 1024

def forward(path, shard):
    model = StageModel(Path(path), dtype="fp32", shard=shard, link=Alone())
    config = model._module.config
    kv = shard.kv(config.num_hidden_layers * shard.pp, config.num_key_value_heads)
    layout = KvLayout(kv.num_layers, kv.num_heads, config.head_dim, 16, 2, "fp32")
    pool = KvPool(bytearray(layout.pool_bytes),
                  CacheView(0, 0, "own", 0, layout, kv.first_layer, kv.first_head, kv))
    for length in (16, 1):
        model([1] * length, list(range(length)), [0], StepLayout(pool, [(0, length, [(0, length)])]),
              None if shard.is_first else torch.zeros(length, model.hidden_size))
    return model

torch.set_num_threads(1)
tiny, large, *numbers = sys.argv[1:]
forward(tiny, ModelShard())  # what libraries take is not the model's
before = resident()
model = forward(large, ModelShard(*map(int, numbers)))
print(resident() - before)
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("large"), num_hidden_layers=4, hidden_size=1024, intermediate_size=3072,
        num_attention_heads=8, num_key_value_heads=4, head_dim=128, vocab_size=8192, initializer_range=0.02)


@pytest.mark.parametrize(("tp", "tp_rank", "pp", "pp_rank"),
                         [(2, 0, 1, 0), (2, 1, 1, 0), (1, 0, 2, 0), (4, 2, 2, 1)])
def test_no_rank_holds_the_full_model(
        large_model: Path, tmp_path: Path, tp: int, tp_rank: int, pp: int, pp_rank: int) -> None:
    size = (large_model / "model.safetensors").stat().st_size
    assert size > 200e6
    tiny = save_tiny_model(tmp_path / "tiny")
    run = subprocess.run([sys.executable, "-c", _RESIDENT, tiny, large_model,
                          *map(str, (tp, tp_rank, pp, pp_rank))],
                         capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 0, run.stderr
    share = int(run.stdout) / size
    # Kernels may map a file by pages of 2 MiB, of which a slice begins and ends somewhere.
    assert share < 1 / (tp * pp) + 0.15, share
