"""What the tests of the Triton backend share: flag combinations, small problems with a held routing, runs and verdicts.

A `Problem` is the experts' part alone: tokens, routing and weights are given, so that a comparison never depends on who
routed how. Its verdict compares with float64 and with the better of Hugging Face's eager experts and our torch backend.
Everything runs on the device under test (`DEVICE`), interpreted on a CPU or compiled on a GPU. `conftest` checks every
address, every integer and every masked lane of interpreted kernels; `surroundings` is for each test file to ask for.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import judge
import pytest
import torch
from interpreter import nan_filled_empty
from judge import WEIGHTS, Tensors, complaints, hf_block, naive_experts, unit_weights
from torch import Tensor

from moefactory.block import Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import (
    GEMMS,
    PASSES,
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
    ResolvedModel,
)
from moefactory.reference import ExpertOptions
from moefactory.reference import compute_experts as torch_experts
from moefactory.routing import RoutingPlan, make_plan
from moefactory.triton import few_tokens, lookup
from moefactory.triton.gate import MAX_TOKENS_FORWARD
from moefactory.triton.options import FusedOptions
from moefactory.triton.plan import BLOCK, BLOCK_ALONE, FEW_BLOCKS, MAX_FEW_GROUPS

GPU = os.environ.get("MOEFACTORY_TEST_GPU", "") == "1"
DEVICE = "cuda" if GPU else "cpu"

FLAGS = ("permute_x", "permute_y", "fuse_swiglu", "fuse_combine")
COMBINATIONS: list[dict[str, bool]] = [dict(zip(FLAGS, on, strict=True)) for on in product((True, False), repeat=4)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float64, *judge.LOW)
Kernels = tuple[tuple[str, str, KernelConfig], ...]


def flag_id(flags: dict[str, bool]) -> str:
    """``permute_x=1,permute_y=0,...``, short enough for a test's id."""
    return ",".join(f"{name}={int(on)}" for name, on in flags.items())


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def surroundings(nan: bool = True) -> Iterator[None]:
    """Fresh memory holds NaN, and no earlier search of this machine's owner has a say in which configs run."""
    former = os.environ.get("MOEFACTORY_CACHE")
    os.environ["MOEFACTORY_CACHE"] = os.path.join(tempfile.gettempdir(), "moefactory-tests-have-tuned-nothing")
    lookup.forget()
    try:
        with nan_filled_empty() if nan else nullcontext():
            yield
    finally:
        del os.environ["MOEFACTORY_CACHE"]
        if former is not None:
            os.environ["MOEFACTORY_CACHE"] = former
        lookup.forget()


# --- kernel configs ---------------------------------------------------------------------------------------------------


def small_kernels(m: int = 16, n: int = 32, k: int = 32, **more: Any) -> Kernels:
    """The same small tiles for all six launches: many tiles on a small problem. `more` holds for every launch."""
    return tuple(
        (p, g, kind(block_m=m, block_n=n, block_k=k, num_stages=2, **more))
        for (p, kind), g in product(PASSES.items(), GEMMS)
    )


def tma_kernels(flags: dict[str, bool], stages: int = 2) -> Kernels:
    """Small tiles with every TMA flag that the rules allow beside these permute flags."""
    x, y, swiglu = flags["permute_x"], flags["permute_y"], flags["fuse_swiglu"]
    tile: dict[str, Any] = {"block_m": 16, "block_n": 32, "block_k": 32, "num_stages": stages}
    return (
        ("fwd", "up", KernelConfigForward(**tile, use_tma_load_x=not x, use_tma_load_w=True, use_tma_store=True)),
        ("fwd", "down", KernelConfigForward(**tile, use_tma_load_x=True, use_tma_load_w=True, use_tma_store=not y)),
        ("bwd_dX", "up", KernelConfigBackward_dX(**tile, use_tma_load_dy=True, use_tma_load_w=True,
                                                 use_tma_store=not x)),
        ("bwd_dX", "down", KernelConfigBackward_dX(**tile, use_tma_load_dy=not y, use_tma_load_w=True,
                                                   use_tma_store=not swiglu)),
        ("bwd_dW", "up", KernelConfigBackward_dW(**tile, use_tma_load_dy=True, use_tma_load_x=not x,
                                                 use_tma_store=True)),
        ("bwd_dW", "down", KernelConfigBackward_dW(**tile, use_tma_load_dy=not y, use_tma_load_x=True,
                                                   use_tma_store=True)),
    )  # fmt: skip


def specialized_kernels(*, swapped: bool = False) -> Kernels:
    """The warp-specialised kernels for all six launches, as shipped.

    `swapped` gives each dW the tile of the other, and every ring its fewest stages.
    """
    rows: dict[str, Any] = {"num_warps": 8, "num_stages": 3 if swapped else 4, "warp_specialize": True}
    fwd = KernelConfigForward(block_m=128, block_n=256, block_k=64, **rows)
    dX = KernelConfigBackward_dX(block_m=128, block_n=64, block_k=256, **rows)
    wide = KernelConfigBackward_dW(block_m=64, block_n=256, block_k=128, **rows)
    tall = KernelConfigBackward_dW(block_m=64, block_n=128, block_k=256, **rows)
    up, down = (tall, wide) if swapped else (wide, tall)  # the operand behind an index takes the narrow side
    return (
        ("fwd", "up", fwd), ("fwd", "down", fwd), ("bwd_dX", "up", dX), ("bwd_dX", "down", dX),
        ("bwd_dW", "up", up), ("bwd_dW", "down", down),
    )  # fmt: skip


def noting(launched: Any, found: list[tuple[str, int]], names: Container[str] | None = None) -> Any:
    """`launched`, a module's `launch`, that writes down (name, programs) of each kernel, or of those of `names`."""

    def run(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        if names is None or name in names:
            found.append((name, grid[0]))
        launched(name, kernel, grid, *args, **meta)

    return run


def claim(monkeypatch: pytest.MonkeyPatch, claimed: bool) -> None:
    """Every warp-specialised kernel that may claim its tiles does, whatever memory and sizes, or none."""
    from moefactory.triton import specialized

    monkeypatch.setattr(specialized, "MAX_CLAIMED", 2**62 * claimed)
    monkeypatch.setattr(specialized, "FEW_ROWS", 2**31 * claimed)
    monkeypatch.setattr(specialized, "WIDE_MEMORY", 0)


def plain_twins() -> Kernels:
    """Plain kernels in the tiles of the specialised ones, so with sums of the same order; a stage less, to fit."""
    return tuple(
        (p, g, replace(config, warp_specialize=False, num_stages=config.num_stages - 1))
        for p, g, config in specialized_kernels()
    )


# --- problems ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem and how its rows are spread: see `selection`."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    routing: str = "random"

    @property
    def model(self) -> ResolvedModel:
        return ResolvedModel(self.hidden, self.intermediate, self.experts, self.top_k, True, "silu")

    def __str__(self) -> str:
        sizes = f"T{self.tokens}E{self.experts}K{self.top_k}H{self.hidden}I{self.intermediate}"
        return f"{sizes}-{self.routing.replace(' ', '_')}"


def selection(shape: Shape, generator: torch.Generator) -> Tensor:
    """[T,K] expert ids.

    random: distinct experts a token; one: always the first top_k experts; last: always the last; gaps: never the
    first, the middle and the last expert; dropped: random, then about a third outside [0, E); none: all outside.
    """
    t, e, k = shape.tokens, shape.experts, shape.top_k
    allowed = list(range(e))
    if shape.routing == "one":
        allowed = allowed[:k]
    elif shape.routing == "last":
        allowed = allowed[-k:]
    elif shape.routing == "gaps":
        allowed = [i for i in allowed if i not in {0, e // 2, e - 1}]
    pool = torch.tensor(allowed)
    order = torch.rand(t, len(allowed), generator=generator).argsort(dim=1)[:, :k]
    chosen = pool[order].reshape(t, k)
    if shape.routing == "dropped":
        out = torch.tensor([-1, e, e + 3])[torch.randint(3, (t, k), generator=generator)]
        chosen = torch.where(torch.rand(t, k, generator=generator) < 0.35, out, chosen)
    return torch.full_like(chosen, e) if shape.routing == "none" else chosen


@dataclass(frozen=True)
class Problem:
    """The experts' part of a block with a held routing; tensors on the CPU. `judge.run_experts` takes it."""

    x: Tensor  # [T,H]
    routing_weights: Tensor  # [T,K]
    selected_experts: Tensor  # [T,K]
    gate_up_proj: Tensor  # [E,2I,H]
    down_proj: Tensor  # [E,H,I]
    dy: Tensor  # [T,H]

    @property
    def plan(self) -> RoutingPlan:
        return make_plan(self.selected_experts, self.gate_up_proj.shape[0])

    @property
    def top_k(self) -> int:
        return self.selected_experts.shape[1]

    def to(self, *where: Any) -> Problem:
        """Moved, or cast: the ids keep their type."""
        dtype = next((w for w in where if isinstance(w, torch.dtype)), None)
        moved = {n: getattr(self, n).to(*where) for n in ("x", "routing_weights", "gate_up_proj", "down_proj", "dy")}
        ids = self.selected_experts if dtype else self.selected_experts.to(*where)
        return replace(self, selected_experts=ids, **moved)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.routing_weights, self.gate_up_proj, self.down_proj]


GRADIENTS = ("dx", "drouting_weights", "gate_up_proj", "down_proj")  # weights' gradients by the names that judge knows


@cache
def problem(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Unit-scale data, drawn in float64 and rounded."""
    g = torch.Generator().manual_seed(seed)
    weights = unit_weights(shape.model, dtype, seed=seed + 1)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    scores = torch.rand(shape.tokens, shape.top_k, generator=g, dtype=torch.float64) + 0.1
    scores = (scores / scores.sum(-1, keepdim=True)).to(dtype)
    x, dy = draw(shape.tokens, shape.hidden), draw(shape.tokens, shape.hidden)
    return Problem(x, scores, selection(shape, g), weights["gate_up_proj"], weights["down_proj"], dy)


def gradients(out: Tensor, leaves: list[Tensor], dy: Tensor) -> Tensors:
    """Output and the gradients of those leaves that ask for one, on the CPU."""
    wanted = [(name, leaf) for name, leaf in zip(GRADIENTS, leaves, strict=True) if leaf.requires_grad]
    found = torch.autograd.grad(out, [leaf for _, leaf in wanted], dy) if wanted else ()
    named = {name: grad.detach().cpu() for (name, _), grad in zip(wanted, found, strict=True)}
    return {"out": out.detach().cpu(), **named}


def run(p: Problem, options: FusedOptions, needs: tuple[bool, ...] = (True,) * 4) -> Tensors:
    """The fused experts on the device under test; a gradient that is not asked for stays out of the dict."""
    from moefactory.triton.ops import compute_experts

    there = p.to(DEVICE)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(there.leaves, needs, strict=True)]
    out, _ = compute_experts(leaves[0], leaves[1], there.plan, leaves[2], leaves[3], options)
    return gradients(out, leaves, there.dy)


def run_torch(p: Problem) -> Tensors:
    """Our torch backend, on the CPU in the problem's dtype."""
    leaves = [t.clone().requires_grad_() for t in p.leaves]
    out, _ = torch_experts(leaves[0], leaves[1], p.plan, leaves[2], leaves[3], ExpertOptions())
    return gradients(out, leaves, p.dy)


def run_hf(p: Problem) -> Tensors | None:
    """Hugging Face's eager experts, or None where they cannot take the routing (no token, ids beyond E)."""
    experts, width, hidden = p.gate_up_proj.shape
    inside = (p.selected_experts >= 0) & (p.selected_experts < experts)
    if not bool(inside.all()) or not p.x.shape[0]:
        return None
    model = ResolvedModel(hidden, width // 2, experts, p.top_k, True, "silu")
    weights = {"gate": p.x.new_zeros(experts, hidden), "gate_up_proj": p.gate_up_proj, "down_proj": p.down_proj}
    module = hf_block(model, weights).experts
    x, scores = (t.clone().requires_grad_() for t in (p.x, p.routing_weights))
    out: Any = module(x, p.selected_experts, scores)  # type: ignore[operator]
    return gradients(out, [x, scores, module.gate_up_proj, module.down_proj], p.dy)  # type: ignore[union-attr,list-item]


def exactly(p: Problem) -> Tensors:
    """float64 on the same rounded inputs, one token and one slot at a time."""
    wide = p.to(torch.float64)
    leaves = [t.clone().requires_grad_() for t in wide.leaves]
    out = naive_experts(leaves[0], leaves[1], p.selected_experts, leaves[2], leaves[3], "silu")
    out = out + sum(leaf.sum() * 0 for leaf in leaves)  # a leaf that no token touches has a gradient of zeros
    return gradients(out, leaves, wide.dy)


@dataclass(frozen=True)
class Yardstick:
    """float64's results and those of the eager paths in the problem's dtype."""

    exact: Tensors
    eager: tuple[Tensors, ...]
    dtype: torch.dtype

    def complaints(self, got: Tensors) -> list[str]:
        """What is wrong: at most twice the error of the better eager path, per expert and per token (see `judge`)."""
        exact = {name: self.exact[name] for name in got}
        if self.dtype is torch.float64:
            return _beyond_rounding(got, exact, self.dtype)
        ours, true = _one_group(got), _one_group(exact)
        if not ours["out"].numel():
            return _beyond_rounding(got, exact, got["out"].dtype)
        return [text for eager in self.eager for text in complaints(ours, _one_group(eager), true, self.dtype)]


def _one_group(tensors: Tensors) -> Tensors:
    """The K routing weights of one token are too few for a statement on its largest error: all tokens are one group."""
    name = "drouting_weights"
    return {**tensors, name: tensors[name].reshape(1, -1)} if name in tensors else tensors


def _beyond_rounding(got: Tensors, exact: Tensors, dtype: torch.dtype) -> list[str]:
    """float64 against float64: sums of other order, 64 eps of the largest value. Zeros of any dtype: none at all."""
    found = []
    for name, right in exact.items():
        if got[name].shape != right.shape or got[name].dtype != dtype:
            found.append(f"{name}: {tuple(got[name].shape)} {got[name].dtype}, not {tuple(right.shape)} {dtype}")
            continue
        bound = 64 * torch.finfo(torch.float64).eps * (float(right.abs().max()) if right.numel() else 0.0)
        error = float((got[name] - right).abs().nan_to_num(nan=torch.inf).max()) if right.numel() else 0.0
        if error > bound:
            found.append(f"{name}: largest error {error:.3g} > {bound:.3g}")
    return found


@cache
def yardstick(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Yardstick:
    """What `problem(shape, dtype, seed)` is measured by; computed once, whatever the flags."""
    p = problem(shape, dtype, seed)
    eager = [run_torch(p)] + ([theirs] if (theirs := run_hf(p)) is not None else [])
    return Yardstick(exactly(p), tuple(eager), dtype)


def options(flags: dict[str, bool], top_k: int, kernels: Kernels = (), **more: Any) -> FusedOptions:
    return FusedOptions(top_k=top_k, **flags, autotune=not kernels, kernels=kernels, **more)


def differing(left: Tensors, right: Tensors) -> list[str]:
    """Names of tensors that differ in a bit, or are in one dict only."""
    same = {n for n in left.keys() & right.keys() if torch.equal(left[n], right[n])}
    return sorted((left.keys() | right.keys()) - same)


def fused_block(model: ResolvedModel, dtype: torch.dtype, seed: int = 0, **more: Any) -> Qwen3MoeFusedGroupedGEMMBlock:
    """A block of `unit_weights` on the device under test."""
    weights = unit_weights(model, dtype, seed=seed)
    return Qwen3MoeFusedGroupedGEMMBlock(model, *(weights[name].to(DEVICE) for name in WEIGHTS), **more)


# --- which kernels run ------------------------------------------------------------------------------------------------


def expected_front(tokens: int, experts: int, top_k: int, *, whole: bool) -> list[str]:
    """The kernels from x to the plan, for at least one token; where the block is one operator the router counts for the
    plan if a block of slots is 8, 16 or 32 tokens, of at most 128 experts."""
    gate = ["gate"] if tokens <= MAX_TOKENS_FORWARD else []
    if few_tokens.few(tokens, experts):
        return [*gate, "route_few_tokens"]
    if tokens * top_k <= BLOCK_ALONE:
        return [*gate, "route_forward", "plan_alone"]
    counted = whole and top_k in {4, 8, 16} and experts <= 128
    few = tokens * top_k <= FEW_BLOCKS * BLOCK and experts < MAX_FEW_GROUPS
    return [
        *gate,
        "route_forward",
        *([] if counted else ["plan_histogram"]),
        *([] if few else ["plan_prefix"]),
        "plan_positions",
    ]


def expected_forward(flags: dict[str, bool]) -> list[str]:
    """The kernels of a forward over at least one row, tile tables left out, in order."""
    permute = [] if flags["permute_x"] else ["gather_rows"]
    up = ["forward_up"] if flags["fuse_swiglu"] else ["forward", "swiglu_forward"]
    if flags["fuse_combine"]:
        return [*permute, *up, "forward", "combine"]
    return [*permute, *up, "forward", *([] if flags["permute_y"] else ["gather_rows"])]


def expected_backward(
    flags: dict[str, bool],
    needs: tuple[bool, ...],
    gather_first: tuple[bool, bool] = (False, False),
    *,
    router: bool = False,
    gate: bool = False,
) -> list[str]:
    """The kernels of a backward that owes gradients of (x, routing weights, gate_up_proj, down_proj).

    `gather_first` of dW of the up and of the down GEMM: whether an indexed operand is copied before the product.
    `router`: the block's backward, not the experts' alone, with the weighted sum in a kernel; `gate`: of as few tokens
    as `gate.gate_gradient` takes, and with the gate's gradient.
    """
    x, scores, up, down = needs
    scores = scores and flags["fuse_combine"]  # else their gradient is torch's
    if not (x or scores or up or down):
        return []
    names = [] if flags["permute_y"] else ["gather_rows"]
    if x or scores or up:
        names += ["dX_dswiglu"] if flags["fuse_swiglu"] else ["dX", "swiglu_backward"]
    else:
        names += ["swiglu_forward"]
    if down:
        names += ["gather_rows", "dW"] if gather_first[1] and flags["permute_y"] else ["dW"]
    names += ["route_backward", *(["gate_gradient"] if gate else [])] if router and scores else []
    if x:
        names += ["dX", "sum_dX" if router else "combine"]
    if up:
        names += ["gather_rows", "dW"] if gather_first[0] or not flags["permute_x"] else ["dW"]
    return names


def indices(plan: RoutingPlan) -> tuple[Any, ...]:
    """A plan as the experts' operators take it."""
    plain = (plan.group_offsets, plan.gather_indices, plan.scatter_indices)
    return *plain, *(plan.table or (None,) * 3), plan.block_m


def without_tables(names: list[str]) -> list[str]:
    """Without what depends on tiles' sides: tables, and the sum of ds over column tiles where it is a launch."""
    return [name for name in names if name not in {"tile_table", "sum_ds"}]


# --- reports ----------------------------------------------------------------------------------------------------------


def report(case: str, **measured: Any) -> None:
    """Append one JSON line to the file that MOEFACTORY_GPU_REPORT names, if it does."""
    if path := os.environ.get("MOEFACTORY_GPU_REPORT"):
        with open(path, "a") as file:
            file.write(json.dumps({"case": case, **measured}) + "\n")
