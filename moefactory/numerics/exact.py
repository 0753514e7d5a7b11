"""The verdict on the integer problem: every bit of every tensor, beside float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .integers import IntegerProblem
from .judge import Comparison, shape_or_dtype
from .oracle import float64_block


def judge_integers(block: Any, problem: IntegerProblem, wanted: tuple[str, ...]) -> list[Comparison]:
    """Run a block that holds the problem's weights, and compare everything it gives bit for bit with float64.

    Args:
        block: built around `problem.weights`.
        problem: the problem.
        wanted: which gradients are asked for, of dX, dgate, dgate_up_proj, ddown_proj.
    """
    x = problem.hidden_states.unsqueeze(0).requires_grad_()
    first, logits = block(x)
    output = getattr(first, "hidden_states", first)
    output.backward(problem.grad_output.unsqueeze(0))
    found: list[Comparison] = []

    def on_expert(e: int, dgate_up_proj: Tensor, ddown_proj: Tensor) -> None:
        for name, true in (("gate_up_proj", dgate_up_proj), ("down_proj", ddown_proj)):
            if f"d{name}" in wanted and getattr(block, name).grad is not None:
                found.append(exactly(f"d{name}", f"expert {e}", getattr(block, name).grad[e], true))

    weights = problem.weights
    oracle = float64_block(weights, x.detach()[0], problem.selected_experts, problem.grad_output, on_expert)
    found.sort(key=lambda c: c.tensor, reverse=True)
    start = [
        exactly("router_logits", "all", logits, oracle.router_logits),
        exactly("output", "all", output[0], oracle.output),
    ]
    for name, mine, true in (
        ("dX", None if x.grad is None else x.grad[0], oracle.dX),
        ("dgate", block.gate.grad, oracle.dgate),
    ):
        if name in wanted:
            start.append(_missing(name) if mine is None else exactly(name, "all", mine, true))
    for name in ("dgate_up_proj", "ddown_proj"):
        if name in wanted and getattr(block, name.removeprefix("d")).grad is None:
            start.append(_missing(name))
    return start + found


def _missing(name: str) -> Comparison:
    return Comparison("integer", name, "all", False, note="is None")


def exactly(tensor: str, part: str, ours: Tensor, oracle: Tensor) -> Comparison:
    """Equality of every element; a true value that the dtype cannot hold is no verdict on the block, and says so."""
    wanted = oracle.to(ours.dtype)
    if wrong := shape_or_dtype("integer", tensor, ours, wanted):
        return wrong
    mine = ours.detach()
    if not torch.equal(wanted.double(), oracle):
        return Comparison("integer", tensor, part, True, note=f"not judged: not exact in {ours.dtype}")
    if torch.equal(mine, wanted):
        return Comparison("integer", tensor, part, True)
    different = int((mine != wanted).sum())
    error = float((mine.double() - oracle).abs().max())
    note = f"{different} of {mine.numel()} elements differ, where every bit must be right"
    return Comparison("integer", tensor, part, False, error, note=note)
