"""Routing of few tokens in one launch, against torch and, bit for bit, against the launches that it stands for.

``python tests/test_few_tokens.py`` compiles it and the router for compute capability 9.0, which needs no GPU, and
prints as JSON what decides the bits there: how the threads share the sums of floats.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import fused
import pytest
import torch
from fused import DEVICE, DTYPES, GPU, dtype_id
from interpreter import write_recorder
from torch import Tensor

from moefactory.routing import make_plan, route
from moefactory.triton import few_tokens, router
from moefactory.triton.few_tokens import few, route_few_tokens
from moefactory.triton.launch import launch, record_launches
from moefactory.triton.plan import plan_tensors
from moefactory.triton.router import top_k_softmax
from moefactory.triton.schedule import tile_table

WIDE = torch.float32 if GPU else torch.float64
NAMES = ("weights", "selected", "exact", "counts", "offsets", "gather", "scatter")
TABLE = ("tile_expert", "tile_row", "num_tiles")
SIZES = [
    (t, e, k)
    for e in (1, 5, 8, 128, 257)
    for k in sorted({1, 3, 8, e})
    for t in (1, 2, 8, 9, 17, 33, 64)
    if k <= e and few(t, e) and (k <= 8 or (t == 2 and not GPU))  # the choice is a step of code for each slot
]


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():
        yield


def random_logits(tokens: int, experts: int, dtype: torch.dtype = WIDE, seed: int = 0) -> Tensor:
    drawn = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * drawn).to(dtype)


def together(logits: Tensor, top_k: int, norm: bool, block_m: int) -> dict[str, Tensor]:
    """What the one launch gives, on the CPU; of the tile table what is in use."""
    out = route_few_tokens(logits.to(DEVICE), top_k, norm, block_m)
    return _named(out)


def separately(logits: Tensor, top_k: int, norm: bool, block_m: int) -> dict[str, Tensor]:
    """The same by router, plan and tile table."""
    weights, selected, exact = top_k_softmax(logits.to(DEVICE), top_k, norm)
    plan = plan_tensors(selected, logits.shape[1])
    table = tile_table(plan[1], selected.numel(), block_m)
    assert table.tile_expert.shape == table.tile_row.shape == (table.max_tiles,)
    return _named((weights, selected, exact, *plan, table.tile_expert, table.tile_row, table.num_tiles))


def _named(out: tuple[Tensor, ...]) -> dict[str, Tensor]:
    found = {name: tensor.cpu() for name, tensor in zip((*NAMES, *TABLE), out, strict=True)}
    found["max_tiles"] = torch.tensor([found["tile_expert"].numel(), found["tile_row"].numel()])
    count = int(found["num_tiles"][0])
    assert 0 < count <= int(found["max_tiles"].min())
    return {**found, "tile_expert": found["tile_expert"][:count], "tile_row": found["tile_row"][:count]}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def differing(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names of what differs in a bit, a shape or a dtype."""
    return [
        name
        for name, tensor in expected.items()
        if got[name].dtype != tensor.dtype or not torch.equal(bits(got[name]), bits(tensor))
    ]


def tiles_of(counts: list[int], block_m: int) -> list[tuple[int, int]]:
    """[(expert, first row)] of rows sorted by expert."""
    ends = [sum(counts[:e]) for e in range(len(counts) + 1)]
    return [(e, row) for e, (start, end) in enumerate(pairwise(ends)) for row in range(start, end, block_m)]


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_bits_of_the_separate_launches(sizes: tuple[int, int, int]) -> None:
    tokens, experts, top_k = sizes
    dtypes = DTYPES if top_k <= 8 else DTYPES[-1:]
    for dtype, (norm, block_m) in product(dtypes, ((True, 16), (False, 32))):
        logits = random_logits(tokens, experts, dtype)
        got, expected = (f(logits, top_k, norm, block_m) for f in (together, separately))
        assert differing(got, expected) == [], (dtype, norm, block_m)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_torch(sizes: tuple[int, int, int], norm: bool) -> None:
    """Weights to rounding, everything else exactly."""
    tokens, experts, top_k = sizes
    logits = random_logits(tokens, experts, seed=1)
    got = together(logits, top_k, norm, 16)
    _, weights, selected = route(logits, torch.eye(experts, dtype=WIDE), top_k, norm)
    plan = make_plan(selected, experts)
    bound = 2e-6 if GPU else 1e-14
    torch.testing.assert_close(got["weights"], weights, atol=bound, rtol=bound)
    assert torch.equal(got["selected"], selected)
    assert torch.equal(got["counts"][:experts], plan.token_counts_by_expert)
    assert torch.equal(got["offsets"], plan.group_offsets)
    assert torch.equal(got["gather"], plan.gather_indices)
    assert torch.equal(got["scatter"], plan.scatter_indices)
    table = list(zip(got["tile_expert"].tolist(), got["tile_row"].tolist(), strict=True))
    assert table == tiles_of(plan.token_counts_by_expert.tolist(), 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 8, 20, 64])
def test_ties(tokens: int, dtype: torch.dtype) -> None:
    """Lowest expert first: logits of few values, of one, and so low that their probability is zero."""
    experts, top_k = 37, 6
    logits = torch.randint(3, (tokens, experts)).to(dtype)
    logits[::3, 5:] = -900
    logits[1::3, 2:] -= 60
    logits[2::3] = 0
    wide = torch.promote_types(dtype, torch.float32)
    order = torch.softmax(logits, 1, dtype=wide).sort(dim=1, descending=True, stable=True).indices
    for norm in (True, False):
        got = together(logits, top_k, norm, 16)
        assert torch.equal(got["selected"], order[:, :top_k])
        assert differing(got, separately(logits, top_k, norm, 16)) == []


@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 64])
def test_every_token_chooses_the_same_experts(tokens: int, block_m: int) -> None:
    """As many slots as an expert can have: all the bits of a word, and experts of several tiles, the last cut off."""
    experts, top_k = 12, 3
    logits = torch.zeros(tokens, experts).index_fill_(1, torch.tensor([2, 7, 11]), 4.0)
    got = together(logits, top_k, True, block_m)
    counts = [tokens * (e in {2, 7, 11}) for e in range(experts)]
    assert got["counts"].tolist() == [*counts, 0]
    assert got["gather"].tolist() == [3 * t + k for k in range(3) for t in range(tokens)]
    assert list(zip(got["tile_expert"].tolist(), got["tile_row"].tolist(), strict=True)) == tiles_of(counts, block_m)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_broken_row(bad: float, dtype: torch.dtype) -> None:
    """NaN weights and the first experts, as the router has it; no other row is touched."""
    logits = random_logits(11, 9, dtype)
    clean = together(logits, 4, True, 16)
    logits[3, 6] = bad
    logits[10] = -torch.inf  # nothing to choose from: NaN, too
    for norm in (True, False):
        got = together(logits, 4, norm, 16)
        assert differing(got, separately(logits, 4, norm, 16)) == []
    got = together(logits, 4, True, 16)
    for row in (3, 10):
        assert got["weights"][row].isnan().all()
        assert got["selected"][row].tolist() == [0, 1, 2, 3]
    others = [row for row in range(11) if row not in {3, 10}]
    assert torch.equal(got["weights"][others], clean["weights"][others])
    assert torch.equal(got["selected"][others], clean["selected"][others])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_minus_infinity(dtype: torch.dtype) -> None:
    """Experts that are masked out come last, with weight zero, in their order."""
    logits = random_logits(5, 9, dtype)
    logits[1, 2:] = -torch.inf
    logits[4, :8] = -torch.inf
    got = together(logits, 4, True, 16)
    assert differing(got, separately(logits, 4, True, 16)) == []
    assert sorted(got["selected"][1, :2].tolist()) == [0, 1]
    assert got["selected"][1, 2:].tolist() == [2, 3]
    assert got["selected"][4].tolist() == [8, 0, 1, 2]
    assert got["weights"][4].tolist() == [1, 0, 0, 0]


def test_logits_in_any_layout() -> None:
    logits = random_logits(6, 10)
    expected = together(logits, 3, True, 16)
    assert differing(_named(route_few_tokens(logits.to(DEVICE).T.contiguous().T, 3, True, 16)), expected) == []


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 5, 3), (17, 8, 8), (64, 37, 6), (3, 257, 8)], ids=str)
def test_each_element_is_written_once(sizes: tuple[int, int, int]) -> None:
    tokens, experts, top_k = sizes
    for norm in (True, False):
        with write_recorder() as recorder:
            out = route_few_tokens(random_logits(tokens, experts, torch.float32), top_k, norm, 16)
        *whole, tile_expert, tile_row, num_tiles = out
        recorder.check_written_once(*whole, num_tiles)
        for table in (tile_expert, tile_row):
            used = list(range(int(num_tiles[0])))
            assert recorder.writers(table) == {(tile,): [(0, 0, 0)] for tile in used}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 8), (7, 5, 3), (33, 37, 6), (8, 257, 8)], ids=str)
def test_nothing_outside_is_written(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result lies in the middle of poison, which is still there afterwards."""
    tokens, experts, top_k = sizes
    pad, surrounded = 64, list[tuple[Tensor, Tensor]]()

    def launch_surrounded(name: str, kernel: Any, grid: Any, logits: Tensor, *args: Any, **meta: Any) -> None:
        *out, t, e = args
        inner = []
        for tensor in out:
            memory = torch.empty(tensor.numel() + 2 * pad, dtype=tensor.dtype, device=DEVICE)
            bits(memory).fill_(77)
            inner.append(memory[pad : pad + tensor.numel()])
            surrounded.append((memory, tensor))
        launch(name, kernel, grid, logits, *inner, t, e, **meta)
        for tensor, written in zip(out, inner, strict=True):
            tensor.view(-1).copy_(written)

    logits = random_logits(tokens, experts, torch.float32)
    expected = together(logits, top_k, True, 16)
    monkeypatch.setattr(few_tokens, "launch", launch_surrounded)
    assert differing(together(logits, top_k, True, 16), expected) == []
    assert len(surrounded) == 10
    for memory, tensor in surrounded:
        around = torch.cat([memory[:pad], memory[pad + tensor.numel() :]])
        assert (bits(around) == 77).all()


# --- the launch -------------------------------------------------------------------------------------------------------


def test_it_is_one_launch() -> None:
    with record_launches() as names:
        route_few_tokens(random_logits(9, 5, torch.float32).to(DEVICE), 2, True, 16)
    assert names == ["route_few_tokens"]


def test_how_many_are_few() -> None:
    most = {e: max((t for t in range(200) if few(t, e)), default=0) for e in (1, 60, 128, 129, 512, 1024, 1025)}
    assert most == {1: 64, 60: 64, 128: 64, 129: 8, 512: 8, 1024: 8, 1025: 0}
    assert not few(0, 8)


@pytest.mark.parametrize("tokens", [0, 65])
def test_more_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"got {tokens} tokens of 8 experts"):
        route_few_tokens(torch.zeros(tokens, 8), 2, True, 16)


# --- compiled code ----------------------------------------------------------------------------------------------------

COMPILED = [(1, 128, 8, "bfloat16"), (64, 128, 8, "bfloat16"), (64, 16, 4, "float32"), (8, 200, 3, "bfloat16")]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """{case: what `compiled` found}, by a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_sums_are_the_routers(case: tuple[Any, ...], code: dict[str, dict[str, Any]]) -> None:
    """A row is shared by as many threads and warps: the sum of the exponentials, and that of the chosen ones, have the
    same bits on a GPU too."""
    found = code[str(case)]
    ours, theirs = found["few"]["sums"], found["router"]["sums"]
    assert len(ours) == 2
    assert ours == [theirs[0], theirs[-1]]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_nothing_is_spilled(case: tuple[Any, ...], code: dict[str, dict[str, Any]]) -> None:
    assert code[str(case)]["few"]["spills"] == 0


def compiled(tokens: int, experts: int, top_k: int, dtype: str) -> dict[str, dict[str, Any]]:
    """Both kernels as their host code launches them: how float sums along a row are shared, and bytes spilled."""
    import sm90
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(name: str, kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        launched.append((kernel, args, meta))

    few_tokens.launch = router.launch = record  # type: ignore[attr-defined]
    logits = torch.zeros(tokens, experts, dtype=getattr(torch, dtype))
    route_few_tokens(logits, top_k, True, 16)
    top_k_softmax(logits, top_k, True)
    found = {}
    for name, (kernel, args, meta) in zip(("few", "router"), launched, strict=True):
        parameters = kernel.arg_names
        arguments = dict(zip(parameters, args, strict=False))
        ones = {n: 1 for n, value in arguments.items() if isinstance(value, int) and value == 1}
        signature = {n: _typed(arguments[n]) if n in arguments and n not in ones else "constexpr" for n in parameters}
        constants = {(parameters.index(n),): v for n, v in {**meta, **ones}.items() if n in parameters}
        attrs = {(parameters.index(n),): [["tt.divisibility", 16]] for n, v in arguments.items() if sm90._sixteens(v)}
        source = ASTSource(kernel, signature, constants, attrs)
        options = {"num_warps": meta.get("num_warps", 4)}
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        found[name] = {"sums": float_sums(binary.asm["ttgir"]), "spills": sm90._spills(binary.asm["ptx"])}
    return found


def _typed(value: Any) -> str:
    if isinstance(value, Tensor) and value.dtype == torch.int64:
        return "*i64"
    import sm90

    return sm90._typed(value)


def float_sums(ttgir: str) -> list[list[Any]]:
    """[columns, what a thread holds, threads, warps along a row] of every sum of floats along the rows, in order."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked.*)$", ttgir, re.MULTILINE))
    found = []
    for body, columns, name in re.findall(
        r'"tt\.reduce".*?axis = 1.*?\n(.*?)\}\) : \(tensor<\d+x(\d+)xf32, (#\w+)>\)', ttgir, re.DOTALL
    ):
        if "arith.addf" in body:
            sides = re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[\d+, (\d+)\]", layouts[name])
            found.append([int(columns), *map(int, sides)])
    return found


if __name__ == "__main__":
    print(json.dumps({str(case): compiled(*case) for case in COMPILED}))
