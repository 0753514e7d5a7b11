"""The warp-specialised kernels by their numbers, and their protocol, without a GPU: see `gluon_interpreter`.

What they compile to is in `test_triton_specialized`, what a GPU makes of that in `test_triton_gpu`.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fused
import gluon_interpreter
import pytest
import torch
from fused import COMBINATIONS, Shape, flag_id, options, specialized_kernels
from torch import Tensor

from moefactory.triton import specialized, specialized_dswiglu, specialized_dW, specialized_rows, turns
from moefactory.triton.backward_dX import dX_gemm_dswiglu
from moefactory.triton.forward import Rows, forward_gemm
from moefactory.triton.ops import experts_backward, experts_forward
from moefactory.triton.schedule import tile_table

pytestmark = pytest.mark.interpreter
SMALL = Shape(40, 3, 2, 200, 72)  # nothing is a multiple of a tile's side
HALVES = Shape(130, 4, 2, 200, 72)  # the same, of experts with 62 to 69 rows: half a tile or more
SHAPES = [
    Shape(70, 9, 4, 64, 32, "gaps"),  # more tiles than programs, each smaller than its box
    Shape(300, 3, 2, 256, 128),  # whole steps; several row tiles an expert, the last one ragged
    Shape(130, 5, 2, 520, 264, "dropped"),  # every dimension ends inside a tile
    Shape(33, 3, 2, 72, 40, "none"),  # dropped slots alone
    Shape(150, 2, 1, 896, 448),  # whole steps, and 14 and 7 of them: parts are stored under every other one
    Shape(330, 5, 2, 512, 264),  # experts of one whole tile, and of two, the second one half
]
CASES = [  # (flags, whether tiles are claimed)
    pytest.param(COMBINATIONS[0], True, id=flag_id(COMBINATIONS[0])),
    pytest.param(COMBINATIONS[-1], True, id=f"{flag_id(COMBINATIONS[-1])}-claimed"),
    pytest.param(COMBINATIONS[-1], False, id=f"{flag_id(COMBINATIONS[-1])}-in turn"),
]
FORWARD: Any = specialized_kernels()[0][2]
DX: Any = specialized_kernels()[3][2]
SEEDS = range(4)


@pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
def test_every_fusion(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """All six GEMMs of a forward and a backward in three programs, held to the rule of every path."""
    p = fused.problem(SMALL, torch.bfloat16)
    with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch):
        got = fused.run(p, options(flags, SMALL.top_k, specialized_kernels()))
    assert fused.yardstick(SMALL, torch.bfloat16).complaints(got) == []


@pytest.mark.parametrize(("flags", "claimed"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size(shape: Shape, flags: dict[str, bool], claimed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a fusion and with all of them: the same rule; the ring has its fewest stages where nothing is fused."""
    fused.claim(monkeypatch, claimed)
    p, kernels = fused.problem(shape, torch.bfloat16), specialized_kernels(swapped=not any(flags.values()))
    with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch):
        got = fused.run(p, options(flags, shape.top_k, kernels))
    assert fused.yardstick(shape, torch.bfloat16).complaints(got) == []


@pytest.mark.parametrize("flags", [COMBINATIONS[0], COMBINATIONS[-1]], ids=str)
def test_a_margin(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """With `sm_margin` 1 of 3 programs each kernel of a step is 2, or as many as it has tiles: the same bits."""
    p, o = fused.problem(SMALL, torch.bfloat16), options(flags, SMALL.top_k, specialized_kernels())
    results, grids = [], dict[int, list[tuple[str, int]]]()

    for margin in (0, 1):
        grids[margin] = []
        with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch), monkeypatch.context() as patch:
            for module in (specialized_rows, specialized_dswiglu, specialized_dW):
                patch.setattr(module, "launch", fused.noting(module.launch, grids[margin]))
            results.append(fused.run(p, replace(o, sm_margin=margin)))
    assert fused.differing(*results) == []
    assert len(grids[0]) >= 5
    assert grids[1] == [(name, min(programs, 2)) for name, programs in grids[0]]
    assert max(programs for _, programs in grids[0]) == 3


def _rows(shape: Shape) -> tuple[fused.Problem, Rows]:
    p = fused.problem(shape, torch.bfloat16)
    plan = p.plan
    table = tile_table(plan.group_offsets, plan.gather_indices.shape[0], 128)
    return p, Rows(plan.group_offsets, plan.gather_indices, shape.top_k, table)


@pytest.mark.parametrize("cols", [1, 3, 8])
@pytest.mark.parametrize("counts", [[1], [0, 0, 5, 0], [128, 129, 256, 0, 1, 3000], [40, 1537, 1536, 0]], ids=str)
def test_order_of_tiles(counts: list[int], cols: int) -> None:
    """Every tile once, none past the last; an expert's row tiles in groups of at most 12, as large as one another but
    for the last, which sweep over the columns together, so that neighbours share W."""
    offsets = torch.tensor([0, *counts, 0], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    table = tile_table(offsets, sum(counts), 128)
    number = int(table.num_tiles[0])
    tables = [gluon_interpreter.Pointers(t) for t in (table.tile_expert, table.tile_row, offsets)]
    place_of = gluon_interpreter.as_python(specialized_rows.place_of)

    def place(tile: int) -> tuple[int, ...]:
        return tuple(map(int, place_of(torch.tensor(tile), tables, number, cols, len(counts), 128, 12)))

    expected = []
    for expert, count in enumerate(counts):
        tiles = -(-count // 128)
        groups = -(-tiles // 12)
        size = -(-tiles // groups) if groups else 1
        for first in range(0, tiles, size):
            rows = [int(offsets[expert]) + 128 * t for t in range(first, min(first + size, tiles))]
            expected += [(expert, row, int(offsets[expert + 1]), col) for col in range(cols) for row in rows]
    assert [place(tile) for tile in range(number * cols)] == expected
    assert place(number * cols)[0] == place(number * cols + 131)[0] == len(counts)


@pytest.mark.parametrize("gathered", [False, True], ids=["in order", "gathered"])
@pytest.mark.parametrize("shape", [SMALL, SHAPES[1]], ids=str)
def test_up_without_h(shape: Shape, gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A of a forward that keeps no H, which it stores in two parts, not six: the bits of one that does."""
    p, rows = _rows(shape)
    x = p.x if gathered else torch.randn(rows.gather_indices.shape[0], shape.hidden).bfloat16()
    with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch):
        kept, alone = (
            forward_gemm(x, p.gate_up_proj, rows, FORWARD, permute_x=gathered, swiglu=True, store_h=h)
            for h in (True, False)
        )
    assert torch.equal(alone[0], kept[0])
    assert alone[1] is None


@pytest.mark.parametrize("programs", [1, 2, 7])
@pytest.mark.parametrize("shape", [SHAPES[0], HALVES], ids=str)
def test_any_order_gives_the_same_bits(shape: Shape, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on after a wait, and which copy lands first, is drawn four times; tiles are claimed, or in turn."""
    p, rows = _rows(shape)
    h = torch.randn(rows.gather_indices.shape[0], 2 * shape.intermediate).bfloat16()
    found = []
    for seed, claimed in ((seed, claimed) for seed in SEEDS for claimed in (False, True)):
        fused.claim(monkeypatch, claimed)
        with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch, programs, seed):
            up = forward_gemm(p.x, p.gate_up_proj, rows, FORWARD, permute_x=True, swiglu=True, store_h=True)
            weights = p.routing_weights.reshape(-1)
            down = dX_gemm_dswiglu(p.dy, p.down_proj, h, weights, rows, DX, dy_divisor=shape.top_k)
            more = [forward_gemm(h, p.down_proj.repeat(1, 1, 2), rows, FORWARD, permute_y=y)[0] for y in (False, True)]
        assert _zeros(rows)
        found.append([t for t in (*up, *down, *more) if t is not None])
    assert all(torch.equal(t, first) for one in found[1:] for t, first in zip(one, found[0], strict=True))


def _zeros(rows: Rows) -> bool:
    """Whether the counters of a launch are as it found them."""
    return not bool(rows.table.num_tiles[1:].any())


@pytest.mark.parametrize(
    ("programs", "held", "until", "chunk"), [(7, 1, 0, 48), (7, 3, 0, 1), (7, 6, 0, 48), (2, 1, 60, 1), (3, 2, 40, 1)]
)
@pytest.mark.parametrize("claimed", [False, True], ids=["in turn", "claimed"])
@pytest.mark.parametrize("shape", [SHAPES[0], HALVES], ids=str)
def test_beside_a_neighbour(
    shape: Shape,
    claimed: bool,
    programs: int,
    held: int,
    until: int,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another kernel holds the multiprocessors of some programs until the others have ended: those compute the
    missing ones' tiles, each once, to the same bits, and the missing ones copy nothing and end. One program alone
    computes all. Or until some tiles are done: then others take what is left of a late one's while it computes. A chunk
    is some tiles, or one."""
    fused.claim(monkeypatch, claimed)
    monkeypatch.setattr(turns, "CHUNK_STEPS", chunk)
    p, rows = _rows(shape)
    h = torch.randn(rows.gather_indices.shape[0], 2 * shape.intermediate).bfloat16()
    weights = p.routing_weights.reshape(-1)

    def all_four() -> list[Tensor]:
        up = forward_gemm(p.x, p.gate_up_proj, rows, FORWARD, permute_x=True, swiglu=True, store_h=True)
        dx = dX_gemm_dswiglu(p.dy, p.down_proj, h, weights, rows, DX, dy_divisor=shape.top_k)
        more = [forward_gemm(h, p.down_proj.repeat(1, 1, 2), rows, FORWARD, permute_y=y)[0] for y in (False, True)]
        return [t for t in (*up, *dx, *more) if t is not None]

    with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch, programs) as alone:
        expected = all_four()
    for seed in SEEDS:
        with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch, programs, seed, held, until) as copies:
            got = all_four()
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        assert until or max(copies) < programs - held
        assert copies.total() == alone.total()
        assert _zeros(rows)


@pytest.mark.parametrize("flags", [COMBINATIONS[0], COMBINATIONS[-1]], ids=flag_id)
def test_a_step_beside_a_neighbour(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """All six GEMMs of a forward and a backward with two of three programs missing: the bits of a step alone. The
    programs of dW go round in turn, and those that come late compute their own tiles."""
    p, o = fused.problem(SMALL, torch.bfloat16), options(flags, SMALL.top_k, specialized_kernels())
    results = []
    for held in (0, 2):
        with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch, held=held):
            results.append(fused.run(p, o))
    assert fused.differing(*results) == []


def test_h_may_start_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """At an odd element, as a hook may hand it out: the bits of one that starts at a multiple of 16 bytes, though the
    kernel reads two numbers at a time; dH also over that H."""
    p, rows = _rows(SMALL)
    h = torch.randn(rows.gather_indices.shape[0], 2 * SMALL.intermediate).bfloat16()
    odd = torch.empty(h.numel() + 1, dtype=h.dtype)[1:].view_as(h).copy_(h)
    weights = p.routing_weights.reshape(-1)
    with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch):
        found = [
            dX_gemm_dswiglu(p.dy, p.down_proj, one, weights, rows, DX, dy_divisor=SMALL.top_k, over_h=over)
            for one, over in ((h, False), (odd, False), (odd, True))
        ]
    assert found[2][0].data_ptr() == odd.data_ptr()
    assert all(torch.equal(t, first) for one in found[1:] for t, first in zip(one, found[0], strict=True))


@pytest.mark.parametrize("saved", ["h", "h_reused"])
def test_a_backward_of_an_h_that_starts_anywhere(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts' whole backward, whose next GEMM moves dH by TMA: the bits of an H that starts as memory does."""
    p = fused.problem(SMALL, torch.bfloat16)
    text = replace(options(COMBINATIONS[0], SMALL.top_k, specialized_kernels()), saved=saved).text
    tensors, indices = (p.x, p.routing_weights, p.gate_up_proj, p.down_proj), fused.indices(p.plan)
    with fused.surroundings(), gluon_interpreter.interpreted(monkeypatch):
        h = experts_forward(*tensors, *indices, text, True, False)[1]
        odd = torch.empty(h.numel() + 1, dtype=h.dtype)[1:].view_as(h).copy_(h)
        found = [experts_backward(p.dy, *tensors, one, *indices, text, [True] * 4) for one in (h, odd)]
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("bandwidth", "rows", "small", "large"),
    [  # of weights of 2**22 elements an expert and of more: who claims
        (3352, 1, {"forward_up", "dX_dswiglu"}, set()),
        (4814, 256, {"forward_up", "forward", "dX_dswiglu"}, {"forward_up", "forward"}),
        (4814, 257, {"forward_up", "dX_dswiglu"}, set()),
    ],
)
def test_who_claims(
    bandwidth: float, rows: int, small: set[str], large: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels with an epilogue where weights are small; the forward's up to 256 rows an expert where memory is wide."""
    monkeypatch.setattr(specialized, "memory_bandwidth", lambda device: bandwidth)
    for width, expected in ((2048, small), (2056, large)):
        weight = torch.empty(3, 2048, width, device="meta")
        names = {"forward_up", "forward", "dX", "dX_dswiglu"}
        assert {name for name in names if specialized.claims(name, weight, 3 * rows)} == expected


# --- what the interpreter would see -----------------------------------------------------------------------------------

ROWS, DSWIGLU, DW = "specialized_rows", "specialized_dswiglu", "specialized_dW"
FAULTS = {  # what is wrong: (where, what stands there, what is put in its place)
    "a stage is filled before it is free": (
        ROWS,
        "    mbarrier.wait(empty.index(s), phase(step + index, STAGES) ^ 1)\n",
        "",
    ),
    "the other phase is waited for": (
        ROWS,
        "phase(step + index, STAGES) ^ 1",
        "phase(step + index, STAGES)",
    ),
    "a stage is given back before its product": (
        ROWS,
        "mbarrier.arrive(empty.index((step + index + STAGES - 1) % STAGES), count=1)",
        "mbarrier.arrive(empty.index((step + index) % STAGES), count=1)",
    ),
    "one consumer frees a stage": (
        ROWS,
        "mbarrier.init(empty.index(s), count=2)",
        "mbarrier.init(empty.index(s), count=1)",
    ),
    "a part is staged over one that is under way": (
        ROWS,
        "    tma.store_wait(0)  # of the part before\n",
        "",
    ),
    "the last part is not waited for": (
        ROWS,
        "told(news, turn)\n    tma.store_wait(0)\n",
        "told(news, turn)\n",
    ),
    "rows are asked for of a tile that there is not": (
        ROWS,
        "            if tile < tiles:\n                next_rows",
        "            if True:\n                next_rows",
    ),
    "rows of the product before": (
        ROWS,
        "_copy_x(index + EXTRA, step,",
        "_copy_x(index, step,",
    ),
    "up's columns in another order": (
        ROWS,
        "quarters[2 + OF_A]",
        "quarters[3 - OF_A]",
    ),
    "a stage that has no rows is not given back": (
        ROWS,
        "    mbarrier.arrive(empty.index(step % STAGES), count=1)\n",
        "",
    ),
    "a stage is given back before it came": (
        ROWS,
        "    mbarrier.wait(full.index(step % X_STAGES), phase(step, X_STAGES))\n",
        "",
    ),
    "the lower rows of half a tile are waited for": (
        ROWS,
        "mbarrier.expect(ready, ROWS * BLOCK_K * 2, pred=whole == 0)",
        "mbarrier.expect(ready, 2 * ROWS * BLOCK_K * 2, pred=whole == 0)",
    ),
    "the lower rows are those of the upper half": (
        ROWS,
        "[row + ROWS, k], ready",
        "[row, k], ready",
    ),
    "65 rows are taken for half a tile": (
        ROWS,
        "whole = row_end - row0 > ROWS if",
        "whole = row_end - row0 > ROWS + 8 if",
    ),
    "columns in another order": (
        ROWS,
        "out.store(quarters[PART])",
        "out.store(quarters[PART ^ 1])",
    ),
    "no turn for the last tile": (
        ROWS,
        "    tell(news, turn, 0, 0, 0, 0)  #",
        "    turn -= 1  #",
    ),
    "dA is handed over before it was taken": (
        DSWIGLU,
        "    mbarrier.wait(handed.index(1), (handovers & 1) ^ 1)\n",
        "",
    ),
    "dA is taken before it was handed over": (
        DSWIGLU,
        "                mbarrier.wait(handed.index(0), handovers & 1)\n",
        "",
    ),
    "a tile's first stage is given back twice": (
        DSWIGLU,
        "pred=index + before > 0",
        "pred=True",
    ),
    "every row is of slot 0": (
        DSWIGLU,
        "        slots.store(slot_ahead)\n",
        "        slots.store(slot_ahead * 0)\n",
    ),
    "dW's stage is filled before it is free": (
        DW,
        "            mbarrier.wait(empty.index(s), phase(step, STAGES) ^ 1)\n",
        "",
    ),
    "dW's halves in another order": (
        DW,
        "_store_half(finished[turn // 2]",
        "_store_half(finished[1 - turn // 2]",
    ),
    "slots of the step before": (
        DW,
        "            p_slots, q_slots = p_next, q_next\n",
        "",
    ),
}


def _planted(folder: Path, name: str, old: str, new: str) -> ModuleType:
    """A module of the kernels with one thing changed."""
    real = importlib.import_module(f"moefactory.triton.{name}")
    source = Path(str(real.__file__)).read_text()
    assert old in source
    path = folder / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("moefactory.triton.planted", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(name: str, module: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """What a module's kernel makes of the same problem, in two programs: up of rows in expert order, which come by TMA
    and have a stage more; dSwiGLU and dW of gathered ones. The first two claim their tiles."""
    p, rows = _rows(HALVES)
    m, width = rows.gather_indices.shape[0], HALVES.intermediate
    generator = torch.Generator().manual_seed(1)
    x, h, other = (torch.randn(m, n, generator=generator).bfloat16() for n in (HALVES.hidden, 2 * width, width))
    monkeypatch.setattr(module, "launch", gluon_interpreter.launch(seed))
    monkeypatch.setattr(module, "num_programs", lambda device, sm_margin: 2)
    out = [torch.full((m, n * width), torch.nan, dtype=torch.bfloat16) for n in (1, 2)]
    if name == ROWS:
        flags = {"permute_x": False, "permute_y": False, "swiglu": True}
        module.specialized_forward(x, p.gate_up_proj, rows, FORWARD, *out, **flags)
        return tuple(out)
    if name == DSWIGLU:
        ds, weights = torch.full((2, m), torch.nan), p.routing_weights.reshape(-1)
        results = out[1], out[0], ds
        module.specialized_dX_dswiglu(p.dy, p.down_proj, h, weights, rows, DX, *results, dy_divisor=HALVES.top_k)
        return *out, ds
    dw = torch.full_like(p.down_proj, torch.nan)
    config = specialized_kernels()[5][2]
    module.specialized_dW(p.dy, other, rows, config, dw, dy_divisor=HALVES.top_k, x_divisor=0)
    return (dw,)


def test_what_is_there_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A and H beside float64, in four orders: two roundings to bfloat16, each by half of the last of 8 bits."""
    p, rows = _rows(HALVES)
    x = torch.randn(rows.gather_indices.shape[0], HALVES.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    counts = rows.expert_offsets[1:] - rows.expert_offsets[:-1]
    expert = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
    h = torch.einsum("rk,rnk->rn", x.double(), p.gate_up_proj.double()[expert])
    gate, up = h.bfloat16().double().chunk(2, dim=1)
    for seed in SEEDS:
        got = _run(ROWS, specialized_rows, seed, monkeypatch)
        for one, right in zip(got, (torch.nn.functional.silu(gate) * up, h), strict=True):
            torch.testing.assert_close(one.double(), right, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is seen in one of four orders at least, as an error or as other bits than those of the kernel as it is."""
    name, *change = FAULTS[fault]
    right = _run(name, importlib.import_module(f"moefactory.triton.{name}"), 0, monkeypatch)
    assert not any(bool(t.isnan().any()) for t in right)
    module = _planted(tmp_path, name, *change)

    def wrong(seed: int) -> bool:
        try:
            got = _run(name, module, seed, monkeypatch)
        except (AssertionError, RuntimeError):
            return True
        return not all(torch.equal(one, other) for one, other in zip(got, right, strict=True))

    assert any(wrong(seed) for seed in SEEDS)
