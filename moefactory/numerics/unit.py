"""The unit-scale problem: x and the gradient of the output are N(0,1), one expert gets no token.

Our block and Hugging Face's route by themselves, in the dtype under test; float64 takes our block's selection. Tokens
that the two route differently (`run.py`) have no part in the weights' gradients, and their rows of the output and of dX
are left out; router logits are compared for every token. How many there are is reported, and whether each choice was a
legitimate one is a verdict of its own, by value: no expert that was left out may score higher in float64 than one that
was taken, by more than twice the router logits' own bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MoeConfig
from ..routing import route
from ..weights import read_hf_block
from .judge import Comparison, Errors, Rounding, judge, judge_rows, shape_or_dtype
from .oracle import Oracle, float64_block
from .run import WEIGHTS, Run, clock, draw_tokens, flipped, run_both, seeded, wanted_gradients


@dataclass(frozen=True)
class UnitResult:
    """The verdicts and what the reader wants to see beside them."""

    comparisons: list[Comparison]
    routing: dict[str, Any]
    expert_load: list[int]
    times_ms: dict[str, float]


def unit_problem(block: Any, hf: nn.Module, config: MoeConfig, tokens: int, seed: int) -> UnitResult:
    """Run our block, Hugging Face's (own weights, same values) and float64 on the same tokens, and judge."""
    weights = read_hf_block(hf)
    x, empty = draw_tokens(weights, tokens, seed)
    grad_output = torch.randn(x.shape, generator=seeded(2 * seed + 1)).to(x)
    ours, theirs, grad_output = run_both(block, hf, weights, x, grad_output)
    wanted = wanted_gradients(config)
    rule = Rounding.of(x.dtype, max(weights.model.hidden_size, 2 * weights.model.moe_intermediate_size, tokens))
    start = clock(x)
    experts = _ExpertJudge(ours, theirs, wanted, rule)
    oracle = float64_block(weights, x, ours.selected_experts, grad_output, experts.on_expert)
    apart = flipped(ours.selected_experts, theirs.selected_experts)
    found = _token_verdicts(ours, theirs, oracle, (~apart).nonzero().flatten(), "dX" in wanted, rule)
    found += experts.gate(oracle) + experts.verdicts()
    for name in ("dX", *(f"d{w}" for w in WEIGHTS)):
        if name not in wanted and ours.gradients[name] is not None:
            note = f"is there, but {'dW_only' if config.dW_only else 'dX_only'}=true does not ask for it"
            found.append(Comparison("unit", name, "all", False, note=note))
    load = torch.bincount(ours.selected_experts.flatten(), minlength=weights.model.num_experts).tolist()
    free = route(x.double(), weights.gate.detach().double(), weights.model.top_k, weights.model.norm_topk_prob)[2]
    routing = {
        "tokens": tokens,
        "top_k": weights.model.top_k,
        "differ_from_hf": int(apart.sum()),
        "differ_from_float64": int(flipped(ours.selected_experts, free).sum()),
        "expert_without_tokens": empty,
    }
    times = {
        "forward": ours.forward_ms, "backward": ours.backward_ms, "hf_forward": theirs.forward_ms,
        "hf_backward": theirs.backward_ms, "float64": clock(x) - start,
    }  # fmt: skip
    return UnitResult(found, routing, load, times)


def _token_verdicts(
    ours: Run, theirs: Run, oracle: Oracle, alike: Tensor, with_dx: bool, rule: Rounding
) -> list[Comparison]:
    """Selection, router logits, output and dX."""
    every = torch.arange(len(ours.router_logits), device=alike.device)
    logits = judge_rows("router_logits", ours.router_logits, theirs.router_logits, oracle.router_logits, every, rule)
    found = [_selection(ours.selected_experts, oracle.router_logits, logits[0].bound), *logits]
    found += judge_rows("output", ours.output, theirs.output, oracle.output, alike, rule)
    if with_dx:
        mine, hf = ours.gradients["dX"], theirs.gradients["dX"]
        assert hf is not None
        found += [_none("dX")] if mine is None else judge_rows("dX", mine, hf, oracle.dX, alike, rule)
    return found


def _none(name: str) -> Comparison:
    return Comparison("unit", name, "all", False, note="is None")


def _selection(selected: Tensor, logits: Tensor, bound: float) -> Comparison:
    """By how much an expert that was left out beats one that was taken, in float64's logits."""
    taken = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, selected, True)
    if not bool((taken.sum(1) == selected.shape[1]).all()):
        return Comparison("unit", "selected_experts", "all", False, note="a token selects one expert twice")
    inf = float("inf")
    worst_taken, best_left = logits.masked_fill(~taken, inf).amin(1), logits.masked_fill(taken, -inf).amax(1)
    error = float((best_left - worst_taken).clamp_min(0).max()) if len(logits) else 0.0
    note = "" if error <= 2 * bound else "an expert that was left out scores higher than one that was taken"
    return Comparison("unit", "selected_experts", "all", not note, error, bound=2 * bound, note=note)


class _ExpertJudge:
    """Judges each expert's weight gradients as the oracle produces them, so that they need not be kept."""

    def __init__(self, ours: Run, theirs: Run, wanted: tuple[str, ...], rule: Rounding) -> None:
        self.ours, self.theirs, self.rule = ours.gradients, theirs.gradients, rule
        self.wanted = wanted
        self.failed: list[Comparison] = []
        self.errors: dict[str, list[Errors]] = {}
        for name in wanted:
            if name == "dX":
                continue
            reference = self.theirs[name]
            assert reference is not None
            if wrong := shape_or_dtype("unit", name, self.ours[name], reference):
                self.failed.append(wrong)
            else:
                self.errors[name] = []

    def on_expert(self, e: int, dgate_up_proj: Tensor, ddown_proj: Tensor) -> None:
        """Take float64's gradients of expert e."""
        for name, true in (("dgate_up_proj", dgate_up_proj), ("ddown_proj", ddown_proj)):
            if name in self.errors:
                self.errors[name].append(self._errors(name, slice(e, e + 1), true.unsqueeze(0)))

    def _errors(self, name: str, experts: slice, true: Tensor) -> Errors:
        mine, hf = self.ours[name], self.theirs[name]
        assert mine is not None and hf is not None
        return Errors.of(mine[experts], hf[experts], true)

    def gate(self, oracle: Oracle) -> list[Comparison]:
        """The router's gradient, its rounding measured by the terms that cancel in it."""
        if "dgate" not in self.errors:
            return []
        errors = self._errors("dgate", slice(None), oracle.dgate)
        terms = Errors.of(oracle.dgate_terms, oracle.dgate_terms, oracle.dgate_terms).oracle
        larger = (torch.maximum(errors.oracle[0], terms[0]), torch.maximum(errors.oracle[1], terms[1]))
        return _with_parts("dgate", replace(errors, oracle=larger), self.rule)

    def verdicts(self) -> list[Comparison]:
        """The experts' tensors, and what is missing."""
        found = list(self.failed)
        for name in ("dgate_up_proj", "ddown_proj"):
            if name in self.errors:
                found += _with_parts(name, _stacked(self.errors[name]), self.rule)
        return found


def _with_parts(name: str, errors: Errors, rule: Rounding) -> list[Comparison]:
    """The whole tensor, then expert by expert."""
    parts = [f"expert {e}" for e in range(len(errors.finite))]
    return judge(name, errors.whole(), rule) + judge(name, errors.floored(), rule, parts)


def _stacked(errors: list[Errors]) -> Errors:
    def cat(name: str) -> tuple[Tensor, Tensor]:
        pairs = [getattr(e, name) for e in errors]
        return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])

    return replace(
        errors[0], ours=cat("ours"), hf=cat("hf"), oracle=cat("oracle"), finite=torch.cat([e.finite for e in errors])
    )
