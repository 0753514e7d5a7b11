"""What the warp-specialised kernels compile to for compute capability 9.0, read off their code without a GPU.

Their results are asserted in `test_triton_gluon`, and on a GPU in `test_triton_gpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from typing import Any

import judge
import pytest
import sm90
import torch
from fused import COMBINATIONS, flag_id, options, specialized_kernels
from judge import WEIGHTS
from sm90 import VARIANTS

from moefactory.block import Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import GEMMS, PASSES, DType, ResolvedModel
from moefactory.rules import MAX_SHARED_MEMORY, shared_memory
from moefactory.triton import choice
from moefactory.triton.choice import Launch, shipped
from moefactory.triton.search_space import refusals
from moefactory.triton.specialized import descriptor, ragged

pytestmark = pytest.mark.interpreter  # compiles without a GPU; what runs on one is in test_triton_gpu
MAX_SPILLS = 80  # bytes a thread: a few scalars around the loops; a spilled accumulator would be hundreds
OF_SUMS = 40  # more where tiles are counted: a register for each sum over threads in which not all have a part
by_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """{variant: what its code holds}, compiled afresh: a kernel in the cache says nothing of today's compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, sm90.__file__], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@by_variant
def test_multiplies_on_hoppers_tensor_cores(variant: str, code: dict[str, dict[str, Any]]) -> None:
    """wgmma alone, mma.sync is the older generation's. Four make a step of 64 in the reduction, eight where it is wide.

    A step stands once for each loop, and once for each product under which the tile before is stored (dW: every other
    of three; parts of H and A, six; of A, two; of y, four, every other of seven where the reduction is so long); two
    consumers.
    """
    one = VARIANTS[variant]
    if one.kernel == "dX_dswiglu":
        steps, each = 2, 8  # 16 warps leave 128 registers each: two products of 128 columns in place of one of 256
    else:
        of_y = 7 if sm90.SIZES[one.sizes][0] >= 7 * 64 else 4
        under = {"forward_up": 6 if "store_h" in one.flags else 2, "forward": of_y, "dX": of_y}.get(one.kernel, 3)
        steps, each = 1 + under, 4
    assert (code[variant]["wgmma"], code[variant]["mma"]) == (2 * steps * each, 0)


@by_variant
def test_fits_a_multiprocessor(variant: str, code: dict[str, dict[str, Any]]) -> None:
    """Shared memory of a launch, barriers included, and registers: 12 warps of 168 or 16 of 128 fill 65,536."""
    found = code[variant]
    assert found["shared memory"] <= MAX_SHARED_MEMORY
    warps = 16 if VARIANTS[variant].kernel == "dX_dswiglu" else 12
    assert found["options"] == {"num_warps": 4, "maxnreg": 65_536 // (32 * warps) // 8 * 8}
    counts = not VARIANTS[variant].kernel.startswith("dW")
    assert found["spills"] <= MAX_SPILLS + OF_SUMS * counts


def _claims(variant: sm90.Variant) -> bool:
    with_epilogue = variant.kernel in {"forward_up", "dX_dswiglu"} and "in_turn" not in variant.flags
    return with_epilogue or "claimed" in variant.flags


def _times_loaded(variant: sm90.Variant) -> int:
    """The loops in which a row tile is loaded: one more where tiles are claimed; the last is for others' tiles."""
    return 5 if _claims(variant) else 4


@by_variant
def test_moves_what_it_can_by_tma(variant: str, code: dict[str, dict[str, Any]]) -> None:
    """A gathered operand comes in copies of 16 bytes, the widest there are; every other, and each result, by TMA.

    Two halves of dW, four parts of y, six of H and A, two of A, by each of two consumers, and for rows once more in the
    code of the turn after the last tile. The dSwiGLU epilogue alone loads and stores past shared memory. The loads of a
    row tile stand four times or more, five where the next one is claimed, since between them it is asked for; a
    compiler may add copies.
    """
    one, found = VARIANTS[variant], code[variant]
    assert set(found["gather widths"]) == ({16} if one.gathered else set())
    is_dw = one.kernel.startswith("dW")
    assert found["tma loads"] >= (1 if one.gathered else 2) * (1 if is_dw else _times_loaded(one))
    direct = one.kernel == "dX_dswiglu" or {"permute_y", "scatter"} & set(one.flags)
    parts = 2 if is_dw else {"forward_up": 6 if "store_h" in one.flags else 2}.get(one.kernel, 4)
    assert found["tma stores"] == (0 if direct else parts * (2 if is_dw else 4))


@by_variant
def test_every_tile_has_its_own_bounds(variant: str, code: dict[str, dict[str, Any]]) -> None:
    """Triton 3.6 and 3.7 take a carried value whose only use is an inner loop's bound for invariant: then every tile
    would sum from the first tile's row on.

    Loops inside the loop over tiles: a consumer multiplies in one, that of the dSwiGLU kernel hands over between two;
    its epilogue has one; a row tile is loaded in four, in five where the next one is claimed. There the lower half's
    consumer lets stages pass in as many loops as it multiplies in.
    """
    one = VARIANTS[variant]
    loops = 2 if one.kernel == "dX_dswiglu" else 1
    partitions = loops * ["default"] + loops * (2 if _claims(one) else 1) * ["partition0"]
    partitions += (1 if one.kernel.startswith("dW") else _times_loaded(one)) * ["partition1"]
    partitions += ["partition2"] if one.kernel == "dX_dswiglu" else []
    assert code[variant]["nested loops"] == [[name, []] for name in partitions]


STALE = """
    default {
      %step = scf.for %tile = %0 to %1 step %2 iter_args(%end = %15) -> (i32) : i32 {
        %acc = scf.for %row = %c0 to %end step %c64 iter_args(%a = %cst) -> (f32) : i32 {
        }
      }
    }
    partition0(%arg0: i32) {
      %13 = tt.load %12 : !tt.ptr<i32>
      %14 = arith.addi %13, %c1 : i32
      %step = scf.for %tile = %0 to %1 step %2 iter_args(%end = %15) -> (i32) : i32 {
        %20 = tt.load %19 : !tt.ptr<i32>
        %21 = scf.for %row = %14 to %end step %c64 iter_args(%a = %cst) -> (i32) : i32 {
        }
        scf.yield %20 : i32
      }
    }
"""


STALE_WHILE = """
    partition1(%arg0: i32) {
      %7 = ttg.local_load %6 : !ttg.memdesc<4xi32> -> tensor<4xi32>
      %8 = "tt.reduce"(%7) <{axis = 0 : i32}> ({
      ^bb0(%a: i32, %b: i32):
      %9 = arith.addi %7, %8 : i32
      %turn:2 = scf.while (%tile = %0, %count = %8) : (i32, i32) -> (i32, i32) {
        %1 = arith.cmpi slt, %tile, %5 : i32
        scf.condition(%1) %tile, %count : i32, i32
      } do {
      ^bb0(%tile: i32, %count: i32):
        scf.for %index = %c0 to %count step %c1  : i32 {
        }
        scf.for %index = %c0 to %9 step %c1  : i32 {
        }
        scf.yield %3, %4 : i32, i32
      }
    }
"""


def test_a_stale_bound_is_found() -> None:
    """What the miscompile looked like: the lower bound is made of a load before the loop, and nothing carries it."""
    assert sm90.nested_loops(STALE) == [("default", []), ("partition0", ["%14"])]
    assert sm90.nested_loops(STALE_WHILE) == [("partition1", []), ("partition1", ["%9"])]


@by_variant
def test_nobody_arrives_before_the_others_are_done(variant: str, code: dict[str, dict[str, Any]]) -> None:
    """A stage is given back, a tile told of, a half handed over by one thread, after a barrier of its partition."""
    assert code[variant]["arrivals"] >= 2
    assert code[variant]["unguarded arrivals"] == []


def test_an_arrival_without_a_barrier_is_found() -> None:
    """The store of one thread, the arrival of another."""
    arrival = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];"
    store, barrier = "st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};", "bar.sync 3, 128;"
    assert sm90.unguarded_arrivals("\n".join([store, barrier, arrival])) == []
    assert sm90.unguarded_arrivals("\n".join([barrier, store, arrival, barrier, arrival])) == [store]


def test_the_variants_are_all_that_a_step_launches() -> None:
    """Every kernel with and without a gather, in whole tiles and in rows of 8 elements, in both dtypes."""
    seen = {(one.kernel, bool(one.gathered)) for one in VARIANTS.values()}
    kernels = {"forward", "forward_up", "dX", "dX_dswiglu", "dW 128x256", "dW 256x128"}
    assert seen == {(kernel, gathered) for kernel in kernels for gathered in (True, False)}
    assert {one.sizes for one in VARIANTS.values() if one.gathered} == {"whole", "eights"}
    assert {one.dtype for one in VARIANTS.values()} == {"bfloat16", "float16"}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
def test_the_tests_configs_are_legal_and_the_shipped_ones_are_among_them(flags: dict[str, bool], swapped: bool) -> None:
    """What the GPU tests state beside any flags breaks no rule; unswapped it is what Hopper ships from 128 rows on."""
    for pass_name, gemm, config in specialized_kernels(swapped=swapped):
        n, k = (528, 520) if gemm == "up" else (520, 264)
        launch = Launch(pass_name, gemm, 8, n, k, 128, DType.bfloat16, options(flags, 2))
        assert refusals(launch, config) == []
        assert shared_memory(pass_name, config, DType.bfloat16) <= MAX_SHARED_MEMORY
        assert (shipped(launch, 90) == config) == (not swapped)


def test_an_untried_triton_gets_the_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gluon changes from release to release: what was never compiled with one is not shipped on it."""
    launch = Launch("fwd", "up", 8, 528, 520, 128, DType.bfloat16, options(COMBINATIONS[0], 2))
    for version, known in (("3.6.0", True), ("3.7.1", True), ("3.9.0", False), ("4.0.0", False)):
        monkeypatch.setattr(choice.triton, "__version__", version)
        assert shipped.__wrapped__(launch, 90).warp_specialize == known


def test_more_rows_than_a_descriptor_holds() -> None:
    """2**30: beyond, the address would no longer come round. Said before anything is launched."""
    few = torch.empty(1, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^rows: got 1073741825; a warp-specialised kernel takes at most 1073741824$"):
        ragged(few, [128, 64], [2**30 + 1, 8], [8, 1])


def test_an_address_that_tma_cannot_take_is_refused() -> None:
    """A view that starts 2 bytes in, stated with a specialised kernel: one line, as for the plain kernels' TMA."""
    memory = torch.empty(65, 64, dtype=torch.bfloat16).flatten()
    with pytest.raises(ValueError, match="moved by TMA must start at a multiple of 16 bytes"):
        descriptor(memory[1 : 1 + 64 * 64].view(64, 64), [64, 64])


def test_the_compiled_tiles_are_the_shipped_ones() -> None:
    """`sm90` compiles what `specialized_kernels` states."""
    stated = {(c.block_m, c.block_n, c.block_k, c.num_warps, c.num_stages) for _, _, c in specialized_kernels()}
    assert {tuple(tile.values()) for tile in sm90.TILES.values()} == stated


@pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
def test_explain_says_it_in_words(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is fused into the launch, and never of a plain kernel; the config's values are told as ever."""
    monkeypatch.setattr(choice, "_capability", lambda device: 90)
    model = ResolvedModel(64, 32, 8, 2, True, "silu")
    weights = (judge.unit_weights(model, torch.bfloat16)[name] for name in WEIGHTS)
    block = Qwen3MoeFusedGroupedGEMMBlock(model, *weights, **flags, autotune=False)
    for rows in (1, 16, 32, 64, 128):
        many = block.explain(8 * rows // 2).splitlines()[-6:]
        special = [rows >= choice.SPECIALIZED_FROM[launch] for launch in product(PASSES, GEMMS)]
        assert [", warp-specialised; block_m=" in line and " warp_specialize=True" in line for line in many] == special
        assert ["warp" in line.replace("num_warps", "") for line in many] == special
    assert all(special)
    alone = sum("the product alone, warp-specialised" in line for line in many)
    fused = [flags["permute_x"] or flags["fuse_swiglu"], flags["permute_y"], flags["permute_x"]]
    fused += [flags["permute_y"] or flags["fuse_swiglu"], flags["permute_x"], flags["permute_y"]]
    assert alone == fused.count(False)
