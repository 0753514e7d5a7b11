"""Planted defects: each kernel with one fault that a kernel like it once had, and the judge must reject it.

A defect is a replacement in the kernel's source. The changed module is loaded beside the real one and its functions put
where the real ones are used. It counts as found when the rule of `fused.Yardstick` complains (or, for sums of too low a
precision, the problem of integers), or when `conftest`'s instruments stop a wrong address.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fused
import judge
import pytest
import torch
from fused import COMBINATIONS, Shape, options, small_kernels, tma_kernels

import moefactory.triton.decode
import moefactory.triton.whole  # and what it imports: first imported under a defect, it would keep it
from moefactory.block import Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import KernelConfigBackward_dW, ResolvedModel
from moefactory.routing import make_plan
from moefactory.triton import few_tokens, launch, library, pipeline, plan, router
from moefactory.triton.forward import Rows
from moefactory.triton.schedule import TileTable

pytestmark = pytest.mark.interpreter
FOLDER = Path(moefactory.triton.__file__).parent
ON, OFF = COMBINATIONS[0], COMBINATIONS[-1]


@dataclass(frozen=True)
class Defect:
    """Replace `old` (which must be there) by `new` in `file`."""

    file: str
    old: str
    new: str


DEFECTS: dict[str, Defect] = {
    "forward: gate and up swapped": Defect(
        "forward.py",
        "gate, up = tl.split(halves)",
        "up, gate = tl.split(halves)",
    ),
    "forward: K tail of x unmasked": Defect(
        "forward.py",
        "x_tile = tl.load(x_ptrs + k, mask=(offs_k < K - k)[None, :], other=0.0)",
        "x_tile = tl.load(x_ptrs + k)",
    ),
    "forward: K tail of w unmasked": Defect(
        "forward.py",
        "w_tile = tl.load(w_ptrs + k, mask=(offs_k < K - k)[None, :], other=0.0)",
        "w_tile = tl.load(w_ptrs + k)",
    ),
    "forward: last K block dropped": Defect(
        "forward.py",
        "tl.range(0, k_end, BLOCK_K)",
        "tl.range(0, k_end - BLOCK_K, BLOCK_K)",
    ),
    "forward: dropped rows multiplied": Defect(
        "forward.py",
        "tl.where(expert < num_experts, K, 0)",
        "K",
    ),
    "forward: dropped rows not stored": Defect(
        "forward.py",
        "row_mask = offs_m < row_end",
        "row_mask = (offs_m < row_end) & (expert < num_experts)",
    ),
    "forward: the next expert's rows in a ragged tile": Defect(
        "forward.py",
        "row_mask = offs_m < row_end",
        "row_mask = offs_m < row_end + BLOCK_M",
    ),
    "forward: slot taken for token": Defect(
        "forward.py",
        "x_row = slot // TOP_K",
        "x_row = slot % TOP_K",
    ),
    "forward: sums rounded at each step": Defect(
        "forward.py",
        'acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee", out_dtype=ACC)',
        'acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee", out_dtype=ACC).to(OUT).to(ACC)',
    ),
    "forward: the second half of a tile's columns is the first": Defect(
        "forward.py",
        "(lane_n // OUT_N) * out_width",
        "(lane_n // OUT_N) * 0",
    ),
    "forward: H of the up half in the gate's place": Defect(
        "forward.py",
        "h_ptrs + out_width, up",
        "h_ptrs, up",
    ),
    "forward: TMA stores ragged tiles": Defect(
        "forward.py",
        "(row0 + tile.shape[0] <= row_end) & ",
        "(row0 >= 0) & ",
    ),
    "forward: TMA stores past the half": Defect(
        "forward.py",
        "(col0 % width + tile.shape[1] <= width)",
        "(col0 >= 0)",
    ),
    "dX: N tail of dy unmasked": Defect(
        "backward_dX.py",
        "dy_tile = tl.load(dy_ptrs + n, mask=(lane_n < N - n)[None, :], other=0.0)",
        "dy_tile = tl.load(dy_ptrs + n)",
    ),
    "dX: ds at the row, not the slot": Defect(
        "backward_dX.py",
        "* M + slot, ds_row",
        "* M + offs_m, ds_row",
    ),
    "dX: ds of one half of the columns": Defect(
        "backward_dX.py",
        "ds_row = _dswiglu_slice(right, ds_row, rows,",
        "_dswiglu_slice(right, ds_row, rows,",
    ),
    "dX: ds counts the routing weight": Defect(
        "backward_dX.py",
        "tl.where(mask, da * a, 0.0)",
        "tl.where(mask, da * a * weight[:, None], 0.0)",
    ),
    "dX: dH without the routing weight": Defect(
        "backward_dX.py",
        "dswiglu(da * weight[:, None], gate, up)",
        "dswiglu(da, gate, up)",
    ),
    "dX: dW's operand without the routing weight": Defect(
        "backward_dX.py",
        "(a * weight[:, None]).to(OUT)",
        "a.to(OUT)",
    ),
    "dX: the routing weight of the row": Defect(
        "backward_dX.py",
        "tl.load(routing_weights_ptr + slot)",
        "tl.load(routing_weights_ptr + tl.where(row_mask, offs_m, 0))",
    ),
    "dX: not scattered": Defect(
        "backward_dX.py",
        "dx_row = slot.to(tl.int64)",
        "dx_row = offs_m.to(tl.int64)",
    ),
    "dX: dropped rows multiplied": Defect(
        "backward_dX.py",
        "tl.where(expert < num_experts, N, 0)",
        "N",
    ),
    "dX: weight of the next expert": Defect(
        "backward_dX.py",
        "w + expert.to(tl.int64) * N * K",
        "w + tl.minimum(expert + 1, num_experts - 1).to(tl.int64) * N * K",
    ),
    "dW: the tail of dy and x unmasked": Defect(
        "backward_dW.py",
        "row_mask = (whole + lane_m < end)[:, None]",
        "row_mask = (whole + lane_m >= 0)[:, None]",
    ),
    "dW: the ragged step left out": Defect(
        "backward_dW.py",
        "if whole < end:",
        "if whole < start:",
    ),
    "dW: empty experts not stored": Defect(
        "backward_dW.py",
        "(offs_n < N)[:, None] &",
        "(start < end) & (offs_n < N)[:, None] &",
    ),
    "dW: rows of the step before": Defect(
        "backward_dW.py",
        "next_row = m + BLOCK_M + lane_m",
        "next_row = m + lane_m",
    ),
    "dW: columns of the first tile": Defect(
        "backward_dW.py",
        "offs_k = k0 + tl.arange(0, BLOCK_K)",
        "offs_k = tl.arange(0, BLOCK_K)",
    ),
    "dW: slot taken for token": Defect(
        "backward_dW.py",
        "other=0) // DIVISOR",
        "other=0) // (DIVISOR + 1)",
    ),
    "dW: sums rounded at each step": Defect(
        "backward_dW.py",
        'x_tile, acc, input_precision="ieee", out_dtype=ACC)',
        'x_tile, acc, input_precision="ieee", out_dtype=ACC).to(dw_ptr.dtype.element_ty).to(ACC)',
    ),
    "tiles: wrong expert at a border": Defect(
        "schedule.py",
        "ends[None, :] <= offs_t[:, None]",
        "ends[None, :] < offs_t[:, None]",
    ),
    "tiles: a ragged tile missing": Defect(
        "schedule.py",
        "(counts + BLOCK_M - 1) // BLOCK_M",
        "(counts + 1) // BLOCK_M",
    ),
    "tiles: each expert from its first row": Defect(
        "schedule.py",
        "start + (offs_t - before) * BLOCK_M",
        "start",
    ),
    "tiles: a group's last rows not swept": Defect(
        "schedule.py",
        "tl.minimum(num_m - first_m, GROUP_M)",
        "GROUP_M",
    ),
    "tiles: slots of the tile after": Defect(
        "schedule.py",
        "tl.load(gather_indices_ptr + offs_m,",
        "tl.load(gather_indices_ptr + tl.minimum(offs_m + 1, row_end - 1),",
    ),
    "combine: weight of the first slot": Defect(
        "combine.py",
        "tl.load(routing_weights_ptr + slot)",
        "tl.load(routing_weights_ptr + token * TOP_K)",
    ),
    "combine: last slot left out": Defect(
        "combine.py",
        "tl.static_range(TOP_K)",
        "tl.static_range(TOP_K - 1)",
    ),
    "combine: not unpermuted": Defect(
        "combine.py",
        "row = tl.load(scatter_indices_ptr + slot).to(tl.int64)",
        "row = slot",
    ),
    "gather: slot taken for token": Defect(
        "gather.py",
        "other=0) // DIVISOR",
        "other=0)",
    ),
    "activation: derivative without the sigmoid's": Defect(
        "activation.py",
        "tl.fma(silu, 1 - sig, sig)",
        "sig",
    ),
    "activation: up's derivative without the sigmoid": Defect(
        "activation.py",
        "da * silu",
        "da * gate",
    ),
    "activation: ds at the row": Defect(
        "activation.py",
        "tl.store(ds_ptr + slot, ds, mask=row_mask)",
        "tl.store(ds_ptr + offs_m, ds, mask=row_mask)",
    ),
    "activation: weights of the row": Defect(
        "activation.py",
        "weight = tl.load(routing_weights_ptr + slot)",
        "weight = tl.load(routing_weights_ptr + tl.where(row_mask, offs_m, 0))",
    ),
    "plan: counts of the block itself too": Defect(
        "plan.py",
        "tl.cumsum(counts, axis=0) - counts",
        "tl.cumsum(counts, axis=0)",
    ),
    "plan: few blocks, the block itself too": Defect(
        "plan.py",
        "(offs_b < block)[:, None]",
        "(offs_b <= block)[:, None]",
    ),
    "plan: few blocks, counts not stored": Defect(
        "plan.py",
        "if block == 0:\n            tl.store(counts_ptr + offs_g, counts, mask=inside)",
        "if block < 0:\n            tl.store(counts_ptr + offs_g, counts, mask=inside)",
    ),
    "plan: many blocks, the block itself too": Defect(
        "plan.py",
        "tl.cumsum(counts, axis=0) - counts\n        tl.store(tile_starts_ptr",
        "tl.cumsum(counts, axis=0)\n        tl.store(tile_starts_ptr",
    ),
    "plan: dropped ids go to expert 0": Defect(
        "plan.py",
        "(expert < E), expert, E)",
        "(expert < E), expert, 0)",
    ),
    "plan: scatter is gather": Defect(
        "plan.py",
        "tl.store(scatter_ptr + slot, row, mask=mask)",
        "tl.store(scatter_ptr + row, slot, mask=mask)",
    ),
    "router: not normalised": Defect(
        "router.py",
        "if NORM:\n        weights = weights /",
        "if NORM:\n        weights = 1.1 * weights /",
    ),
    "router: the second best twice": Defect(
        "router.py",
        "key = tl.where(offs_e[None, :] == expert[:, None], -1, key)",
        "key = tl.where((offs_e[None, :] == expert[:, None]) & (k == 0), -1, key)",
    ),
    "gate: the last tokens left out": Defect(
        "gate.py",
        "for first in range(0, T, BLOCK_T)",
        "for first in range(0, T - BLOCK_T + 1, BLOCK_T)",
    ),
    "gate: dlogits of the next expert": Defect(
        "gate.py",
        "dlogits_ptr + token[:, None] * E + expert[None, :]",
        "dlogits_ptr + token[:, None] * E + (expert[None, :] + 1) % E",
    ),
    "few tokens: an expert's rows start one late": Defect(
        "few_tokens.py",
        "starts = (ends & 0xFFFF) - counts",
        "starts = (ends & 0xFFFF) - counts + (offs_e > 0)",
    ),
    "few tokens: a token counted among the earlier": Defect(
        "few_tokens.py",
        "earlier = (tl.full((TOKENS * SLOTS,), 1, WORD) << token.to(WORD)) - 1",
        "earlier = (tl.full((TOKENS * SLOTS,), 2, WORD) << token.to(WORD)) - 1",
    ),
    "few tokens: every tile of an expert is its first": Defect(
        "few_tokens.py",
        "starts + tile * BLOCK_M, mask=tile < tiles",
        "starts, mask=tile < tiles",
    ),
    "few tokens: scatter is gather": Defect(
        "few_tokens.py",
        "tl.store(scatter_ptr + slot, row, mask=mask)",
        "tl.store(scatter_ptr + row, slot, mask=mask)",
    ),
}


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():
        yield


def plant(defect: Defect, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the changed module and put its functions wherever the real ones are."""
    text = (FOLDER / defect.file).read_text()
    assert defect.old in text, f"{defect.file} no longer contains {defect.old!r}: plant the defect anew"
    stem = defect.file.removesuffix(".py")
    path = folder / defect.file
    path.write_text(text.replace(defect.old, defect.new))
    name = f"moefactory.triton.{stem}_with_a_defect"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    with monkeypatch.context() as patch:  # operators are registered once in a process: the real ones get new kernels
        patch.setattr(library, "define", lambda schema, fake: lambda function: function)
        patch.setattr(library, "differentiate", lambda *anything: None)
        patch.setattr(router, "differentiate", lambda *anything: None)
        spec.loader.exec_module(module)
    real = sys.modules[f"moefactory.triton.{stem}"]
    for key, value in vars(real).items():
        if isinstance(value, torch._ops.OpOverload):
            setattr(module, key, value)
    swaps = {id(value): getattr(module, key) for key, value in vars(real).items() if _own(value, real)}
    for key, user in list(sys.modules.items()):
        if key.startswith("moefactory") and user is not module:
            for attribute, value in list(vars(user).items()):
                if id(value) in swaps:
                    monkeypatch.setattr(user, attribute, swaps[id(value)])


def _own(value: Any, module: Any) -> bool:
    """Whether this function or kernel was defined in `module`; operators are registered once and stay."""
    inner = getattr(value, "fn", value)
    return callable(value) and getattr(inner, "__module__", None) == module.__name__ and not isinstance(value, type)


# --- the battery ------------------------------------------------------------------------------------------------------

Check = Callable[[], list[str]]
DROPPED = Shape(21, 3, 3, 50, 47, "dropped")
GAPS = Shape(20, 5, 2, 36, 20, "gaps")
BLOCKS = Shape(150, 3, 3, 1, 1, "dropped")  # four blocks of slots
NO_TABLE = TileTable(torch.empty(0), torch.empty(0), torch.empty(0), 0)
MODEL = ResolvedModel(20, 12, 5, 3, True, "silu")


def experts(shape: Shape, flags: dict[str, bool], kernels: fused.Kernels, programs: int = 3) -> Check:
    """The rule on one problem. The interpreter runs a launch's programs one after the other: in which order tiles are
    stored, and what a store beyond its tile destroys, depends on their number."""

    def check() -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "INTERPRETED_PROGRAMS", programs)
            got = fused.run(fused.problem(shape, torch.float32), options(flags, shape.top_k, kernels))
        return fused.yardstick(shape, torch.float32).complaints(got)

    return check


def integers() -> list[str]:
    p = judge.exact_problem(torch.bfloat16)
    there = fused.Problem(p.x, p.routing_weights, p.selected_experts, p.gate_up_proj, p.down_proj, p.dy)
    got = fused.run(there, options(ON, there.top_k, small_kernels(16, 256, 64)))
    names = {"gate_up_proj": "dgate_up_proj", "down_proj": "ddown_proj"}
    return judge.unequal({names.get(name, name): t for name, t in got.items()}, p.expected(torch.bfloat16))


def rounding_of_dW() -> list[str]:
    """Three steps of bfloat16 rows, summed in float32 and rounded once: half an ulp."""
    g = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(40, 16, generator=g).bfloat16() for _ in range(2))
    rows = Rows(torch.tensor([0, 40, 40], dtype=torch.int32), torch.arange(40, dtype=torch.int32), 1, NO_TABLE)
    got = pipeline.dW_gemm(dy, x, rows, 1, KernelConfigBackward_dW(block_m=16, block_n=16, block_k=16))[0]
    exact = dy.double().T @ x.double()
    bound = 0.502 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-5
    return [] if ((got.double() - exact).abs() <= bound).all() else ["dW: rounded more than once"]


def whole_block(tokens: int = 60, flags: dict[str, bool] = ON) -> list[str]:
    """The router, too: at up to 64 tokens in one launch with the plan. Experts have several tiles."""
    weights = judge.unit_weights(MODEL, torch.float32)
    tiles: Any = {"autotune": False, "kernel_config_fwd": small_kernels()[0][2]}
    block = Qwen3MoeFusedGroupedGEMMBlock(MODEL, *(weights[name].clone() for name in judge.WEIGHTS), **flags, **tiles)
    x, dy = judge.unit_tokens(tokens, MODEL, torch.float32, 7), judge.unit_tokens(tokens, MODEL, torch.float32, 8)
    exact = judge.oracle(MODEL, weights, x, dy, judge.held_routing(MODEL, weights, x))
    return judge.complaints(judge.run_block(block, x, dy), judge.run_hf(MODEL, weights, x, dy), exact, torch.float32)


def plan_of_dropped_ids(shape: Shape = DROPPED, few: int = plan.FEW_BLOCKS) -> list[str]:
    ids = fused.problem(shape, torch.float32).selected_experts
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.plan_and_table.__globals__, "FEW_BLOCKS", few)  # the defect's own
        got, expected = plan.make_plan(ids, shape.experts), make_plan(ids, shape.experts)
    names = ("token_counts_by_expert", "gather_indices", "scatter_indices")
    return [name for name in names if not torch.equal(getattr(got, name), getattr(expected, name))]


BATTERY: list[Check] = [
    experts(DROPPED, ON, small_kernels()),
    experts(DROPPED, OFF, small_kernels()),
    experts(GAPS, {**ON, "fuse_swiglu": False}, tma_kernels({**ON, "fuse_swiglu": False})),
    experts(GAPS, {**OFF, "fuse_swiglu": True}, tma_kernels({**OFF, "fuse_swiglu": True}), programs=2),
    rounding_of_dW,
    whole_block,
    lambda: whole_block(flags=OFF),
    lambda: whole_block(few_tokens.MAX_TOKENS + 1),
    plan_of_dropped_ids,
    lambda: plan_of_dropped_ids(BLOCKS),
    lambda: plan_of_dropped_ids(BLOCKS, few=0),
    integers,
]


def found_by_battery() -> list[str]:
    """The complaints of the first check that has any; a stopped kernel is one."""
    for check in BATTERY:
        try:
            if complaints := check():
                return complaints
        except Exception as error:  # whatever the instruments or a shape raise
            return [f"{type(error).__name__}: {error}"]
    return []


def test_the_battery_accepts_the_kernels_as_they_are() -> None:
    assert found_by_battery() == []


def test_the_battery_accepts_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planting alone changes nothing: a copy of the source without a fault passes, and it is the copy that runs."""
    plant(Defect("forward.py", "@triton.jit", "@triton.jit"), tmp_path, monkeypatch)
    assert pipeline.forward_gemm.__module__ == "moefactory.triton.forward_with_a_defect"
    assert experts(GAPS, ON, small_kernels())() == []


@pytest.mark.parametrize("file", ["router.py", "few_tokens.py"])
def test_the_battery_accepts_a_copy_of_the_routing(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(Defect(file, "@triton.jit", "@triton.jit"), tmp_path, monkeypatch)
    kernel = {"router.py": router._route_forward, "few_tokens.py": few_tokens._route_few_tokens}[file]
    assert kernel.fn.__module__.endswith("_with_a_defect")
    assert whole_block() == whole_block(few_tokens.MAX_TOKENS + 1) == []


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_rejected(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(DEFECTS[name], tmp_path, monkeypatch)
    assert found_by_battery()
