"""Is a launch right under a kernel config? Its own kernel on a small problem whose sums are integers, bit for bit.

Small integers make every sum exact in float32, whatever the order, so a right result has one bit pattern: that of
torch in float64, rounded once. The problem keeps n, k and the flags (so the tails of the blocks are the real ones) and
has few experts, with one row more and one row less than a block, a single row, none, and dropped rows. Where SwiGLU is
fused, gates are 0 or so large that their sigmoid is exactly 1. Outputs begin as NaN, and the kernel runs twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import KernelConfig
from ..routing import RoutingPlan, make_plan
from .choice import Launch
from .pipeline import Pipeline

INPUTS = {
    ("fwd", "up"): ("x",),
    ("fwd", "down"): ("a",),
    ("bwd_dX", "up"): ("dh",),
    ("bwd_dX", "down"): ("dout", "h", "s"),
    ("bwd_dW", "up"): ("dh", "x"),
    ("bwd_dW", "down"): ("dout", "h", "s"),
}
LARGE_GATE = 64  # exp(-64) vanishes beside 1, in float64 too
ROUND = 16  # sizes that are multiples of 16 get a kernel of their own: the probe's are, where the real ones can be


@dataclass(frozen=True)
class Problem:
    """Tensors that a launch runs on: the plan, the weights by GEMM and the inputs by name (see `shapes`)."""

    launch: Launch
    plan: RoutingPlan
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]


def shapes(launch: Launch, plan: RoutingPlan) -> dict[str, tuple[int, int]]:
    """The shape of every input this launch reads; x and s by token, dout too with fuse_combine, the rest by row."""
    hidden, width = (launch.k, launch.n // 2) if launch.gemm == "up" else (launch.n, launch.k)
    tokens, rows = plan.num_tokens, plan.num_tokens * plan.top_k
    every = {
        "x": (tokens, hidden),
        "s": (tokens, plan.top_k),
        "a": (rows, width),
        "h": (rows, 2 * width),
        "dh": (rows, 2 * width),
        "dout": (tokens if launch.options.fuse_combine else rows, hidden),
    }
    return {name: every[name] for name in INPUTS[launch.pass_name, launch.gemm]}


def runner(problem: Problem, config: KernelConfig, *, checking: bool = False) -> Callable[[], dict[str, Tensor]]:
    """A function that runs this launch under `config`, through the same pipeline as a step; its results by name.

    `checking` adds to dX of the down GEMM the dW that reads its second result.
    """
    launch, plan, t = problem.launch, problem.plan, problem.inputs
    forced = replace(launch.options, autotune=False, kernels=((launch.pass_name, launch.gemm, config),))
    indices = (plan.group_offsets, plan.gather_indices, plan.scatter_indices)
    p = Pipeline(*indices, forced, problem.weights["up"], problem.weights["down"])

    def d_down(need_dh: bool, need_dw: bool) -> dict[str, Any]:
        found = p.d_down(t["dout"], t["h"], t["s"], need_dh=need_dh, need_dw=need_dw)
        return {name: value for name, value in zip(("dh", "ds", "dw"), found, strict=True) if value is not None}

    return {
        ("fwd", "up"): lambda: dict(zip(("a", "h"), p.up(t["x"], save_h=True), strict=True)),
        ("fwd", "down"): lambda: {"y": p.down(t["a"])},
        ("bwd_dX", "up"): lambda: {"dx": p.dx_up(t["dh"])},
        ("bwd_dX", "down"): lambda: d_down(True, checking),
        ("bwd_dW", "up"): lambda: {"dw": p.dw_up(t["dh"], t["x"])},
        ("bwd_dW", "down"): lambda: d_down(False, True),
    }[launch.pass_name, launch.gemm]


def integer_problem(launch: Launch, block_m: int, device: torch.device) -> Problem:
    """The problem on which a launch is judged, for configs with at most `block_m` rows a block."""
    draw = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, launch.dtype.value)

    def integers(*shape: int) -> Tensor:  # -1, 0, 1
        return torch.randint(-1, 2, shape, generator=draw, device=device, dtype=torch.int8).to(dtype)

    plan = _uneven_plan(launch, block_m, device)
    n, k = launch.n, launch.k
    other = ("down", (plan.num_experts, k, n // 2)) if launch.gemm == "up" else ("up", (plan.num_experts, 2 * k, n))
    weights = {
        launch.gemm: integers(plan.num_experts, n, k),
        other[0]: torch.zeros(other[1], dtype=dtype, device=device),
    }
    inputs = {name: integers(*shape) for name, shape in shapes(launch, plan).items()}
    if "s" in inputs:
        inputs["s"] = torch.exp2(inputs["s"])  # 1/2, 1, 2
    if "h" in inputs:
        gate, up = inputs["h"].chunk(2, dim=1)  # views
        gate.abs_().mul_(LARGE_GATE)
        up.add_(up.eq(0).to(dtype) * 2)  # -1, 1, 2
        inputs["h"][_kept_rows(plan) :] = 0  # as the forward leaves dropped rows
    if (launch.pass_name, launch.gemm) == ("fwd", "up"):
        _lift_gates(weights["up"], inputs["x"], plan)
    return Problem(launch, plan, weights, inputs)


def _uneven_plan(launch: Launch, block_m: int, device: torch.device) -> RoutingPlan:
    """Few experts, unevenly loaded in shuffled slots; the rest of the slots is dropped."""
    experts = ROUND if launch.experts % ROUND == 0 else min(launch.experts, 6)
    loads = [block_m + 1, 0, 1, 2 * block_m + block_m // 2 + 3, block_m - 1, block_m]
    counts = [loads[e % len(loads)] for e in range(experts)]
    top_k = launch.options.top_k
    rows = -(-(sum(counts) + 3) // (ROUND * top_k)) * ROUND * top_k
    experts_of = torch.arange(experts + 1).repeat_interleave(torch.tensor([*counts, rows - sum(counts)]))
    shuffled = experts_of[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    return make_plan(shuffled.view(-1, top_k).to(device), experts)


def _kept_rows(plan: RoutingPlan) -> int:
    return int(plan.token_counts_by_expert.sum())


def _lift_gates(weight: Tensor, x: Tensor, plan: RoutingPlan) -> None:
    """Write column 0 so that every gate is at least `LARGE_GATE`."""
    width = weight.shape[1] // 2
    x[:, 0] = 16
    weight[:, :width, 0] = 0
    lowest = _product(x.double()[plan.gather_indices // plan.top_k], weight, plan, transposed=True)[:, :width].min()
    weight[:, :width, 0] = torch.ceil((LARGE_GATE - lowest) / 16).to(weight.dtype)


def _product(rows: Tensor, weight: Tensor, plan: RoutingPlan, *, transposed: bool) -> Tensor:
    """Each expert's rows times its weight (or its transpose) in float64; zeros for dropped rows."""
    out = rows.new_zeros(rows.shape[0], weight.shape[1 if transposed else 2])
    for e, here in enumerate(_slices(plan)):
        w = weight[e].double()
        out[here] = rows[here] @ (w.T if transposed else w)
    return out


def _outer(left: Tensor, right: Tensor, plan: RoutingPlan, dtype: torch.dtype) -> Tensor:
    """Each expert's left^T right, rounded to `dtype` expert by expert: in float64 it is large."""
    return torch.stack([(left[here].T @ right[here]).to(dtype) for here in _slices(plan)])


def _slices(plan: RoutingPlan) -> list[slice]:
    ends = plan.token_counts_by_expert.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def truth(problem: Problem) -> dict[str, Tensor]:
    """What the launch must give, by name: float64 torch, rounded where the kernels round."""
    launch, plan, o = problem.launch, problem.plan, problem.launch.options
    dtype = problem.weights[launch.gemm].dtype
    t = {name: value.double() for name, value in problem.inputs.items()}
    weight, token = problem.weights[launch.gemm], plan.gather_indices // plan.top_k
    if launch.pass_name == "fwd" and launch.gemm == "up":
        h = _product(t["x"][token], weight, plan, transposed=True).to(dtype)
        return {"h": h, "a": _activation(h.double())[2].to(dtype)}
    if launch.pass_name == "fwd":
        y = _product(t["a"], weight, plan, transposed=True).to(dtype)
        return {"y": y[plan.scatter_indices] if o.permute_y else y}
    if launch.gemm == "up" and launch.pass_name == "bwd_dX":
        rows = _product(t["dh"], weight, plan, transposed=False).to(dtype).double()[plan.scatter_indices]
        return {"dx": rows.view(plan.num_tokens, plan.top_k, -1).sum(1).to(dtype)}
    if launch.gemm == "up":
        return {"dw": _outer(t["dh"], t["x"][token], plan, dtype)}
    dy = t["dout"][token if o.fuse_combine else plan.gather_indices]
    s = t["s"].view(-1, 1)[plan.gather_indices] if o.fuse_combine else torch.ones_like(dy[:, :1])
    _, _, a = _activation(t["h"])
    found = {"dw": _outer(dy, (a * s).to(dtype).double(), plan, dtype)}
    return found if launch.pass_name == "bwd_dW" else {**found, **_d_activation(problem, dy, s, t["h"])}


def _activation(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gate, up, silu(gate) * up)."""
    gate, up = h.chunk(2, dim=1)
    return gate, up, torch.nn.functional.silu(gate) * up


def _d_activation(problem: Problem, dy: Tensor, s: Tensor, h: Tensor) -> dict[str, Tensor]:
    plan, weight = problem.plan, problem.weights["down"]
    da = _product(dy, weight, plan, transposed=False)
    if not problem.launch.options.fuse_swiglu:
        da = da.to(weight.dtype).double()  # the GEMM's result is a tensor of its own
    gate, up, a = _activation(h)
    sig = torch.sigmoid(gate)
    dh = torch.cat([s * da * up * sig * (1 + gate * (1 - sig)), s * da * gate * sig], dim=1)
    return {"dh": dh.to(weight.dtype), "ds": (da * a).sum(1)[plan.scatter_indices]}


def complaint(problem: Problem, config: KernelConfig, expected: dict[str, Tensor]) -> str | None:
    """What is wrong with the launch under `config`, or None. What the kernel raises is raised."""
    run = runner(problem, config, checking=True)
    for attempt in ("", " in a second run"):
        with _memory_of_nan():
            got = run()
        for name, wanted in expected.items():
            if found := _difference(got[name], wanted):
                return f"{name}: {found}{attempt}"
    return None


def _difference(got: Tensor, wanted: Tensor) -> str | None:
    if got.shape != wanted.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    differ = (got != wanted).nonzero()  # a NaN differs from everything
    if not len(differ):
        return None
    first = tuple(differ[0].tolist())
    came, right = got[first].item(), wanted[first].item()
    return f"{len(differ)} of {got.numel()} elements differ, at {list(first)} {came:g} instead of {right:g}"


@contextmanager
def _memory_of_nan() -> Iterator[None]:
    """Let torch.empty return NaN (integers: the largest): an element that is not written shows itself."""
    deterministic: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        torch.set_deterministic_debug_mode("warn")
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            deterministic.fill_uninitialized_memory = fill
