"""Generation's kernels in Triton's interpreter, in fp32, which is what it can do of them; and compiled for a
Hopper without one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from interpreter import INTERPRETS, in_the_first_run, run_again

if INTERPRETS:
    from attend_double import attend_ones as expected_attention
    from triton.tools.tensor_descriptor import TensorDescriptor

    from disagg_mpi.engine.gpu.kernels.attend import attend_ones
    from disagg_mpi.engine.gpu.kernels.few import few_rows_product, norm_rows
    from disagg_mpi.engine.gpu.kernels.product import row_product

interpreted = pytest.mark.skipif(not INTERPRETS, reason="run by test_the_kernels_in_the_interpreter")


@interpreted
@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page"), [
    (8, 2, 64, 16), (9, 3, 32, 32), (4, 4, 32, 4), (20, 1, 16, 8), (2, 1, 256, 16)])
@pytest.mark.parametrize(("lengths", "parts", "least"), [
    ([40, 1, 17], 1, 16), ([200, 5, 33], 4, 16), ([70, 16], 8, 32), ([100], 32, 64)])
def test_generation_attends(
        turns: bool, window: int, heads: int, kv_heads: int, dim: int, page: int, lengths: list[int],
        parts: int, least: int) -> None:
    torch.manual_seed(0)
    counts = [-(-length // page) for length in lengths]
    num_blocks = sum(counts) + 1
    planes = torch.randn(2, num_blocks, page, kv_heads, dim)
    pages = torch.randperm(num_blocks)[: sum(counts)].int()
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    positions = torch.tensor(lengths, dtype=torch.int32) - 1
    qkv = torch.randn(len(lengths), (heads + 2 * kv_heads) * dim)
    rotary = torch.rand(max(lengths), dim)
    rows = len(lengths) * kv_heads * parts * heads // kv_heads
    counters = torch.zeros(len(lengths) * kv_heads, dtype=torch.int32)
    results = []
    for launch in (attend_ones.__getitem__, lambda grid: lambda *all_: expected_attention(grid, *all_)):
        mine = planes.clone()
        out = torch.full((len(lengths), heads * dim), 7.0)
        launch((len(lengths), kv_heads, parts))(
            qkv, qkv.stride(0), out, *mine, rotary, positions, pages, starts, torch.full((rows, dim), 9.0),
            torch.full((rows,), 9.0), torch.full((rows,), 9.0), counters, qkv, *mine[0].stride()[:3],
            dim**-0.5 / math.log(2), least, heads, kv_heads, dim, page, 16, parts, window, 2, turns,
            launch != attend_ones.__getitem__, 0)
        assert not counters.any()
        results.append((out, mine))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@interpreted
@pytest.mark.parametrize(("normed", "gated", "added"), [
    (True, False, False), (True, True, False), (False, False, True), (False, False, False)])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_a_row_is_multiplied(normed: bool, gated: bool, added: bool, width: int) -> None:
    torch.manual_seed(0)
    num_rows, num_columns = 24, 256
    x, norm, out = torch.randn(num_columns), torch.rand(num_columns), torch.randn(num_rows)
    weight = torch.randn(num_rows * (2 if gated else 1), num_columns)
    normed_x = x * torch.rsqrt(x.square().mean() + 1e-5) * norm if normed else x
    expected = weight @ normed_x
    if gated:
        expected = torch.nn.functional.silu(expected[:num_rows]) * expected[num_rows:]
    if added:
        expected = expected + out
    row_product[(num_rows // 4,)](
        x, weight, norm, 1e-5, out, num_rows, num_columns, 4, width, normed, gated, added, False)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("num_members", [1, 5, 16])
@pytest.mark.parametrize(("gated", "added", "splits"), [
    (True, False, 1), (False, True, 1), (False, True, 2), (False, False, 4)])
def test_a_few_rows_are_multiplied(num_members: int, gated: bool, added: bool, splits: int) -> None:
    torch.manual_seed(0)
    num_rows, num_columns = 48, 256
    x, out = torch.randn(num_members, num_columns), torch.randn(num_members, num_rows)
    weight = torch.randn(num_rows * (2 if gated else 1), num_columns)
    expected = x @ weight.T
    if gated:
        expected = torch.nn.functional.silu(expected[:, :num_rows]) * expected[:, num_rows:]
    if added:
        expected = expected + out
    counters = torch.zeros(3, dtype=torch.int32)
    few_rows_product[(3, splits)](
        TensorDescriptor.from_tensor(x, [16, 32]), TensorDescriptor.from_tensor(weight, [16, 32]), out,
        torch.full((3 * splits * 16 * 16,), 9.0), counters, num_members, num_rows, num_columns, 16, 16, 32,
        splits, 3, gated, added, False)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert not counters.any()


@interpreted
@pytest.mark.parametrize("num_columns", [64, 96])
def test_rows_are_normed(num_columns: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, num_columns), torch.rand(num_columns)
    out = torch.empty_like(x)
    norm_rows[(3,)](x, weight, 1e-5, out, num_columns, 128, False)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (num_columns,), weight, 1e-5))


@in_the_first_run
def test_the_kernels_in_the_interpreter() -> None:
    run_again(__file__)


@in_the_first_run
def test_what_a_hopper_would_run() -> None:
    """For Llama-3-8B's shape, and attention for others; a launch overlaps with the one before it."""
    pytest.importorskip("triton", minversion="3.4")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from disagg_mpi.engine.gpu.kernels.attend import attend_ones
    from disagg_mpi.engine.gpu.kernels.few import few_rows_product, norm_rows
    from disagg_mpi.engine.gpu.kernels.product import row_product
    from disagg_mpi.engine.gpu.products import tiling

    kinds = {**dict.fromkeys(("rotary", "partial", "partial_max", "partial_sum"), "*fp32"),
             **dict.fromkeys(("positions", "pages", "page_starts", "counters"), "*i32"),
             **dict.fromkeys(("row_stride", "block_stride", "token_stride", "head_stride", "least", "M", "N"),
                             "i32"), "scale": "fp32", "eps": "fp32"}
    for kernel, warps, constants in (
        *((attend_ones, 1, {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "PAGE": 32, "TILE": 32,
                            "PARTS": 32, "WINDOW": 0, "STAGES": 3, "TURNS": True, "OVERLAPS": True,
                            "ASKED": 64 * 2**10})
          for heads, kv_heads, dim in ((32, 8, 128), (20, 1, 64), (16, 8, 256))),
        (row_product, 4, {"K": 4096, "ROWS": 2, "WIDTH": 1024, "NORMED": True, "GATED": True, "ADDED": False,
                          "OVERLAPS": True}),
        (norm_rows, 8, {"K": 4096, "WIDTH": 4096, "OVERLAPS": True}),
        *((few_rows_product, tiled.warps, {
            "K": columns, "MOST": tiled.most, "ROWS": tiled.rows, "WIDTH": tiled.width,
            "SPLITS": tiled.splits, "STAGES": tiled.stages, "GATED": gated, "ADDED": added,
            "OVERLAPS": True})
          for members, columns, gated, added in (
              (8, 4096, True, False), (32, 14336, False, True), (64, 4096, False, True),
              (64, 4096, False, False), (64, 4096, True, False), (128, 4096, True, False))
          for tiled in [tiling(members, columns, gated=gated)])):
        tiles = {"x": "MOST", "weight": "ROWS"} if kernel is few_rows_product else {}
        kinds_here = kinds | {name: f"tensordesc<bf16[{constants[height]}, {constants['WIDTH']}]>"
                              for name, height in tiles.items()}
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else kinds_here.get(name, "*bf16")
                     for name in names}
        aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names)
                   if name not in constants and name not in tiles
                   and signature[name] not in ("fp32", "*i32")}
        compiled = triton.compile(
            ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()},
                      aligned),
            target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "launch_pdl": True})
        assert "griddepcontrol.wait" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 227 * 2**10
        if tiles:
            assert "wgmma" in compiled.asm["ptx"] and "cp.async.bulk.tensor" in compiled.asm["ptx"]
