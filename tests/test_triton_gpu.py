"""What only a GPU shows: races, overflowing addresses, synchronisation, graphs, streams, devices, real sizes.

MOEFACTORY_GPU_REPORT=file collects one JSON line of what each test measured. Tests that need tens of gigabytes take
turns, whatever the number of processes. The rule is that of `fused.Yardstick`; sampled rows and experts stand for the
whole where float64 on everything would take minutes.
"""

from __future__ import annotations

import fcntl
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import fused
import judge
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fused import (
    COMBINATIONS,
    GPU,
    Shape,
    dtype_id,
    flag_id,
    options,
    plain_twins,
    report,
    small_kernels,
    specialized_kernels,
    tma_kernels,
)
from judge import WEIGHTS, Tensors
from torch import Tensor

from moefactory.block import Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import (
    GEMMS,
    PASSES,
    DType,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
    ResolvedModel,
)
from moefactory.routing import RoutingPlan, make_plan
from moefactory.triton import specialized_dswiglu, specialized_dW, specialized_rows
from moefactory.triton.backward_dW import dW_gemm
from moefactory.triton.backward_dX import dX_gemm, dX_gemm_dswiglu
from moefactory.triton.choice import SPECIALIZED_FROM, Launch, bucket, choose
from moefactory.triton.forward import Rows, forward_gemm
from moefactory.triton.launch import memory_bandwidth
from moefactory.triton.ops import compute_experts
from moefactory.triton.schedule import tile_table

pytestmark = pytest.mark.gpu
REPEATS, TMA_REPEATS = 1_000, 10_000
MODEL = ResolvedModel(128, 64, 8, 2, True, "silu")
EDGE_FLAGS = [COMBINATIONS[i] for i in (0, 6, 9, 15)]
by_flags = pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
by_edge = pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0, all that the specialised kernels know")
by_kernels = pytest.mark.parametrize("kernels", ["shipped", pytest.param("specialized", marks=on_hopper)])


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings(nan=False):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time, and an empty allocator before and after: for tests that need much of the memory."""
    with open(Path(tempfile.gettempdir()) / "moefactory-gpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            torch.cuda.empty_cache()


def gibibytes() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def block_of(
    model: ResolvedModel = MODEL, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", **more: Any
) -> Qwen3MoeFusedGroupedGEMMBlock:
    weights = judge.unit_weights(model, dtype)
    return Qwen3MoeFusedGroupedGEMMBlock(model, *(weights[name].to(device) for name in WEIGHTS), **more)


def stated(kernels: str) -> dict[str, Any]:
    """A block's options for the shipped choice, or for the specialised kernels at any number of rows."""
    if kernels == "shipped":
        return {}
    pairs = {p: tuple(c for q, _, c in specialized_kernels() if q == p) for p in PASSES}
    return {"autotune": False, **{f"kernel_config_{p}": pair for p, pair in pairs.items()}}


def tokens_of(
    count: int, model: ResolvedModel = MODEL, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", seed: int = 7
) -> tuple[Tensor, Tensor]:
    pair = (judge.unit_tokens(count, model, dtype, seed=seed), judge.unit_tokens(count, model, dtype, seed=seed + 1))
    return pair[0].to(device), pair[1].to(device)


def step(block: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, then the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    out, _ = block(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], dy)]


def repeated(run: Callable[[], list[Tensor]], times: int) -> tuple[int, float]:
    """(how many of `times` runs differed from the first in a bit, seconds). Nothing is read back in between."""
    first = run()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        differs = torch.stack([(one != other).any() for one, other in zip(run(), first, strict=True)])
        wrong += differs.any()
    return int(wrong), time.perf_counter() - start


# --- races ------------------------------------------------------------------------------------------------------------


@by_flags
def test_deterministic(flags: dict[str, bool]) -> None:
    """1,000 forwards and backwards: the bits of the first, router and plan included."""
    block, (x, dy) = block_of(**flags), tokens_of(100)
    wrong, seconds = repeated(lambda: step(block, x, dy), REPEATS)
    report("deterministic", flags=flag_id(flags), repeats=REPEATS, wrong=wrong, ms=round(seconds / REPEATS * 1e3, 3))
    assert wrong == 0


def _ragged(experts: int = 16, top_k: int = 2, tokens: int = 500, block_m: int = 64) -> tuple[RoutingPlan, Rows]:
    """Experts with uneven counts: whole tiles and ragged ones side by side; one expert without rows."""
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(experts, generator=g) ** 2
    weights[3] = 0
    ids = torch.multinomial(weights.expand(tokens, -1), top_k, generator=g)
    plan = make_plan(ids.cuda(), experts)
    offsets = plan.group_offsets
    return plan, Rows(offsets, plan.gather_indices, top_k, tile_table(offsets, plan.gather_indices.shape[0], block_m))


TMA_TILE: dict[str, Any] = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize("kernel", ["forward", "forward swiglu", "dX", "dW"])
def test_tma_store(kernel: str) -> None:
    """10,000 launches that store by TMA: each gives the bits of the pointer store."""
    plan, rows = _ragged()
    m, experts, n, k = plan.gather_indices.shape[0], 16, 256, 192

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    x, dy, w = draw(m, k), draw(m, n), draw(experts, n, k)
    loads: dict[str, Any] = {"use_tma_load_w": True, **TMA_TILE}

    def run(store: bool) -> list[Tensor]:
        if kernel == "dX":
            config = KernelConfigBackward_dX(**loads, use_tma_load_dy=True, use_tma_store=store)
            return [dX_gemm(dy, w, rows, config)]
        if kernel == "dW":
            tma = {"use_tma_load_dy": True, "use_tma_load_x": True}
            return [dW_gemm(dy, x, rows, experts, KernelConfigBackward_dW(**TMA_TILE, **tma, use_tma_store=store))]
        swiglu = kernel.endswith("swiglu")
        config_fwd = KernelConfigForward(**loads, use_tma_load_x=True, use_tma_store=store)
        y, h = forward_gemm(x, w, rows, config_fwd, swiglu=swiglu, store_h=swiglu)
        return [y] if h is None else [y, h]

    expected = run(False)
    assert all(torch.equal(one, other) for one, other in zip(run(True), expected, strict=True))
    wrong, seconds = repeated(lambda: run(True), TMA_REPEATS)
    report("tma store", kernel=kernel, repeats=TMA_REPEATS, wrong=wrong, us=round(seconds / TMA_REPEATS * 1e6, 1))
    assert wrong == 0


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@by_edge
def test_tma_in_every_number_of_stages(flags: dict[str, bool], stages: int) -> None:
    """Explicit configs with every TMA flag that is legal: they compile, run and hold the rule at any pipeline depth."""
    shape = Shape(75, 5, 2, 128, 64, "gaps")
    p, yardstick = fused.problem(shape, torch.bfloat16), fused.yardstick(shape, torch.bfloat16)
    got = fused.run(p, options(flags, shape.top_k, tma_kernels(flags, stages=stages)))
    assert yardstick.complaints(got) == []
    again = fused.run(p, options(flags, shape.top_k, tma_kernels(flags, stages=stages)))
    assert fused.differing(again, got) == []
    report("tma stages", flags=flag_id(flags), stages=stages, ok=True)


# --- warp-specialised kernels -----------------------------------------------------------------------------------------

SPECIALIZED_SHAPES = [
    Shape(200, 10, 2, 520, 264, "dropped"),  # every dimension ends inside a tile; more dW tiles than multiprocessors
    Shape(700, 157, 4, 64, 32, "gaps"),  # more row tiles than multiprocessors, each smaller than its box
    Shape(400, 3, 2, 256, 128),  # whole tiles: several row tiles an expert, the last one ragged
    Shape(150, 8, 2, 72, 40, "gaps"),  # rows of 8 elements, not of 16; empty experts first, amid and last
    Shape(300, 3, 2, 896, 448),  # whole steps, 14 and 7 of them: stores under every other one, as at Qwen's sizes
    Shape(33, 3, 2, 72, 40, "none"),  # dropped slots alone
    Shape(1, 8, 2, 64, 32),
]
SPECIALIZED_CASES = [(shape, torch.bfloat16) for shape in SPECIALIZED_SHAPES]
SPECIALIZED_CASES += [(shape, torch.float16) for shape in SPECIALIZED_SHAPES[:1] + SPECIALIZED_SHAPES[3:4]]
BELOW_DSWIGLU = {"dx", "drouting_weights", "gate_up_proj"}  # what is made of the fused dH and its <dA, A>


@on_hopper
@pytest.mark.parametrize(("shape", "dtype"), SPECIALIZED_CASES, ids=lambda v: str(v).removeprefix("torch."))
@by_flags
def test_specialized(flags: dict[str, bool], shape: Shape, dtype: torch.dtype) -> None:
    """The rule, and the bits of the plain kernels in the same tiles; fresh memory holds NaN.

    The fused dSwiGLU rounds its float32 intermediates in another order: what comes after it is held to the rule alone.
    """
    p = fused.problem(shape, dtype)
    with fused.surroundings():
        plain, got = (fused.run(p, options(flags, shape.top_k, k)) for k in (plain_twins(), specialized_kernels()))
    assert fused.yardstick(shape, dtype).complaints(got) == []
    assert set(fused.differing(plain, got)) <= (BELOW_DSWIGLU if flags["fuse_swiglu"] else set())


@on_hopper
@by_edge
def test_specialized_in_other_tiles_and_stages(flags: dict[str, bool]) -> None:
    """dW gathers its wide operand, rings have their fewest stages: the same bits as the shipped tiles give."""
    shape = SPECIALIZED_SHAPES[0]
    p = fused.problem(shape, torch.bfloat16)
    with fused.surroundings():
        got = [fused.run(p, options(flags, shape.top_k, specialized_kernels(swapped=s))) for s in (False, True)]
    assert fused.differing(*got) == []


@on_hopper
@by_edge
def test_specialized_in_few_programs(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs walk all tiles, their rings come round many times: the bits of a program a multiprocessor.

    Of dropped rows alone each has some 16 tiles of a few products: more than it may be told of at a time.
    """
    for shape in (*SPECIALIZED_SHAPES[:4], Shape(3000, 3, 2, 72, 40, "none")):
        p, o = fused.problem(shape, torch.bfloat16), options(flags, shape.top_k, specialized_kernels())
        with fused.surroundings(), monkeypatch.context() as patch:
            many = fused.run(p, o)
            for module in (specialized_rows, specialized_dswiglu, specialized_dW):
                patch.setattr(module, "num_programs", lambda device, sm_margin: 3)
            assert fused.differing(fused.run(p, o), many) == []


@on_hopper
@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize("shape", SPECIALIZED_SHAPES, ids=str)
def test_tiles_are_claimed_or_go_round(shape: Shape, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the forward's kernels and of dSwiGLU claim their tiles or go round in turn: the same bits, with fewer
    tiles than programs, as many, or many each. The counter is 0 after each, ten times over the same table."""
    told: list[bool] = []
    launched = specialized_rows.launch

    def telling(*args: Any, **meta: Any) -> None:
        told.append(meta["CLAIM"])
        launched(*args, **meta)

    for module in (specialized_rows, specialized_dswiglu):
        monkeypatch.setattr(module, "launch", telling)
        monkeypatch.setattr(module, "num_programs", lambda device, sm_margin: programs)
    p = fused.problem(shape, torch.bfloat16).to("cuda")
    plan = p.plan
    table = tile_table(plan.group_offsets, plan.gather_indices.shape[0], 128)
    forward, config = specialized_kernels()[0][2], specialized_kernels()[3][2]
    on_tiles = Rows(plan.group_offsets, plan.gather_indices, shape.top_k, table)
    h = torch.randn(plan.gather_indices.shape[0], 2 * shape.intermediate, dtype=torch.bfloat16, device="cuda")
    wide = p.down_proj.repeat(1, 1, 2)

    def all_four() -> list[Tensor]:
        weights = p.routing_weights.reshape(-1)
        up = forward_gemm(p.x, p.gate_up_proj, on_tiles, forward, permute_x=True, swiglu=True, store_h=True)
        down = dX_gemm_dswiglu(p.dy, p.down_proj, h, weights, on_tiles, config, dy_divisor=shape.top_k)
        more = [forward_gemm(h, wide, on_tiles, forward, permute_y=y)[0] for y in (False, True)]
        return [t for t in (*up, *down, *more) if t is not None]

    fused.claim(monkeypatch, False)
    first, tiles = all_four(), table.num_tiles.tolist()
    assert tiles[1] == 0
    for _ in range(10):
        fused.claim(monkeypatch, True)
        assert all(torch.equal(again, once) for again, once in zip(all_four(), first, strict=True))
        assert table.num_tiles.tolist() == tiles
    assert told == [*[False] * 4, *[True] * 40]


@on_hopper
def test_memory_bandwidth() -> None:
    """What is read off the device is what its data sheet says (GB/s), but for the clock's own rounding; of a Hopper GPU
    not named here, between the slowest and the fastest of their data sheets."""
    named = {"NVIDIA H200": (4800, 4800), "NVIDIA H100 80GB HBM3": (3350, 3350)}
    least, most = named.get(torch.cuda.get_device_name(), (2000, 4900))
    assert 0.95 * least < memory_bandwidth(torch.device("cuda")) < 1.05 * most


@on_hopper
@by_flags
def test_specialized_keeps_nan_in_its_expert(flags: dict[str, bool]) -> None:
    """Every token of one expert is NaN, in x and in dY: the other tokens and experts keep their bits.

    Rows of neighbours lie in one box of TMA, and row 0, which is NaN, is what a lane past an expert's end reads.
    """
    shape = Shape(350, 5, 1, 72, 40)
    p = fused.problem(shape, torch.bfloat16)
    expert = int(p.selected_experts[0, 0])
    bad = p.selected_experts[:, 0] == expert
    x, dy = (torch.where(bad[:, None], torch.nan, t) for t in (p.x, p.dy))
    o = options(flags, 1, specialized_kernels())
    clean, got = fused.run(p, o), fused.run(replace(p, x=x, dy=dy), o)
    others = torch.arange(shape.experts) != expert
    kept = {name: others if name in {"gate_up_proj", "down_proj"} else ~bad for name in clean}
    assert [name for name, rows in kept.items() if not torch.equal(got[name][rows], clean[name][rows])] == []
    assert all(bool(got[name][~rows].isnan().all()) for name, rows in kept.items())


@on_hopper
@by_edge
def test_specialized_is_deterministic(flags: dict[str, bool]) -> None:
    """1,000 forwards and backwards over experts of some 75 rows: the bits of the first."""
    block, (x, dy) = block_of(**flags, **stated("specialized")), tokens_of(300)
    wrong, seconds = repeated(lambda: step(block, x, dy), REPEATS)
    ms = round(seconds / REPEATS * 1e3, 3)
    report("specialized deterministic", flags=flag_id(flags), repeats=REPEATS, wrong=wrong, ms=ms)
    assert wrong == 0


SPECIALIZED_LAUNCHES = [
    "forward", "forward gathered", "forward scattered",
    "forward_up", "forward_up gathered", "forward_up without h", "forward_up gathered, without h",
    "forward_up gathered, in turn",
    "forward claimed", "forward scattered, claimed",
    "dX", "dX gathered", "dX scattered", "dX_dswiglu", "dX_dswiglu gathered", "dX_dswiglu gathered, in turn",
    "dW up", "dW up gathered", "dW down", "dW down gathered",
]  # fmt: skip


@on_hopper
@pytest.mark.parametrize("launched", SPECIALIZED_LAUNCHES)
def test_specialized_kernel_repeats(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 launches of each kernel, every one of which stores by TMA or by rows: the plain kernel's bits each time.

    The fused dSwiGLU is compared with its own first launch; that one is within float32's rounding of the plain one.
    """
    plan, rows = _ragged(tokens=1500, block_m=128)
    m, experts, hidden, width = plan.gather_indices.shape[0], 16, 520, 264
    kernel, _, how = launched.partition(" ")
    gathered, scattered = "gathered" in how, "scattered" in how
    gemm = "up" if kernel == "forward_up" or how.startswith("up") else "down"
    pass_name = {"forward": "fwd", "forward_up": "fwd", "dW": "bwd_dW"}.get(kernel, "bwd_dX")
    divisor = rows.top_k if gathered else 0
    read = m // rows.top_k if gathered else m
    if "in turn" in how or "claimed" in how:
        fused.claim(monkeypatch, "claimed" in how)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    configs: dict[bool, Any] = {
        special: next(c for p, g, c in kernels if (p, g) == (pass_name, gemm))
        for special, kernels in ((True, specialized_kernels()), (False, plain_twins()))
    }
    if pass_name == "fwd":
        x, w, swiglu = draw(read, hidden), draw(experts, 2 * width, hidden) * hidden**-0.5, kernel == "forward_up"

        def run(special: bool) -> list[Tensor]:
            flags = {"permute_x": gathered, "permute_y": scattered, "swiglu": swiglu}
            flags["store_h"] = swiglu and "without h" not in how
            return [t for t in forward_gemm(x, w, rows, configs[special], **flags) if t is not None]
    elif pass_name == "bwd_dX":
        dy, w, h, s = draw(read, hidden), draw(experts, hidden, width) * hidden**-0.5, draw(m, 2 * width), draw(m)

        def run(special: bool) -> list[Tensor]:
            config = configs[special]
            if kernel == "dX_dswiglu":
                return list(dX_gemm_dswiglu(dy, w, h, s, rows, config, dy_divisor=divisor))
            return [dX_gemm(dy, w, rows, config, dy_divisor=divisor, scatter=scattered)]
    else:
        narrow, other = draw(read, hidden), draw(m, width)

        def run(special: bool) -> list[Tensor]:
            config = configs[special]
            if gemm == "up":  # x is the one behind the index
                return [dW_gemm(other, narrow, rows, experts, config, x_divisor=divisor)]
            return [dW_gemm(narrow, other, rows, experts, config, dy_divisor=divisor)]

    plain, first = run(False), run(True)
    if kernel == "dX_dswiglu":
        (dh, scaled_a, ds), (plain_dh, plain_scaled_a, plain_ds) = first, plain
        assert torch.equal(scaled_a, plain_scaled_a)
        last_bit = torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(dh, plain_dh, rtol=last_bit, atol=1e-5 * float(plain_dh.abs().max()))
        torch.testing.assert_close(ds, plain_ds, rtol=1e-5, atol=1e-5 * float(plain_ds.abs().max()))
    else:
        assert all(torch.equal(one, other) for one, other in zip(first, plain, strict=True))
    wrong, seconds = repeated(lambda: run(True), TMA_REPEATS)
    us = round(seconds / TMA_REPEATS * 1e6, 1)
    report("specialized kernel", kernel=launched, repeats=TMA_REPEATS, wrong=wrong, us=us)
    assert wrong == 0


# --- the launch cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", EDGE_FLAGS[:2], ids=flag_id)
def test_kernels_of_other_arguments_are_kept_apart(flags: dict[str, bool]) -> None:
    """Aligned and not, sizes of 1, of 16s and odd, one expert and many, in turn and back again: each its own kernel."""
    shapes = [Shape(16, 8, 2, 64, 32), Shape(17, 8, 2, 64, 32), Shape(1, 1, 1, 64, 32), Shape(16, 5, 2, 50, 47)]
    for dtype in (torch.bfloat16, torch.float32):
        for _ in range(2):
            for shape in shapes:
                for shift in (0, 1):
                    p = fused.problem(shape, dtype)
                    leaves = []
                    for tensor in p.leaves:
                        memory = torch.zeros(tensor.numel() + shift, dtype=dtype, device="cuda")
                        leaves.append(memory[shift:].view(tensor.shape).copy_(tensor).requires_grad_())
                    there = p.to("cuda")
                    out, _ = compute_experts(
                        leaves[0], leaves[1], there.plan, leaves[2], leaves[3], options(flags, shape.top_k)
                    )
                    got = fused.gradients(out, leaves, there.dy)
                    assert fused.yardstick(shape, dtype).complaints(got) == [], (shape, dtype, shift)


# --- memory -----------------------------------------------------------------------------------------------------------


@by_flags
def test_dirty_memory(flags: dict[str, bool]) -> None:
    """The allocator hands out NaN: what a kernel does not write, or reads past an end, shows."""
    shape = Shape(75, 7, 3, 96, 40, "dropped")
    sizes = [2**n for n in range(9, 26, 2)]
    for _ in range(2):
        dirt = [torch.full((size,), torch.nan, device="cuda") for size in sizes for _ in range(3)]
        del dirt
        got = fused.run(fused.problem(shape, torch.bfloat16), options(flags, shape.top_k))
        assert fused.yardstick(shape, torch.bfloat16).complaints(got) == []


def test_peak_memory() -> None:
    """A forward without gradients holds A, Y and the output: no permuted copy, no H."""
    model = ResolvedModel(2048, 768, 32, 8, True, "silu")
    with alone():
        weights = {n: torch.randn(s, device="cuda").bfloat16() * 0.02 for n, s in _sizes(model).items()}
        block = Qwen3MoeFusedGroupedGEMMBlock(model, *(weights[name] for name in WEIGHTS))
        x = torch.randn(1, 8192, 2048, device="cuda").bfloat16()
        peaks = {}
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                block(x)
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                out = block(x)
                torch.cuda.synchronize()
                peaks[grad] = torch.cuda.max_memory_allocated() - before
                del out
        rows, bytes_ = 8192 * 8, 2
        a, y, h, out_bytes = (rows * w * bytes_ for w in (768, 2048, 1536, 2048 / 8))
        report("peak memory", without_gradients=peaks[False], with_gradients=peaks[True], copy=y)
        assert peaks[False] <= 1.05 * (a + y + out_bytes)
        assert peaks[True] <= 1.05 * (a + y + out_bytes + h)


def _sizes(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    e, h, i = model.num_experts, model.hidden_size, model.moe_intermediate_size
    return {"gate": (e, h), "gate_up_proj": (e, 2 * i, h), "down_proj": (e, h, i)}


# --- samples in float64 -----------------------------------------------------------------------------------------------


def _large(model: ResolvedModel, tokens: int, last_expert_too: bool = False) -> fused.Problem:
    """Unit-scale data, drawn on the GPU; half of the tokens prefer a few experts, so that counts are uneven."""
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16).mul_(scale)

    e, h, i, k = model.num_experts, model.hidden_size, model.moe_intermediate_size, model.top_k
    liking = torch.randn(tokens, e, generator=g, device="cuda")
    liking[::2, : max(1, e // 8)] += 1
    if last_expert_too:
        liking[-1, -1] += 100
    selected = liking.topk(k).indices
    scores = torch.rand(tokens, k, generator=g, device="cuda") + 0.1
    scores = (scores / scores.sum(-1, keepdim=True)).bfloat16()
    up, down = draw(e, 2 * i, h, scale=h**-0.5), draw(e, h, i, scale=i**-0.5)
    return fused.Problem(draw(tokens, h), scores, selected, up, down, draw(tokens, h))


def _parts(rows: Tensor, s: Tensor, dy: Tensor, up: Tensor, down: Tensor) -> Tensors:
    """Every result for rows [R,H] of one expert, their weights s [R,1] and dY [R,H], in their dtype."""
    h = rows @ up.T
    gate, lin = h.chunk(2, dim=1)
    sig = torch.sigmoid(gate)
    a = F.silu(gate) * lin
    y = a @ down.T
    da = (s * dy) @ down
    dh = torch.cat([da * lin * sig * (1 + gate * (1 - sig)), da * F.silu(gate)], 1)
    return {"out": s * y, "dx": dh @ up, "ds": (dy * y).sum(1), "up": dh.T @ rows, "down": (s * dy).T @ a}


def _sampled(p: fused.Problem, tokens: list[int], experts: list[int], dtype: torch.dtype) -> Tensors:
    """out, dx and drouting_weights of these tokens, the weights' gradients of these experts."""
    found: dict[str, list[Tensor]] = {"out": [], "dx": [], "drouting_weights": [], "gate_up_proj": [], "down_proj": []}

    def of(index: Any, slot: Any, expert: int) -> Tensors:
        s = p.routing_weights[index, slot].reshape(-1, 1)
        weights = (p.gate_up_proj[expert], p.down_proj[expert])
        return _parts(*(t.to(dtype) for t in (p.x[index], s, p.dy[index], *weights)))

    for t in tokens:
        each = [of([t], [k], e) for k, e in enumerate(p.selected_experts[t].tolist())]
        found["out"].append(sum(part["out"][0] for part in each))  # type: ignore[arg-type]
        found["dx"].append(sum(part["dx"][0] for part in each))  # type: ignore[arg-type]
        found["drouting_weights"].append(torch.stack([part["ds"][0] for part in each]))
    for e in experts:
        index, slot = (p.selected_experts == e).nonzero(as_tuple=True)
        part = of(index, slot, e)
        found["gate_up_proj"].append(part["up"])
        found["down_proj"].append(part["down"])
    return {name: torch.stack(values).cpu() for name, values in found.items() if values}


def _check_samples(p: fused.Problem, flags: dict[str, bool], tokens: list[int], experts: list[int]) -> dict[str, float]:
    """The rule on samples, everything finite; milliseconds of a step."""
    leaves = [t.requires_grad_() for t in p.leaves]
    o = options(flags, p.top_k)
    plan = p.plan

    def once() -> tuple[Tensor, tuple[Tensor, ...]]:
        out, _ = compute_experts(leaves[0], leaves[1], plan, leaves[2], leaves[3], o)
        return out, torch.autograd.grad(out, leaves, p.dy)

    once()
    torch.cuda.synchronize()
    start = time.perf_counter()
    out, grads = once()
    torch.cuda.synchronize()
    ms = (time.perf_counter() - start) * 1e3
    assert all(bool(t.isfinite().all()) for t in (out, *grads))
    with torch.no_grad():
        got = {
            "out": out[tokens], "dx": grads[0][tokens], "drouting_weights": grads[1][tokens],
            "gate_up_proj": grads[2][experts], "down_proj": grads[3][experts],
        }  # fmt: skip
        got = {name: tensor.detach().cpu() for name, tensor in got.items() if tensor.numel()}
        eager, exact = (_sampled(p, tokens, experts, dtype) for dtype in (torch.bfloat16, torch.float64))
    assert fused.Yardstick(exact, (eager,), torch.bfloat16).complaints(got) == []
    return {"ms": round(ms, 2), "gibibytes": gibibytes()}


QWEN = {
    "30b": (ResolvedModel(2048, 768, 128, 8, True, "silu"), 4096),
    "235b": (ResolvedModel(4096, 1536, 128, 8, True, "silu"), 2048),
    "30b, few tokens": (ResolvedModel(2048, 768, 128, 8, True, "silu"), 64),
}


def _chosen(p: fused.Problem, flags: dict[str, bool]) -> list[KernelConfig]:
    """The configs of a step's six launches."""
    experts, width, hidden = p.gate_up_proj.shape
    rows = bucket(p.selected_experts.numel(), experts)
    sizes = {"up": (width, hidden), "down": (hidden, width // 2)}
    launches = [
        Launch(pass_name, gemm, experts, *sizes[gemm], rows, DType.bfloat16, options(flags, p.top_k))
        for pass_name in PASSES
        for gemm in GEMMS
    ]
    return [choose(launch, p.x.device)[0] for launch in launches]


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("flags", [COMBINATIONS[0], COMBINATIONS[15]], ids=flag_id)
def test_qwen_sizes(name: str, flags: dict[str, bool]) -> None:
    """Qwen3's real sizes, shipped choice: 48 tokens and the busiest, idlest and last expert against float64.

    On Hopper the two large ones run the warp-specialised kernels throughout, the small one those of dW.
    """
    model, tokens = QWEN[name]
    with alone():
        p = _large(model, tokens)
        rows = bucket(tokens * model.top_k, model.num_experts)
        special = [HOPPER and rows >= SPECIALIZED_FROM[launch] for launch in product(PASSES, GEMMS)]
        assert [config.warp_specialize for config in _chosen(p, flags)] == special
        counts = torch.bincount(p.selected_experts.flatten(), minlength=model.num_experts)
        order = counts.argsort().tolist()
        experts = sorted({order[0], order[-1], model.num_experts - 1})
        measured = _check_samples(p, flags, [*range(0, tokens, max(1, tokens // 47)), tokens - 1], experts)
        report("qwen", model=name, tokens=tokens, flags=flag_id(flags), **measured)
        del p


OVERFLOWS = {  # what passes 2^31 elements
    "rows * 2I": (ResolvedModel(128, 1024, 8, 8, True, "silu"), 140_000),
    "rows * H exactly": (ResolvedModel(2048, 64, 8, 8, True, "silu"), 131_072),
    "rows * H and a token": (ResolvedModel(2048, 64, 8, 8, True, "silu"), 131_073),
    "experts * 2I * H": (ResolvedModel(2112, 2048, 256, 2, True, "silu"), 64),
}


@pytest.mark.parametrize("name", OVERFLOWS)
@pytest.mark.parametrize("flags", [COMBINATIONS[0], COMBINATIONS[15]], ids=flag_id)
def test_addresses_beyond_32_bits(name: str, flags: dict[str, bool]) -> None:
    """Finite everywhere and right at both ends: the first and last tokens, the first and last experts."""
    model, tokens = OVERFLOWS[name]
    with alone():
        p = _large(model, tokens, last_expert_too=True)
        ends = [*range(8), *range(tokens // 2, tokens // 2 + 8), *range(tokens - 8, tokens)]
        measured = _check_samples(p, flags, ends, [0, model.num_experts - 1])
        report("beyond 32 bits", size=name, flags=flag_id(flags), **measured)
        del p


# --- synchronisation, graphs, streams, devices ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it is a prototype
@by_kernels
@by_flags
def test_no_synchronisation(flags: dict[str, bool], kernels: str) -> None:
    """Neither a forward nor a backward asks the device for a number; tracing included."""
    for trace in (False, True):
        block, (x, dy) = block_of(**flags, **stated(kernels), trace=trace), tokens_of(64)
        run = (lambda x: (block(x)[0].hidden_states,)) if trace else block  # type: ignore[misc]  # noqa: B023

        def both(run: Any = run, x: Tensor = x, dy: Tensor = dy) -> None:
            x = x.detach().requires_grad_()
            run(x)[0].backward(dy)

        both()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            both()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("whole", ["forward", "step"])
@by_kernels
@by_edge
def test_cuda_graph(flags: dict[str, bool], kernels: str, whole: str) -> None:
    """Captured once, replayed with other tokens, so with another routing: the bits of an eager run each time."""
    block, (x, dy) = block_of(**flags, **stated(kernels)), tokens_of(96)
    static = x.clone()

    def run() -> list[Tensor]:
        if whole == "step":
            return step(block, static, dy)
        with torch.no_grad():
            return list(block(static))

    graph, results = _captured(run)
    for seed in (11, 12, 13):
        other, _ = tokens_of(96, seed=seed)
        other = other[:, :1].expand_as(other) if seed == 13 else other  # all tokens to the same experts
        static.copy_(other)
        graph.replay()
        got = [t.clone() for t in results]
        assert all(torch.equal(one, two) for one, two in zip(got, run(), strict=True))
    report("cuda graph", flags=flag_id(flags), kernels=kernels, what=whole, ok=True)


def test_streams() -> None:
    """On a side stream behind slow work, and on two streams at once: the same bits as on the default stream."""
    block = block_of()
    inputs = [tokens_of(200, seed=seed) for seed in (21, 22)]
    expected = [step(block, x, dy) for x, dy in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    slow = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for i, ((x, dy), stream) in enumerate(zip(inputs, streams, strict=True)):
        with torch.cuda.stream(stream):
            late = torch.empty_like(x)
            for _ in range(10):
                slow @ slow
            late.copy_(x)  # not there before the products are through
            results[i] = step(block, late, dy)
    torch.cuda.synchronize()
    for got, right in zip(results, expected, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(got, right, strict=True))


@triton.jit
def _hold(end_ptr, out_ptr, LANES: tl.constexpr):
    """Stay until the word at `end_ptr` is 1, or for seconds, with so many registers that no GEMM's program fits."""
    lane = tl.arange(0, LANES)
    numbers = lane
    turn = 0
    while (tl.atomic_add(end_ptr, 0, sem="relaxed") == 0) & (turn < 2_000_000):
        numbers = numbers * 3 + lane
        turn += 1
    tl.store(out_ptr + tl.program_id(0) * LANES + lane, numbers)


@on_hopper
@pytest.mark.parametrize("held", [1, 100, 131])
@by_edge
def test_beside_a_neighbour(flags: dict[str, bool], held: int) -> None:
    """Another stream's kernel holds multiprocessors all the while, up to all but one: the bits of a step alone, three
    times over. It is told to end when the steps have ended, and is there at both ends of them."""
    block = block_of(**stated("specialized"), **flags)
    x, dy = tokens_of(700)
    for _ in range(3):  # a kernel that is loaded waits for all that runs, a neighbour too: none is left to be
        expected = step(block, x, dy)
    torch.cuda._sleep(1)
    end = torch.ones(1, dtype=torch.int32, device="cuda")
    out = torch.empty(held, 8192, dtype=torch.int32, device="cuda")
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    _hold[(held,)](end, out, LANES=8192, num_warps=8)  # compiled
    end.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        _hold[(held,)](end, out, LANES=8192, num_warps=8)
        done.record()
    torch.cuda._sleep(2_000_000)  # a millisecond: it is there by then
    results = [step(block, x, dy) for _ in range(3)]
    torch.cuda.current_stream().synchronize()
    assert not done.query()
    end.fill_(1)
    torch.cuda.synchronize()
    for got in results:
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.skipif(not GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
@by_edge
def test_second_device(flags: dict[str, bool]) -> None:
    """Tensors on cuda:1 while cuda:0 is current: kernels, streams and tables of the tensors' own device."""
    expected = [t.cpu() for t in step(block_of(**flags), *tokens_of(50))]
    with torch.cuda.device(0):
        block = block_of(device="cuda:1", **flags)
        got = step(block, *tokens_of(50, device="cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(got, expected, strict=True))


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Inductor's own
@pytest.mark.parametrize("flags", [COMBINATIONS[0], COMBINATIONS[15]], ids=flag_id)
def test_inductor(flags: dict[str, bool]) -> None:
    """fullgraph with Inductor, tokens dynamic: bfloat16's rounding of eager, no graph break, few graphs."""
    torch._dynamo.reset()
    block = block_of(**flags)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    start = time.perf_counter()
    for count in (64, 40, 57):
        x, dy = tokens_of(count)
        found = []
        for run in (block, compiled):
            leaf = x.detach().requires_grad_()
            out, _ = run(leaf)
            found.append([out.detach(), *torch.autograd.grad(out, [leaf, *block.parameters()], dy)])
        for one, other in zip(*found, strict=True):
            assert (one - other).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * one.abs().max()
    report("inductor", flags=flag_id(flags), seconds=round(time.perf_counter() - start, 1))


# --- precision --------------------------------------------------------------------------------------------------------


def test_float32_is_not_tf32() -> None:
    """Sums of 2,048 terms: float32's error, a thousandth of what TF32's ten bits of mantissa would give."""
    shape = Shape(64, 4, 2, 2048, 128)
    p = fused.problem(shape, torch.float32)
    got = fused.run(p, options(COMBINATIONS[0], 2), (False,) * 4)["out"].double()
    wide = fused.exactly(p)["out"]
    error = float((got - wide).abs().max() / wide.abs().max())
    report("float32", error=error)
    assert error < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_many_tokens_of_small_tiles(dtype: torch.dtype) -> None:
    """Thousands of tiles over every multiprocessor, with a hundred empty experts among them."""
    shape = Shape(700, 157, 4, 64, 32, "gaps")
    p = fused.problem(shape, dtype)
    selected = p.selected_experts.clone()
    selected[selected % 3 != 0] = 3
    p = replace(p, selected_experts=selected)
    got = fused.run(p, options(COMBINATIONS[0], 4, small_kernels()))
    exact, eager = fused.exactly(p), fused.run_torch(p)
    assert fused.Yardstick(exact, (eager,), dtype).complaints(got) == []
