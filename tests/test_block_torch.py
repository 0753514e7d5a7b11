"""The torch block against Hugging Face's eager block and a float64 oracle, and every promise that a CPU can check.

Numbers are judged by `judge.complaints` (twice Hugging Face's error plus rounding, per expert and per token, routing
held) and, on integers, bit for bit. `test_the_rule_rejects` and `test_the_exact_problem_rejects`: both can fail.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import judge
import pytest
import torch
from judge import (
    LOW,
    MODEL,
    WEIGHTS,
    Tensors,
    complaints,
    data,
    exact_problem,
    forced,
    make_block,
    oracle,
    run_block,
    run_experts,
    run_hf,
    unequal,
    weights_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moefactory.block
from moefactory import matrix
from moefactory.block import GroupedGEMMResult, Qwen3MoeGroupedGEMMBlock
from moefactory.config import (
    Backend,
    DType,
    MoeConfig,
    ResolvedModel,
    WeightsSource,
)
from moefactory.factory import build
from moefactory.reference import ExpertOptions, compute_experts, grouped_gemm
from moefactory.routing import make_plan

TORCH_ROWS = [row for row in matrix.rows() if row.valid and matrix.config_of(row).backend.name is Backend.torch]
RUN = [row for row in TORCH_ROWS if "moe.device=cuda" not in row.overrides]
FLAG_ROWS = [row for row in RUN if row.part == "flags"]
TINY = ResolvedModel(64, 32, 8, 2, True, "silu")
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in LOW]


def by_id(rows: list[matrix.Row]) -> list[Any]:
    return [pytest.param(row, id=row.id) for row in rows]


# --- the matrix -------------------------------------------------------------------------------------------------------

_references: dict[Any, tuple[Tensors, Tensors]] = {}


def references(model: ResolvedModel, weights: Tensors, x: Tensor, dy: Tensor) -> tuple[Tensors, Tensors]:
    """(Hugging Face's eager results, the oracle's), computed once for the same data."""
    key = (model, x.dtype, x.shape[1], *(float(w.double().sum()) for w in weights.values()))
    if key not in _references:
        exact = oracle(model, weights, x, dy, judge.held_routing(model, weights, x))
        low = x.dtype != torch.float64 and x.shape[1] > 0  # float64 and no tokens: the oracle speaks for itself
        _references[key] = (run_hf(model, weights, x, dy) if low else exact, exact)
    return _references[key]


def expected_gradients(config: MoeConfig) -> set[str]:
    weights = set() if config.dX_only else set(WEIGHTS)
    return {"hidden_states", "router_logits"} | weights | (set() if config.dW_only else {"dx"})


@cache
def checkpoint(folder: Path) -> None:
    judge.write_checkpoint(folder, TINY)


def check_row(row: matrix.Row, folder: Path, dtype: DType | None = None) -> None:
    """Build the row's block, run it forward and backward in dirty memory, and judge every tensor."""
    config = matrix.config_of(row)
    config = config if dtype is None else replace(config, dtype=dtype)
    source = None
    if config.weights.source is WeightsSource.live:
        source = judge.hf_block(TINY, judge.unit_weights(TINY, torch.float32))
    if config.weights.source is WeightsSource.checkpoint:
        checkpoint(folder)
        config.weights.path = str(folder)
    block = build(config, source)
    x, dy = data(row.tokens, block.model, block.gate.dtype)
    with judge.nan_memory():
        got = run_block(block, x, dy)
    eager, exact = references(block.model, weights_of(block), x, dy)
    wanted = expected_gradients(config)
    assert set(got) == wanted
    assert complaints(got, eager, {name: exact[name] for name in wanted}, block.gate.dtype) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "layers"


@pytest.mark.parametrize("row", by_id(RUN))
def test_each_legal_row_of_the_matrix(row: matrix.Row, folder: Path) -> None:
    check_row(row, folder)


@pytest.mark.parametrize("dtype", [DType.float16, DType.bfloat16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("row", by_id(FLAG_ROWS))
def test_each_legal_flag_combination_in_low_precision(row: matrix.Row, dtype: DType, folder: Path) -> None:
    check_row(row, folder, dtype)


def test_what_is_run_is_the_matrix() -> None:
    """192 legal combinations of flags on torch (3 of 4 gradient choices, 6 free flags); only cuda is left out."""
    assert len(FLAG_ROWS) == 3 * 2**6
    assert [row.overrides for row in TORCH_ROWS if row not in RUN] == [("moe.device=cuda",)]


# --- the rule and its controls ----------------------------------------------------------------------------------------


def judged(dtype: torch.dtype, scale: float | None) -> Callable[[], list[str]]:
    """A function that runs the block as it is then and says what the rule finds; scale None is unit scale."""
    weights = judge.unit_weights(MODEL, dtype, scale=scale)
    x = judge.unit_tokens(64, MODEL, dtype, scale=scale or 1.0)
    dy = judge.unit_tokens(64, MODEL, dtype, seed=2)
    eager = run_hf(MODEL, weights, x, dy)
    exact = oracle(MODEL, weights, x, dy, judge.held_routing(MODEL, weights, x))
    block = Qwen3MoeGroupedGEMMBlock(MODEL, *(weights[name].clone() for name in WEIGHTS))
    return lambda: complaints(run_block(block, x, dy), eager, exact, dtype)


@pytest.mark.parametrize("scale", [None, 0.02], ids=["unit", "0.02"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_rejects(dtype: torch.dtype, scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the seven planted bugs is rejected in the output itself; the block as it is passes."""
    found = judged(dtype, scale)
    assert found() == []
    for name, bug in judge.SEVEN_BUGS.items():
        monkeypatch.setattr(moefactory.block, "compute_experts", bug(compute_experts))
        assert any(text.startswith("hidden_states") for text in found()), name


def test_the_rule_rejects_nan_and_a_missing_gradient() -> None:
    exact = {"dx": torch.ones(2, 3, dtype=torch.float64)}
    good = {"dx": torch.ones(2, 3)}
    assert complaints(good, good, exact, torch.float32) == []
    (found,) = complaints({"dx": torch.tensor([[1, 1, 1], [1, math.nan, 1]])}, good, exact, torch.float32)
    assert found.startswith("dx[1]: not finite")
    assert complaints({}, good, exact, torch.float32) == ["dx: missing"]
    assert complaints({"dx": good["dx"].half()}, good, exact, torch.float32)


@pytest.mark.parametrize(("permute_x", "permute_y"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_bit_for_bit(dtype: torch.dtype, act: str, permute_x: bool, permute_y: bool) -> None:
    """Partial sums pass what bfloat16 and float16 can count, final ones do not: only wide sums give these bits."""
    problem = exact_problem(dtype)
    options = ExpertOptions(act, permute_x, permute_y)
    with judge.nan_memory():
        assert unequal(run_experts(compute_experts, problem, options), problem.expected(dtype)) == []


@pytest.mark.parametrize("name", [*judge.SEVEN_BUGS, *judge.FINE_BUGS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exact_problem_rejects(dtype: torch.dtype, name: str) -> None:
    """Also the two bugs that the rule cannot see."""
    problem = exact_problem(dtype)
    wrong = (judge.SEVEN_BUGS | judge.FINE_BUGS)[name](compute_experts)
    assert "out" in unequal(run_experts(wrong, problem, ExpertOptions()), problem.expected(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_through_the_whole_block(dtype: torch.dtype) -> None:
    """top_k = 1 and logits more than 110 apart: the routing weight is exactly 1 and its gradient exactly 0."""
    problem = exact_problem(dtype)
    e, h, i = problem.down_proj.shape
    model = ResolvedModel(h, i, e, 1, True, "silu")
    gate = torch.randint(-200, 201, (e, h), generator=torch.Generator().manual_seed(3)).to(dtype)
    best = (problem.x.float() @ gate.float().T).topk(2)
    assert (best.values[:, 0] - best.values[:, 1]).min() > 110
    block = Qwen3MoeGroupedGEMMBlock(model, gate, problem.gate_up_proj, problem.down_proj)
    got = run_block(block, problem.x[None], problem.dy[None])
    weights = weights_of(block)
    exact = oracle(replace(model, hidden_act="relu"), weights, problem.x[None], problem.dy[None], best.indices[:, :1])
    exact.pop("router_logits")
    assert unequal(got, {name: tensor.to(dtype) for name, tensor in exact.items()}) == []
    assert not got["gate"].any()


def test_gradcheck() -> None:
    """The gradients are those of the function, numerically, for input and weights; float64, every entry."""
    model = ResolvedModel(6, 4, 3, 2, True, "silu")
    block = make_block(model, torch.float64, trace=False)
    x = judge.unit_tokens(5, model, torch.float64).requires_grad_()

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(block, dict(zip(WEIGHTS, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *(getattr(block, name) for name in WEIGHTS)))


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_flags_are_bitwise_neutral(dtype: torch.dtype) -> None:
    """Gather and scatter inside of `grouped_gemm` or outside: the same bits, forward and backward."""
    weights = judge.unit_weights(MODEL, dtype)
    x = judge.unit_tokens(37, MODEL, dtype)[0]
    scores = torch.rand(37, MODEL.top_k, dtype=dtype)
    plan = make_plan(judge.held_routing(MODEL, weights, x), MODEL.num_experts)
    seen = []
    for permute_x, permute_y in itertools.product([False, True], repeat=2):
        leaves = [t.clone().requires_grad_() for t in (x, scores, weights["gate_up_proj"], weights["down_proj"])]
        options = ExpertOptions(permute_x=permute_x, permute_y=permute_y)
        out, steps = compute_experts(leaves[0], leaves[1], plan, leaves[2], leaves[3], options)
        seen.append([out, *(getattr(steps, f.name) for f in fields(steps)), *torch.autograd.grad(out.sum(), leaves)])
        rows = leaves[0] if permute_x else leaves[0][plan.gather_indices // plan.top_k]
        seen[-1].append(grouped_gemm(rows, leaves[2], plan, permute_x=permute_x, permute_y=permute_y))
        if permute_y:
            seen[-1][-1] = seen[-1][-1][plan.gather_indices]
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


class CountMatmuls(TorchDispatchMode):
    """Counts the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("flag", "products"), [("none", 4 * 8 + 2), ("dW_only", 3 * 8 + 1), ("dX_only", 2 * 8 + 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sided_backward(dtype: torch.dtype, flag: str, products: int) -> None:
    """dW_only and dX_only: the same bits as the full backward, the others None, and not even computed.

    Full: two products for each expert's GEMM and the router's. dW_only leaves out dX of the up GEMM and of the router
    (the down GEMM's leads to dW of the up GEMM); dX_only leaves out every dW.
    """
    x, dy = data(23, MODEL, dtype)
    full = run_block(make_block(MODEL, dtype), x, dy)
    block = make_block(MODEL, dtype, **({} if flag == "none" else {flag: True}))
    got = run_block(block, x, dy)
    config = MoeConfig(dW_only=flag == "dW_only", dX_only=flag == "dX_only")
    assert set(got) == expected_gradients(config)
    assert unequal(full, got) == []
    leaf = x.clone().requires_grad_()
    out = block(leaf)[0].hidden_states
    with CountMatmuls() as counter:
        out.backward(dy)
    assert counter.count == products


@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=4)))
def test_only_requested_gradients(trained: tuple[bool, ...]) -> None:
    """Every subset of input, gate, gate_up_proj and down_proj: the rest None, the requested ones bitwise the same."""
    x, dy = data(11, MODEL, torch.float32)
    full = run_block(make_block(MODEL, torch.float32), x, dy)
    block = make_block(MODEL, torch.float32)
    leaf = x.clone().requires_grad_(trained[0])
    for name, wanted in zip(WEIGHTS, trained[1:], strict=True):
        getattr(block, name).requires_grad_(wanted)
    out = block(leaf)[0].hidden_states
    assert out.requires_grad == any(trained)
    if any(trained):
        out.backward(dy)
    for name, tensor, wanted in zip(("dx", *WEIGHTS), (leaf, *block.parameters()), trained, strict=True):
        assert (tensor.grad is not None) == wanted, name
        assert not wanted or torch.equal(tensor.grad, full[name]), name


def test_trace_holds_every_intermediate() -> None:
    """Each field of the traced result against rows computed one by one; the untraced block gives the same output."""
    block = make_block(MODEL, torch.float64)
    x = judge.unit_tokens(9, MODEL, torch.float64)
    result, logits = block(x)
    assert isinstance(result, GroupedGEMMResult)
    flat, k = x[0], MODEL.top_k
    selected = judge.held_routing(MODEL, weights_of(block), x).flatten()
    order = result.gather_indices.long()
    for row, slot in enumerate(order.tolist()):
        e = int(selected[slot])
        first = block.gate_up_proj[e] @ flat[slot // k]
        torch.testing.assert_close(result.first_gemm[row], first)
        torch.testing.assert_close(result.intermediate[row], torch.nn.functional.silu(first[:32]) * first[32:])
        torch.testing.assert_close(result.second_gemm[row], block.down_proj[e] @ result.intermediate[row])
    assert torch.equal(selected[order], selected.sort(stable=True).values)
    assert result.token_counts_by_expert.tolist() == [Counter(selected.tolist())[e] for e in range(MODEL.num_experts)]
    assert torch.equal(result.hidden_states_unpermute[order], result.second_gemm)
    torch.testing.assert_close(result.topk_weights.sum(1), torch.ones(9, dtype=torch.float64))
    rows = result.hidden_states_unpermute.view(9, k, -1) * result.topk_weights[..., None]
    torch.testing.assert_close(result.hidden_states[0], rows.sum(1))
    plain, same_logits = make_block(MODEL, torch.float64, trace=False)(x)
    assert torch.equal(plain, result.hidden_states)
    assert torch.equal(logits, same_logits)
    assert logits.shape == (9, MODEL.num_experts)


# --- edges ------------------------------------------------------------------------------------------------------------


EDGES: dict[str, tuple[ResolvedModel, dict[int, float], int, set[int]]] = {
    "no tokens": (MODEL, {}, 0, set(range(8))),
    "one token": (replace(MODEL, top_k=8), {}, 1, set()),
    "first, middle and last expert empty": (MODEL, {0: -60, 4: -60, 7: -60}, 13, {0, 4, 7}),
    "all but one empty": (replace(MODEL, top_k=1), {5: 60}, 13, {0, 1, 2, 3, 4, 6, 7}),
    "top_k is E": (replace(MODEL, top_k=8), {}, 13, set()),
    "a single expert": (ResolvedModel(64, 32, 1, 1, False, "silu"), {}, 13, set()),
    "odd sizes": (ResolvedModel(47, 97, 7, 3, False, "gelu"), {}, 13, set()),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(dtype: torch.dtype, name: str) -> None:
    """Judged by the rule in dirty memory; experts without tokens get gradients that are zero, not None and not NaN."""
    model, push, tokens, empty = EDGES[name]
    block, x = forced(model, dtype, push, tokens)
    dy = judge.unit_tokens(tokens, model, dtype, seed=2)
    with judge.nan_memory():
        got = run_block(block, x, dy)
    eager, exact = references(model, weights_of(block), x, dy)
    assert complaints(got, eager, exact, dtype) == []
    idle = {e for e in range(model.num_experts) if not got["gate_up_proj"][e].any() and not got["down_proj"][e].any()}
    assert idle == empty
    assert got["hidden_states"].shape == x.shape
    assert got["router_logits"].shape == (tokens, model.num_experts)


@pytest.mark.parametrize("dropped", [[(0, 0)], [(2, 1), (5, 0), (5, 1), (5, 2)], "all"])
def test_dropped_slots_add_nothing(dropped: Any) -> None:
    """Ids E and -1: no row, no gradient, nothing in the sum; against the naive loop in float64, in dirty memory."""
    weights = judge.unit_weights(MODEL, torch.float64)
    x = judge.unit_tokens(9, MODEL, torch.float64)[0]
    selected = judge.held_routing(MODEL, weights, x)
    places = list(itertools.product(range(9), range(MODEL.top_k))) if dropped == "all" else dropped
    for n, place in enumerate(places):
        selected[place] = -1 if n % 2 else MODEL.num_experts
    scores = torch.rand(9, MODEL.top_k, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, scores, weights["gate_up_proj"], weights["down_proj"])]
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    with judge.nan_memory():
        plan = make_plan(selected, MODEL.num_experts)
        out, steps = compute_experts(leaves[0], leaves[1], plan, leaves[2], leaves[3], ExpertOptions())
        out.sum().backward()
    right = judge.naive_experts(twins[0], twins[1], selected, twins[2], twins[3], "silu")
    torch.testing.assert_close(out, right)
    if dropped != "all":
        right.sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, torch.zeros_like(twin) if twin.grad is None else twin.grad)
    assert leaves[1].grad is not None
    assert all(leaves[1].grad[place] == 0 for place in places)
    kept = int(plan.token_counts_by_expert.sum())
    assert kept == 27 - len(places)
    assert not steps.first_gemm[kept:].any()
    assert not steps.second_gemm[kept:].any()


# --- independence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_token_stays_in_its_row(dtype: torch.dtype, poison: float) -> None:
    """NaN or inf in one token: the other rows of output, logits and dX are those of the batch without that token."""
    block = make_block(MODEL, dtype)
    x, dy = data(16, MODEL, dtype)
    others = torch.arange(16) != 3
    clean = run_block(block, x[:, others], dy[:, others])
    x[0, 3, 5] = poison
    got = run_block(block, x, dy)
    assert not got["hidden_states"][0, 3].isfinite().all()
    for name, mask in (("hidden_states", (0, others)), ("dx", (0, others)), ("router_logits", others)):
        rows, right = got[name][mask], clean[name].reshape(rows_shape(got[name][mask]))
        torch.testing.assert_close(rows, right, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def rows_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_gradient_stays_in_its_row(dtype: torch.dtype) -> None:
    """NaN in one row of dY: the other rows of dX keep their bits."""
    block = make_block(MODEL, dtype)
    x, dy = data(16, MODEL, dtype)
    clean = run_block(block, x, dy)["dx"][0]
    dy[0, 3, 5] = math.nan
    got = run_block(block, x, dy)["dx"][0]
    others = torch.arange(16) != 3
    assert got[3].isnan().all()
    assert torch.equal(got[others], clean[others])


def test_a_bad_expert_stays_with_its_tokens() -> None:
    """NaN in one expert's weights: tokens that it does not see keep their bits, in output and dX."""
    block = make_block(MODEL, torch.float32)
    x, dy = data(16, MODEL, torch.float32)
    clean = run_block(block, x, dy)
    seen = (judge.held_routing(MODEL, weights_of(block), x) == 2).any(1)
    assert seen.any()
    assert not seen.all()
    with torch.no_grad():
        block.gate_up_proj[2] = math.nan
    got = run_block(block, x, dy)
    for name in ("hidden_states", "dx"):
        assert got[name][0, seen].isnan().all()
        assert torch.equal(got[name][0, ~seen], clean[name][0, ~seen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype: torch.dtype) -> None:
    """Twenty runs give the same bits in every tensor."""
    block = make_block(MODEL, dtype)
    x, dy = data(64, MODEL, dtype)
    first = run_block(block, x, dy)
    for _ in range(20):
        assert unequal(run_block(block, x, dy), first) == []


def test_token_order_does_not_matter() -> None:
    """Shuffled tokens give shuffled rows; dW sums over tokens, so it is only close."""
    block = make_block(MODEL, torch.float64)
    x, dy = data(29, MODEL, torch.float64)
    shuffle = torch.randperm(29, generator=torch.Generator().manual_seed(5))
    one, two = run_block(block, x, dy), run_block(block, x[:, shuffle], dy[:, shuffle])
    for name in ("hidden_states", "dx"):
        torch.testing.assert_close(two[name], one[name][:, shuffle], rtol=1e-12, atol=1e-12)
    for name in WEIGHTS:
        torch.testing.assert_close(two[name], one[name], rtol=1e-12, atol=1e-12)


def test_inputs_are_left_alone() -> None:
    """Neither the bytes nor the version counters of input, dY and weights change."""
    block = make_block(MODEL, torch.float32)
    x, dy = data(16, MODEL, torch.float32)
    leaf = x.clone().requires_grad_()
    watched = [leaf, dy, *block.parameters()]
    before = [(t.detach().clone(), t._version) for t in watched]
    block(leaf)[0].hidden_states.backward(dy)
    for tensor, (value, version) in zip(watched, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def test_changed_weights_are_noticed() -> None:
    """A weight written between forward and backward is an error of autograd, not a wrong gradient."""
    block = make_block(MODEL, torch.float32)
    x, dy = data(4, MODEL, torch.float32)
    out = block(x.requires_grad_())[0].hidden_states
    with torch.no_grad():
        block.down_proj.add_(1)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        out.backward(dy)
