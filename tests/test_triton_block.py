"""The Triton backend against float64, Hugging Face's eager block and our torch backend: every legal configuration.

Errors are judged per expert and per token: at most twice that of the better eager path in the same dtype, plus the
result's own rounding, with the routing held (`fused.Yardstick`, `judge.complaints`); on integers, bit for bit. Fresh
memory holds NaN. The same cases run interpreted on a CPU and compiled on a GPU. Which kernels ran is asserted, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import fused
import judge
import pytest
import torch
from fused import COMBINATIONS, DEVICE, DTYPES, FLAGS, GPU, Shape, differing, dtype_id, flag_id, options, small_kernels
from judge import WEIGHTS, Tensors
from torch import Tensor

from moefactory import matrix
from moefactory.block import GroupedGEMMResult, Qwen3MoeFusedGroupedGEMMBlock, Qwen3MoeGroupedGEMMBlock
from moefactory.config import (
    GEMMS,
    PASSES,
    Backend,
    ConfigError,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
    MachineError,
    MoeConfig,
    ResolvedModel,
    Saved,
    WeightsError,
    WeightsSource,
    resolve_kernels,
)
from moefactory.factory import build
from moefactory.numerics.oracle import float64_block
from moefactory.reference import ExpertOptions
from moefactory.reference import compute_experts as torch_experts
from moefactory.triton import launch as launching
from moefactory.triton import pipeline, replay
from moefactory.triton.choice import choose
from moefactory.triton.explain import launches
from moefactory.triton.gate import MAX_TOKENS
from moefactory.triton.launch import record_launches
from moefactory.triton.ops import compute_experts
from moefactory.weights import BlockWeights

TINY = ResolvedModel(64, 32, 8, 2, True, "silu")
by_flags = pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():
        yield


def flags_of(config: MoeConfig) -> dict[str, bool]:
    return {name: getattr(config, name) for name in FLAGS}


# --- the matrix -------------------------------------------------------------------------------------------------------


def _runs_here(config: MoeConfig) -> bool:
    """Which rows this kind of run takes; a row that states no device runs on either."""
    if config.backend.name is not Backend.triton or config.device not in {None, DEVICE}:
        return False
    if any(k is not None and k.warp_specialize for k in resolve_kernels(config.kernels).configs.values()):
        return HOPPER  # compiled only, and for Hopper alone
    return not (GPU and config.dtype is not None and config.dtype.value == "float64")


HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
ROWS = [row for row in matrix.rows() if row.valid and _runs_here(matrix.config_of(row))]


def test_nothing_is_left_out() -> None:
    """288 combinations of flags: 3 of 4 gradient choices, 3 of 4 of autotune and kernels; five flags are free.

    Not run is only what asks for another device, on a GPU float64, and off Hopper the specialised kernels.
    """
    flags = [row for row in ROWS if row.part == "flags"]
    assert len(flags) == 2**4 * 3 * 3 * 2
    other = {"moe.device=cpu" if GPU else "moe.device=cuda"} | ({"moe.dtype=float64"} if GPU else set())
    legal = [row for row in matrix.rows() if row.valid and "moe/backend=triton" in row.overrides]
    left = [row for row in legal if row not in ROWS and not other & set(row.overrides)]
    assert all(not HOPPER and "warp_specialize=true" in " ".join(row.overrides) for row in left)


def _data(block: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """(x, dY) [1,T,H] in which no token's last chosen expert ties with the next: each path breaks ties its way."""
    model, gate = block.model, block.gate.detach()
    for seed in range(1000, 1050):
        x = judge.unit_tokens(tokens, model, gate.dtype, seed=seed).to(DEVICE)
        ordered = torch.nn.functional.linear(x[0], gate).sort(descending=True).values
        k = model.top_k
        if k == model.num_experts or not (ordered[:, k - 1] == ordered[:, k]).any():
            return x, judge.unit_tokens(tokens, model, gate.dtype, seed=seed + 100).to(DEVICE)
    raise AssertionError("no data without ties")


@cache
def _references(key: Any) -> list[Tensors]:
    """[float64, then the eager paths'] for a block's weights and data; `key` is (model, weights, x, dy, selected)."""
    model, weights, x, dy, selected = key.value
    exact = judge.oracle(model, weights, x, dy, selected)
    if not x.shape[1]:
        return [exact, exact]
    torch_block = Qwen3MoeGroupedGEMMBlock(model, *(weights[n].clone() for n in WEIGHTS), trace=False)
    found = [judge.run_block(torch_block, x, dy)]
    if x.dtype is not torch.float64:  # there Hugging Face's softmax is float32
        with torch.device(x.device):
            found.append(judge.run_hf(model, weights, x, dy))
    return [exact, *found]


class _Key:
    """Hashable by the numbers in it, so that rows with the same data share one reference."""

    def __init__(self, *value: Any) -> None:
        self.value = value
        model, weights, x, *_ = value
        self.key = (model, x.dtype, tuple(x.shape), *(float(w.double().sum()) for w in weights.values()))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


def whole_gate(tensors: Tensors) -> Tensors:
    """The gate's gradient as one group: an expert that one token chose has one number's rounding in its whole row."""
    return {name: t.reshape(1, -1) if name == "gate" else t for name, t in tensors.items()}


def float64_terms(block: Qwen3MoeFusedGroupedGEMMBlock, x: Tensor, dy: Tensor, selected: Tensor) -> Tensor:
    """[E,H]: how large the terms are whose differences the gate's gradient sums up."""
    weights = BlockWeights(block.model, block.gate, block.gate_up_proj, block.down_proj)
    return float64_block(weights, x.flatten(0, -2), selected, dy.flatten(0, -2), lambda *_: None).dgate_terms


def expected_launches(block: Qwen3MoeFusedGroupedGEMMBlock, tokens: int) -> list[str]:
    """Every kernel of one forward and backward through the whole block, tile tables left out."""
    config = block.moe_config
    if not tokens:
        return []
    needs = (not config.dW_only, True, not config.dX_only, not config.dX_only)
    flags = flags_of(config)
    whole = flags["fuse_combine"] and not config.trace  # else the router is a node of autograd of its own
    front = fused.expected_front(tokens, block.model.num_experts, block.model.top_k, whole=whole)
    dW = {one.gemm: choose(one, block.gate.device)[0] for one in launches(block, tokens) if one.pass_name == "bwd_dW"}
    first = dW["up"].gather_first, dW["down"].gather_first  # type: ignore[union-attr]
    few = not config.dX_only and tokens <= MAX_TOKENS
    back = fused.expected_backward(flags, needs, first, router=whole, gate=few)
    back += [] if whole else ["route_backward"]
    again = [] if config.saved is not Saved.x else ["forward"] if config.permute_x else ["gather_rows", "forward"]
    return [*front, *fused.expected_forward(flags), *again, *back]


def _source(config: MoeConfig, folder: Path) -> tuple[MoeConfig, Any]:
    """The config on the device under test, and what its weights' source needs."""
    if config.weights.source is WeightsSource.checkpoint:
        if not (folder / "config.json").exists():
            judge.write_checkpoint(folder, TINY)
        config.weights.path = str(folder)
    if config.weights.source is WeightsSource.live:
        return config, judge.hf_block(TINY, judge.unit_weights(TINY, torch.float32)).to(DEVICE)
    return replace(config, device=DEVICE), None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "layers"


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
def test_each_legal_row_of_the_matrix(row: matrix.Row, folder: Path) -> None:
    """Built by the factory, run forward and backward: right numbers, the gradients asked for, the kernels expected."""
    config, source = _source(matrix.config_of(row), folder)
    block: Any = build(config, source)
    assert isinstance(block, Qwen3MoeFusedGroupedGEMMBlock)
    assert isinstance(block, Qwen3MoeGroupedGEMMBlock)
    model, dtype = block.model, block.gate.dtype
    x, dy = _data(block, row.tokens)
    with record_launches() as names:
        got = judge.run_block(block, x, dy)
    selected = block.run_router(x.reshape(-1, model.hidden_size).detach())[2]
    exact, *eager = _references(_Key(model, judge.weights_of(block), x, dy, selected))
    if model.top_k == 1 and model.norm_topk_prob:  # the weight is constant 1: what float64 finds here is rounding
        exact = {**exact, "gate": torch.zeros_like(exact["gate"])}
    wanted = {"hidden_states", "router_logits"}
    wanted |= set() if config.dW_only else {"dx"}
    wanted |= set() if config.dX_only else set(WEIGHTS)
    assert set(got) == wanted
    right = whole_gate({name: exact[name] for name in wanted})
    terms = whole_gate({"gate": float64_terms(block, x, dy, selected)})  # the softmax's gradient cancels
    for reference in eager:
        assert judge.complaints(whole_gate(got), whole_gate(reference), right, dtype, terms) == []
    assert fused.without_tables(names) == expected_launches(block, row.tokens)


# --- the experts: dtypes, edges ---------------------------------------------------------------------------------------

# No size is a multiple of a block; 50 of float16 is no multiple of 16 bytes; three addends show their order.
ODD = Shape(13, 4, 3, 50, 47)


@by_dtype
@by_flags
def test_dtypes(flags: dict[str, bool], dtype: torch.dtype) -> None:
    got = fused.run(fused.problem(ODD, dtype), options(flags, ODD.top_k, small_kernels()))
    assert fused.yardstick(ODD, dtype).complaints(got) == []


EDGES = (
    Shape(0, 4, 2, 20, 12),
    Shape(1, 5, 3, 47, 97),
    Shape(1, 1, 1, 20, 20),
    Shape(15, 7, 2, 33, 20),
    Shape(16, 7, 1, 20, 47),
    Shape(17, 3, 3, 20, 33),
    Shape(20, 7, 3, 50, 47, "gaps"),
    Shape(19, 5, 1, 33, 20, "one"),
    Shape(19, 5, 2, 20, 33, "last"),
    Shape(19, 5, 3, 47, 20, "dropped"),
    Shape(5, 3, 2, 20, 20, "none"),
)
EDGE_FLAGS = [COMBINATIONS[i] for i in (0, 6, 9, 15)]  # all on, two mixed, all off
LOWEST = torch.bfloat16


@pytest.mark.parametrize("shape", EDGES, ids=str)
@pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)
@pytest.mark.parametrize("dtype", [DTYPES[0], LOWEST], ids=dtype_id)
def test_edges(shape: Shape, flags: dict[str, bool], dtype: torch.dtype) -> None:
    """T=0 and 1, sizes around a block, empty experts at both ends, one expert with all, top_k = E, dropped slots."""
    got = fused.run(fused.problem(shape, dtype), options(flags, shape.top_k, small_kernels()))
    assert fused.yardstick(shape, dtype).complaints(got) == []
    plan = fused.problem(shape, dtype).plan
    empty = plan.token_counts_by_expert == 0
    for name in ("gate_up_proj", "down_proj"):  # zeros: not None, not NaN, not -0 of a sum
        assert torch.equal(got[name][empty], torch.zeros_like(got[name][empty]))
    dropped = (fused.problem(shape, dtype).selected_experts >= shape.experts).all(1)
    assert not got["out"][dropped].any()
    assert not got["dx"][dropped].any()


EXACT = [(flags, torch.bfloat16) for flags in COMBINATIONS]
EXACT += [(flags, torch.float32) for flags in EDGE_FLAGS]
EXACT += [(flags, torch.float16) for flags in EDGE_FLAGS[::3]]  # that problem is 8 times as large


@pytest.mark.parametrize(
    ("flags", "dtype"), [pytest.param(flags, dtype, id=f"{flag_id(flags)}-{dtype_id(dtype)}") for flags, dtype in EXACT]
)
def test_integers_bit_for_bit(flags: dict[str, bool], dtype: torch.dtype) -> None:
    """Sums that pass 256 (float16: 2048) on the way, exact in float32: one wrong element, one bf16 sum would show."""
    p = judge.exact_problem(dtype)
    there = fused.Problem(*(getattr(p, f.name) for f in fields(fused.Problem)))
    kernels = () if GPU else small_kernels(16, 256, 64)  # wide: the interpreter's time goes with the number of tiles
    got = fused.run(there, options(flags, there.top_k, kernels))
    names = {"gate_up_proj": "dgate_up_proj", "down_proj": "ddown_proj"}
    renamed = {names.get(name, name): tensor for name, tensor in got.items()}
    assert judge.unequal(renamed, p.expected(dtype)) == []


TWO = [DTYPES[0], LOWEST]


@pytest.mark.parametrize("dtype", TWO, ids=dtype_id)
def test_tma_flags_in_every_dtype(dtype: torch.dtype) -> None:
    """Every TMA flag that the rules allow, with permute flags on and off: the same bits as through pointers."""
    shape = Shape(19, 3, 2, 48, 32)
    for flags in EDGE_FLAGS:
        by_tma = options(flags, shape.top_k, fused.tma_kernels(flags))
        plain = fused.run(fused.problem(shape, dtype), options(flags, shape.top_k, small_kernels()))
        got = fused.run(fused.problem(shape, dtype), by_tma)
        if GPU and dtype is not torch.float32:  # a compiler may lay out a tensor core's product differently
            assert fused.yardstick(shape, dtype).complaints(got) == []
        else:
            assert differing(got, plain) == []


# --- flags against each other -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TWO, ids=dtype_id)
@pytest.mark.parametrize("fuse", list(product((True, False), repeat=2)), ids=str)
def test_permute_flags_do_not_change_a_bit(dtype: torch.dtype, fuse: tuple[bool, bool]) -> None:
    """Gather and scatter inside the GEMMs against explicit permutations, at the same tiles."""
    p = fused.problem(ODD, dtype)
    found = [
        fused.run(p, options(dict(zip(FLAGS, (x, y, *fuse), strict=True)), ODD.top_k, small_kernels()))
        for x, y in product((True, False), repeat=2)
    ]
    assert all(differing(other, found[0]) == [] for other in found[1:])


@pytest.mark.parametrize("dtype", TWO, ids=dtype_id)
def test_swiglu_fused_or_not_gives_the_same_bits(dtype: torch.dtype) -> None:
    """H and dA are rounded before the activation in both; the routing weights' gradient alone is summed by tiles.

    Compiled, epilogue and kernel contract different products and sums into one instruction: there only the output.
    """
    p = fused.problem(ODD, dtype)
    for flags in COMBINATIONS[:2]:
        both = [
            fused.run(p, options({**flags, "fuse_swiglu": on}, ODD.top_k, small_kernels()), (not GPU,) * 4)
            for on in (True, False)
        ]
        assert set(differing(*both)) <= {"drouting_weights"}


@by_flags
def test_repeated(flags: dict[str, bool]) -> None:
    """Two calls, the second in other dirty memory: the same bits."""
    p, o = fused.problem(ODD, DTYPES[0]), options(flags, ODD.top_k)
    first = fused.run(p, o)
    junk = [torch.full((4096,), 7.0, device=DEVICE) for _ in range(8)]
    del junk
    assert differing(fused.run(p, o), first) == []


# --- which gradients --------------------------------------------------------------------------------------------------


def fused_block(
    model: ResolvedModel = TINY, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> Qwen3MoeFusedGroupedGEMMBlock:
    return fused.fused_block(model, dtype, seed, **more)


def block_data(tokens: int, model: ResolvedModel = TINY, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, dy = judge.data(tokens, model, dtype)
    return x.to(DEVICE), dy.to(DEVICE)


@by_flags
@pytest.mark.parametrize("only", ["dW_only", "dX_only"])
def test_one_sided_backward(flags: dict[str, bool], only: str) -> None:
    """What is asked for equals the full run bit for bit; the rest is None and not computed."""
    x, dy = block_data(9)
    full = judge.run_block(fused_block(**flags), x, dy)
    with record_launches() as names:
        part = judge.run_block(fused_block(**flags, **{only: True}), x, dy)
    owed = {"dx"} if only == "dX_only" else set(WEIGHTS)
    assert set(part) == {"hidden_states", "router_logits"} | owed
    assert [name for name in part if not torch.equal(part[name], full[name])] == []
    dW, dX = names.count("dW"), names.count("dX")
    through_down = 0 if flags["fuse_swiglu"] else 1  # dX of the down GEMM has a kernel of this name then
    assert (dW, dX - through_down) == ((0, 1) if only == "dX_only" else (2, 0))


SUBSETS = list(product((True, False), repeat=4))


@cache
def _full(flags: str) -> Tensors:
    named = {name: on == "1" for name, on in (text.split("=") for text in flags.split(","))}
    return fused.run(fused.problem(ODD, DTYPES[0]), options(named, ODD.top_k))


@pytest.mark.parametrize("needs", SUBSETS, ids=lambda n: "".join("xsud"[i] for i in range(4) if n[i]) or "none")
@pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)
def test_only_requested_gradients(needs: tuple[bool, ...], flags: dict[str, bool]) -> None:
    """All 16 choices of (x, routing weights, gate_up_proj, down_proj): bitwise as in the full run, nothing else run."""
    p, o = fused.problem(ODD, DTYPES[0]), options(flags, ODD.top_k)
    full = _full(flag_id(flags))
    with record_launches() as names:
        part = fused.run(p, o, needs)
    assert set(part) == {"out"} | {name for name, need in zip(fused.GRADIENTS, needs, strict=True) if need}
    assert [name for name in part if not torch.equal(part[name], full[name])] == []
    assert fused.without_tables(names) == [*fused.expected_forward(flags), *fused.expected_backward(flags, needs)]
    assert names.count("tile_table") <= 2  # one a pass: every tile has the same height


def test_nested_recorders() -> None:
    """An inner recorder leaves the outer one listening, whatever both hold."""
    p, o = fused.problem(ODD, DTYPES[0]), options(COMBINATIONS[0], ODD.top_k)
    with record_launches() as outer:
        with record_launches() as inner:
            pass
        fused.run(p, o, (False,) * 4)
    assert inner == []
    assert fused.without_tables(outer) == fused.expected_forward(COMBINATIONS[0])


# --- trace ------------------------------------------------------------------------------------------------------------


@by_flags
@pytest.mark.parametrize("dtype", [DTYPES[0], LOWEST], ids=dtype_id)
def test_trace(flags: dict[str, bool], dtype: torch.dtype) -> None:
    """Every intermediate has the torch backend's order and values; tracing changes no bit of the result."""
    x, _ = block_data(9, dtype=dtype)
    result, logits = fused_block(dtype=dtype, **flags, trace=True)(x)
    weights = judge.unit_weights(TINY, dtype)
    wide = Qwen3MoeGroupedGEMMBlock(TINY, *(weights[n].double() for n in WEIGHTS))
    eager = Qwen3MoeGroupedGEMMBlock(TINY, *(weights[n] for n in WEIGHTS))(x.cpu())[0]
    exact = wide(x.cpu().double())[0]
    assert isinstance(result, GroupedGEMMResult)
    for field in fields(GroupedGEMMResult):
        got, right, low = (getattr(r, field.name).detach().cpu() for r in (result, exact, eager))
        assert got.shape == right.shape
        if not got.dtype.is_floating_point:
            assert torch.equal(got, right), field.name
            assert got.dtype == torch.int32
            continue
        assert got.dtype == dtype
        bound = 2 * (low.double() - right).abs().max() + 8 * torch.finfo(dtype).eps * right.abs().max()
        assert (got.double() - right).abs().max() <= bound, field.name
    for name in ("first_gemm", "intermediate", "second_gemm", "hidden_states_unpermute"):
        assert not getattr(result, name).requires_grad  # their gradients would be lost without a word
    assert result.hidden_states.requires_grad
    plain, same_logits = fused_block(dtype=dtype, **flags)(x)
    assert torch.equal(plain, result.hidden_states)
    assert torch.equal(logits, same_logits)


@by_flags
def test_trace_with_dropped_slots(flags: dict[str, bool]) -> None:
    """What no expert computes is zero in every intermediate, and lies last in expert order."""
    p = fused.problem(EDGES[9], DTYPES[0]).to(DEVICE)
    o = options(flags, p.top_k, small_kernels())
    out, steps = compute_experts(p.x, p.routing_weights, p.plan, p.gate_up_proj, p.down_proj, o, trace=True)
    right, exact = torch_experts(p.x, p.routing_weights, p.plan, p.gate_up_proj, p.down_proj, ExpertOptions())
    assert steps is not None
    h, a, y = steps
    wanted = exact.hidden_states_unpermute if flags["permute_y"] or not flags["fuse_combine"] else exact.second_gemm
    for got, expected in ((out, right), (h, exact.first_gemm), (a, exact.intermediate), (y, wanted)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    kept = int(p.plan.token_counts_by_expert.sum())
    assert kept < h.shape[0]
    assert not h[kept:].any()
    assert not a[kept:].any()


# --- explain ----------------------------------------------------------------------------------------------------------


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Any], list[tuple[str, dict[str, Any]]]]]:
    """(what `choose` was asked and said, the GEMM launches with their constants).

    Each launch once: who makes a tile table before a GEMM asks for its config, too.
    """
    asked: list[Any] = []
    launched: list[tuple[str, dict[str, Any]]] = []
    choose = pipeline.choose

    def choosing(launch: Any, device: torch.device) -> Any:
        answer = choose(launch, device)
        if all(launch is not one for one, *_ in asked):
            asked.append((launch, *answer))
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "choose", choosing)
        patch.setattr(replay, "_prepare", lambda *call: None)  # where launches must not run, these would
        for module in ("forward", "backward_dX", "backward_dW"):
            path = f"moefactory.triton.{module}.launch"

            def launching(name: str, kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
                launched.append((name, meta))
                kernel[grid](*args, **meta)

            patch.setattr(path, launching)
        yield asked, launched


GEMM_NAMES = {"forward_up", "forward", "dX_dswiglu", "dX", "dW"}
CHOICES: dict[str, dict[str, Any]] = {
    "shipped": {},
    "stated": {
        "autotune": False,
        "kernel_config_fwd": KernelConfigForward(block_m=16, block_n=32, block_k=32),
        "kernel_config_bwd_dX": (KernelConfigBackward_dX(block_m=32, block_n=32, block_k=64), None),
        "kernel_config_bwd_dW": KernelConfigBackward_dW(block_m=16, block_n=64, block_k=32, num_stages=2),
    },
    "gathered": {
        "autotune": False,
        "kernel_config_bwd_dW": KernelConfigBackward_dW(
            block_m=16, block_n=64, block_k=32, gather_first=True, use_tma_load_x=True, use_tma_load_dy=True
        ),
    },
}
STATED = {
    "shipped": (),
    "stated": (("bwd_dX", "up"), *product(("fwd", "bwd_dW"), GEMMS)),
    "gathered": tuple(product(("bwd_dW",), GEMMS)),
}
WORDS = {  # what explain says of a launch, and the constant that must be set then
    ("fwd", "up"): {"gathers x": "PERMUTE_X", "SwiGLU in the epilogue": "SWIGLU"},
    ("fwd", "down"): {"scatters y to token order": "PERMUTE_Y"},
    ("bwd_dX", "up"): {"scatters dx to token order": "SCATTER"},
    ("bwd_dX", "down"): {"gathers dy": "DY_DIVISOR", "dSwiGLU in the epilogue": "DSWIGLU"},
    ("bwd_dW", "up"): {"gathers x": "X_DIVISOR"},
    ("bwd_dW", "down"): {"gathers dy": "DY_DIVISOR"},
}


EXPLAINED = [("stated", 9, flags) for flags in COMBINATIONS]
EXPLAINED += [(c, t, flags) for c, t in (("shipped", 3), ("shipped", 40), ("gathered", 9)) for flags in EDGE_FLAGS]


@pytest.mark.parametrize(
    ("choice", "tokens", "flags"), [pytest.param(c, t, f, id=f"{c}-{t}-{flag_id(f)}") for c, t, f in EXPLAINED]
)
def test_explain_says_what_runs(
    choice: str, tokens: int, flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line of explain(): the launch, what is fused, each field of the config and where it is from."""
    block = fused_block(**flags, **CHOICES[choice])
    first, *lines = block.explain(tokens).splitlines()
    lines = [line for line in lines if not line.startswith("without gradients")]  # test_triton_decode
    x, dy = block_data(tokens)
    with spied(monkeypatch) as (asked, launched), record_launches() as names:
        judge.run_block(block, x, dy)
    others = [name for name in expected_launches(block, tokens) if name not in GEMM_NAMES]
    assert fused.without_tables(names) == others  # the GEMMs' launches went to the spy
    assert f"{2 * tokens} rows" in first
    assert len(lines) == len(asked) == len(launched) == 6
    said = dict(line.split(": ", 1) for line in lines)
    constants = dict(zip([(a[0].pass_name, a[0].gemm) for a in asked], (meta for _, meta in launched), strict=True))
    assert sorted(said) == sorted(f"{p} {g}" for p, g in product(PASSES, GEMMS))
    for launch, config, origin in asked:
        words = said[f"{launch.pass_name} {launch.gemm}"]
        meta = constants[launch.pass_name, launch.gemm]
        for word, constant in WORDS[launch.pass_name, launch.gemm].items():
            assert (word in words) == bool(meta[constant]), (word, words)
        for name, value in asdict(config).items():
            if name not in {"gather_first", "warp_specialize"}:  # what a kernel is given, and which it is
                assert meta[name if name.startswith("num_") else name.upper()] == value
            told = re.search(rf"\b{name}=(\S+)", words)
            assert (told.group(1) if told else "False") == str(value)
        indexed = flags["permute_x" if launch.gemm == "up" else "permute_y"]
        assert ("from a gathered copy of" in words) == (indexed and getattr(config, "gather_first", False))
        assert words.endswith(f"({origin})")
        assert origin == ("stated" if (launch.pass_name, launch.gemm) in STATED[choice] else "shipped")
    ran = {(a[0].pass_name, a[0].gemm): a[0] for a in asked}
    assert {(one.pass_name, one.gemm): one for one in launches(block, tokens)} == ran


def test_explain_of_a_misaligned_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches that explain() asks about are those that run, also where an address rules TMA out."""
    memory = torch.zeros(TINY.num_experts * 2 * TINY.moe_intermediate_size * TINY.hidden_size + 1, device=DEVICE)
    up = memory[1:].view(TINY.num_experts, 2 * TINY.moe_intermediate_size, TINY.hidden_size)
    weights = {name: tensor.to(DEVICE) for name, tensor in judge.unit_weights(TINY, torch.float32).items()}
    up.copy_(weights["gate_up_proj"])
    block = Qwen3MoeFusedGroupedGEMMBlock(TINY, weights["gate"], up, weights["down_proj"])
    x, dy = block_data(9)
    with spied(monkeypatch) as (asked, _):
        judge.run_block(block, x, dy)
    found = {(a[0].pass_name, a[0].gemm): a[0] for a in asked}
    assert {(one.pass_name, one.gemm): one for one in launches(block, 9)} == found


def test_explain_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the launches have autocast's dtype, and explain() says so."""
    block = fused_block()
    x, dy = block_data(9)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected = launches(block, 9)
        with spied(monkeypatch) as (asked, _):
            judge.run_block(block, x, dy.bfloat16())
    assert {one.dtype for one in expected} == {a[0].dtype for a in asked}


# --- Hugging Face and the inherited methods ---------------------------------------------------------------------------


@by_flags
def test_from_hf(flags: dict[str, bool]) -> None:
    """A live block's parameters are shared, its training flag kept, every option passed on; the output is its own."""
    theirs = judge.hf_block(TINY, judge.unit_weights(TINY, torch.float32)).to(DEVICE).eval()
    block = Qwen3MoeFusedGroupedGEMMBlock.from_hf(
        theirs, **flags, autotune=False, dW_only=True, trace=True,
        kernel_config_fwd=KernelConfigForward(block_m=16, block_n=32, block_k=32),
        kernel_config_bwd_dW=KernelConfigBackward_dW(block_m=16, block_n=32, block_k=32),
        kernel_config_bwd_dX=(None, KernelConfigBackward_dX(block_m=16, block_n=32, block_k=32)),
    )  # fmt: skip
    assert isinstance(block, Qwen3MoeGroupedGEMMBlock)
    assert not block.training
    assert block.gate_up_proj is theirs.experts.gate_up_proj  # type: ignore[union-attr]
    assert flags_of(block.moe_config) == flags
    assert (block.dW_only, block.dX_only, block.trace) == (True, False, True)
    assert len(block.fused.kernels) == 5
    assert not block.fused.autotune
    x, _ = block_data(6)
    out: Any = theirs(x)
    torch.testing.assert_close(block(x)[0].hidden_states, out[0] if isinstance(out, tuple) else out)
    assert sorted(name for name, _ in block.named_parameters()) == sorted(WEIGHTS)


def test_inherited_methods() -> None:
    """The router, the plan, the activation and the weights' readers are those of the torch block."""
    ours, plain = fused_block(), Qwen3MoeGroupedGEMMBlock(TINY, *judge.unit_weights(TINY, torch.float32).values())
    x = block_data(7)[0][0]
    router = plain.run_router(x.cpu())
    for got, expected in zip(ours.run_router(x), router, strict=True):
        torch.testing.assert_close(got.cpu(), expected)
    plans = ours.get_token_counts_and_gather_indices(router[2].to(DEVICE))
    for one, other in zip(plans, plain.get_token_counts_and_gather_indices(router[2]), strict=True):
        assert torch.equal(one.cpu(), other)
        assert one.dtype == other.dtype
    torch.testing.assert_close(ours.act_and_mul(x).cpu(), plain.act_and_mul(x.cpu()))
    theirs = judge.hf_block(TINY, judge.unit_weights(TINY, torch.float32)).to(DEVICE)
    for tensor, name in zip(ours.extract_hf_weights(theirs), WEIGHTS, strict=True):
        assert torch.equal(tensor, getattr(ours, name))
    ours.load_state_dict(plain.state_dict())


BAD_IDS = {"floats": torch.zeros(3, 2), "one dimension": torch.zeros(6).long(), "bools": torch.ones(3, 2).bool()}


@pytest.mark.parametrize("ids", BAD_IDS.values(), ids=BAD_IDS)
def test_bad_expert_ids_are_refused_by_the_inherited_method(ids: Tensor) -> None:
    """As the torch block refuses them: the kernels would read them as integers of some kind."""
    with pytest.raises(ValueError, match=r"selected_experts: got .*; needed: integers of shape \[T, K\]"):
        fused_block().get_token_counts_and_gather_indices(ids.to(DEVICE))


def test_check_weights() -> None:
    weights = judge.unit_weights(TINY, torch.float32)
    block = fused_block()
    block.check_weights(judge.hf_block(TINY, weights).to(DEVICE))
    weights["down_proj"][3, 2, 1] += 1
    with pytest.raises(WeightsError, match=r"down_proj: 1 of \d+ elements differ"):
        block.check_weights(judge.hf_block(TINY, weights).to(DEVICE))


# --- layouts and addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded", "offset by one"])
@pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)
def test_strided_input_and_gradient(layout: str, flags: dict[str, bool]) -> None:
    """x and dY in layouts that nobody promised: the same bits as contiguous copies of them."""
    p, o = fused.problem(Shape(12, 3, 2, 36, 20), torch.float32).to(DEVICE), None
    o = options(flags, p.top_k, small_kernels())

    def strided(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.T.contiguous().T
        if layout == "every second":
            return torch.stack([t, t * 7], 1).flatten(0, 1)[::2]
        if layout == "expanded":
            return t[:1].expand_as(t)
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)

    found = []
    for layout_of in (strided, lambda t: strided(t).contiguous().clone()):
        leaves = [p.x, p.routing_weights, p.gate_up_proj, p.down_proj]
        made = [layout_of(leaves[0]).detach(), layout_of(leaves[1]).detach(), *leaves[2:]]
        leaves = [t.requires_grad_() for t in made]
        out, _ = compute_experts(leaves[0], leaves[1], p.plan, leaves[2], leaves[3], o)
        found.append(fused.gradients(out, leaves, layout_of(p.dy)))
    assert differing(*found) == []


@pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_misaligned_storage(flags: dict[str, bool], dtype: torch.dtype) -> None:
    """Weights and tokens that start one element off: the shipped choice runs, with the same result."""
    shape = Shape(24, 3, 2, 64, 32)
    p = fused.problem(shape, dtype)
    leaves = []
    for tensor in p.leaves:
        memory = torch.zeros(tensor.numel() + 1, dtype=dtype, device=DEVICE)
        leaves.append(memory[1:].view(tensor.shape).copy_(tensor).requires_grad_())
    there = p.to(DEVICE)
    out, _ = compute_experts(leaves[0], leaves[1], there.plan, leaves[2], leaves[3], options(flags, shape.top_k))
    assert fused.yardstick(shape, dtype).complaints(fused.gradients(out, leaves, there.dy)) == []


def test_weights_that_are_not_contiguous_are_refused() -> None:
    weights = {n: t.to(DEVICE) for n, t in judge.unit_weights(TINY, torch.float32).items()}
    for name in ("gate_up_proj", "down_proj"):
        bent = {**weights, name: weights[name].transpose(1, 2).contiguous().transpose(1, 2)}
        with pytest.raises(WeightsError, match=rf"{name}: got strides .*contiguous"):
            Qwen3MoeFusedGroupedGEMMBlock(TINY, *(bent[n] for n in WEIGHTS))
        p = fused.problem(Shape(4, 3, 2, 20, 12), torch.float32).to(DEVICE)
        tensor = getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2)
        with pytest.raises(ValueError, match=rf"{name}: got strides"):
            q = replace(p, **{name: tensor})
            compute_experts(q.x, q.routing_weights, q.plan, q.gate_up_proj, q.down_proj, options(COMBINATIONS[0], 2))


MISMATCHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gate_up_proj of another dtype": ("gate_up_proj", {"gate_up_proj": lambda t: t.double()}),
    "down_proj of another dtype": ("down_proj", {"down_proj": lambda t: t.double()}),
    "one expert too many": ("gate_up_proj", {"gate_up_proj": lambda t: torch.cat([t, t[:1]])}),
    "another I": ("down_proj", {"down_proj": lambda t: t[..., :-1].contiguous()}),
    "another H": ("gate_up_proj", {"x": lambda t: t[:, :-1].contiguous()}),
    "fewer tokens than the plan": ("plan", {"x": lambda t: t[:-1], "routing_weights": lambda t: t[:-1]}),
    "routing weights of another K": ("routing_weights", {"routing_weights": lambda t: t[:, :1]}),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_mismatched_arguments_are_refused(name: str) -> None:
    """One line that names the argument; unchecked, each of these is a wrong address or a page of compiler output."""
    argument, changes = MISMATCHED[name]
    p = fused.problem(Shape(4, 3, 2, 20, 12), torch.float32).to(DEVICE)
    q = replace(p, **{key: change(getattr(p, key)) for key, change in changes.items()})
    with pytest.raises(ValueError, match=rf"^{argument}: got .*needed"):
        compute_experts(q.x, q.routing_weights, p.plan, q.gate_up_proj, q.down_proj, options(COMBINATIONS[0], 2))
    with pytest.raises(ValueError, match=r"^plan: got"):
        compute_experts(p.x, p.routing_weights, p.plan, p.gate_up_proj, p.down_proj, options(COMBINATIONS[0], 1))


def test_weights_moved_after_building() -> None:
    """to(dtype) of a built block: the launches follow the new dtype."""
    block = fused_block().to(torch.bfloat16)
    x, dy = block_data(5, dtype=torch.bfloat16)
    assert judge.run_block(block, x, dy)["hidden_states"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="needed: the weights' dtype"):
        block(x.float())


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_a_dtype_that_is_refused_moves_nothing(dtype: torch.dtype) -> None:
    """to(dtype) of a built block: the weights stay what they were, and the block runs on."""
    block = fused_block()
    before = {name: weight.clone() for name, weight in block.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"^dtype: got {dtype}; allowed: float16, bfloat16, float32, float64$"):
        block.to(dtype)
    for name, weight in block.state_dict().items():
        assert weight.dtype == before[name].dtype and torch.equal(weight, before[name])
    x, _ = block_data(5)
    assert block(x)[0].isfinite().all()


@pytest.mark.interpreter
def test_bfloat16_that_the_interpreter_would_not_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own interpreter computes garbage: refused wherever bfloat16 comes in, nothing is moved."""
    block, (x, _) = fused_block(), block_data(5)
    monkeypatch.setattr(launching, "bfloat16_is_rounded", lambda: False)
    reason = "Triton's interpreter does not compute bfloat16 rightly"
    with pytest.raises(MachineError, match=reason):
        block.bfloat16()
    assert block.gate.dtype == x.dtype == torch.float32
    weights = {name: weight.bfloat16() for name, weight in block.state_dict().items()}
    for run in (
        lambda: torch.func.functional_call(block, weights, (x.bfloat16(),)),
        lambda: block.load_state_dict(weights, assign=True) and block(x.bfloat16()),
    ):
        with pytest.raises(MachineError, match=reason):
            run()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(MachineError, match=reason):
        fused_block()(x)


@pytest.mark.parametrize("value", [None, [1.0], 3])
def test_hidden_states_that_are_no_tensor(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^hidden_states: got {type(value).__name__}; needed: a tensor \[..., 64\]$"):
        fused_block()(value)


# --- independence of tokens and experts -------------------------------------------------------------------------------


def _spoil(p: fused.Problem, name: str, index: Any, value: float) -> fused.Problem:
    tensor = getattr(p, name).clone()
    tensor[index] = value
    return replace(p, **{name: tensor})


def _changed(left: Tensor, right: Tensor) -> set[int]:
    """The indices of the first dimension whose bits differ, NaN equal to itself."""
    same = (left == right) | (left.isnan() & right.isnan())
    return set((~same.flatten(1).all(1)).nonzero().flatten().tolist())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)
def test_a_bad_token_stays_with_itself(flags: dict[str, bool], value: float) -> None:
    """NaN or Inf in one token's x, or dY, or routing weight: its own row and its experts' gradients, nothing else."""
    p, o = fused.problem(ODD, torch.float32), options(flags, ODD.top_k, small_kernels())
    clean, token = fused.run(p, o), 7
    experts = set(p.selected_experts[token].tolist())
    for name, index in (("x", token), ("dy", token), ("routing_weights", (token, 0)), ("x", (token, ODD.hidden - 1))):
        spoiled = fused.run(_spoil(p, name, index, value), o)
        for tensor in ("out", "dx", "drouting_weights"):
            assert _changed(clean[tensor], spoiled[tensor]) <= {token}, (name, tensor)
        for tensor in ("gate_up_proj", "down_proj"):
            assert _changed(clean[tensor], spoiled[tensor]) <= experts, (name, tensor)
        touched = "dx" if name == "dy" else "out"
        assert not spoiled[touched][token].isfinite().all()


@pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_bad_weights_stay_with_their_tokens(flags: dict[str, bool], name: str) -> None:
    p, o = fused.problem(ODD, torch.float32), options(flags, ODD.top_k, small_kernels())
    clean = fused.run(p, o)
    for expert in (0, 2, ODD.experts - 1):
        spoiled = fused.run(_spoil(p, name, expert, torch.nan), o)
        tokens = set((p.selected_experts == expert).any(1).nonzero().flatten().tolist())
        for tensor in ("out", "dx"):
            assert _changed(clean[tensor], spoiled[tensor]) == tokens
        for tensor in ("gate_up_proj", "down_proj"):
            assert _changed(clean[tensor], spoiled[tensor]) <= {expert}


@pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_order_and_split_of_the_batch(flags: dict[str, bool], dtype: torch.dtype) -> None:
    """At fixed tiles: shuffled tokens give shuffled rows, two halves give the halves, bit for bit (out, dX, ds)."""
    p, o = fused.problem(ODD, dtype), options(flags, ODD.top_k, small_kernels())
    whole = fused.run(p, o)
    per_token = ("x", "routing_weights", "selected_experts", "dy")

    def taken(index: Tensor) -> Tensors:
        return fused.run(replace(p, **{name: getattr(p, name)[index] for name in per_token}), o)

    order = torch.randperm(ODD.tokens, generator=torch.Generator().manual_seed(1))
    shuffled, halves = taken(order), [taken(torch.arange(0, 9)), taken(torch.arange(9, ODD.tokens))]
    for name in ("out", "dx", "drouting_weights"):
        assert torch.equal(shuffled[name], whole[name][order])
        assert torch.equal(torch.cat([half[name] for half in halves]), whole[name])


@by_flags
def test_routing_weights_gradient_with_zeros_and_ties(flags: dict[str, bool]) -> None:
    """Weights of zero still have a gradient, <dO, Y>; slots of equal weight and expert have equal ones."""
    p = fused.problem(ODD, DTYPES[0])
    weights = p.routing_weights.clone()
    weights[:, 0] = 0
    weights[3] = 0
    twins = p.selected_experts.clone()
    twins[5] = 2
    weights[5] = 0.25
    q = replace(p, routing_weights=weights, selected_experts=twins)
    got = fused.run(q, options(flags, ODD.top_k, small_kernels()))
    exact = fused.exactly(q)
    assert fused.Yardstick(exact, (fused.run_torch(q),), DTYPES[0]).complaints(got) == []
    assert got["drouting_weights"][5].unique().numel() == 1
    assert not got["dx"][3].any()
    assert got["drouting_weights"][3].all()


# --- whole block: inputs, steps ---------------------------------------------------------------------------------------


@by_flags
def test_inputs_are_left_alone(flags: dict[str, bool]) -> None:
    """Bytes and version counters of tokens, weights and dY stay; outputs share no memory with them."""
    block = fused_block(**flags)
    x, dy = block_data(9)
    x.requires_grad_()
    given = [x, dy, *(getattr(block, name) for name in WEIGHTS)]
    before = [(t.detach().clone(), t._version) for t in given]
    out, logits = block(x)
    out.backward(dy)
    for tensor, (bytes_before, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, bytes_before)
        assert tensor._version == version
    owned = {t.untyped_storage().data_ptr() for t in given}
    assert not owned & {t.untyped_storage().data_ptr() for t in (out, logits, x.grad)}


@by_flags
def test_one_step_of_sgd_moves_every_tensor(flags: dict[str, bool]) -> None:
    block = fused_block(**flags)
    before = {name: getattr(block, name).detach().clone() for name in WEIGHTS}
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    x, dy = block_data(33)
    block(x)[0].backward(dy)
    optimizer.step()
    for name in WEIGHTS:
        moved = (getattr(block, name) != before[name]).flatten(1).any(1)
        assert moved.all(), f"{name}: {int((~moved).sum())} experts did not move"


def test_two_steps_in_dirty_memory() -> None:
    """The second step finds the first one's memory, not zeros: dropped rows and empty experts stay exact."""
    shape = Shape(20, 7, 3, 50, 47, "dropped")
    p, o = fused.problem(shape, DTYPES[0]), options(COMBINATIONS[0], shape.top_k)
    first = fused.run(p, o)
    junk = [torch.full_like(t, torch.nan) for t in first.values()]
    del junk
    assert differing(fused.run(p, o), first) == []


@pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_autocast(flags: dict[str, bool], given: torch.dtype) -> None:
    """Everything but the router's softmax runs in autocast's dtype; gradients come in the parameters' own."""
    block = fused_block(**flags)
    low = fused_block(dtype=torch.bfloat16, **flags)
    x, dy = block_data(9)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, logits = block(x.to(given))
    assert out.dtype == logits.dtype == torch.bfloat16
    expected = low(x.bfloat16())[0]
    assert torch.equal(out, expected)
    out.backward(dy.bfloat16())
    expected.backward(dy.bfloat16())
    for name in WEIGHTS:
        assert getattr(block, name).grad.dtype == torch.float32
        assert torch.equal(getattr(block, name).grad.bfloat16(), getattr(low, name).grad)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 2), (0, 4)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    block = fused_block()
    x = torch.randn(*lead, TINY.hidden_size, device=DEVICE)
    out, logits = block(x)
    assert out.shape == x.shape
    assert torch.equal(out.reshape(1, -1, 64), block(x.reshape(1, -1, 64))[0])
    assert logits.shape == (x[..., 0].numel(), 8)


@pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
def test_inputs_at_odd_addresses(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """x and dout as views that start 4 bytes in: the bits of aligned ones, and no GEMM is given such an address.

    The warp-specialised kernels copy 16 bytes at a time, whether by TMA or through an index.
    """
    p = fused.problem(Shape(20, 5, 2, 32, 16), torch.float32).to(DEVICE)
    o = options(flags, 2)
    seen: list[int] = []
    for name in ("forward_gemm", "dX_gemm", "dX_gemm_dswiglu", "dW_gemm"):
        real = getattr(pipeline, name)

        def noting(first: Tensor, second: Tensor, *rest: Any, real: Any = real, **more: Any) -> Any:
            seen.extend(t.data_ptr() % 16 for t in (first, second))
            return real(first, second, *rest, **more)

        monkeypatch.setattr(pipeline, name, noting)

    def shifted(tensor: Tensor) -> Tensor:
        memory = torch.empty(tensor.numel() + 1, device=tensor.device)
        return memory[1:].view(tensor.shape).copy_(tensor)

    def results(x: Tensor, dy: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        out, _ = compute_experts(x, p.routing_weights, p.plan, p.gate_up_proj, p.down_proj, o)
        return [out.detach(), *torch.autograd.grad(out, [x], dy)]

    expected, got = results(p.x, p.dy), results(shifted(p.x), shifted(p.dy))
    assert all(map(torch.equal, got, expected))
    assert set(seen) == {0}
