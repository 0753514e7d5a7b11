"""Few tokens in a block: what `few_tokens` makes in one launch reaches the GEMMs, and no bit differs from the others.

The other path is the same block with `few` saying no: router, plan and tile table by their own kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import fused
import judge
import pytest
import torch
from fused import COMBINATIONS, DEVICE, DTYPES, GPU, Shape, differing, dtype_id, flag_id, options, small_kernels
from judge import WEIGHTS, Tensors
from torch import Tensor

from moefactory.block import GroupedGEMMResult, Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import KernelConfigForward, ResolvedModel
from moefactory.triton import few_tokens, ops, pipeline, whole
from moefactory.triton.explain import launches
from moefactory.triton.launch import record_launches
from moefactory.triton.ops import compute_experts

MODEL = ResolvedModel(64, 32, 8, 2, True, "silu")
BOUND = few_tokens.MAX_TOKENS
by_flags = pytest.mark.parametrize("flags", [COMBINATIONS[i] for i in (0, 6, 9, 15)], ids=flag_id)


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():
        yield


@contextmanager
def separately() -> Iterator[None]:
    """No number of tokens is few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_tokens, "few", lambda tokens, experts: False)
        yield


def make_block(
    model: ResolvedModel = MODEL, dtype: torch.dtype = torch.float32, **more: Any
) -> Qwen3MoeFusedGroupedGEMMBlock:
    return fused.fused_block(model, dtype, **more)


def data(tokens: int, model: ResolvedModel = MODEL, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, dy = judge.data(tokens, model, dtype)
    return x.to(DEVICE), dy.to(DEVICE)


def step(block: Qwen3MoeFusedGroupedGEMMBlock, tokens: int, run: Any = None) -> tuple[Tensors, list[str]]:
    """(output, logits and every gradient of a step, what was launched)."""
    x, dy = data(tokens, block.model, block.gate.dtype)
    with record_launches() as names:
        return judge.run_block(run or block, x, dy), names


# --- what is launched -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_few_tokens_take_five_launches(grad: bool) -> None:
    block = make_block()
    x, _ = data(5)
    for _ in range(4):  # on a GPU the last two are played
        with record_launches() as names, torch.set_grad_enabled(grad):
            block(x)
        assert names == ["gate", "route_few_tokens", "forward_up", "forward", "combine"]


@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_the_table_is_for_the_up_gemm(block_m: int) -> None:
    """Whatever its rows per tile; the down GEMM and the backward take it where theirs are as many."""
    up = KernelConfigForward(block_m=block_m, block_n=32, block_k=32)
    down = KernelConfigForward(block_m=16, block_n=32, block_k=32)
    x, _ = data(30)
    block = make_block(autotune=False, kernel_config_fwd=(up, down))
    with record_launches() as names:
        out, _ = block(x)
    tables = ["tile_table"] * (block_m != 16)
    assert names == ["gate", "route_few_tokens", "forward_up", *tables, "forward", "combine"]
    with separately():
        assert torch.equal(block(x)[0], out)


@pytest.mark.interpreter
def test_a_forward_makes_no_other_table() -> None:
    """Interpreted, all tiles have one height: the one table serves both GEMMs. The backward makes its own."""
    assert step(make_block(), 9)[1].count("tile_table") == 1
    with separately():
        assert step(make_block(), 9)[1].count("tile_table") == 2


def test_a_table_of_another_height_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that expects other tiles than the GEMM has costs a launch and no bit."""
    block = make_block()
    expected, _ = step(block, 9)
    monkeypatch.setattr(whole, "_block_m", lambda *args: 128)
    got, names = step(block, 9)
    assert differing(got, expected) == []
    assert names.index("tile_table") < names.index("forward_up")


def test_it_is_announced() -> None:
    """explain() says when the routing is one launch."""
    block = make_block()
    assert block.explain(BOUND).splitlines()[0].endswith("; router, plan and tile table in one launch")
    assert block.explain(BOUND + 1).splitlines()[0].endswith("per expert")


def test_heights_are_those_of_the_launch() -> None:
    """The height is the one that explain() and the GEMM have, in every bucket."""
    block = make_block(ResolvedModel(64, 32, 2, 2, True, "silu"))
    for tokens in (1, 17, 33, 64):
        (up,) = (one for one in launches(block, tokens) if (one.pass_name, one.gemm) == ("fwd", "up"))
        height = pipeline.first_block_m(block.gate_up_proj, tokens * 2, block.fused)
        assert height == pipeline.choose(up, block.gate.device)[0].block_m
        with record_launches() as names:
            block(data(tokens)[0])
        assert names[-4:] == ["route_few_tokens", "forward_up", "forward", "combine"]


# --- the bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 2, 17, BOUND, BOUND + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_bits_of_separate_kernels(tokens: int, dtype: torch.dtype) -> None:
    """Output, logits and all gradients, below, at and above the bound."""
    block = make_block(dtype=dtype)
    got, names = step(block, tokens)
    with separately():
        expected, others = step(block, tokens)
    assert differing(got, expected) == []
    assert set(got) == {"hidden_states", "router_logits", "dx", *WEIGHTS}
    assert ("route_few_tokens" in names) == (0 < tokens <= BOUND)
    assert "route_few_tokens" not in others
    assert names.count("route_backward") == others.count("route_backward") == (tokens > 0)


@pytest.mark.parametrize("norm", [True, False])
@by_flags
def test_flags_and_options(flags: dict[str, bool], norm: bool) -> None:
    """Nine experts of which a token has three; the loss is of the logits, too; what is saved; one-sided backwards."""
    model = replace(MODEL, num_experts=9, top_k=3, norm_topk_prob=norm)
    x, dy = data(7, model)
    for more in ({}, {"saved": "h_reused"}, {"saved": "x"}, {"dW_only": True}, {"dX_only": True}):
        block = make_block(model, **flags, **more)

        def gradients(block: Any = block) -> list[Tensor]:
            leaves = [x.clone().requires_grad_(), *block.parameters()]
            out, logits = block(leaves[0])
            loss = (out * dy).sum() + logits.square().sum()
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
            return [out.detach(), logits.detach(), *(g for g in found if g is not None)]

        got = gradients()
        with separately():
            expected = gradients()
        assert len(got) == len(expected)
        assert all(map(torch.equal, got, expected))


@by_flags
def test_trace(flags: dict[str, bool]) -> None:
    """Every intermediate, those of the plan among them."""
    block, (x, _) = make_block(**flags, trace=True), data(5)
    got: GroupedGEMMResult = block(x)[0]
    with separately():
        expected: GroupedGEMMResult = block(x)[0]
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(got, name), tensor), name
        assert getattr(got, name).dtype == tensor.dtype


def test_the_inherited_methods_agree() -> None:
    """run_router and the plan's counts, by their own kernels, with what the forward uses."""
    block, (x, _) = make_block(trace=True), data(6)
    result = block(x)[0]
    _, weights, selected = block.run_router(x[0])
    counts, gather = block.get_token_counts_and_gather_indices(selected)
    assert torch.equal(result.topk_weights, weights)
    assert torch.equal(result.token_counts_by_expert, counts)
    assert torch.equal(result.gather_indices, gather)


def test_autocast() -> None:
    block, (x, _) = make_block(), data(5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, logits = block(x)
        with separately():
            assert torch.equal(block(x)[0], out)
    assert out.dtype == logits.dtype == torch.bfloat16


# --- as an operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
def test_opcheck(tokens: int, norm: bool) -> None:
    logits = torch.randn(tokens, 5, device=DEVICE)
    torch.library.opcheck(few_tokens.route_few_tokens, (logits.clone().requires_grad_(), 2, norm, 16))


def test_opcheck_of_the_experts_with_a_table() -> None:
    p = fused.problem(Shape(6, 3, 2, 20, 12), torch.float32).to(DEVICE)
    _, plan = few_tokens.route(torch.randn(6, 3, device=DEVICE), 2, True, 16)
    leaves = [t.clone().requires_grad_() for t in p.leaves]
    o = options(COMBINATIONS[0], 2, small_kernels())
    torch.library.opcheck(ops.experts_forward, (*leaves, *fused.indices(plan), o.text, True, True))
    saved = (p.dy, *p.leaves, torch.randn(12, 24, device=DEVICE))
    torch.library.opcheck(ops.experts_backward, (*saved, *fused.indices(plan), o.text, [True] * 4))


def test_a_plan_with_a_table_and_without() -> None:
    p = fused.problem(Shape(6, 3, 2, 20, 12), torch.float32).to(DEVICE)
    _, plan = few_tokens.route(torch.randn(6, 3, device=DEVICE), 2, True, 16)
    o, found = options(COMBINATIONS[0], 2, small_kernels()), []
    for one in (plan, replace(plan, table=None, block_m=0)):
        leaves = [t.clone().requires_grad_() for t in p.leaves]
        with record_launches() as names:
            out, _ = compute_experts(leaves[0], leaves[1], one, leaves[2], leaves[3], o)
            found.append(fused.gradients(out, leaves, p.dy))
        assert names.count("tile_table") == (0 if one.table else 2)
    assert differing(*found) == []


@pytest.mark.parametrize("tokens", [1, 9])
def test_compiled_for_a_number_of_tokens(tokens: int) -> None:
    """The same launches and bits as an eager step."""
    torch._dynamo.reset()
    block = make_block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    expected, eager_names = step(block, tokens)
    x, dy = data(tokens)
    x.requires_grad_()
    with record_launches() as names:
        out, _ = compiled(x)
        found = torch.autograd.grad(out, [x, *block.parameters()], dy)
    assert torch.equal(out, expected["hidden_states"].view_as(out))
    assert all(torch.equal(a, expected[n].view_as(a)) for n, a in zip(("dx", *WEIGHTS), found, strict=True))
    assert names == eager_names
    assert "route_few_tokens" in names


def test_compiled_for_any_number_of_tokens() -> None:
    """One graph on both sides of the bound; its kernels are those for any number."""
    torch._dynamo.reset()
    block = make_block()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (9, BOUND + 6, 3):
        x, _ = data(tokens)
        assert torch.equal(compiled(x)[0], block(x)[0])
    assert len(graphs) == 1


def test_exported_for_few_tokens() -> None:
    """A number of tokens that is known to be few, and one of a range that ends at the bound."""
    block = make_block()
    fixed = torch.export.export(block, (data(5)[0],), strict=False)
    some = torch.export.Dim("tokens", min=2, max=BOUND)
    ranged = torch.export.export(block, (data(5)[0],), dynamic_shapes=({1: some},), strict=False)
    for program, tokens in ((fixed, 5), (ranged, 9)):
        x, _ = data(tokens)
        with record_launches() as names:
            out, _ = program.module()(x)
        assert names[:2] == ["gate", "route_few_tokens"]
        assert torch.equal(out, block(x)[0])


def test_repeated() -> None:
    """Written out, recorded, then played on a GPU: the same bits each time, of gradients, too."""
    block = make_block()
    first, *others = [step(block, 9)[0] for _ in range(5 if GPU else 2)]
    assert [differing(first, other) for other in others] == [[]] * len(others)
