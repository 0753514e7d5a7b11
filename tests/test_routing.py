"""The router against Hugging Face's, and the plan against a loop that places rows one by one (hypothesis)."""

from __future__ import annotations

import math
from typing import Any

import judge
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import LOW, MODEL
from torch import Tensor

from moefactory.config import ResolvedModel
from moefactory.routing import (
    RoutingPlan,
    combine,
    get_token_counts_and_gather_indices,
    make_plan,
    permute,
    route,
    unpermute,
)

FAST = settings(derandomize=True, deadline=None, max_examples=150, database=None)
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in LOW]


@st.composite
def routings(draw: Any) -> tuple[Tensor, int]:
    """(selected_experts [T,K] with ids from -2 to E+1, some of them to be dropped; E)."""
    experts, top_k, tokens = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(0, 12))
    ids = st.lists(st.integers(-2, experts + 1), min_size=tokens * top_k, max_size=tokens * top_k)
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16]))
    return torch.tensor(draw(ids), dtype=dtype).reshape(tokens, top_k), experts


def naive_order(selected: Tensor, experts: int) -> list[int]:
    """The flat slots in expert order: expert by expert, each slot in its turn; the dropped ones last."""
    flat = selected.flatten().tolist()
    order = [slot for e in range(experts) for slot, expert in enumerate(flat) if expert == e]
    return order + [slot for slot, expert in enumerate(flat) if not 0 <= expert < experts]


@FAST
@given(routings())
def test_plan(routing: tuple[Tensor, int]) -> None:
    """Counts, gather indices and their inverse equal the loop's; every array is int32."""
    selected, experts = routing
    before = selected.clone()
    plan = make_plan(selected, experts)
    order = naive_order(selected, experts)
    flat = selected.flatten().tolist()
    assert plan.gather_indices.tolist() == order
    assert plan.token_counts_by_expert.tolist() == [flat.count(e) for e in range(experts)]
    assert [order.index(slot) for slot in range(len(order))] == plan.scatter_indices.tolist()
    assert (plan.top_k, plan.num_tokens, plan.num_experts) == (selected.shape[1], selected.shape[0], experts)
    arrays = (plan.token_counts_by_expert, plan.gather_indices, plan.scatter_indices)
    assert {array.dtype for array in arrays} == {torch.int32}
    assert torch.equal(selected, before)
    counts, gather = get_token_counts_and_gather_indices(selected, experts)
    assert torch.equal(counts, plan.token_counts_by_expert)
    assert torch.equal(gather, plan.gather_indices)


@FAST
@given(routings(), st.integers(1, 4))
def test_permute_and_back(routing: tuple[Tensor, int], width: int) -> None:
    """permute copies a token's row to its places, unpermute brings rows back, combine weighs and sums."""
    selected, experts = routing
    plan = make_plan(selected, experts)
    tokens, top_k = selected.shape
    x = torch.arange(1.0, tokens * width + 1, dtype=torch.float64).reshape(tokens, width).requires_grad_()
    rows = permute(x, plan)
    order = plan.gather_indices.tolist()
    assert rows.tolist() == [x[slot // top_k].tolist() for slot in order]
    back = unpermute(rows, plan)
    assert back.tolist() == [x[slot // top_k].tolist() for slot in range(tokens * top_k)]
    weights = torch.linspace(-1, 2, tokens * top_k, dtype=torch.float64).reshape(tokens, top_k)
    out = combine(back, weights)
    torch.testing.assert_close(out, x * weights.sum(1, keepdim=True))
    (grad,) = torch.autograd.grad(rows.sum(), x)
    assert torch.equal(grad, torch.full_like(x, top_k))


@FAST
@given(routings())
def test_plan_in_dirty_memory(routing: tuple[Tensor, int]) -> None:
    """No element of the plan is left as the allocator gave it."""
    plan = make_plan(*routing)
    with judge.nan_memory():
        dirty = make_plan(*routing)
    for name in ("token_counts_by_expert", "gather_indices", "scatter_indices"):
        assert torch.equal(getattr(plan, name), getattr(dirty, name)), name


@pytest.mark.parametrize(
    ("selected", "shape"),
    [(torch.zeros(3), r"\(3,\) torch.float32"), (torch.zeros(3, 2), r"\(3, 2\) torch.float32"),
     (torch.zeros(3, 2, dtype=torch.bool), "torch.bool"), (torch.zeros(1, 3, 2, dtype=torch.int64), r"\(1, 3, 2\)")],
)  # fmt: skip
def test_plan_refuses(selected: Tensor, shape: str) -> None:
    with pytest.raises(ValueError, match=rf"selected_experts: got .*{shape}.*; needed: integers of shape \[T, K\]"):
        make_plan(selected, 4)


def test_a_plan_is_frozen() -> None:
    plan = make_plan(torch.zeros(2, 2, dtype=torch.int64), 4)
    assert isinstance(plan, RoutingPlan)
    with pytest.raises(AttributeError):
        plan.top_k = 3  # type: ignore[misc]


# --- the router -------------------------------------------------------------------------------------------------------


def hf_router(model: ResolvedModel, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, selection) of the installed transformers, by running its block."""
    weights = judge.unit_weights(model, x.dtype)
    block = judge.hf_block(model, {**weights, "gate": gate})
    found = block.gate(x)
    if isinstance(found, tuple):
        return found
    seen: list[Any] = []  # transformers 4 routes inside of the block: its weights show in what the experts are given
    block.gate.register_forward_hook(lambda module, args, logits: seen.append(logits))
    block(x[None])
    probabilities = seen[0].float().softmax(-1)
    best, selected = probabilities.topk(model.top_k, dim=-1)
    best = best / best.sum(-1, keepdim=True) if model.norm_topk_prob else best
    return seen[0], best.to(x.dtype), selected


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_route_is_hf_route(dtype: torch.dtype, top_k: int, norm: bool) -> None:
    """Logits, weights and selection bit for bit: the same operations in the same order and dtypes."""
    model = ResolvedModel(64, 32, 8, top_k, norm, "silu")
    gate = judge.unit_weights(model, dtype)["gate"]
    x = judge.unit_tokens(50, model, dtype)[0]
    logits, weights, selected = route(x, gate, top_k, norm)
    theirs = hf_router(model, x, gate)
    assert torch.equal(logits, theirs[0])
    assert torch.equal(weights, theirs[1])
    assert torch.equal(selected, theirs[2])
    assert (logits.dtype, weights.dtype, selected.dtype) == (dtype, dtype, torch.int64)


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_held_routing(dtype: torch.dtype, norm: bool) -> None:
    """Given Hugging Face's selection, route gives the very weights; given any other, the softmax at those ids."""
    model = ResolvedModel(64, 32, 8, 3, norm, "silu")
    gate = judge.unit_weights(model, dtype)["gate"]
    x = judge.unit_tokens(50, model, dtype)[0]
    _, theirs, chosen = hf_router(model, x, gate)
    logits, weights, selected = route(x, gate, 3, norm, chosen)
    assert torch.equal(weights, theirs)
    assert selected is chosen
    other = (chosen + 1) % 8
    _, weights, selected = route(x, gate, 3, norm, other)
    exact = logits.double().softmax(-1).gather(1, other)
    exact = exact / exact.sum(-1, keepdim=True) if norm else exact
    torch.testing.assert_close(weights.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert selected is other


def test_route_in_float64_is_float64() -> None:
    """The softmax of float64 logits is not narrowed to float32 (Hugging Face's is): it serves as an oracle."""
    gate = judge.unit_weights(MODEL, torch.float64)["gate"]
    x = judge.unit_tokens(20, MODEL, torch.float64)[0]
    _, weights, selected = route(x, gate, 3, False)
    exact = [[math.exp(v) for v in row] for row in (x @ gate.T).tolist()]
    right = [[exact[t][e] / math.fsum(exact[t]) for e in row] for t, row in enumerate(selected.tolist())]
    torch.testing.assert_close(weights, torch.tensor(right, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normalised"])
def test_route_gradient(norm: bool) -> None:
    """gradcheck of the weights with a held selection, for the tokens and for the gate."""
    model = ResolvedModel(6, 4, 5, 2, norm, "silu")
    gate = judge.unit_weights(model, torch.float64)["gate"].requires_grad_()
    x = judge.unit_tokens(4, model, torch.float64)[0].requires_grad_()
    held = torch.tensor([[0, 1], [4, 2], [3, 0], [1, 2]])
    assert torch.autograd.gradcheck(lambda x, gate: route(x, gate, 2, norm, held)[:2], (x, gate))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_routed_the_same_every_time(dtype: torch.dtype) -> None:
    """All scores alike: whatever is chosen, it is chosen again, each expert once."""
    gate = torch.ones(8, 64, dtype=dtype)
    x = judge.unit_tokens(40, MODEL, dtype)[0]
    first = route(x, gate, 3, True)[2]
    assert all(torch.equal(route(x, gate, 3, True)[2], first) for _ in range(20))
    assert all(len(set(row)) == 3 for row in first.tolist())
    torch.testing.assert_close(route(x, gate, 3, True)[1], torch.full((40, 3), 1 / 3, dtype=dtype))


def test_no_tokens() -> None:
    logits, weights, selected = route(torch.zeros(0, 64), torch.zeros(8, 64), 3, True)
    assert (logits.shape, weights.shape, selected.shape) == ((0, 8), (0, 3), (0, 3))
    plan = make_plan(selected, 8)
    assert (plan.num_tokens, plan.token_counts_by_expert.tolist()) == (0, [0] * 8)
    assert combine(unpermute(permute(torch.zeros(0, 64), plan), plan), weights).shape == (0, 64)
