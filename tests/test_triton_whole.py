"""The block as one operator: every gradient, the router's part of dX above all, and what its two halves may be asked.

The yardstick is the torch backend in the same dtype beside float64 (`judge`), and, where a loss uses the router's
logits, torch's own autograd through the torch backend in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import fused
import judge
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from fused import COMBINATIONS, DEVICE, DTYPES, GPU, dtype_id, flag_id
from judge import WEIGHTS, Tensors
from torch import Tensor

from moefactory.block import Qwen3MoeFusedGroupedGEMMBlock, Qwen3MoeGroupedGEMMBlock
from moefactory.config import ResolvedModel
from moefactory.triton import combine, whole
from moefactory.triton.gate import (
    MAX_TOKENS,
    MAX_TOKENS_FORWARD,
    MAX_WIDTH,
    _router_logits,
    gate_gradient,
    gate_logits,
    router_logits,
)
from moefactory.triton.launch import record_launches
from moefactory.triton.ops import compute_experts
from moefactory.triton.options import FusedOptions
from moefactory.triton.plan import make_plan
from moefactory.triton.routed import parts_of, size_of, views_of
from moefactory.triton.router import select

MODEL = ResolvedModel(64, 32, 8, 2, True, "silu")
WIDE = torch.float32 if GPU else torch.float64
ONE_PASS = [flags for flags in COMBINATIONS if flags["fuse_combine"]]
NAMES = ("x", *WEIGHTS)


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():  # fresh memory is NaN
        yield


def make_block(model: ResolvedModel = MODEL, dtype: torch.dtype = WIDE, **more: Any) -> Any:
    return fused.fused_block(model, dtype, **more)


def operands(tokens: int, model: ResolvedModel = MODEL, dtype: torch.dtype = WIDE) -> dict[str, Tensor]:
    weights = judge.unit_weights(model, dtype)
    x = judge.unit_tokens(tokens, model, dtype)[0]
    return {"x": x.to(DEVICE), **{name: weights[name].to(DEVICE) for name in WEIGHTS}}


# --- the sum of dX ----------------------------------------------------------------------------------------------------

SIZES = [  # tokens, experts, top_k, width: sizes below, at and above a program's 64 tokens, 128 columns, 128 experts
    (1, 1, 1, 8),
    (7, 3, 2, 40),
    (64, 8, 8, 128),
    (65, 20, 3, 136),
    (130, 129, 2, 264),
    (3, 300, 4, 1000 if GPU else 72),
]


@pytest.mark.parametrize("token_order", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sum_dX(sizes: tuple[int, ...], dtype: torch.dtype, token_order: bool) -> None:
    """Against float64: sums of float32 in another order, then one rounding to the dtype.

    The bound is one unit in the last place of the result, plus float32's of the sum of the addends' sizes.
    """
    tokens, experts, top_k, width = sizes
    draw = torch.Generator().manual_seed(5)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    rows, dlogits, gate = new(tokens * top_k, width), new(tokens, experts), new(experts, width)
    scatter = torch.randperm(tokens * top_k, generator=draw).int()
    with record_launches() as names:
        got = combine.sum_dX(*(t.to(DEVICE) for t in (rows, scatter, dlogits, gate)), top_k, token_order=token_order)
    assert names == ["sum_dX"]
    assert got.dtype == dtype
    taken = (rows if token_order else rows[scatter.long()]).double().view(tokens, top_k, width)
    exact = taken.sum(1) + dlogits.double() @ gate.double()
    terms = taken.abs().sum(1) + dlogits.double().abs() @ gate.double().abs()
    inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = exact.abs() * torch.finfo(dtype).eps + terms * inner * (top_k + experts)
    assert ((got.cpu().double() - exact).abs() <= bound).all()


def test_sum_dX_of_no_tokens() -> None:
    nothing = torch.empty(0, 8, device=DEVICE)
    scatter = torch.empty(0, dtype=torch.int32, device=DEVICE)
    dx = combine.sum_dX(nothing, scatter, nothing, torch.ones(8, 8, device=DEVICE), 2, token_order=True)
    assert dx.shape == (0, 8)


def test_sum_dX_keeps_a_bad_row_to_its_token() -> None:
    """NaN in a row, in dlogits or in a column of the gate reaches its token, or its column, and nothing else."""
    tokens, experts, top_k, width = 70, 5, 2, 130
    draw = torch.Generator().manual_seed(6)
    rows, dlogits = torch.randn(tokens * top_k, width, generator=draw), torch.randn(tokens, experts, generator=draw)
    gate, scatter = torch.randn(experts, width, generator=draw), torch.arange(tokens * top_k, dtype=torch.int32)
    rows[7, 3], dlogits[9, 1], gate[2, 129] = (float("nan"),) * 3
    dx = combine.sum_dX(*(t.to(DEVICE) for t in (rows, scatter, dlogits, gate)), top_k, token_order=True).cpu()
    bad = torch.zeros(tokens, width, dtype=torch.bool)
    bad[3, 3], bad[9], bad[:, 129] = True, True, True
    assert torch.equal(dx.isnan(), bad)


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 8), (3, 5, 40), (4, 3, 2056), (5, 3, 1032), (MAX_TOKENS_FORWARD, 129, 72)], ids=str
)
def test_gate_logits(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against float64, up to four tokens and above, rows of one piece and of two: sums of float32 in some order, then
    one rounding to the dtype.

    The bound is one unit in the last place of the result, plus float32's of the sum of the addends' sizes.
    """
    tokens, experts, width = sizes
    draw = torch.Generator().manual_seed(7)
    x, gate = (torch.randn(n, width, generator=draw, dtype=torch.float64).to(dtype) for n in (tokens, experts))
    plain = gate.to(DEVICE)
    apart = torch.stack([plain, plain], dim=2)[..., 0]  # of other strides
    for one in (plain, apart):
        with record_launches() as names:
            got = gate_logits(x.to(DEVICE), one)
        assert names == ["gate"]
        assert (got.shape, got.dtype) == ((tokens, experts), dtype)
        exact, terms = x.double() @ gate.double().T, x.double().abs() @ gate.double().abs().T
        inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert (
            (got.cpu().double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + terms * inner * width
        ).all()


@pytest.mark.parametrize(("tokens", "width"), [(0, 24), (MAX_TOKENS_FORWARD + 1, 24), (2, MAX_WIDTH + 8)])
def test_gate_logits_of_none_or_many_tokens_or_wide_rows_are_torchs(tokens: int, width: int) -> None:
    x, gate = (torch.randn(n, width, device=DEVICE, dtype=WIDE) for n in (tokens, 8))
    with record_launches() as names:
        assert torch.equal(gate_logits(x, gate), torch.nn.functional.linear(x, gate))
    assert names == []


@pytest.mark.parametrize("numbers", [range(1, 5), (5, 6, MAX_TOKENS_FORWARD)])
def test_gate_logits_of_a_token_are_its_own(numbers: Iterable[int]) -> None:
    """Its bits do not depend on how many others there are, nor on NaN in another one."""
    draw = torch.Generator().manual_seed(8)
    x, gate = (torch.randn(n, 200, generator=draw).to(DEVICE) for n in (MAX_TOKENS_FORWARD, 9))
    first, *others = (gate_logits(x[:tokens], gate)[:1] for tokens in numbers)
    assert all(torch.equal(first, other) for other in others)
    x[1:] = float("nan")
    assert torch.equal(gate_logits(x[: max(numbers)], gate)[:1], first)


def test_router_logits_are_differentiated_as_torchs() -> None:
    """First and second derivatives are those of torch's product; the operator passes torch's own check."""
    draw = torch.Generator().manual_seed(8)
    x, gate = (torch.randn(n, 12, generator=draw, dtype=WIDE).to(DEVICE).requires_grad_() for n in (3, 5))
    torch.library.opcheck(_router_logits, (x, gate))
    with record_launches() as names:
        logits = router_logits(x, gate)
    assert names == ["gate"]
    torch.testing.assert_close(logits, x @ gate.T)
    dlogits = torch.randn(3, 5, generator=draw, dtype=WIDE).to(DEVICE).requires_grad_()
    found = torch.autograd.grad(logits, (x, gate), dlogits, create_graph=True)
    expected = torch.autograd.grad(x @ gate.T, (x, gate), dlogits, create_graph=True)
    torch.testing.assert_close(found, expected)
    loss = lambda grads: sum(grad.square().sum() for grad in grads)  # noqa: E731
    second = [torch.autograd.grad(loss(grads), (x, gate, dlogits)) for grads in (found, expected)]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize(
    ("dtype", "names"), [(torch.float32, []), (torch.bfloat16, ["gate"])], ids=["cast", "as it is"]
)
def test_router_logits_under_autocast(dtype: torch.dtype, names: list[str]) -> None:
    """What autocast would cast is torch's; what has its dtype already is the kernel's."""
    x, gate = (torch.randn(n, 24, device=DEVICE, dtype=dtype) for n in (3, 5))
    with torch.autocast(DEVICE, torch.bfloat16), record_launches() as launched:
        logits = router_logits(x, gate)
        torch.testing.assert_close(logits, torch.nn.functional.linear(x, gate))
    assert launched == names
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 23), torch.float32), ((3, 24), torch.float16)], ids=["width", "dtype"]
)
def test_router_logits_of_what_does_not_fit_are_refused_by_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate = torch.zeros(5, 24, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|same dtype"), record_launches() as names:
        router_logits(torch.zeros(shape, device=DEVICE, dtype=dtype), gate)
    assert names == []


@pytest.mark.parametrize("frozen", ["x", "gate"])
def test_router_logits_keep_what_the_backward_needs(frozen: str) -> None:
    """Of a frozen operand no gradient is owed, so that the other one may be written to, as it may with torch's."""
    x, gate = torch.randn(3, 24, device=DEVICE), torch.randn(5, 24, device=DEVICE)
    leaf, other = (gate, x) if frozen == "x" else (x, gate)
    leaf.requires_grad_()
    made = leaf * 1
    logits = router_logits(x, made) if frozen == "x" else router_logits(made, gate)
    made.add_(1)
    logits.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, other.sum(0).expand(leaf.shape))


def test_router_logits_leave_a_subclass_its_own_product() -> None:
    """A gate that stands for something else, as a quantised one does, is asked, not read."""

    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                found = function(*args, **(kwargs or {}))
            return 2 * found if function is torch.nn.functional.linear else found

    x, gate = torch.randn(3, 24, device=DEVICE), torch.randn(5, 24, device=DEVICE)
    with record_launches() as names:
        got = router_logits(x, gate.as_subclass(Doubled))
    assert names == []
    torch.testing.assert_close(got.as_subclass(Tensor), 2 * (x @ gate.T))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, at first use
def test_router_logits_have_no_forward_mode_derivative() -> None:
    """As everything here: refused, where the dispatcher would drop the tangent."""
    x, gate = torch.zeros(3, 24, device=DEVICE), torch.zeros(5, 24, device=DEVICE)
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        router_logits(fwAD.make_dual(x, torch.ones_like(x)), gate)


# --- the gate's gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sizes", [(1, 1, 8), (7, 3, 40), (64, 64, 64), (65, 70, 136), (MAX_TOKENS, 129, 72)], ids=str)
def test_gate_gradient(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against float64, below, at and above a program's 64 on each side: sums of float32 in some order, then one
    rounding to the dtype.

    The bound is one unit in the last place of the result, plus float32's of the sum of the addends' sizes.
    """
    tokens, experts, width = sizes
    draw = torch.Generator().manual_seed(7)
    dlogits, x = (torch.randn(tokens, n, generator=draw, dtype=torch.float64).to(dtype) for n in (experts, width))
    with record_launches() as names:
        got = gate_gradient(dlogits.to(DEVICE), x.to(DEVICE))
    assert names == ["gate_gradient"]
    assert (got.shape, got.dtype) == ((experts, width), dtype)
    exact, terms = dlogits.double().T @ x.double(), dlogits.double().abs().T @ x.double().abs()
    inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert ((got.cpu().double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + terms * inner * tokens).all()


@pytest.mark.parametrize("tokens", [0, MAX_TOKENS + 1])
def test_gate_gradient_of_none_or_many_tokens_is_torchs(tokens: int) -> None:
    dlogits, x = (torch.randn(tokens, n, device=DEVICE, dtype=WIDE) for n in (8, 24))
    with record_launches() as names:
        assert torch.equal(gate_gradient(dlogits, x), dlogits.t() @ x)
    assert names == []


def test_gate_gradient_keeps_a_bad_number_to_its_row_and_column() -> None:
    """NaN in dlogits reaches its expert's row, NaN in x its column, and nothing else."""
    draw = torch.Generator().manual_seed(8)
    dlogits, x = torch.randn(70, 66, generator=draw), torch.randn(70, 130, generator=draw)
    dlogits[69, 65], x[3, 129] = float("nan"), float("nan")
    bad = torch.zeros(66, 130, dtype=torch.bool)
    bad[65], bad[:, 129] = True, True
    assert torch.equal(gate_gradient(dlogits.to(DEVICE), x.to(DEVICE)).cpu().isnan(), bad)


# --- a step -----------------------------------------------------------------------------------------------------------


def step(block: Any, x: Tensor, dy: Tensor, dlogits: Tensor | None, used: str = "both") -> Tensors:
    """Results and gradients of <dy, out> + <dlogits, logits>, or of one of the two, on the CPU."""
    device = block.gate.device
    leaf = x.detach().to(device).requires_grad_()
    block.zero_grad(set_to_none=True)
    out, logits = block(leaf)
    out = getattr(out, "hidden_states", out)
    given = {"out": (out, dy), "logits": (logits, dlogits)}
    pairs = [
        (t, d.to(device).view(t.shape)) for name, (t, d) in given.items() if d is not None and used in {name, "both"}
    ]
    torch.autograd.backward([t for t, _ in pairs], [d for _, d in pairs])
    grads = {"dx": leaf.grad, **{name: getattr(block, name).grad for name in WEIGHTS}}
    found = {"hidden_states": out.detach(), "router_logits": logits.detach()}
    return {name: t.cpu() for name, t in {**found, **grads}.items() if t is not None}


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context")  # torch's own
@pytest.mark.parametrize("flags", ONE_PASS, ids=flag_id)
@pytest.mark.parametrize("used", ["both", "out", "logits"])
@pytest.mark.parametrize("norm", [True, False])
def test_losses_of_the_logits(used: str, norm: bool, flags: dict[str, bool]) -> None:
    """A loss of the output, of the router's logits (a balancing loss), or of both: float64's gradients to rounding.

    Interpreted, float64 with a bound of 1e-12 of the largest; on a GPU float32 with 1e-4.
    """
    model = ResolvedModel(64, 32, 8, 2, norm, "silu")
    tokens, weights = 70, judge.unit_weights(model, WIDE)
    x, dy = judge.data(tokens, model, WIDE)
    dlogits = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(WIDE)
    right_block = Qwen3MoeGroupedGEMMBlock(model, *(weights[name].double() for name in WEIGHTS), trace=False)
    exact = step(right_block, x.double(), dy.double(), dlogits.double(), used)
    got = step(make_block(model, **flags), x, dy, dlogits, used)
    assert set(got) == {"hidden_states", "router_logits", "dx", "gate"} | (set() if used == "logits" else set(WEIGHTS))
    for name, tensor in got.items():
        bound = (1e-4 if GPU else 1e-12) * exact[name].abs().max()
        assert (tensor.double() - exact[name]).abs().max() <= bound, name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [0, 1, 5, 65, 150])
def test_the_node_and_its_parts(tokens: int, dtype: torch.dtype) -> None:
    """The same numbers as from router, plan and experts by themselves: all bits but those of dX and of what is seen
    through another product, dX by the judge's rule."""
    block = make_block(MODEL, dtype)
    x, dy = judge.data(tokens, MODEL, dtype)
    got = step(block, x, dy, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen3MoeFusedGroupedGEMMBlock, "_at_once", lambda *args: None)
        apart = step(block, x, dy, None)
    assert set(got) == set(apart)
    summed = {"dx", "gate"}  # in another order: the gate's gradient by a kernel, not by torch
    assert [name for name in got if name not in summed and not torch.equal(got[name], apart[name])] == []
    selected = judge.held_routing(MODEL, judge.unit_weights(MODEL, dtype), x)
    exact = judge.oracle(MODEL, judge.unit_weights(MODEL, dtype), x, dy, selected)
    mine, parts, right = ({"dx": t["dx"], "gate": t["gate"].reshape(1, -1)} for t in (got, apart, exact))
    assert judge.complaints(mine, parts, right, dtype) == []


@pytest.mark.parametrize("needs", [n for n in product((True, False), repeat=4) if any(n)], ids=str)
def test_only_requested_gradients(needs: tuple[bool, ...]) -> None:
    """Each subset of the four leaves: its gradients have the bits that they have among all, the others are None."""
    tensors = operands(70)
    dy = judge.unit_tokens(70, MODEL, WIDE, seed=2)[0].to(DEVICE)

    def gradients(wanted: tuple[bool, ...]) -> tuple[dict[str, Tensor | None], list[str]]:
        leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors.values(), wanted, strict=True)]
        with record_launches() as names:
            out, _ = whole.compute_block((leaves[0], leaves[1], leaves[2], leaves[3]), True, FusedOptions(2))
            out.backward(dy)
        return dict(zip(NAMES, (leaf.grad for leaf in leaves), strict=True)), names

    (everything, _), (found, names) = gradients((True,) * 4), gradients(needs)
    for name, need in zip(NAMES, needs, strict=True):
        right = everything[name]
        assert right is not None
        mine = found[name]
        assert (mine is not None) == need
        assert mine is None or torch.equal(mine, right), name
    x, gate, up, down = needs
    flags = dict.fromkeys(fused.FLAGS, True)
    expected = fused.expected_backward(flags, (x, x or gate, up, down), router=True, gate=gate)
    forward = [*fused.expected_front(70, 8, 2, whole=True), *fused.expected_forward(flags)]
    assert fused.without_tables(names) == [*forward, *expected]


def test_what_is_done_along_the_way() -> None:
    """Of 70 tokens, in tiles of 16 columns, of which dA has two: the whole block launches no sum of ds, since the
    router's backward adds its parts, and no tile table in its forward, since the plan makes it; one in its backward.
    With a top_k of 4 the router counts, too. Router and experts apart launch all of these, and give the same bits, but
    for the gate's gradient, which torch sums up in its own order."""
    model = ResolvedModel(64, 32, 8, 4, True, "silu")
    options = fused.options(COMBINATIONS[0], 4, fused.small_kernels(16, 16, 16))
    assert all(getattr(options, flag) for flag in fused.FLAGS)
    tensors = operands(70, model)
    dy = judge.unit_tokens(70, model, WIDE, seed=2)[0].to(DEVICE)

    def step(compute: Any) -> tuple[list[Tensor], list[str], list[str]]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
        with record_launches() as names:
            out = compute(*leaves)
            before = list(names)
            out.backward(dy)
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        return [out.detach(), *grads[1:]], before, names[len(before) :]

    def apart(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, selected = select(torch.nn.functional.linear(x, gate), 4, True)
        return compute_experts(x, weights, make_plan(selected, 8), up, down, options)[0]

    whole_bits, *of_whole = step(lambda *leaves: whole.compute_block(leaves, True, options)[0])
    apart_bits, *of_apart = step(apart)
    extra = ("plan_histogram", "tile_table", "sum_ds")
    assert [[names.count(name) for name in extra] for names in of_whole] == [[0, 0, 0], [0, 1, 0]]
    assert [[names.count(name) for name in extra] for names in of_apart] == [[1, 1, 0], [0, 1, 1]]
    assert len(whole_bits) == len(apart_bits) == 4  # the output and what is not x's, whose parts are rounded apart
    gate = apart_bits[1]
    assert (whole_bits[1] - gate).abs().max() <= (1e-5 if GPU else 1e-13) * gate.abs().max()
    assert all(torch.equal(whole_bits[i], apart_bits[i]) for i in (0, 2, 3))


def test_logits_may_be_changed_after_the_forward() -> None:
    """With normalised weights nothing is kept of the logits: who scales them in place disturbs no backward."""
    x, dy = judge.data(70, MODEL, WIDE)
    block = make_block()
    expected = step(block, x, dy, None)
    leaf = x.to(DEVICE).requires_grad_()
    block.zero_grad(set_to_none=True)
    out, logits = block(leaf)
    logits.detach().mul_(3)
    out.backward(dy.to(DEVICE))
    assert torch.equal(leaf.grad.cpu(), expected["dx"])  # type: ignore[union-attr]


@pytest.mark.parametrize("tokens", [5, 70])
def test_repeated(tokens: int) -> None:
    """The same bits each time, on a GPU from the third call of a kind on from its tape."""
    block, (x, dy) = make_block(MODEL, DTYPES[-1]), judge.data(tokens, MODEL, DTYPES[-1])
    first = step(block, x, dy, None)
    for _ in range(50 if GPU else 3):
        assert fused.differing(step(block, x, dy, None), first) == []


# --- what is kept between the two -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sizes", [(0, 3, 2), (1, 1, 1), (5, 7, 3), (70, 130, 8)], ids=str)
def test_parts_of_one_memory(sizes: tuple[int, int, int], dtype: torch.dtype, norm: bool) -> None:
    """Each part has its shape and dtype, starts at a multiple of 16 bytes as the kernels need it, and shares no byte
    with another: filled one after the other, all hold what they were filled with."""
    tokens, experts, top_k = sizes
    parts = parts_of(tokens, experts, top_k, dtype, norm)
    memory = torch.empty(size_of(parts), dtype=torch.uint8, device=DEVICE)
    views = views_of(memory, parts)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = [
        (tokens, top_k),
        (tokens, top_k),
        (tokens if norm else 0, top_k),
        (experts + 2,),
        *[(tokens * top_k,)] * 2,
    ]
    dtypes = [dtype, torch.int64, wide, torch.int32, torch.int32, torch.int32]
    assert [(tuple(v.shape), v.dtype) for v in views] == list(zip(shapes, dtypes, strict=True))
    for value, view in enumerate(views):
        assert not view.numel() or view.data_ptr() % 16 == 0
        view.fill_(value)
    assert all(bool((view == value).all()) for value, view in enumerate(views))


def at_an_odd_element(tensor: Tensor) -> Tensor:
    """In other memory, as of a pool of bytes."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view_as(tensor).copy_(tensor)


def last_dimension_first(tensor: Tensor) -> Tensor:
    """The same numbers in another order of memory, each second element of it."""
    wide = torch.empty(*reversed(tensor.shape), 2, dtype=tensor.dtype, device=tensor.device)[..., 0]
    return wide.permute(*reversed(range(tensor.ndim))).copy_(tensor)


HOW: list[dict[str, Any]] = [
    {"saved": "h"}, {"saved": "h_reused"}, {"saved": "x"}, {"fuse_combine": False}, {"trace": True},
]  # fmt: skip


@pytest.mark.parametrize("elsewhere", [at_an_odd_element, last_dimension_first])
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_a_hook_may_hand_out_other_memory(
    norm: bool, how: dict[str, Any], elsewhere: Callable[[Tensor], Tensor]
) -> None:
    """What was saved comes back in other memory, from another start or in another order: the same bits, of the block as
    one operator and of router and experts apart."""
    model = ResolvedModel(64, 32, 8, 2, norm, "silu")
    block, (x, dy) = make_block(model, **how), judge.data(70, model, WIDE)
    expected = step(block, x, dy, None)
    own = {getattr(block, name).data_ptr() for name in WEIGHTS} if elsewhere is at_an_odd_element else set()
    moved: list[Tensor] = []

    def unpack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() in own or not tensor.numel():  # where weights start decides which kernels run
            return tensor
        moved.append(tensor)
        return elsewhere(tensor)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        got = step(block, x, dy, None)
    if {"trace", "fuse_combine"} & set(how):  # torch's own products take another way through other memory
        assert {t.dtype for t in moved} >= {WIDE, torch.int32, torch.int64}  # x, plan, and whom the router chose
        bound = 1e-5 if GPU else 1e-12
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=bound, atol=bound)
        return
    assert fused.differing(got, expected) == []
    assert {t.dtype for t in moved} >= {WIDE, torch.uint8}  # x, and what router and plan left
    assert own or {tuple(t.shape) for t in moved} >= {tuple(getattr(block, name).shape) for name in WEIGHTS}


@pytest.mark.parametrize("wrong", [lambda t: t.to(torch.float16), lambda t: t[:-1], lambda t: t.unsqueeze(0)])
@pytest.mark.parametrize("number", range(7))
def test_a_hook_that_hands_out_something_else(number: int, wrong: Callable[[Tensor], Tensor]) -> None:
    """Of x, three weights, h, what router and plan left, and the logits, one has another dtype or shape than was saved:
    refused in one line, where the kernels would read addresses that are not theirs."""
    model = ResolvedModel(64, 32, 8, 2, number < 6, "silu")  # with norm_topk_prob the logits are not saved
    block, (x, dy) = make_block(model), judge.data(70, model, WIDE)
    given = iter(range(100))

    def unpack(tensor: Tensor) -> Tensor:
        return wrong(tensor) if next(given) == number else tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack),
        pytest.raises(ValueError, match=r"^\w+: got .*; needed: [(\[]") as refusal,
    ):
        step(block, x, dy, None)
    assert "\n" not in str(refusal.value)
    assert next(given) == (6 if number < 6 else 7)


@pytest.mark.parametrize("wrong", [lambda t: t.to(torch.float16), lambda t: t[:-1]])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("how", HOW[3:], ids=str)
def test_a_hook_that_hands_out_something_else_of_the_parts(
    how: dict[str, Any], norm: bool, wrong: Callable[[Tensor], Tensor]
) -> None:
    """Router and experts apart: whichever of the tensors that a kernel reads has another dtype or shape than was saved,
    the backward is refused. What torch's own nodes saved is torch's to judge."""
    model = ResolvedModel(64, 32, 8, 2, norm, "silu")
    block, (x, dy) = make_block(model, **how), judge.data(20, model, WIDE)
    expected = step(block, x, dy, None)
    refused = number = 0
    while True:
        given = iter(range(100))

        def unpack(tensor: Tensor, number: int = number, given: Iterator[int] = given) -> Tensor:
            return wrong(tensor) if next(given) == number and tensor.numel() else tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            try:
                got = step(block, x, dy, None)
            except (ValueError, RuntimeError):
                refused += 1
            else:  # nothing was read of it, or of the same numbers
                for name, value in got.items():
                    torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-2)
                if next(given) <= number:
                    break
        number += 1
    assert refused >= 8


# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tokens", [3, 70])
def test_opcheck(tokens: int, norm: bool) -> None:
    """Both operators by torch's own checks: schema, fake tensors, autograd, AOT dispatch."""
    tensors = [t.requires_grad_() for t in operands(tokens).values()]
    text = FusedOptions(2).text
    torch.library.opcheck(whole.block_forward, (*tensors, norm, text, True))
    with torch.no_grad():
        out, logits, h, routed = whole.block_forward(*tensors, norm, text, True)
    plain = [t.detach() for t in tensors]
    for dlogits, needs in ((None, [True] * 4), (torch.ones_like(logits), [True, True, False, False])):
        saved = (*plain, h, routed, None if norm else logits.clone(), dlogits)
        torch.library.opcheck(whole.block_backward, (torch.ones_like(out), *saved, norm, text, needs))


def test_under_autocast_in_its_tensors_dtype() -> None:
    """The operator's parts are called with the tensors that it was given; the block has cast them."""
    tensors = tuple(operands(70, dtype=torch.float32).values())
    expected = whole.compute_block(tensors, True, FusedOptions(2))  # type: ignore[arg-type]
    with torch.autocast(DEVICE, torch.bfloat16):
        for _ in range(4):
            got = whole.compute_block(tensors, True, FusedOptions(2))  # type: ignore[arg-type]
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))


def test_h_reused_runs_once() -> None:
    block, (x, dy) = make_block(saved="h_reused"), judge.data(70, MODEL, WIDE)
    expected = step(make_block(), x, dy, None)
    assert fused.differing(step(block, x, dy, None), expected) == []
    out, _ = block(x.to(DEVICE).requires_grad_())
    out.backward(dy.to(DEVICE), retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward, but saved=h_reused"):
        out.backward(dy.to(DEVICE))


def test_no_second_derivative() -> None:
    x, _ = judge.data(70, MODEL, WIDE)
    leaf = x.to(DEVICE).requires_grad_()
    out, _ = make_block()(leaf)
    (dx,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, at first use
@pytest.mark.parametrize("name", NAMES)
def test_no_forward_mode(name: str) -> None:
    tensors = operands(70)
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        tensors[name] = fwAD.make_dual(tensors[name], torch.ones_like(tensors[name]))
        whole.compute_block(tuple(tensors.values()), True, FusedOptions(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("which", [0, 1])
def test_no_forward_mode_of_a_gradient(which: int) -> None:
    """A tangent on the gradient of the output or of the logits is refused, not dropped."""
    x, _ = judge.data(70, MODEL, WIDE)
    leaf = x.to(DEVICE).requires_grad_()
    outputs = make_block()(leaf)
    grads = [torch.ones_like(one) for one in outputs]
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        grads[which] = fwAD.make_dual(grads[which], torch.ones_like(grads[which]))
        torch.autograd.grad(outputs, leaf, grads)


REFUSED = {
    "gate": ("gate", lambda t: t[:, :-1], r"gate: got \(8, 63\)"),
    "up": ("gate_up_proj", lambda t: t[..., :-2].contiguous(), r"gate_up_proj: got \(8, 64, 62\)"),
    "down": ("down_proj", lambda t: t.half(), r"down_proj: got \(8, 64, 32\) torch.float16"),
    "strides": ("down_proj", lambda t: t.mT.contiguous().mT, "down_proj: got strides"),
    "device": ("gate_up_proj", lambda t: t.to("meta"), "gate_up_proj: on meta; needed: x's device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    """One line with the argument, what came and what is needed, before anything is launched."""
    name, change, words = REFUSED[case]
    tensors = operands(70)
    tensors[name] = change(tensors[name])
    with record_launches() as names, pytest.raises(ValueError, match=words):
        whole.compute_block(tuple(tensors.values()), True, FusedOptions(2))  # type: ignore[arg-type]
    assert names == []
