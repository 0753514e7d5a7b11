"""The rows of ``moefactory bench``: every model, token count and runner gives one for each measure, come what may.

What is refused, runs out of memory or fails says so in its own row, and the others are measured all the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import factory
from .bench_rows import BenchRow, Lost, Settings, verdict
from .config import (
    Backend,
    BackendConfig,
    DType,
    MachineError,
    ModelConfig,
    MoeConfig,
    model_preset,
)
from .describe import require_here
from .measure import Product, Step, Timer, dense_ms, flops, in_turns, inputs, products, round_ms, steered_gate
from .peers import PEERS, UnavailableError
from .progress import Tell
from .routing import route
from .rules import check_rules, make_case
from .weights import BlockWeights

PRESETS = ("tiny", "qwen3_30b_a3b", "qwen3_235b_a22b")
KERNEL_FLAGS = ("permute_x", "permute_y", "fuse_swiglu", "fuse_combine")
GRADIENT_FLAGS = ("dW_only", "dX_only")


@dataclass(frozen=True)
class _Case:
    """One model at one token count: what its runners have in common."""

    config: MoeConfig
    weights: BlockWeights
    x: Tensor
    dout: Tensor


@dataclass
class Sweep:
    """Goes through models, token counts and runners, outermost first: weights are made once for each model."""

    config: MoeConfig
    settings: Settings
    device: torch.device
    timer: Timer
    tell: Tell | None = None
    notes: list[str] = field(default_factory=list)
    ran: list[MoeConfig] = field(default_factory=list)  # the configurations of our blocks that were made

    def __post_init__(self) -> None:
        s = self.settings
        self.models: list[str | None] = list(s.models) if s.models else [None]
        self.runners = [*(s.backends or ()), *(s.peers or ())]
        self.total, self.done = len(self.models) * len(s.tokens) * len(self.runners), 0

    def rows(self) -> Iterator[BenchRow]:
        """The rows, each as soon as it is there."""
        for model in self.models:
            made, lost = self._attempt(lambda model=model: self._weights(model))  # type: ignore[misc]
            name = model or _name(made)
            for tokens in self.settings.tokens:
                yield from self._at(name, tokens, made, lost)
            del made

    def _attempt(self, call: Callable[[], Any]) -> tuple[Any, Lost | None]:
        """(what it returns, None), or (None, why there is nothing): a compiler raises what it likes."""
        try:
            return call(), None
        except Exception as error:
            lost = verdict(error)
        free(self.device)  # only now: the error held the tensors of its frames
        return None, lost

    def _weights(self, model: str | None) -> tuple[MoeConfig, BlockWeights]:
        """The configuration as it is run, and weights that all runners share."""
        config = factory._with_source(self.config, None)
        if model is not None:
            config = replace(config, model=ModelConfig(**asdict(model_preset(model))))
        weights = factory.load_weights(config)
        gate = weights.gate.detach()
        if self.settings.routing != "random":
            gate = steered_gate(gate, config.weights.seed)
        up, down = weights.gate_up_proj.detach(), weights.down_proj.detach()
        weights = BlockWeights(weights.model, nn.Parameter(gate), nn.Parameter(up), nn.Parameter(down))
        dtype = DType(str(gate.dtype).removeprefix("torch."))
        sizes = ModelConfig(**asdict(weights.model))
        return replace(config, model=sizes, dtype=dtype, device=str(gate.device)), weights

    def _at(self, name: str, tokens: int, made: Any, lost: Lost | None) -> Iterator[BenchRow]:
        """The rows of one model and token count."""
        blank = self._blank(name, tokens)
        case: _Case | None = None
        if lost is None:
            config, weights = made
            blank = replace(blank, dtype=config.dtype.name)
            s = self.settings
            drawn, lost = self._attempt(lambda: inputs(weights.gate, weights.model, tokens, s.routing, s.seed))
        if lost is None:
            blank = replace(blank, load=_load(weights, drawn[0]))
            case = _Case(config, weights, drawn[0], drawn[1])
        for runner in self.runners:
            if self.tell:
                self.tell(f"{name}, {tokens} tokens, {runner}", self.done, self.total)
            yield from self._runner(replace(blank, runs=runner, flags=self._flags(runner)), case, lost)
            self.done += 1
            free(self.device)

    def _dense(self, row: BenchRow, weights: BlockWeights, of: Sequence[Product]) -> float | None:
        """Milliseconds of these dense products; None, and a note, where they do not run: the row then has no share."""
        place, ms = (weights.gate.dtype, self.device), round_ms(self.settings.ms)
        times, lost = self._attempt(lambda: dense_ms(weights.model, row.tokens, *place, self.timer, ms, of))
        if lost:
            note = f"{row.model}, {row.tokens} tokens: no share, the dense products do not run: {': '.join(lost)}"
            if note not in self.notes:
                self.notes.append(note)
        return sum(times.values()) if times else None

    def _blank(self, name: str, tokens: int) -> BenchRow:
        c, s = self.config, self.settings
        dtype = c.dtype.name if c.dtype else ""
        return BenchRow(name, tokens, "", "", dtype=dtype, device=str(self.device), routing=s.routing, seed=s.seed)

    def _flags(self, runner: str) -> str:
        names = () if runner in PEERS else GRADIENT_FLAGS if runner == "torch" else KERNEL_FLAGS + GRADIENT_FLAGS
        return " ".join(flag for flag in names if getattr(self.config, flag))

    def _runner(self, row: BenchRow, case: _Case | None, lost: Lost | None) -> Iterator[BenchRow]:
        """The rows of one runner."""
        made: Any = None
        if case and lost is None:
            config, weights = case.config, case.weights
            if row.runs not in PEERS:
                config = replace(config, backend=BackendConfig(Backend(row.runs)))
            made, lost = self._attempt(lambda: _make(row.runs, config, weights, row.tokens))
            if made and row.runs not in PEERS:
                self.ran.append(config)
        for measure in ["forward", "step", *(["graph"] if self.settings.graph and row.runs not in PEERS else [])]:
            blank, why = replace(row, measure=measure), lost
            if case and made:
                blank = replace(blank, kernels=made[1])
                step = Step(made[0], case.x, case.dout, case.config)
                found, why = self._attempt(lambda blank=blank, step=step: self._measured(blank, step, case))  # type: ignore[misc]
            yield found if why is None else replace(blank, status=why[0], reason=why[1])

    def _measured(self, row: BenchRow, step: Step, case: _Case) -> BenchRow:
        on_gpu = self.device.type == "cuda"
        if row.measure == "graph":
            if not on_gpu:
                raise MachineError(f"CUDA graphs need moe.device=cuda, got {self.device}")
            if row.runs == "torch":
                raise UnavailableError("backend torch waits for the GPU on its way: it cannot be captured")
            run = step.graph()
        else:
            run = {"forward": step.forward, "step": step.step}[row.measure]
        held, peak = step.memory() if on_gpu and row.measure == "step" else (None, None)
        of = products(row.measure, case.config)
        times, beside = in_turns(
            run, lambda: self._dense(row, case.weights, of), self.timer, self.device, self.settings.ms
        )
        return replace(
            row, p20_ms=times.p20, p50_ms=times.p50, p80_ms=times.p80, dense_ms=beside,
            share=beside / times.p50 if beside else None,
            tflops=flops(case.weights.model, row.tokens, of) / times.p50 / 1e9, held_mib=held, peak_mib=peak,
        )  # fmt: skip


def _name(made: Any) -> str:
    """The preset with the sizes of the weights."""
    return next((name for name in PRESETS if made and model_preset(name) == made[1].model), "config")


def _make(runner: str, config: MoeConfig, weights: BlockWeights, tokens: int) -> tuple[nn.Module, str]:
    """(the module, where its kernel configs are from). Whatever keeps it from being there is raised."""
    if runner in PEERS:
        return PEERS[runner](weights), ""
    check_rules(make_case(config, weights.model, config.dtype))
    require_here(config)
    block = factory.make_block(config, weights)
    text = block.explain(tokens) if runner == "triton" else ""
    origins = [name for name in ("tuned", "shipped", "stated") if f"({name})" in text]
    return block, origins[0] if len(origins) == 1 else "mixed" if origins else ""


def _load(weights: BlockWeights, x: Any) -> float:
    """Rows of the busiest expert over the mean."""
    model = weights.model
    with torch.no_grad():
        selected = route(x[0], weights.gate, model.top_k, model.norm_topk_prob)[2]
    return float(selected.flatten().bincount().max()) * model.num_experts / selected.numel()


def free(device: torch.device) -> None:
    """Give memory that nothing holds back to the GPU."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # a broken context: the rows that follow say so
            return
