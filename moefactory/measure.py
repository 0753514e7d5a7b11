"""What a benchmark measures: times of a module and of the dense products beside it, memory, graph replay, inputs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError, MoeConfig, ResolvedModel

MIB = 2**20
STEERING = 12.0  # added to the logits of the experts that a token is to select; the others are normal
PRODUCTS = {
    "forward": (("fwd", "up"), ("fwd", "down")),
    "backward": (("bwd_dX", "down"), ("bwd_dW", "down"), ("bwd_dX", "up"), ("bwd_dW", "up")),
}
STEP = PRODUCTS["forward"] + PRODUCTS["backward"]
ROUNDS = 5  # of short measurements that take turns

Run = Callable[[], Any]
Product = tuple[str, str]  # (pass, GEMM)


@dataclass(frozen=True)
class Times:
    """Quantiles of the milliseconds of a call."""

    p20: float
    p50: float
    p80: float


Timer = Callable[[Run, torch.device, int], Times]


def time_calls(run: Run, device: torch.device, ms: int) -> Times:
    """Call `run` for about `ms` milliseconds; on a GPU each call finds a cold L2."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return Times(*do_bench(run, warmup=max(1, ms // 4), rep=ms, quantiles=[0.2, 0.5, 0.8]))
    from torch.utils.benchmark import Timer as HostTimer

    run()
    timer = HostTimer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    seconds = timer.blocked_autorange(min_run_time=ms / 1000).times
    if len(seconds) < 2:
        return Times(*[seconds[0] * 1000] * 3)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Times(fifths[0] * 1000, statistics.median(seconds) * 1000, fifths[3] * 1000)


def products(measure: str, config: MoeConfig) -> tuple[Product, ...]:
    """The GEMMs of a forward, or of a step with the gradients that the configuration asks for."""
    if measure != "step":
        return PRODUCTS["forward"]
    never = set[Product]()
    if config.dX_only:
        never = {("bwd_dW", "up"), ("bwd_dW", "down")}
    elif config.dW_only:
        never = {("bwd_dX", "up")}
    return PRODUCTS["forward"] + tuple(one for one in PRODUCTS["backward"] if one not in never)


def flops(model: ResolvedModel, tokens: int, of: Sequence[Product]) -> int:
    """Multiplications and additions of these GEMMs; the up GEMM has twice the down GEMM's."""
    down = 2 * tokens * model.top_k * model.hidden_size * model.moe_intermediate_size
    return sum(2 * down if gemm == "up" else down for _, gemm in of)


def dense_ms(
    model: ResolvedModel,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    ms: int,
    of: Sequence[Product] = STEP,
) -> dict[Product, float]:
    """Milliseconds of the dense product of each GEMM: one matrix product over all T*K rows, nothing else."""
    rows, h, i = tokens * model.top_k, model.hidden_size, model.moe_intermediate_size

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, a, z, up, down = new(rows, h), new(rows, i), new(rows, 2 * i), new(2 * i, h), new(h, i)
    runs: dict[Product, Run] = {
        ("fwd", "up"): lambda: x @ up.T,
        ("fwd", "down"): lambda: a @ down.T,
        ("bwd_dX", "down"): lambda: x @ down,
        ("bwd_dW", "down"): lambda: x.T @ a,
        ("bwd_dX", "up"): lambda: z @ up,
        ("bwd_dW", "up"): lambda: z.T @ x,
    }
    return {one: timer(runs[one], device, ms).p50 for one in of}


def turns(measurements: Sequence[Callable[[], Any]], rounds: int) -> list[tuple[Any, ...]]:
    """What each measurement gave in each of the rounds, in which they take turns.

    A machine's clocks fall while it works: what is measured first looks better than it is.
    """
    return list(zip(*([measure() for measure in measurements] for _ in range(rounds)), strict=True))


def round_ms(ms: int) -> int:
    """The milliseconds of a round, of `ms` for all of them."""
    return max(1, ms // ROUNDS)


def in_turns(
    run: Run, dense: Callable[[], float | None], timer: Timer, device: torch.device, ms: int
) -> tuple[Times, float | None]:
    """(quantiles of `run`, milliseconds of the dense products beside it), each the median of ROUNDS short rounds.

    `dense` gives None where there are no dense products to compare with.
    """
    beside, times = turns((dense, lambda: timer(run, device, round_ms(ms))), ROUNDS)
    quantiles = (statistics.median(getattr(one, name) for one in times) for name in ("p20", "p50", "p80"))
    return Times(*quantiles), None if None in beside else statistics.median(beside)


def captured(run: Run, device: torch.device) -> Run:
    """The replay of a CUDA graph of `run`."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Step:
    """Forward, and forward with backward, of any block: ours, or Hugging Face's of either version.

    Args:
        module: takes [B,S,H]; returns hidden states, alone or first of a tuple.
        x, dout: [1,T,H], the input and the gradient of the output.
        config: dW_only and dX_only say which gradients are asked for.
    """

    def __init__(self, module: nn.Module, x: Tensor, dout: Tensor, config: MoeConfig) -> None:
        self.module, self.dout = module, dout
        self.x = x.detach().requires_grad_(not config.dW_only)
        weights = [] if config.dX_only else [p for p in module.parameters() if p.requires_grad]
        self.wanted = [*([] if config.dW_only else [self.x]), *weights]

    def _out(self) -> Tensor:
        out = self.module(self.x)
        first = out[0] if isinstance(out, tuple) else out
        return first if isinstance(first, Tensor) else first.hidden_states  # a traced result

    def forward(self) -> Tensor:
        """[1,T,H], nothing kept for a backward."""
        with torch.no_grad():
            return self._out()

    def step(self) -> tuple[Tensor, ...]:
        """The gradients to x and to all weights, as far as they are asked for."""
        return torch.autograd.grad(self._out(), self.wanted, self.dout, allow_unused=True)

    def memory(self) -> tuple[float, float]:
        """MiB on the GPU: (held for the backward after a forward, the peak of a step, gradients included)."""
        device = self.x.device
        self.step()  # what is made once, compiled code and scratch, is no part of it
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = self._out()
        held = torch.cuda.memory_allocated(device) - before
        grads = torch.autograd.grad(out, self.wanted, self.dout, allow_unused=True)
        peak = torch.cuda.max_memory_allocated(device) - before
        del out, grads
        return held / MIB, peak / MIB

    def graph(self) -> Run:
        """The replay of a forward that a CUDA graph holds."""
        return captured(self.forward, self.x.device)


def steered_gate(gate: Tensor, seed: int) -> Tensor:
    """Orthonormal rows [E,H] in place of a gate: `inputs` can then choose each token's experts."""
    e, h = gate.shape
    if e > h:
        raise ConfigError(f"routing: a chosen routing needs hidden_size of num_experts or more, got {h} and {e}")
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(h, e, generator=draw)).Q.T.contiguous().to(gate)


def inputs(gate: Tensor, model: ResolvedModel, tokens: int, routing: str, seed: int) -> tuple[Tensor, Tensor]:
    """(x, gradient of the output), [1,T,H] each: normal, the same bits on every machine before the cast.

    Unless `routing` is random, x leans towards the rows of a `steered_gate`.
    """
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, model.hidden_size, generator=draw)
    dout = torch.randn(tokens, model.hidden_size, generator=draw)
    if routing != "random":
        selected = chosen(routing, tokens, model.num_experts, model.top_k, draw)
        rows = gate.detach().cpu().float()
        for slot in range(model.top_k):
            x += STEERING * rows[selected[:, slot]]
    return x.to(gate)[None], dout.to(gate)[None]


def chosen(routing: str, tokens: int, experts: int, top_k: int, draw: torch.Generator) -> Tensor:
    """Which experts each token is to select, [T,K], no expert twice in a row of it.

    balanced: the same number of rows each, but for one. zipf: the n-th expert is drawn in proportion to 1/n. one: the
    first K experts take everything.
    """
    if routing == "balanced":
        flat = torch.arange(tokens * top_k) % experts
        return flat.view(tokens, top_k)[torch.randperm(tokens, generator=draw)]
    if routing == "one":
        return torch.arange(top_k).expand(tokens, top_k)
    odds = -torch.log(torch.arange(1, experts + 1).float())
    noise = -torch.log(-torch.log(torch.rand(tokens, experts, generator=draw).clamp(1e-7, 1 - 1e-7)))
    return (odds + noise).topk(top_k).indices  # Gumbel: a draw without replacement
