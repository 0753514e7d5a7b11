"""Each kernel alone, against float64 torch: right numbers, every element written once, nothing read outside.

Sizes are odd on purpose: T around a block, E prime and 1, H and I no multiples of a block, empty experts at both ends,
one expert with all rows, dropped rows. Inputs lie in the middle of NaN, outputs are NaN before the launch. The bound is
float64's (float32's on a GPU) rounding of a sum, 1e-12 (2e-5) of the largest value: a wrong row is off by 0.1 and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import fused
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fused import DEVICE, GPU, Shape, dtype_id, selection
from interpreter import write_recorder
from torch import Tensor

from moefactory.config import KernelConfigBackward_dW, KernelConfigBackward_dX, KernelConfigForward
from moefactory.routing import RoutingPlan, make_plan, route
from moefactory.triton import launch as launch_module
from moefactory.triton.activation import swiglu_backward, swiglu_forward
from moefactory.triton.backward_dW import dW_gemm
from moefactory.triton.backward_dX import dX_gemm, dX_gemm_dswiglu
from moefactory.triton.combine import combine_rows, sum_parts
from moefactory.triton.forward import Rows, forward_gemm
from moefactory.triton.gather import gather_rows
from moefactory.triton.plan import BLOCK, plan_and_table, plan_tensors
from moefactory.triton.plan import make_plan as fused_plan
from moefactory.triton.router import (
    backward_of_parts,
    counted,
    room_for_choice,
    select_and_count,
    top_k_softmax,
    top_k_softmax_backward,
)
from moefactory.triton.schedule import WORDS, TileTable, tile_table

WIDE, BOUND = (torch.float32, 2e-5) if GPU else (torch.float64, 1e-12)
TILE: dict[str, Any] = {"block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}
FWD, DX, DW = KernelConfigForward(**TILE), KernelConfigBackward_dX(**TILE), KernelConfigBackward_dW(**TILE)

SHAPES = (
    Shape(1, 1, 1, 20, 20),
    Shape(1, 5, 5, 97, 47),
    Shape(15, 5, 1, 20, 97),
    Shape(16, 1, 1, 33, 20),
    Shape(17, 5, 3, 47, 33),
    Shape(33, 7, 2, 64, 32),
    Shape(20, 7, 3, 50, 47, "gaps"),
    Shape(24, 5, 1, 33, 20, "one"),
    Shape(24, 5, 2, 20, 47, "last"),
    Shape(19, 5, 3, 47, 20, "dropped"),
    Shape(5, 3, 2, 20, 20, "none"),
    Shape(4, 4, 4, 16, 16),
)
EMPTY = Shape(0, 4, 2, 20, 12)


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():
        yield


# --- a case: operands on the device, float64 answers ------------------------------------------------------------------


def embedded(tensor: Tensor) -> Tensor:
    """A copy in the middle of NaN, at a multiple of 16 bytes: a read past either end shows on any device."""
    pad = 64
    memory = torch.full((tensor.numel() + 2 * pad,), torch.nan, dtype=tensor.dtype, device=DEVICE)
    inner = memory[pad : pad + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


@dataclass(frozen=True)
class Operands:
    """One shape's plan and random operands; `wide(name)` is float64 on the CPU, `there(name)` what a kernel gets."""

    shape: Shape
    plan: RoutingPlan  # on the CPU
    values: dict[str, Tensor]  # float64, already rounded to the dtype under test
    dtype: torch.dtype

    def wide(self, name: str) -> Tensor:
        return self.values[name]

    def there(self, name: str) -> Tensor:
        return embedded(self.values[name].to(self.dtype))

    @property
    def rows(self) -> int:
        return self.shape.tokens * self.shape.top_k

    @property
    def kept(self) -> Tensor:
        """[T*K] bool in expert order: not a dropped slot."""
        return torch.arange(self.rows) < int(self.plan.token_counts_by_expert.sum())

    @property
    def expert(self) -> Tensor:
        """[T*K] the expert of each expert-order row; a dropped one has the last."""
        counts = [*self.plan.token_counts_by_expert.tolist(), self.rows - int(self.kept.sum())]
        return (
            torch.arange(self.shape.experts + 1)
            .repeat_interleave(torch.tensor(counts))
            .clamp(max=self.shape.experts - 1)
        )

    def device_plan(self) -> RoutingPlan:
        p = self.plan
        return RoutingPlan(
            p.token_counts_by_expert.to(DEVICE), p.gather_indices.to(DEVICE), p.scatter_indices.to(DEVICE), p.top_k
        )

    def device_rows(self, block_m: int = 16) -> Rows:
        plan = self.device_plan()
        offsets, n = plan.group_offsets, plan.gather_indices.shape[0]
        table = tile_table(offsets, n, block_m) if n else TileTable(offsets, offsets, offsets, 0)
        return Rows(offsets, plan.gather_indices, plan.top_k, table)

    def source(self, divisor: int) -> Tensor:
        """The row that each expert-order row reads: itself, or gather // divisor."""
        return torch.arange(self.rows) if divisor == 0 else self.plan.gather_indices.long() // divisor

    def product(self, rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """Each row times its expert's weight (transposed: the forward), zeros for dropped rows; float64."""
        w = weight[self.expert]
        out = torch.einsum("rk,rnk->rn" if transposed else "rn,rnk->rk", rows, w)
        return out * self.kept[:, None]


def operands(shape: Shape, dtype: torch.dtype = WIDE, seed: int = 0) -> Operands:
    g = torch.Generator().manual_seed(seed)
    t, e, k, h, i = shape.tokens, shape.experts, shape.top_k, shape.hidden, shape.intermediate
    m = t * k
    sizes = {
        "x": (t, h), "x_rows": (m, h), "up": (e, 2 * i, h), "down": (e, h, i), "a": (m, i), "h": (m, 2 * i),
        "y": (m, h), "dout": (t, h), "dout_rows": (m, h), "dh": (m, 2 * i), "s": (t, k),
    }  # fmt: skip
    values = {n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype).double() for n, s in sizes.items()}
    return Operands(shape, make_plan(selection(shape, g), e), values, dtype)


def check(got: Tensor, exact: Tensor, what: str = "") -> None:
    """Same shape, and off by at most BOUND of the largest value, each element."""
    got = got.detach().cpu()
    assert tuple(got.shape) == tuple(exact.shape), what
    if got.numel():
        error = (got.double() - exact).abs().nan_to_num(nan=torch.inf).max()
        assert error <= BOUND * exact.abs().max().clamp(min=1), f"{what}: off by {error:.3g}"


def silu_parts(h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, gate, up, sigmoid(gate)) of h."""
    gate, up = h.chunk(2, dim=1)
    return F.silu(gate) * up, gate, up, torch.sigmoid(gate)


# --- what each kernel must give ---------------------------------------------------------------------------------------
# A runner launches on the device and gives (name, got, exact) for each of its outputs.

Result = list[tuple[str, Tensor, Tensor]]
Runner = Callable[[Operands, Rows], Result]


def run_forward(o: Operands, rows: Rows, config: KernelConfigForward = FWD, *, gather: bool) -> Result:
    x = "x" if gather else "x_rows"
    y, h = forward_gemm(o.there(x), o.there("up"), rows, config, permute_x=gather)
    assert h is None
    return [("y", y, o.product(o.wide(x)[o.source(o.plan.top_k if gather else 0)], o.wide("up"), True))]


def run_forward_down(o: Operands, rows: Rows, config: KernelConfigForward = FWD, *, scatter: bool) -> Result:
    y, _ = forward_gemm(o.there("a"), o.there("down"), rows, config, permute_y=scatter)
    exact = o.product(o.wide("a"), o.wide("down"), True)
    return [("y", y, exact[o.plan.scatter_indices.long()] if scatter else exact)]


def run_forward_swiglu(
    o: Operands, rows: Rows, config: KernelConfigForward = FWD, *, gather: bool, store_h: bool
) -> Result:
    x = "x" if gather else "x_rows"
    a, h = forward_gemm(o.there(x), o.there("up"), rows, config, permute_x=gather, swiglu=True, store_h=store_h)
    exact = o.product(o.wide(x)[o.source(o.plan.top_k if gather else 0)], o.wide("up"), True)
    assert (h is not None) == store_h
    return [("a", a, silu_parts(exact)[0]), *([("h", h, exact)] if h is not None else [])]


def run_dX(o: Operands, rows: Rows, config: KernelConfigBackward_dX = DX, *, scatter: bool) -> Result:
    dx = dX_gemm(o.there("dh"), o.there("up"), rows, config, scatter=scatter)
    exact = o.product(o.wide("dh"), o.wide("up"), False)
    return [("dx", dx, exact[o.plan.scatter_indices.long()] if scatter else exact)]


def _dy(o: Operands, divisor: int) -> tuple[str, Tensor]:
    name = "dout" if divisor > 1 else "dout_rows"
    if o.plan.top_k == 1 and divisor:
        name = "dout"
    return name, o.wide(name)[o.source(divisor)]


def _divisor(o: Operands, gather: str) -> int:
    return {"expert": 0, "slot": 1, "token": o.plan.top_k}[gather]


def run_dX_gather(o: Operands, rows: Rows, config: KernelConfigBackward_dX = DX, *, order: str) -> Result:
    name, dy = _dy(o, _divisor(o, order))
    da = dX_gemm(o.there(name), o.there("down"), rows, config, dy_divisor=_divisor(o, order))
    return [("da", da, o.product(dy, o.wide("down"), False))]


def run_dX_dswiglu(
    o: Operands, rows: Rows, config: KernelConfigBackward_dX = DX, *, order: str, weighted: bool
) -> Result:
    name, dy = _dy(o, _divisor(o, order))
    weights = o.there("s") if weighted else None
    got = dX_gemm_dswiglu(
        o.there(name), o.there("down"), o.there("h"), weights, rows, config, dy_divisor=_divisor(o, order)
    )
    da = o.product(dy, o.wide("down"), False)
    return list(zip(("dh", "scaled_a", "ds"), got, exact_dswiglu(o, da, weighted), strict=True))


def exact_dswiglu(o: Operands, da: Tensor, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, s * a, ds in token order) from the gradient of a, in float64."""
    a, gate, up, sig = silu_parts(o.wide("h"))
    s = o.wide("s").reshape(-1, 1)[o.plan.gather_indices.long()] if weighted else torch.ones_like(a[:, :1])
    dgate = s * da * up * (sig + gate * sig * (1 - sig))
    return torch.cat([dgate, s * da * F.silu(gate)], 1), s * a, (da * a).sum(1)[o.plan.scatter_indices.long()]


def run_dW_up(o: Operands, rows: Rows, config: KernelConfigBackward_dW = DW, *, gather: bool) -> Result:
    x, divisor = ("x", o.plan.top_k) if gather else ("x_rows", 0)
    dw = dW_gemm(o.there("dh"), o.there(x), rows, o.shape.experts, config, x_divisor=divisor)
    return [("dw", dw, exact_dW(o, o.wide("dh"), o.wide(x)[o.source(divisor)]))]


def run_dW_down(o: Operands, rows: Rows, config: KernelConfigBackward_dW = DW, *, order: str) -> Result:
    name, dy = _dy(o, _divisor(o, order))
    dw = dW_gemm(o.there(name), o.there("a"), rows, o.shape.experts, config, dy_divisor=_divisor(o, order))
    return [("dw", dw, exact_dW(o, dy, o.wide("a")))]


def exact_dW(o: Operands, dy: Tensor, x: Tensor) -> Tensor:
    mine = F.one_hot(o.expert, o.shape.experts).double() * o.kept[:, None]
    return torch.einsum("re,rn,rk->enk", mine, dy, x)


def run_combine(o: Operands, rows: Rows, *, token_order: bool, weighted: bool) -> Result:
    weights = o.there("s") if weighted else None
    out = combine_rows(o.there("y"), o.device_plan().scatter_indices, weights, o.plan.top_k, token_order=token_order)
    y = o.wide("y") if token_order else o.wide("y")[o.plan.scatter_indices.long()]
    s = o.wide("s") if weighted else torch.ones_like(o.wide("s"))
    return [("out", out, (y.view(*s.shape, y.shape[1]) * s[..., None]).sum(1))]


def run_gather(o: Operands, rows: Rows, *, order: str) -> Result:
    name, dy = _dy(o, _divisor(o, order))
    return [("rows", gather_rows(o.there(name), o.device_plan().gather_indices, _divisor(o, order)), dy)]


def run_swiglu_forward(o: Operands, rows: Rows, *, weighted: bool) -> Result:
    a = swiglu_forward(o.there("h"), o.device_plan().gather_indices, o.there("s") if weighted else None)
    exact = silu_parts(o.wide("h"))[0]
    s = o.wide("s").reshape(-1, 1)[o.plan.gather_indices.long()] if weighted else 1
    return [("a", a, exact * s)]


def run_swiglu_backward(o: Operands, rows: Rows, *, weighted: bool) -> Result:
    weights = o.there("s") if weighted else None
    got = swiglu_backward(o.there("a"), o.there("h"), o.device_plan().gather_indices, weights)
    return list(zip(("dh", "scaled_a", "ds"), got, exact_dswiglu(o, o.wide("a"), weighted), strict=True))


ORDERS = ("expert", "slot", "token")
RUNNERS: dict[str, tuple[Callable[..., Result], dict[str, Any]]] = {
    "forward": (run_forward, {"gather": False}),
    "forward gather": (run_forward, {"gather": True}),
    "forward down": (run_forward_down, {"scatter": False}),
    "forward down scatter": (run_forward_down, {"scatter": True}),
    **{
        f"forward swiglu{' gather' * g}{' h' * h}": (run_forward_swiglu, {"gather": g, "store_h": h})
        for g, h in product((False, True), repeat=2)
    },
    "dX": (run_dX, {"scatter": False}),
    "dX scatter": (run_dX, {"scatter": True}),
    **{f"dX {order}": (run_dX_gather, {"order": order}) for order in ORDERS},
    **{
        f"dX dswiglu {order}{' weighted' * w}": (run_dX_dswiglu, {"order": order, "weighted": w})
        for order, w in (("expert", True), ("expert", False), ("token", True), ("slot", False))
    },
    "dW up": (run_dW_up, {"gather": False}),
    "dW up gather": (run_dW_up, {"gather": True}),
    **{f"dW down {order}": (run_dW_down, {"order": order}) for order in ORDERS},
    **{
        f"combine {'token' if t else 'expert'}{' weighted' * w}": (run_combine, {"token_order": t, "weighted": w})
        for t, w in product((False, True), repeat=2)
    },
    **{f"gather {order}": (run_gather, {"order": order}) for order in ("slot", "token")},
    **{f"swiglu forward{' weighted' * w}": (run_swiglu_forward, {"weighted": w}) for w in (False, True)},
    **{f"swiglu backward{' weighted' * w}": (run_swiglu_backward, {"weighted": w}) for w in (False, True)},
}
GEMMS = [name for name in RUNNERS if name.startswith(("forward", "dX", "dW"))]


def run(name: str, o: Operands, **more: Any) -> Result:
    function, flags = RUNNERS[name]
    return function(o, o.device_rows(more["config"].block_m if "config" in more else 16), **flags, **more)


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RUNNERS)
def test_against_float64(name: str, shape: Shape) -> None:
    for what, got, exact in run(name, operands(shape)):
        check(got, exact, what)


@pytest.mark.parametrize("name", RUNNERS)
def test_no_rows(name: str) -> None:
    """T=0: empty results, and weight gradients of zeros (not NaN: no kernel runs)."""
    for what, got, exact in run(name, operands(EMPTY)):
        check(got, exact, what)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", RUNNERS)
def test_each_element_is_written_once(name: str) -> None:
    """No races: no launch writes an element twice; outputs are written whole, also ds before its sum over tiles."""
    for shape in (SHAPES[4], SHAPES[6], SHAPES[9]):
        with write_recorder() as recorder:
            results = run(name, operands(shape))
        for what, got, _ in results:
            if not (what == "ds" and "dX" in name):  # that one is torch's sum of what the kernel wrote
                recorder.check_written_once(got)
        touched = [t for each in recorder._launches for key, t in each.arguments.items() if key.endswith("_ptr")]
        assert not any(recorder.duplicates(t) for t in touched)


@pytest.mark.interpreter
@pytest.mark.parametrize("programs", [1, 2, 3])
def test_tma_stores_write_each_element_once(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ragged tile stored whole would write the next expert's rows too; which one wins depends on the programs."""
    monkeypatch.setattr(launch_module, "INTERPRETED_PROGRAMS", programs)
    for name in (name for name, flags in TMA_FLAGS.items() if "use_tma_store" in flags):
        config = _config(name, (16, 32, 32), use_tma_store=True)
        with write_recorder() as recorder:
            results = run(name, operands(TMA_SHAPES[0], torch.float32), config=config)
        for what, got, exact in results:
            recorder.check_written_once(got)
            assert (got.double() - exact).abs().max() <= 2e-5 * exact.abs().max(), (name, what)


@pytest.mark.interpreter
def test_the_write_recorder_is_listening() -> None:
    """Two rows of the plan with one slot: the scatter writes it twice, and the other slot never."""
    o = operands(SHAPES[4])
    gather = o.plan.gather_indices.clone()
    gather[3] = gather[5]
    wrong = replace(o, plan=replace(o.plan, gather_indices=gather))
    with write_recorder() as recorder:
        y = run("forward down scatter", wrong)[0][1]
    with pytest.raises(AssertionError, match="never written"):
        recorder.check_written_once(y)


# --- tiles ------------------------------------------------------------------------------------------------------------

TILES = ((16, 32, 32), (32, 64, 16), (64, 32, 64), (16, 128, 128), (128, 16, 16))
CONFIG_OF = {"forward": KernelConfigForward, "dX": KernelConfigBackward_dX, "dW": KernelConfigBackward_dW}


def _config(name: str, tile: tuple[int, int, int], **more: Any) -> Any:
    m, n, k = tile
    if "swiglu" in name and name.startswith("forward"):
        n = max(n, 32)
    return CONFIG_OF[name.split(maxsplit=1)[0]](block_m=m, block_n=n, block_k=k, num_warps=4, num_stages=2, **more)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", GEMMS)
def test_tiles(name: str, tile: tuple[int, int, int]) -> None:
    """Several tiles in every dimension, or one that is larger than the problem: the same numbers."""
    if GPU and name not in {"forward swiglu gather h", "dX dswiglu token weighted", "dW up gather"}:
        tile = TILES[0]  # a compilation for each: three kernels see all tiles, the others one
    for flatten in (False, True):
        for what, got, exact in run(
            name, operands(Shape(37, 3, 2, 97, 47)), config=_config(name, tile, flatten=flatten)
        ):
            check(got, exact, what)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("programs", [1, 2, 50])
def test_number_of_programs(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One persistent program, a few, or more than there are tiles: the same bits."""
    o = operands(SHAPES[4])
    before = run(name, o)
    monkeypatch.setattr(launch_module, "INTERPRETED_PROGRAMS", programs)
    for (what, got, _), (_, expected, _) in zip(run(name, o), before, strict=True):
        assert torch.equal(got, expected), what


@pytest.mark.parametrize("block_m", [16, 32, 128])
@pytest.mark.parametrize("shape", [*SHAPES, Shape(200, 37, 2, 16, 16), Shape(9, 7, 2, 16, 16, "gaps")], ids=str)
def test_tile_table(shape: Shape, block_m: int) -> None:
    """Every expert's rows cut into blocks, dropped rows last, in order; the promised bound holds; counters are 0."""
    plan = operands(shape).device_plan()
    offsets = plan.group_offsets
    table = tile_table(offsets, plan.gather_indices.shape[0], block_m)
    ends = offsets.tolist()
    expected = [(group, row) for group, (start, end) in enumerate(pairwise(ends)) for row in range(start, end, block_m)]
    count, *counters = table.num_tiles.tolist()
    assert (count, counters) == (len(expected), [0] * (WORDS - 1))
    assert count <= table.max_tiles
    assert list(zip(table.tile_expert[:count].tolist(), table.tile_row[:count].tolist(), strict=True)) == expected


# --- plan and router --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [*SHAPES, EMPTY, Shape(300, 5, 3, 1, 1, "dropped"), Shape(129, 128, 8, 1, 1), Shape(43, 3, 3, 1, 1)],
    ids=str,
)
def test_plan(shape: Shape) -> None:
    """The counting sort gives the plan of `moefactory.routing`, bit for bit: several blocks, dropped ids, no rows."""
    ids = selection(shape, torch.Generator().manual_seed(3))
    got, expected = fused_plan(ids.to(DEVICE), shape.experts), make_plan(ids, shape.experts)
    for name in ("token_counts_by_expert", "gather_indices", "scatter_indices", "group_offsets"):
        one, other = getattr(got, name).cpu(), getattr(expected, name)
        assert torch.equal(one, other), name
        assert one.dtype == other.dtype == torch.int32
    assert got.top_k == expected.top_k


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8], ids=dtype_id)
def test_plan_of_other_integers(dtype: torch.dtype) -> None:
    """Any integers in any layout are ids."""
    ids = torch.tensor([[0, 3], [2, 1], [5, 200]])
    got = fused_plan(ids.to(DEVICE, dtype).T.contiguous().T, 4)
    assert torch.equal(got.gather_indices.cpu(), make_plan(ids, 4).gather_indices)


@pytest.mark.interpreter
@pytest.mark.parametrize("few", [15, 14])
def test_plan_with_many_blocks(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of 15 blocks, as many as are few, are added up by each program; of more by a prefix, which walks more
    than one step. Every element is written once."""
    monkeypatch.setattr("moefactory.triton.plan.BLOCK", 16)
    monkeypatch.setattr("moefactory.triton.plan.FEW_BLOCKS", few)
    monkeypatch.setattr("moefactory.triton.plan.PREFIX_BLOCKS", 4)
    ids = selection(Shape(80, 5, 3, 1, 1, "dropped"), torch.Generator().manual_seed(3))
    with launch_module.record_launches() as names, write_recorder() as recorder:
        got = fused_plan(ids, 5)
    assert ("plan_prefix" in names) == (few < 15)
    assert torch.equal(got.gather_indices, make_plan(ids, 5).gather_indices)
    recorder.check_written_once(got.gather_indices, got.scatter_indices, got.group_offsets, got.token_counts_by_expert)


@pytest.mark.parametrize("few", [0, 32])
@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize(
    "sizes", [(65, 5, 4), (300, 128, 8), (129, 40, 16), (130, 9, 3), (40, 200, 8), (20, 300, 8)], ids=str
)
def test_counts_and_table_along_the_way(
    sizes: tuple[int, int, int], block_m: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the router counts and what `plan_positions` adds are the bits of the kernels that do it alone: last blocks
    of a few tokens, experts without tokens, a top_k of which blocks hold no whole tokens, more experts than a warp has
    in a row, a table too long to be made along the way; blocks that are few and that are not, more groups than few."""
    monkeypatch.setattr("moefactory.triton.plan.FEW_BLOCKS", few)
    tokens, experts, top_k = sizes
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    logits[:, 1] = -20.0
    alone = top_k_softmax(logits, top_k, True)
    counts = counted(top_k, experts, BLOCK)
    assert counts == (top_k != 3 and experts <= 128)
    chosen = room_for_choice(logits, top_k, True)
    tile_counts = select_and_count(logits, True, BLOCK if counts else 0, chosen)
    assert all(torch.equal(one, other) for one, other in zip(chosen, alone, strict=True))
    plan = plan_tensors(alone[1], experts)
    indices = (torch.empty_like(plan[1]), torch.empty_like(plan[2]), torch.empty_like(plan[3]))
    planned, table = plan_and_table(chosen[1], experts, tile_counts, block_m, indices)
    assert all(torch.equal(one, other) for one, other in zip((planned, *indices), plan, strict=True))
    torchs = make_plan(alone[1].cpu(), experts)  # `plan` was made by as many launches as `planned`
    assert torch.equal(planned[:experts].cpu(), torchs.token_counts_by_expert)
    for mine, other in zip(indices, (torchs.group_offsets, torchs.gather_indices, torchs.scatter_indices), strict=True):
        assert torch.equal(mine.cpu(), other)
    right = tile_table(plan[1], tokens * top_k, block_m)
    assert (table is None) == (right.max_tiles > 32 * -(-tokens * top_k // BLOCK))
    if table is not None:
        number = int(right.num_tiles[0])
        assert table[0].shape == table[1].shape == (right.max_tiles,)
        assert torch.equal(table[2], right.num_tiles)
        assert torch.equal(table[0][:number], right.tile_expert[:number])
        assert torch.equal(table[1][:number], right.tile_row[:number])


ROUTES = [(1, 1, 1), (7, 5, 1), (9, 5, 5), (8, 8, 2), (17, 7, 3), (33, 37, 8), (3, 128, 8)]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("sizes", ROUTES, ids=str)
def test_router(sizes: tuple[int, int, int], norm: bool) -> None:
    """Weights, choice and the logits' gradient against float64 torch."""
    tokens, experts, top_k = sizes
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=g, dtype=WIDE)
    dweights = torch.randn(tokens, top_k, generator=g, dtype=WIDE)
    wide = logits.double().requires_grad_()
    weights, selected = route(wide, torch.eye(experts, dtype=torch.float64), top_k, norm)[1:]
    (exact,) = torch.autograd.grad(weights, wide, dweights.double())
    leaf = embedded(logits).requires_grad_()
    got, ids, _ = top_k_softmax(leaf, top_k, norm)
    assert torch.equal(ids.cpu(), selected)
    assert ids.dtype == torch.int64
    check(got, weights.detach())
    check(torch.autograd.grad(got, leaf, dweights.to(DEVICE))[0], exact)


def _router_gradient(logits: Tensor, dweights: Tensor, top_k: int, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(ours, torch's in the same dtype, float64's)."""
    found = []
    for t in (logits, logits.double()):
        leaf = t.clone().requires_grad_()
        weights = route(leaf, torch.eye(t.shape[1], dtype=t.dtype), top_k, norm)[1]
        found.append(torch.autograd.grad(weights, leaf, dweights.to(t.dtype))[0])
    leaf = logits.to(DEVICE).requires_grad_()
    weights = top_k_softmax(leaf, top_k, norm)[0]
    return torch.autograd.grad(weights, leaf, dweights.to(DEVICE))[0].cpu(), *found


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gap", [0, 3, 9])
def test_router_gradient_of_a_sure_router(norm: bool, gap: int) -> None:
    """One expert far ahead: what little gradient is left is at most twice as wrong as torch's."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 8, generator=g)
    logits[torch.arange(32), torch.randint(8, (32,), generator=g)] += gap
    ours, eager, exact = _router_gradient(logits, torch.randn(32, 3, generator=g), 3, norm)
    scale = exact.abs().amax()
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 2e-7 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_router_gradient_of_one_expert_is_zero(dtype: torch.dtype) -> None:
    """top_k = 1 with norm_topk_prob: the weight is 1 whatever the logits are, and nothing may leak into the gate."""
    ours, *_ = _router_gradient(torch.randn(9, 5).to(dtype), torch.randn(9, 1).to(dtype), 1, True)
    assert not ours.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_router_breaks_ties_by_the_lowest_expert(dtype: torch.dtype) -> None:
    """Equal logits, many at the border, and logits so low that their probability is zero."""
    logits = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 2, 1, 2, 1, 1, 0], [0, -900, -900, -900, -900, -900, -900]])
    weights, ids, _ = top_k_softmax(logits.to(DEVICE, dtype), 3, True)
    assert ids.tolist() == [[0, 1, 2], [1, 3, 2], [0, 1, 2]]
    torch.testing.assert_close(weights[0].float().cpu(), torch.full((3,), 1 / 3), atol=2e-3, rtol=0)
    assert weights[2].tolist() == [1, 0, 0]


def test_router_of_nan() -> None:
    """A row with NaN gets NaN weights and distinct ids in range; no other row is touched."""
    logits = torch.randn(5, 6)
    clean, ids, _ = top_k_softmax(logits.to(DEVICE), 3, True)
    for bad in (torch.nan, torch.inf):
        logits[2, 1] = bad
        weights, chosen, _ = top_k_softmax(logits.to(DEVICE), 3, True)
        assert weights[2].isnan().all()
        assert all(0 <= e < 6 for e in chosen[2].tolist())
        assert len(set(chosen[2].tolist())) == 3
        others = [0, 1, 3, 4]
        assert torch.equal(weights[others], clean[others])
        assert torch.equal(chosen[others], ids[others])


@pytest.mark.interpreter
def test_router_writes_once() -> None:
    leaf = torch.randn(19, 7).requires_grad_()
    with write_recorder() as recorder:
        weights, ids, _ = top_k_softmax(leaf, 3, True)
        (dlogits,) = torch.autograd.grad(weights, leaf, torch.ones_like(weights))
        recorder.check_written_once(weights.detach(), ids, dlogits)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_gradient_of_the_weights_in_parts(dtype: torch.dtype, number: int, norm: bool) -> None:
    """[P, T*K] in float32, added in their order and rounded once: the bits of the backward that is given the sum, here
    of 1,300 tokens with parts of very different sizes, so that another order shows."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(1300, 9, generator=g).to(DEVICE, dtype)
    _, selected, exact = top_k_softmax(logits, 3, norm)
    scales = 10.0 ** torch.arange(number)[:, None]
    parts = (torch.randn(number, 3900, generator=g) * scales).to(DEVICE)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    assert torch.equal(sum_parts(parts), total)
    saved = exact if norm else logits
    expected = top_k_softmax_backward(total.to(dtype).view(1300, 3), saved, selected, 9, norm)
    got = backward_of_parts(parts, dtype, saved, selected, 9, norm)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


# --- TMA --------------------------------------------------------------------------------------------------------------

TMA_FLAGS = {
    "forward": ("use_tma_load_w", "use_tma_load_x", "use_tma_store"),
    "forward down": ("use_tma_load_w", "use_tma_load_x", "use_tma_store"),
    "forward gather": ("use_tma_load_w", "use_tma_store"),
    "forward down scatter": ("use_tma_load_w", "use_tma_load_x"),
    "forward swiglu": ("use_tma_load_w", "use_tma_load_x", "use_tma_store"),
    "forward swiglu h": ("use_tma_load_w", "use_tma_load_x", "use_tma_store"),
    "forward swiglu gather h": ("use_tma_load_w", "use_tma_store"),
    "dX": ("use_tma_load_w", "use_tma_load_dy", "use_tma_store"),
    "dX scatter": ("use_tma_load_w", "use_tma_load_dy"),
    "dX expert": ("use_tma_load_w", "use_tma_load_dy", "use_tma_store"),
    "dX token": ("use_tma_load_w", "use_tma_store"),
    "dX dswiglu expert weighted": ("use_tma_load_w", "use_tma_load_dy"),
    "dX dswiglu token weighted": ("use_tma_load_w",),
    "dW up": ("use_tma_load_dy", "use_tma_load_x", "use_tma_store"),
    "dW up gather": ("use_tma_load_dy", "use_tma_store"),
    "dW down expert": ("use_tma_load_dy", "use_tma_load_x", "use_tma_store"),
    "dW down token": ("use_tma_load_x", "use_tma_store"),
}
TMA_SHAPES = (Shape(25, 3, 2, 52, 44), Shape(20, 7, 2, 64, 32, "gaps"), Shape(9, 5, 3, 36, 20, "dropped"))


@pytest.mark.parametrize("name", TMA_FLAGS)
def test_tma_gives_the_same_bits(name: str) -> None:
    """Each TMA flag alone and all together, against pointers at the same tiles: bitwise, ragged tiles included."""
    flags = TMA_FLAGS[name]
    together = dict.fromkeys(flags, True)
    for shape in TMA_SHAPES:
        o = operands(shape, torch.float32)
        settings = [together] if shape is not TMA_SHAPES[0] else [together, *({flag: True} for flag in flags)]
        plain = run(name, o, config=_config(name, (16, 32, 32)))
        for setting in settings:
            got = run(name, o, config=_config(name, (16, 32, 32), **setting))
            for (what, one, exact), (_, other, _) in zip(got, plain, strict=True):
                assert torch.equal(one, other), f"{what} of {shape} with {setting}"
                assert (one.cpu().double() - exact).abs().max() <= 2e-5 * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", [name for name in TMA_FLAGS if "load_w" in TMA_FLAGS[name][0]])
def test_tma_of_a_misaligned_weight_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stated TMA flag and an address that TMA cannot take: one line that names the cause, no launch."""
    o = operands(TMA_SHAPES[0], torch.float32)

    def shifted(self: Operands, which: str) -> Tensor:
        tensor = self.values[which].to(self.dtype)
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)[1:]
        return memory.view(tensor.shape).copy_(tensor) if which in {"up", "down"} else tensor.to(DEVICE)

    monkeypatch.setattr(Operands, "there", shifted)
    run(name, o)  # pointers do not mind
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        run(name, o, config=_config(name, (16, 32, 32), use_tma_load_w=True))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("name", ["forward gather", "forward down scatter", "dX scatter", "dW up gather",
                                  "combine expert weighted", "combine token"])  # fmt: skip
def test_one_rounding(name: str, dtype: torch.dtype) -> None:
    """Sums are held in float32 and rounded once: half an ulp of the result, and float32's noise of the sum."""
    for what, got, exact in run(name, operands(Shape(37, 3, 2, 80, 47), dtype)):
        assert got.dtype == dtype
        bound = 0.502 * torch.finfo(dtype).eps * exact.abs() + 2e-5 * exact.abs().max()
        assert ((got.cpu().double() - exact).abs() <= bound).all(), what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_h_is_rounded_before_the_activation(dtype: torch.dtype) -> None:
    """The fused epilogue and the two kernels apart give the same bits of A and H."""
    o = operands(Shape(21, 3, 2, 80, 47), dtype)
    fused = run("forward swiglu gather h", o)
    ((_, h, _),) = run("forward gather", o)
    a = swiglu_forward(h, o.device_plan().gather_indices, None)
    assert torch.equal(fused[1][1], h)
    assert torch.equal(fused[0][1], a)


# --- isolation --------------------------------------------------------------------------------------------------------

BAD = (float("nan"), float("inf"))
ISOLATED = Shape(37, 5, 3, 40, 20)


def _outputs(name: str, o: Operands) -> dict[str, Tensor]:
    return {what: got.cpu() for what, got, _ in run(name, o)}


def _spoiled(o: Operands, which: str, index: Any, value: float) -> Operands:
    changed = o.wide(which).clone()
    changed[index] = value
    return replace(o, values={**o.values, which: changed})


def _same_bits(left: Tensor, right: Tensor) -> Tensor:
    """Elementwise, NaN equal to itself."""
    return (left == right) | (left.isnan() & right.isnan())


def _row_input(name: str) -> str:
    """The operand whose rows are tokens' (or slots') in a kernel that gives rows."""
    if name.startswith("forward down"):
        return "a"
    if name.startswith("forward"):
        return "x" if "gather" in name else "x_rows"
    if name in {"dX", "dX scatter"}:
        return "dh"
    if name.startswith("dX"):
        return "dout" if "token" in name else "dout_rows"
    if name.startswith("gather"):
        return "dout" if "token" in name else "dout_rows"
    return {"combine": "y", "swiglu f": "h", "swiglu b": "a"}[name[: 7 + name.startswith("swiglu")]]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", [name for name in RUNNERS if not name.startswith("dW")])
def test_a_bad_row_stays_in_its_row(name: str, value: float) -> None:
    """One row of NaN or Inf changes only the rows that read it, bit for bit."""
    o, which = operands(ISOLATED), _row_input(name)
    row = o.wide(which).shape[0] // 2
    clean, spoiled = _outputs(name, o), _outputs(name, _spoiled(o, which, row, value))
    for what in clean:
        differ = ~_same_bits(clean[what], spoiled[what]).reshape(clean[what].shape[0], -1).all(1)
        readers = int(differ.sum())
        most = o.plan.top_k if which in {"x", "dout"} else 1
        assert readers == 0 if what == "scaled_a" else 1 <= readers <= most, what  # scaled_a is of H alone


@pytest.mark.parametrize("side", ["dy", "x"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", [name for name in RUNNERS if name.startswith("dW")])
def test_a_bad_row_stays_in_its_experts_gradient(name: str, value: float, side: str) -> None:
    """Ragged last steps mask both operands: 0 * NaN of the next expert's row never arrives."""
    o = operands(ISOLATED)
    if name.startswith("dW up"):
        which = "dh" if side == "dy" else ("x" if "gather" in name else "x_rows")
    else:
        which = "a" if side == "x" else ("dout" if "token" in name else "dout_rows")
    starts = o.plan.group_offsets[:-2].tolist()
    for row in starts[1:]:  # the row right behind an expert's last
        source = int(o.source(o.plan.top_k)[row]) if which in {"x", "dout"} else row
        if which == "dout_rows" and "slot" in name:
            source = int(o.plan.gather_indices[row])
        clean, spoiled = _outputs(name, o)["dw"], _outputs(name, _spoiled(o, which, source, value))["dw"]
        hit = {int(o.expert[r]) for r in range(o.rows) if which not in {"x", "dout"} and r == row}
        if which in {"x", "dout"}:
            hit = set(o.expert[o.source(o.plan.top_k) == source].tolist())
        differ = ~_same_bits(clean, spoiled).reshape(clean.shape[0], -1).all(1)
        assert set(differ.nonzero().flatten().tolist()) == hit


@pytest.mark.parametrize("name", [n for n in RUNNERS if n.startswith(("forward", "dX"))])
def test_bad_weights_stay_with_their_expert(name: str) -> None:
    """NaN in one expert's weights reaches that expert's rows and no other, also where tiles are ragged."""
    o = operands(ISOLATED)
    which = "up" if name in {"forward", "forward gather", "dX", "dX scatter"} or "forward swiglu" in name else "down"
    for expert in (0, 2, 4):
        clean, spoiled = _outputs(name, o), _outputs(name, _spoiled(o, which, expert, torch.nan))
        for what in clean:
            rows = o.expert if what not in {"ds"} and "scatter" not in name else o.expert[o.plan.scatter_indices.long()]
            differ = ~_same_bits(clean[what], spoiled[what]).reshape(o.rows, -1).all(1)
            if what != "scaled_a":
                assert torch.equal(differ, rows == expert), what
            else:
                assert not differ.any()


# --- addresses beyond 2^31 --------------------------------------------------------------------------------------------
# Gigabytes that are never touched cost nothing on a CPU: zeros of numpy are mapped, not written. One tile at the far
# end of each tensor; an offset in int32 would wrap, which `conftest` turns into an error, or land outside.

FAR_ROW, FAR_EXPERT, WIDTH = 2**31 // 64 - 5, 2**31 // (64 * 64) + 3, 64  # rows and experts of 64 (by 64) elements


def _virtual(*shape: int, dtype: Any = np.float16) -> Tensor:
    return torch.from_numpy(np.zeros(shape, dtype=dtype))


def _one_tile(expert: int, experts: int, row0: int, end: int) -> Rows:
    """The rows from `row0` to `end` belong to `expert`, those before to the experts before; slots are rows."""
    offsets = torch.full((experts + 2,), row0, dtype=torch.int32)
    offsets[0], offsets[expert + 1 :] = 0, end
    gather = _virtual(end, dtype=np.int32)
    gather[row0:] = torch.arange(row0, end)
    table = [torch.tensor([value], dtype=torch.int32) for value in (expert, row0, 1)]
    return Rows(offsets, gather, 1, TileTable(table[0], table[1], table[2], 1))


@dataclass(frozen=True)
class _Far:
    """A problem of one tile at the far end of the rows, of the experts, or of both."""

    rows: Rows
    expert: int
    experts: int
    row0: int
    end: int
    draw: torch.Generator

    def matrix(self, width: int = WIDTH) -> Tensor:
        """[rows, width], random in the tile's rows."""
        tensor = _virtual(self.end, width)
        tensor[self.row0 :] = torch.randn(self.end - self.row0, width, generator=self.draw)
        return tensor

    def weight(self, n: int = WIDTH) -> Tensor:
        tensor = _virtual(self.experts, n, WIDTH)
        tensor[self.expert] = torch.randn(n, WIDTH, generator=self.draw) / 8
        return tensor

    def near(self, tensor: Tensor) -> Tensor:
        """The rows of the tile, in float64."""
        return tensor[self.row0 : self.end].double()


@pytest.fixture(params=["rows", "experts"])
def far(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> _Far:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # nobody fills gigabytes
    rows, experts = (FAR_ROW, 1) if request.param == "rows" else (3, FAR_EXPERT)
    row0, end, expert = rows, rows + 13, experts - 1
    return _Far(_one_tile(expert, experts, row0, end), expert, experts, row0, end, torch.Generator().manual_seed(0))


def _close(got: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=2e-2)
    assert exact.abs().max() > 0.5


@pytest.mark.interpreter
@pytest.mark.parametrize("permute", [False, True])
def test_far_forward(far: _Far, permute: bool) -> None:
    x, w = far.matrix(), far.weight()
    y, _ = forward_gemm(x, w, far.rows, FWD, permute_x=permute, permute_y=permute)
    _close(far.near(y), far.near(x) @ w[far.expert].double().T)


@pytest.mark.interpreter
def test_far_forward_swiglu(far: _Far) -> None:
    x, w = far.matrix(), far.weight(2 * WIDTH)
    a, h = forward_gemm(x, w, far.rows, FWD, swiglu=True, store_h=True)
    assert h is not None
    exact = far.near(x) @ w[far.expert].double().T
    _close(far.near(h), exact)
    _close(far.near(a), silu_parts(exact)[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("permute", [False, True])
def test_far_dX(far: _Far, permute: bool) -> None:
    dy, w = far.matrix(), far.weight()
    dx = dX_gemm(dy, w, far.rows, DX, dy_divisor=int(permute), scatter=permute)
    _close(far.near(dx), far.near(dy) @ w[far.expert].double())


@pytest.mark.interpreter
def test_far_dX_dswiglu(far: _Far) -> None:
    dy, w, h = far.matrix(), far.weight(), far.matrix(2 * WIDTH)
    dh, scaled, ds = dX_gemm_dswiglu(dy, w, h, None, far.rows, DX)
    da = far.near(dy) @ w[far.expert].double()
    a, gate, up, sig = silu_parts(far.near(h))
    _close(far.near(scaled), a)
    _close(far.near(ds), (da * a).sum(1))
    _close(far.near(dh), torch.cat([da * up * (sig + gate * sig * (1 - sig)), da * F.silu(gate)], 1))


@pytest.mark.interpreter
@pytest.mark.parametrize("permute", [0, 1])
def test_far_dW_reads(permute: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond 2^31 elements. dW itself is small: it walks every expert."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows, row0, end = _one_tile(0, 1, FAR_ROW, FAR_ROW + 13), FAR_ROW, FAR_ROW + 13
    rows.expert_offsets[0] = row0
    far = _Far(rows, 0, 1, row0, end, torch.Generator().manual_seed(0))
    dy, x = far.matrix(), far.matrix()
    dw = dW_gemm(dy, x, rows, 1, DW, dy_divisor=permute, x_divisor=permute)
    _close(dw[0].double(), far.near(dy).T @ far.near(x))


@pytest.mark.interpreter
def test_far_dW_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert beyond 2^31 elements of dW, whose other experts this one program leaves alone."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    side = 2**14
    tile = replace(DW, block_n=64, block_k=64)
    experts, tiles = 9, (side // 64) ** 2
    rows = Rows(torch.tensor([0] * experts + [5, 5], dtype=torch.int32), torch.arange(5, dtype=torch.int32), 1,
                TileTable(torch.empty(0), torch.empty(0), torch.empty(0), 0))  # fmt: skip
    dy, x = torch.randn(5, side).half(), torch.randn(5, side).half()

    def last_tiles(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        total = experts * tiles  # as many programs as make program 0 walk the first tile and the last
        monkeypatch.setattr("moefactory.triton.backward_dW.tl.num_programs", lambda axis: total - 1)
        kernel[(1,)](*args, **meta)

    monkeypatch.setattr("moefactory.triton.backward_dW.launch", last_tiles)
    dw = dW_gemm(dy, x, rows, experts, tile)
    _close(dw[-1, -64:, -64:].double(), dy[:, -64:].double().T @ x[:, -64:].double())
