"""Searching the fastest right kernel config of each launch of a step. Never runs inside a step.

Every candidate is judged by `probe` before it is timed: what is wrong or cannot run is struck out, with its reason. A
launch's result is written as soon as that launch is done, so an interrupted search goes on where it was (within a
launch it starts over, but finds its kernels compiled).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import PASSES, ConfigError, KernelConfig
from ..routing import make_plan
from . import cache
from .choice import Launch, _capability
from .explain import launches
from .launch import compile_ahead, interpreting
from .lookup import Result, keep, known
from .probe import Problem, complaint, integer_problem, runner, shapes, truth
from .search_space import candidates

if TYPE_CHECKING:
    from ..block import Qwen3MoeFusedGroupedGEMMBlock

FINALISTS = 4  # timed once more, one after the other: a GPU's clock drifts by some percent during a search
TOGETHER = 8  # candidates compiled at a time: more, and the first of them is long in coming
TIE = 1.01  # of configs this close to the fastest, the one nearest to the shipped choice wins

Run = Callable[[], Any]
Timer = Callable[[Run], float]


@dataclass(frozen=True)
class TuneRow:
    """One candidate of one launch.

    Attributes:
        launch, config: what was tried for what.
        status: ``ok``, ``wrong`` (another result than torch's), ``failed`` (did not compile or run), or ``cached``
            (from an earlier search; nothing was run).
        ms: milliseconds of the launch with what belongs to it (a permuted copy, the sum over K), else None.
        reason: why it was struck out.
        shipped, winner: whether it is the shipped choice, and whether steps now use it (known at a launch's end).
    """

    launch: Launch
    config: KernelConfig
    status: str
    ms: float | None = None
    reason: str = ""
    shipped: bool = False
    winner: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        one = self.launch
        place = {"pass": one.pass_name, "gemm": one.gemm, "rows_per_expert": one.rows_per_expert}
        rest = {name: getattr(self, name) for name in ("status", "ms", "reason", "shipped", "winner")}
        return {**place, "config": asdict(self.config), **rest}


@dataclass(frozen=True)
class TuneProgress:
    """After each candidate: `done` of `total`, and the row that it gave. A cached launch is done at once."""

    done: int
    total: int
    row: TuneRow


@dataclass(frozen=True)
class TuneReport:
    """What a search found, in the order in which it ran."""

    device: str
    num_tokens: int
    rows: tuple[TuneRow, ...]

    @property
    def winners(self) -> list[TuneRow]:
        """The row of each launch that has a result."""
        return [row for row in self.rows if row.winner]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {"device": self.device, "num_tokens": self.num_tokens, "rows": [row.as_dict() for row in self.rows]}

    def __str__(self) -> str:
        lines = [f"tuned for {self.num_tokens} tokens on {self.device}"]
        for row in self.winners:
            tried = [other for other in self.rows if other.launch == row.launch]
            lost = sum(other.status in {"wrong", "failed"} for other in tried)
            shipped = next((other.ms for other in tried if other.shipped), None)
            gain = f", {shipped / row.ms:.2f}x the shipped choice's speed" if shipped and row.ms else ""
            count = "from the cache" if row.status == "cached" else f"{len(tried)} tried, {lost} struck out"
            values = " ".join(f"{k}={v}" for k, v in asdict(row.config).items() if v is not False)
            lines.append(f"{_name(row.launch)}: {row.ms:.4g} ms{gain}; {count}; {values}")
        return "\n".join(lines)


def tune(
    block: Qwen3MoeFusedGroupedGEMMBlock,
    num_tokens: int,
    *,
    passes: Sequence[str] = tuple(PASSES),
    progress: Callable[[TuneProgress], None] | None = None,
    timer: Timer | None = None,
    redo: bool = False,
) -> TuneReport:
    """Search the kernel configs of a step with `num_tokens` tokens and keep them in the cache.

    With several processes, let one tune and the others start after it: then all read the same configs.

    Args:
        block: its weights are read, never written; under autocast its launches have autocast's dtype.
        num_tokens: T. The results hold for every T of the same power-of-two bucket of rows per expert.
        passes: fwd, bwd_dX, bwd_dW; launches that the block's dW_only or dX_only rules out are left out.
        progress: called after each candidate.
        timer: milliseconds of a function; by default the GPU's own clock (in the interpreter the host's).
        redo: search again what the cache has.

    Raises:
        ConfigError: a block with autotune=false, which would not use the results.
        ValueError: `num_tokens` below 1, an unknown pass.
        RuntimeError: a candidate broke the GPU's context.
    """
    todo = _launches(block, num_tokens, passes)
    device, rows = block.gate.device, list[TuneRow]()
    counts = {one: len(candidates(one, _capability(device))) for one in todo}
    done = 0

    def tell(row: TuneRow, candidates_done: int = 1) -> None:
        nonlocal done
        done += candidates_done
        if progress:
            progress(TuneProgress(done, sum(counts.values()), row))

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for one in todo:
            if (result := None if redo else known(one, device)) is not None:
                rows += _cached_rows(one, device, result)
                tell(rows[-1], counts[one])
            else:
                real = _random_problem(one, block, num_tokens)
                rows += _search(real, device, timer or _default_timer(device), tell)
    return TuneReport(str(cache.environment(device)["device"]), num_tokens, tuple(rows))


def _launches(block: Qwen3MoeFusedGroupedGEMMBlock, num_tokens: int, passes: Sequence[str]) -> list[Launch]:
    """The launches to tune: those that this block can run, in the dtype that a step would have now."""
    if not block.fused.autotune:
        raise ConfigError("autotune: got false; tune() needs true, since a block without it never uses the results")
    if num_tokens < 1:
        raise ValueError(f"num_tokens: got {num_tokens}; needed: 1 or more")
    if unknown := [name for name in passes if name not in PASSES]:
        raise ValueError(f"passes: got {unknown[0]!r}; allowed: {', '.join(PASSES)}")
    never = {("bwd_dX", "up")} if block.dW_only else {("bwd_dW", "up"), ("bwd_dW", "down")} if block.dX_only else set()
    wanted = [one for one in launches(block, num_tokens) if one.pass_name in passes]
    return [one for one in wanted if (one.pass_name, one.gemm) not in never]


def _weights(block: Qwen3MoeFusedGroupedGEMMBlock) -> dict[str, Tensor]:
    """The weights by GEMM, as a step would have them now: under autocast, copies in its dtype."""
    kind = block.gate.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else block.gate.dtype
    return {"up": block.gate_up_proj.detach().to(dtype), "down": block.down_proj.detach().to(dtype)}


def _cached_rows(launch: Launch, device: torch.device, result: Result) -> list[TuneRow]:
    """The shipped choice's row, where it was timed, and the winner's."""
    shipped = candidates(launch, _capability(device))[0]
    rows = [TuneRow(launch, shipped, "cached", result.shipped_ms, shipped=True)] if result.shipped_ms else []
    if result.winner == shipped:
        rows = []
    return [*rows, TuneRow(launch, result.winner, "cached", result.ms, shipped=result.winner == shipped, winner=True)]


def _search(timed: Problem, device: torch.device, timer: Timer, tell: Callable[[TuneRow], None]) -> list[TuneRow]:
    """Judge and time every candidate of a launch, keep the winner in the cache."""
    launch = timed.launch
    choices = candidates(launch, _capability(device))
    small = integer_problem(launch, max(config.block_m for config in choices), device)
    expected = truth(small)
    rows = []
    for place, config in enumerate(choices):
        if place % TOGETHER == 0:
            _compile(choices[place : place + TOGETHER], (small, timed))
        row = _judged(timed, config, timer, lambda config: complaint(small, config, expected))
        rows.append(replace(row, shipped=config == choices[0]))
        tell(rows[-1])
    rows = _finals(rows, timed, timer)
    _warn(rows)
    for row in rows:
        if row.winner and row.ms:
            keep(launch, device, Result(row.config, row.ms, rows[0].ms))
    return rows


def _compile(configs: Sequence[KernelConfig], problems: tuple[Problem, ...]) -> None:
    """Compile what these configs launch, several at a time. What cannot be is struck out where it is judged."""

    def run() -> None:
        for config, problem in product(configs, problems):
            with suppress(Exception):
                runner(problem, config)()

    if not interpreting():
        compile_ahead(run)


def _judged(
    timed: Problem, config: KernelConfig, timer: Timer, complain: Callable[[KernelConfig], str | None] | None = None
) -> TuneRow:
    """The row of a candidate: right and timed, or struck out."""
    launch = timed.launch
    try:
        if complain and (wrong := complain(config)):
            return TuneRow(launch, config, "wrong", reason=wrong)
        return TuneRow(launch, config, "ok", cache.milliseconds(timer(runner(timed, config))))
    except torch.OutOfMemoryError:
        raise  # our tensors do not fit: not the candidate's fault
    except Exception as error:  # a compiler raises what it likes, and any of it strikes the candidate out
        _check_context(timed.weights["up"].device, f"{_name(launch)} under {config}")
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return TuneRow(launch, config, "failed", reason=first[:200])


def _check_context(device: torch.device, what: str) -> None:
    """RuntimeError where the last launch broke the GPU's context: nothing runs in this process after that."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        text = f"{what} broke the GPU's context; what was tuned before it is kept, this process cannot go on"
        raise RuntimeError(text) from error


def _finals(rows: list[TuneRow], timed: Problem, timer: Timer) -> list[TuneRow]:
    """The rows, the fastest and the shipped one timed once more side by side, and the winner marked."""
    fastest = sorted((row for row in rows if row.ms), key=lambda row: row.ms or 0.0)[:FINALISTS]
    for place, row in enumerate(rows):
        if row in fastest or (row.shipped and row.ms):
            rows[place] = replace(_judged(timed, row.config, timer), shipped=row.shipped)
    again = {row.config for row in fastest} | {rows[0].config}
    finalists = [row for row in rows if row.ms and row.config in again]
    best = min((row.ms for row in finalists if row.ms), default=0.0)
    winner = next((row.config for row in finalists if row.ms and row.ms <= best * TIE), None)
    return [replace(row, winner=row.config == winner) for row in rows]


def _warn(rows: list[TuneRow]) -> None:
    """A wrong candidate, or a launch without a right one, is nobody's routine."""
    wrong = [row for row in rows if row.status == "wrong"]
    none = not any(row.winner for row in rows)
    if wrong or none:
        first = (wrong or rows)[0]
        what = "computed a wrong result" if wrong else "could not run"
        count = f"{len(wrong or rows)} of {len(rows)} candidates {what} and are struck out"
        rest = "; none is left, the shipped choice stays in use" if none else ""
        text = f"{_name(first.launch)}: {count}, first {first.config}: {first.reason}{rest}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)


def _random_problem(launch: Launch, block: Qwen3MoeFusedGroupedGEMMBlock, num_tokens: int) -> Problem:
    """Normal data of the real shape under near-balanced routing, and the block's own weights."""
    device, dtype = block.gate.device, getattr(torch, launch.dtype.value)
    draw = torch.Generator(device).manual_seed(0)
    scores = torch.rand(num_tokens, launch.experts, generator=draw, device=device)
    plan = make_plan(scores.topk(launch.options.top_k).indices, launch.experts)
    sizes = shapes(launch, plan)
    inputs = {name: torch.randn(s, generator=draw, device=device, dtype=dtype) for name, s in sizes.items()}
    return Problem(launch, plan, _weights(block), inputs)


def _default_timer(device: torch.device) -> Timer:
    return _gpu_milliseconds if device.type == "cuda" and not interpreting() else _host_milliseconds


def _gpu_milliseconds(run: Run) -> float:
    """The median over a cold L2, from a CUDA graph where one can be captured: the host outlasts a small kernel."""
    from triton.testing import do_bench

    run()
    torch.cuda.synchronize()
    graph, replay = torch.cuda.CUDAGraph(), run
    with suppress(RuntimeError):
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        replay = graph.replay
    return float(do_bench(replay, warmup=10, rep=50, return_mode="median"))


def _host_milliseconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000


def _name(launch: Launch) -> str:
    return f"{launch.pass_name} {launch.gemm}"
