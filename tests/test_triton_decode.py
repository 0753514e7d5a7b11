"""A forward of one to four tokens in two launches: its numbers, when it runs, what it refuses, what it leaves alone.

The yardstick is the torch backend with the same weights, and float64 with the experts that the torch backend chose
(`judge`). The data have no two router logits within rounding of each other where an expert is chosen by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fused
import judge
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from fused import DEVICE, GPU, dtype_id
from judge import WEIGHTS, Tensors, unit_weights
from torch import Tensor

from moefactory.block import Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import ResolvedModel
from moefactory.triton import decode, replay
from moefactory.triton.gate import MAX_WIDTH
from moefactory.triton.launch import record_launches
from moefactory.triton.ops import compute_experts
from moefactory.triton.options import FusedOptions

MODEL = ResolvedModel(64, 32, 8, 2, True, "silu")
NAMES = ["decode_gate", "decode_experts"] if GPU else ["decode_gate", "decode_experts", "decode_experts"]
ORDINARY = ["gate", "route_few_tokens", "forward_up", "forward", "combine"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODELS = {
    "even": MODEL,
    "one expert": ResolvedModel(32, 16, 1, 1, True, "silu"),
    "no power of two": ResolvedModel(72, 40, 5, 3, True, "silu"),
    "not normalised": ResolvedModel(48, 24, 12, 4, False, "silu"),
    "all experts": ResolvedModel(40, 24, 6, 6, True, "silu"),
    "several pieces of a row": ResolvedModel(4104 if GPU else 1096, 776 if GPU else 328, 4, 2, True, "silu"),
    "more units than programs": ResolvedModel(1024 if GPU else 96, 1536 if GPU else 48, 16, 8, True, "silu"),
    "most slots": ResolvedModel(32, 16, 20, decode.MAX_TOP_K, True, "silu"),
}


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():  # fresh memory is NaN
        yield


def make_block(model: ResolvedModel = MODEL, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return fused.fused_block(model, dtype, **more)


@torch.no_grad()
def forward(block: Any, x: Tensor) -> tuple[Tensors, list[str]]:
    """(what a forward gives, on the CPU; what it launches)."""
    with record_launches() as names:
        out, logits = block(x.to(block.gate.device))
    return {"hidden_states": out.cpu(), "router_logits": logits.cpu()}, names


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", range(1, decode.MAX_TOKENS + 1))
@pytest.mark.parametrize("name", MODELS)
def test_against_float64(name: str, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both results by the judge's rule, beside the torch backend's errors in the same dtype.

    Also of more tokens than are shipped where a row is several pieces: the kernels take them.
    """
    monkeypatch.setattr(decode, "MAX_TOKENS_WIDE", decode.MAX_TOKENS)
    model = MODELS[name]
    x, dy = judge.data(tokens, model, dtype)
    got, names = forward(make_block(model, dtype), x)
    assert names == NAMES
    selected = judge.held_routing(model, unit_weights(model, dtype), x)
    exact = judge.oracle(model, unit_weights(model, dtype), x, dy, selected)
    eager, _ = forward(judge.make_block(model, dtype, trace=False), x)
    assert judge.complaints(got, eager, {key: exact[key] for key in got}, dtype) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_integers_bit_for_bit(dtype: torch.dtype) -> None:
    """Small integers are exact in every order of summation, and where one expert has all the weight it is 1.

    The gate is so large that the softmax is 0 or 1; the activation of multiples of 128 is 0 or the number itself.
    """
    model = ResolvedModel(32, 16, 4, 1, True, "silu")
    generator = torch.Generator().manual_seed(3)

    def integers(*shape: int, least: int = -2, most: int = 3) -> Tensor:
        return torch.randint(least, most, shape, generator=generator).to(dtype)

    x = torch.zeros(1, 2, 32, dtype=dtype)
    x[0, 0, 0], x[0, 1, 1] = 1, 1  # a token takes a column of each weight
    gate = torch.zeros(4, 32, dtype=dtype)
    gate[2, 0], gate[1, 1] = 1000, 1000
    gate_up = integers(4, 32, 32)
    gate_up[:, :16] = 128 * integers(4, 16, 32, least=-1, most=2)
    down = integers(4, 32, 16, least=-1, most=2)
    block = Qwen3MoeFusedGroupedGEMMBlock(model, gate.to(DEVICE), gate_up.to(DEVICE), down.to(DEVICE))
    got, names = forward(block, x)
    assert names == NAMES
    assert got["router_logits"].tolist() == [[0, 0, 1000, 0], [0, 1000, 0, 0]]
    for token, expert in ((0, 2), (1, 1)):
        gate_part, up_part = gate_up[expert, :, token].double().chunk(2)
        a = (torch.where(gate_part > 0, gate_part, 0.0) * up_part).to(dtype).double()
        assert torch.equal(got["hidden_states"][0, token].double(), (down[expert].double() @ a).to(dtype).double())


@pytest.mark.parametrize("tokens", range(1, decode.MAX_TOKENS + 1))
def test_the_same_experts_as_with_gradients(tokens: int) -> None:
    """A forward that is to be differentiated takes the other kernels; both agree to rounding, logits to the bit."""
    block, (x, _) = make_block(), judge.data(tokens, MODEL, torch.float32)
    got, _ = forward(block, x)
    with record_launches() as names:
        out, logits = block(x.to(DEVICE))
    assert names == ORDINARY
    torch.testing.assert_close(got["hidden_states"], out.detach().cpu(), rtol=1e-5, atol=1e-6)
    assert torch.equal(got["router_logits"], logits.detach().cpu())
    apart = torch.empty(1 + x.numel(), device=DEVICE)[1:].view(x.shape).copy_(x)  # at no multiple of 16 bytes
    assert torch.equal(forward(block, apart)[0]["router_logits"], got["router_logits"])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", ["even", "no power of two"])
def test_any_number_of_programs(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits: also where the programs' first rows lie in several experts, in some or in all of a token's."""
    model = MODELS[name]
    block, (x, _) = make_block(model), judge.data(tokens, model, torch.float32)
    expected, _ = forward(block, x)
    of_an_expert = -(-model.moe_intermediate_size // 2)  # units
    firsts = []
    for most in (1, of_an_expert, 2 * of_an_expert, 4 * model.top_k * of_an_expert):
        monkeypatch.setattr(decode, "num_programs", lambda *args, most=most: most)
        sizes = (tokens, model.num_experts, model.hidden_size, model.moe_intermediate_size, model.top_k, True)
        *_, constants = decode._constants(sizes, torch.float32, False, most)
        firsts.append(constants["FIRST"])
        replay.forget()
        got, names = forward(block, x)
        assert names == NAMES
        assert [key for key in got if not torch.equal(got[key], expected[key])] == []
    assert firsts[0] == 1
    assert 1 < firsts[2] <= firsts[3] <= model.top_k


def test_programs_share_evenly() -> None:
    """Units up and down, and how many programs of at most 528 read them; half of 528 or more, and of equals the fewest.

    The model's sizes, one token: 3,072 and 512 units are six and one for each of 512. An H100's or H200's 528 programs
    would have six and one, too, but some of them less.
    """
    assert decode._even(528, (3072, 2), (512, 3)) == 512
    assert decode._even(528, (528, 2), (528, 3)) == 528
    assert decode._even(528, (528, 2), (1, 3)) == 528
    assert decode._even(528, (1, 2), (1, 3)) == 264
    assert decode._even(1, (5, 2), (5, 3)) == 1


def test_which_weights_leave_the_l2_first() -> None:
    """Those that are read once, or nearly: of Qwen's models up to 3 tokens and 1, with more the L2 is to keep some."""

    def leave(hidden: int, width: int) -> list[bool]:
        sizes = [(tokens, 128, hidden, width, 8, True) for tokens in range(1, decode.MAX_TOKENS + 1)]
        found = [decode._constants(one, torch.bfloat16, True, 528)[-1]["EVICT"] for one in sizes]
        return [policy == "evict_first" for policy in found]

    assert leave(2048, 768) == [True, True, True, False]
    assert leave(4096, 1536) == [True, False, False, False]


# --- which experts ----------------------------------------------------------------------------------------------------


def chosen_by(logits: list[float], top_k: int, norm: bool = True) -> Tensor:
    """The weight that each expert has: expert e's output is row e of the identity, and its weight with it."""
    experts = len(logits)
    model = ResolvedModel(max(16, experts), 16, experts, top_k, norm, "silu")
    x = torch.zeros(1, 1, model.hidden_size)
    x[0, 0, 0] = 1
    gate = torch.zeros(experts, model.hidden_size)
    gate[:, 0] = torch.tensor(logits)
    gate_up = torch.zeros(experts, 32, model.hidden_size)
    gate_up[:, 0, 0], gate_up[:, 16, 0] = 100.0, 0.01  # silu(100) * 0.01 = 1 to rounding
    down = torch.zeros(experts, model.hidden_size, 16)
    down[range(experts), range(experts), 0] = 1.0
    block = Qwen3MoeFusedGroupedGEMMBlock(model, gate.to(DEVICE), gate_up.to(DEVICE), down.to(DEVICE))
    got, names = forward(block, x)
    assert names == NAMES
    return got["hidden_states"][0, 0, :experts]


def test_the_largest_are_chosen() -> None:
    logits = [0.5, 2.0, -1.0, 1.0, 0.0]
    p = torch.tensor(logits).softmax(0)
    kept = torch.where(torch.tensor([False, True, False, True, False]), p, 0.0)
    torch.testing.assert_close(chosen_by(logits, 2, norm=False), kept, rtol=1e-5, atol=0)
    torch.testing.assert_close(chosen_by(logits, 2), kept / kept.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_among_equals_the_first(value: float) -> None:
    """All p equal: the top_k lowest ids."""
    assert (chosen_by([value] * 7, 3) > 0).tolist() == [True] * 3 + [False] * 4


def test_probabilities_of_zero_may_be_chosen() -> None:
    """exp of the difference is 0 for all but one: the rest is taken by id, with a weight of 0."""
    torch.testing.assert_close(chosen_by([-500.0, -400.0, 0.0, -300.0], 3), torch.tensor([0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_with_itself(bad: float) -> None:
    """Its output is NaN; the other's has the bits that it has alone."""
    block, (x, _) = make_block(), judge.data(2, MODEL, torch.float32)
    alone, _ = forward(block, x[:, 1:])
    x[0, 0, 3] = bad
    got, names = forward(block, x)
    assert names == NAMES
    assert got["hidden_states"][0, 0].isnan().all()
    assert torch.equal(got["hidden_states"][0, 1], alone["hidden_states"][0, 0])


def test_bad_logits_give_no_number() -> None:
    """One NaN in the gate is one in every softmax: the routing weights are NaN, as the router's are, whatever x is."""
    block, (x, _) = make_block(), judge.data(2, MODEL, torch.float32)
    with torch.no_grad():
        block.gate[5, 0] = float("nan")
    assert forward(block, x)[0]["hidden_states"].isnan().all()


def test_bad_weights_of_others_do_not_count() -> None:
    """An expert that nobody chose may hold NaN."""
    block, (x, _) = make_block(), judge.data(1, MODEL, torch.float32)
    clean, _ = forward(block, x)
    (selected,) = judge.held_routing(MODEL, unit_weights(MODEL, torch.float32), x).tolist()
    (other, *_) = sorted(set(range(MODEL.num_experts)) - set(selected))
    with torch.no_grad():
        block.gate_up_proj[other], block.down_proj[other] = float("nan"), float("nan")
    assert torch.equal(forward(block, x)[0]["hidden_states"], clean["hidden_states"])


# --- again and again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", range(1, decode.MAX_TOKENS + 1))
def test_repeated(tokens: int) -> None:
    """The same bits each time: sums have one order, and a program that waits for the others finds all of A."""
    model = replace(MODEL, hidden_size=2048, moe_intermediate_size=768, num_experts=16, top_k=8) if GPU else MODEL
    block, (x, _) = make_block(model, torch.bfloat16), judge.data(tokens, model, torch.bfloat16)
    x = x.to(DEVICE)
    with torch.no_grad():
        first, _ = block(x)
        for _ in range(5000 if GPU else 3):
            assert torch.equal(block(x)[0], first)


@pytest.mark.gpu
def test_in_a_graph_and_on_two_streams() -> None:
    """A replay gives what the call gives for what is in x then; two streams at once do not disturb each other."""
    model = replace(MODEL, hidden_size=2048, moe_intermediate_size=768, num_experts=16, top_k=8)
    block = make_block(model, torch.bfloat16).requires_grad_(False)
    xs = [judge.unit_tokens(1, model, torch.bfloat16, seed=seed).to(DEVICE) for seed in range(8)]
    expected = [block(x)[0].clone() for x in xs]
    held = xs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = block(held)
    for x, right in zip(xs, expected, strict=True):
        held.copy_(x)
        graph.replay()
        assert torch.equal(out, right)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for turn in range(200):
        results = []
        for stream, which in zip(streams, (turn % 8, (turn + 3) % 8), strict=True):
            with torch.cuda.stream(stream):
                results.append((block(xs[which])[0], expected[which]))
        torch.cuda.synchronize()
        assert all(torch.equal(got, right) for got, right in results)


def test_inputs_are_left_alone() -> None:
    block, (x, _) = make_block(), judge.data(2, MODEL, torch.float32)
    before = [t.clone() for t in (x, *(getattr(block, name) for name in WEIGHTS))]
    forward(block, x)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *(getattr(block, n) for n in WEIGHTS)), strict=True))


# --- when it runs -----------------------------------------------------------------------------------------------------

OTHERWISE: dict[str, dict[str, Any]] = {
    "permute_x": {"permute_x": False},
    "permute_y": {"permute_y": False},
    "fuse_swiglu": {"fuse_swiglu": False},
    "fuse_combine": {"fuse_combine": False},
    "trace": {"trace": True},
    "kernels": {"autotune": False, "kernel_config_fwd": fused.small_kernels()[0][2]},
}


@pytest.mark.parametrize("why", OTHERWISE)
def test_what_is_declared_otherwise_runs_otherwise(why: str) -> None:
    """A fusion that is off, an intermediate or a kernel config that is asked for: the ordinary kernels."""
    x, _ = judge.data(1, MODEL, torch.float32)
    with record_launches() as names, torch.no_grad():
        make_block(**OTHERWISE[why])(x.to(DEVICE))
    assert not {"decode_gate", "decode_experts"} & set(names)
    assert "forward" in names


@pytest.mark.parametrize("leaf", ["x", *WEIGHTS])
def test_with_a_gradient_to_come_it_does_not_run(leaf: str) -> None:
    """One tensor that needs a gradient is enough; none, or no_grad, and it runs."""
    block = make_block().requires_grad_(False)
    x = judge.data(1, MODEL, torch.float32)[0].to(DEVICE)
    with record_launches() as names:
        block(x)
    assert names == NAMES
    (x if leaf == "x" else getattr(block, leaf)).requires_grad_()
    with record_launches() as names:
        block(x)
    assert names == ORDINARY
    with record_launches() as names, torch.no_grad():
        block(x)
    assert names == NAMES


def test_one_sided_blocks_without_gradients() -> None:
    """dX_only and dW_only cut leaves off; what is left without a gradient runs here."""
    x = judge.data(1, MODEL, torch.float32)[0].to(DEVICE)
    with record_launches() as names:
        make_block(dX_only=True)(x)
    assert names == NAMES


@pytest.mark.parametrize("tokens", [0, decode.MAX_TOKENS + 1])
def test_other_numbers_of_tokens(tokens: int) -> None:
    names = forward(make_block(), judge.data(tokens, MODEL, torch.float32)[0])[1]
    assert "decode_gate" not in names


def test_limits() -> None:
    """What `suits` says at each bound and beyond it."""

    def suits(experts: int = 8, top_k: int = 2, tokens: int = 1, row: int = 64, dtype: Any = torch.bfloat16) -> bool:
        x = torch.empty(tokens, row // dtype.itemsize, dtype=dtype, device="meta")
        return decode.suits(x, experts, top_k, FusedOptions(top_k))

    most, wide = decode.MAX_TOKENS, decode.MAX_TOKENS_WIDE
    assert suits(decode.MAX_EXPERTS, decode.MAX_TOP_K)
    assert not suits(decode.MAX_EXPERTS + 1)
    assert not suits(32, decode.MAX_TOP_K + 1)
    assert suits(tokens=most, row=decode.PIECE)
    assert not suits(tokens=most + 1)
    assert suits(tokens=wide, row=decode.PIECE + 16)
    assert not suits(tokens=wide + 1, row=decode.PIECE + 16)
    assert suits(row=2 * MAX_WIDTH)
    assert not suits(row=2 * (MAX_WIDTH + 1))
    assert not suits(dtype=torch.float64)  # which the interpreter has


def test_it_is_announced() -> None:
    """explain() says when a forward is two launches."""
    words = "without gradients: decode_gate and decode_experts, two launches, in place of all below"
    block = make_block()
    assert block.explain(decode.MAX_TOKENS).splitlines()[1] == words
    assert words not in block.explain(decode.MAX_TOKENS + 1)
    assert words not in make_block(permute_y=False).explain(1)
    assert words not in make_block(trace=True).explain(1)


def test_under_autocast() -> None:
    """The weights are cast, and the results are autocast's."""
    block, (x, _) = make_block(), judge.data(1, MODEL, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad(), record_launches() as names:
        out, logits = block(x.to(DEVICE))
    assert names == NAMES
    assert out.dtype == logits.dtype == torch.bfloat16
    low = make_block(dtype=torch.bfloat16)
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(low, name).copy_(getattr(block, name))
    assert torch.equal(out.cpu(), forward(low, x.bfloat16())[0]["hidden_states"])


# --- the operator -----------------------------------------------------------------------------------------------------


def operands(tokens: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    weights = unit_weights(MODEL, dtype)
    x = judge.data(tokens, MODEL, dtype)[0].view(tokens, -1)
    return [x.to(DEVICE), *(weights[name].to(DEVICE) for name in WEIGHTS)]


@pytest.mark.parametrize("tokens", [1, 2])
def test_opcheck(tokens: int) -> None:
    """Schema, fake and autograd registration by torch's own checks."""
    torch.library.opcheck(
        decode.decode_tokens,
        (*operands(tokens), 2, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_compiled() -> None:
    """torch.compile finds the operator, without a graph break, and its bits are those of the call."""
    block, (x, _) = make_block().requires_grad_(False), judge.data(1, MODEL, torch.float32)
    x = x.to(DEVICE)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    out, logits = torch.compile(block, backend=backend, fullgraph=True)(x)
    assert [node.target for node in graphs[0].graph.nodes if "moefactory" in str(node.target)] == [decode.decode_tokens]
    assert all(torch.equal(a, b) for a, b in zip((out, logits), block(x), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # of torch.jit itself
def test_a_trace_takes_the_other_kernels() -> None:
    """torch.jit.trace holds on to what it saw of a few tokens; the kernels for any number of few tokens take more."""
    block = make_block().requires_grad_(False)
    traced = torch.jit.trace(block, judge.data(2, MODEL, torch.float32)[0].to(DEVICE), check_trace=False)
    x = judge.data(10, MODEL, torch.float32)[0].to(DEVICE)
    assert torch.equal(traced(x)[0], block(x)[0])


def test_no_backward() -> None:
    tensors = operands()
    tensors[0].requires_grad_()
    out, _ = decode.decode_tokens(*tensors, 2, True)
    with pytest.raises(RuntimeError, match="decode has no backward; run the block"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, at first use
def test_no_forward_mode() -> None:
    x, *weights = operands()
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        decode.decode((fwAD.make_dual(x, torch.ones_like(x)), *weights), 2, True)


REFUSED: dict[str, tuple[dict[int, Any], int, str]] = {
    "tokens": ({0: lambda t: t.expand(5, -1)}, 2, "x: got 5 tokens; needed: 1 to 4"),
    "no tokens": ({0: lambda t: t[:0]}, 2, "x: got 0 tokens; needed: 1 to 4"),
    "top_k": ({}, 9, "top_k: got 9 of 8 experts"),
    "gate": ({1: lambda t: t[:, :-1]}, 2, r"gate: got \(8, 63\)"),
    "up": ({2: lambda t: t[..., :-2].contiguous()}, 2, r"gate_up_proj: got \(8, 64, 62\)"),
    "down": ({3: lambda t: t[:-1]}, 2, r"down_proj: got \(7, 64, 32\)"),
    "dtype": ({3: lambda t: t.half()}, 2, r"down_proj: got \(8, 64, 32\) torch.float16"),
    "strides": ({3: lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)}, 2, "down_proj: got strides"),
    "device": ({2: lambda t: t.to("meta")}, 2, "gate_up_proj: on meta; needed: x's device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    """One line with the argument, what came and what is needed, before anything is launched."""
    changes, top_k, words = REFUSED[name]
    tensors = operands()
    for index, change in changes.items():
        tensors[index] = change(tensors[index])
    with record_launches() as names, pytest.raises(ValueError, match=words):
        decode.decode(tuple(tensors), top_k, True)
    assert names == []


def test_strided_inputs() -> None:
    """x and gate may be views; the bits are those of contiguous ones."""
    x, gate, up, down = operands(2)
    expected = decode.decode((x, gate, up, down), 2, True)
    wide = torch.stack((x, x), dim=-1).flatten(1)[:, ::2]
    tall = gate.T.contiguous().T
    assert not wide.is_contiguous() and not tall.is_contiguous()
    got = decode.decode((wide, tall, up, down), 2, True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_experts_alone_are_untouched() -> None:
    """`compute_experts`, which is given a routing, has its own kernels for any number of tokens."""
    p = fused.problem(fused.Shape(1, 8, 2, 64, 32), torch.float32).to(DEVICE)
    with record_launches() as names, torch.no_grad():
        compute_experts(p.x, p.routing_weights, p.plan, p.gate_up_proj, p.down_proj, FusedOptions(2))
    assert "decode_experts" not in names
