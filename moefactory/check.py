"""``moefactory check``: a block beside Hugging Face's and beside float64, and a verdict for each tensor.

Three things are compared (`moefactory.numerics` says how):
    weights   bit for bit with those of Hugging Face's block, which `from_pretrained` loaded by itself
    unit      unit-scale data: errors of ours and of Hugging Face's against float64, per tensor, per expert, per token
    integer   exact sums: bit for bit with float64
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from . import factory
from .config import DType, MoeConfig, ResolvedModel, WeightsConfig, WeightsError, WeightsSource, as_dict, resolve_model
from .numerics.demo import demo_checkpoint
from .numerics.exact import judge_integers
from .numerics.integers import integer_problem, integer_sizes
from .numerics.judge import Comparison
from .numerics.run import wanted_gradients
from .numerics.theirs import load_hf_block, quiet_transformers
from .numerics.unit import UnitResult, unit_problem
from .provenance import provenance
from .reference import activation
from .rules import check_rules, make_case
from .weights import to_hf_block


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        status: ``ok``, or ``mismatch`` if any comparison fails.
        comparisons: every verdict.
        config: the configuration as it was run, plain.
        model: the block's sizes and routing.
        source: where the weights came from, in words.
        ran: what computed the experts, in words.
        routing: tokens, top_k, and how many tokens route differently in Hugging Face's block and in float64.
        expert_load: tokens of each expert in the unit-scale problem.
        times_ms: single runs, the first ones: compilation is included.
        provenance: versions, commit, machine and GPU.
        notes: what the reader should know besides.
    """

    status: str
    comparisons: list[Comparison]
    config: dict[str, Any]
    model: ResolvedModel
    source: str
    ran: str
    routing: dict[str, Any]
    expert_load: list[int]
    times_ms: dict[str, float]
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def run_check(config: MoeConfig, tokens: int = 64, seed: int = 0, cache: str | None = None) -> CheckReport:
    """Check the block of a configuration.

    Args:
        config: weights that are not stated are a demonstration checkpoint, written by transformers.
        tokens: of the unit-scale problem, T.
        seed: of its tokens.
        cache: folder of the demonstration checkpoint, None for the user's cache folder.

    Raises:
        ConfigError, WeightsError: what `moefactory.build` refuses, and a cache folder that cannot be written.
    """
    start = time.perf_counter()
    check_rules(make_case(config))
    notes: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        config = _with_weights(config, cache, stack, notes)
        block = factory.build(config)
        config = _placed(config, block)
        hf, source = _hf_block(config)
        same = _same_weights(block, hf)
        ran = str(block.explain(tokens))  # type: ignore[operator]
        model: ResolvedModel = block.model  # type: ignore[assignment]
        unit = unit_problem(block, hf, config, tokens, seed)
        del block, hf  # a second block of that size follows
        exact = _integers(config, model, notes)
    _add_notes(unit, exact, notes)
    comparisons = [same, *unit.comparisons, *exact]
    times = {**unit.times_ms, "total": (time.perf_counter() - start) * 1000}
    return CheckReport(
        "ok" if all(c.ok for c in comparisons) else "mismatch", comparisons, as_dict(config), model, source, ran,
        unit.routing, unit.expert_load, times, provenance(torch.device(config.device or "cpu")), notes,
    )  # fmt: skip


def _with_weights(config: MoeConfig, cache: str | None, stack: ExitStack, notes: list[str]) -> MoeConfig:
    """The configuration with a source of weights: the demonstration checkpoint unless one is stated."""
    if config.weights.source is not None:
        return config
    model = resolve_model(config.model)
    activation(model.hidden_act)
    demo = demo_checkpoint(model, config.weights.seed, cache, stack)
    if demo.note:
        notes.append(demo.note)
    return replace(config, weights=WeightsConfig(WeightsSource.checkpoint, config.weights.seed, demo.path, demo.layer))


def _placed(config: MoeConfig, block: Any) -> MoeConfig:
    """With the dtype and device that the block has."""
    dtype = DType(str(block.gate.dtype).removeprefix("torch."))
    return replace(config, dtype=dtype, device=str(block.gate.device))


def _hf_block(config: MoeConfig) -> tuple[nn.Module, str]:
    """Hugging Face's block with weights of its own (never our block's memory), and where they came from."""
    assert config.dtype is not None and config.device is not None
    weights = config.weights
    if weights.source is WeightsSource.checkpoint:
        assert weights.path is not None and weights.layer is not None
        dtype = getattr(torch, config.dtype.name)
        block, how = load_hf_block(weights.path, weights.layer, dtype, config.device)
        return block, f"layer {weights.layer} of {weights.path}, Hugging Face's by {how}"
    return to_hf_block(factory.load_weights(config)), f"random, seed {weights.seed}"


def _same_weights(block: Any, hf: nn.Module) -> Comparison:
    try:
        block.check_weights(hf)
    except WeightsError as error:
        return Comparison("weights", "weights", "all", False, note=str(error))
    return Comparison("weights", "weights", "all", True)


def _integers(config: MoeConfig, model: ResolvedModel, notes: list[str]) -> list[Comparison]:
    """The integer problem on a block of the same configuration, around weights of its own."""
    assert config.dtype is not None and config.device is not None
    sizes = integer_sizes(model)
    for name in ("hidden_size", "moe_intermediate_size", "top_k"):
        if getattr(sizes, name) != getattr(model, name):
            notes.append(f"integer problem: {name}={getattr(sizes, name)} in place of {getattr(model, name)}")
    problem = integer_problem(sizes, getattr(torch, config.dtype.name), config.device)
    own = problem.weights
    copies = {name: getattr(own, name).clone() for name in ("gate", "gate_up_proj", "down_proj")}
    block = factory.make_block(config, replace(own, **copies))  # the problem's stay what they are, whatever it does
    return judge_integers(block, problem, wanted_gradients(config))


def _add_notes(unit: UnitResult, exact: list[Comparison], notes: list[str]) -> None:
    """What the tables do not show by themselves."""
    routing = unit.routing
    if apart := routing["differ_from_hf"]:
        what = "their gradient of the output is zero, their rows of output and dX are not compared"
        notes.append(f"{apart} of {routing['tokens']} tokens select other experts in Hugging Face's block: {what}")
    if apart := routing["differ_from_float64"]:
        notes.append(
            f"{apart} of {routing['tokens']} tokens would select other experts in float64, which is held to ours"
        )
    if routing["expert_without_tokens"] is None:
        notes.append("every expert gets tokens: no draw left one without")
    if skipped := sorted({c.tensor for c in exact if c.note.startswith("not judged")}):
        notes.append(f"integer problem: {', '.join(skipped)} are not exact with this activation, and not judged")
