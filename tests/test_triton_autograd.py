"""The Triton backend as a citizen of torch: gradcheck, operators, compile, checkpoint, what is saved and allocated.

Refusals are in our own words. Nothing that is saved or allocated has a shape that depends on the routing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import fused
import judge
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from fused import COMBINATIONS, DEVICE, GPU, Shape, differing, dtype_id, flag_id, options, small_kernels
from judge import WEIGHTS, Tensors
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moefactory.block import Qwen3MoeFusedGroupedGEMMBlock, Qwen3MoeGroupedGEMMBlock
from moefactory.config import ResolvedModel
from moefactory.triton import library, ops, plan, router
from moefactory.triton.launch import record_launches
from moefactory.triton.ops import compute_experts
from moefactory.triton.options import FusedOptions

TINY = ResolvedModel(64, 32, 8, 2, True, "silu")
SMALL = Shape(6, 3, 2, 5, 4)
by_flags = pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
EDGE_FLAGS = [COMBINATIONS[i] for i in (0, 6, 9, 15)]
by_edge = pytest.mark.parametrize("flags", EDGE_FLAGS, ids=flag_id)


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():
        yield


def fused_block(
    model: ResolvedModel = TINY, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> Qwen3MoeFusedGroupedGEMMBlock:
    return fused.fused_block(model, dtype, seed, **more)


def block_data(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, dy = judge.data(tokens, TINY, dtype)
    return x.to(DEVICE), dy.to(DEVICE)


def leaves_of(p: fused.Problem, needs: tuple[bool, ...] = (True,) * 4) -> list[Tensor]:
    return [t.clone().requires_grad_(need) for t, need in zip(p.leaves, needs, strict=True)]


# --- the formulas -----------------------------------------------------------------------------------------------------


def _experts(p: fused.Problem, o: FusedOptions) -> Callable[..., Tensor]:
    plan = p.plan
    return lambda x, s, up, down: compute_experts(x, s, plan, up, down, o)[0]


@pytest.mark.interpreter
@by_flags
def test_gradcheck(flags: dict[str, bool]) -> None:
    """float64, numeric against analytic, fast mode; the backward must also give the same bits twice."""
    p = fused.problem(SMALL, torch.float64)
    assert torch.autograd.gradcheck(_experts(p, options(flags, 2)), leaves_of(p), fast_mode=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("routing", ["dropped", "one"])
@by_edge
def test_gradcheck_of_odd_routing(flags: dict[str, bool], routing: str) -> None:
    p = fused.problem(replace(SMALL, routing=routing), torch.float64)
    assert torch.autograd.gradcheck(_experts(p, options(flags, 2)), leaves_of(p), fast_mode=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("flags", [EDGE_FLAGS[0], EDGE_FLAGS[3]], ids=flag_id)
def test_gradcheck_in_full(flags: dict[str, bool]) -> None:
    """Every element of the Jacobian, over several tiles."""
    p = fused.problem(Shape(3, 2, 2, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(_experts(p, options(flags, 2, small_kernels(16, 32, 16))), leaves_of(p))


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("only", [{}, {"dW_only": True}, {"dX_only": True}], ids=str)
def test_gradcheck_of_the_block(norm: bool, only: dict[str, bool]) -> None:
    """Router included. With dW_only the block is constant in x, with dX_only in the weights."""
    model = ResolvedModel(6, 4, 5, 2, norm, "silu")
    block = fused_block(model, torch.float64, **only)
    x = judge.unit_tokens(4, model, torch.float64, seed=3)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(WEIGHTS, weights, strict=True)), (x,))[0]

    weights = [getattr(block, name).detach() for name in WEIGHTS]
    x = x if only.get("dW_only") else x.requires_grad_()
    weights = weights if only.get("dX_only") else [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


@pytest.mark.interpreter
def test_gradcheck_notices_a_wrong_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check: a backward that forgets the derivative of the sigmoid."""
    right = ops.Pipeline._d_activation

    def wrong(self: Any, *args: Any) -> Any:
        dh, a, ds = right(self, *args)
        return dh * 1.01, a, ds

    monkeypatch.setattr(ops.Pipeline, "_d_activation", wrong)
    p = fused.problem(Shape(1, 1, 1, 2, 1), torch.float64)  # a failure makes torch compute the whole Jacobian
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(_experts(p, options(COMBINATIONS[0], 1)), leaves_of(p), fast_mode=True)


# --- operators --------------------------------------------------------------------------------------------------------


def forward_arguments(p: fused.Problem, o: FusedOptions, save_h: bool, trace: bool, requires: bool = True) -> Any:
    x, s, up, down = leaves_of(p, (requires,) * 4)
    return x, s, up, down, *fused.indices(p.plan), o.text, save_h, trace


@by_edge
@pytest.mark.parametrize(("save_h", "trace"), [(True, False), (True, True), (False, False), (False, True)])
def test_opcheck_forward(flags: dict[str, bool], save_h: bool, trace: bool) -> None:
    """Schema, fake against real, autograd registration, dynamic shapes."""
    p = fused.problem(Shape(6, 3, 2, 20, 12), torch.float32).to(DEVICE)
    torch.library.opcheck(ops.experts_forward, forward_arguments(p, options(flags, 2), save_h, trace, save_h))


@by_edge
@pytest.mark.parametrize("needs", [[True] * 4, [False, True, False, True], [True, False, True, False]], ids=str)
def test_opcheck_backward(flags: dict[str, bool], needs: list[bool]) -> None:
    p = fused.problem(Shape(6, 3, 2, 20, 12), torch.float32).to(DEVICE)
    if not flags["fuse_combine"]:
        p = replace(p, dy=p.dy.repeat_interleave(2, 0))
    x, s, up, down, *indices, text, _, _ = forward_arguments(p, options(flags, 2), True, False, requires=False)
    h = torch.randn(12, 24, device=DEVICE)
    torch.library.opcheck(ops.experts_backward, (p.dy, x, s, up, down, h, *indices, text, needs))


def test_opcheck_plan_and_router() -> None:
    ids = torch.tensor([[0, 3], [2, 1], [5, -1]], device=DEVICE)
    torch.library.opcheck(plan.plan_tensors, (ids, 4))
    logits = torch.randn(6, 5, device=DEVICE)
    for norm in (True, False):
        torch.library.opcheck(router.top_k_softmax, (logits.clone().requires_grad_(), 2, norm))
        _, chosen, exact = router.top_k_softmax(logits, 2, norm)
        saved = exact if norm else logits
        arguments = (torch.randn(6, 2, device=DEVICE), saved, chosen, 5, norm)
        torch.library.opcheck(router.top_k_softmax_backward, arguments)


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_fake_agrees_with_real_on_wide_routing_weights(wide: torch.dtype) -> None:
    """Routing weights in float32 beside bfloat16 tokens: their gradient is float32, as the fake says."""
    p = fused.problem(Shape(6, 3, 2, 20, 12), torch.bfloat16).to(DEVICE)
    x, s, up, down, *indices, text, _, _ = forward_arguments(p, options(COMBINATIONS[0], 2), True, False, False)
    h = torch.randn(12, 24, device=DEVICE).bfloat16()
    arguments = (p.dy, x, s.to(wide), up, down, h, *indices, text, [True] * 4)
    torch.library.opcheck(ops.experts_backward, arguments, test_utils="test_faketensor")
    assert ops.experts_backward(*arguments)[1].dtype == wide
    for flags in COMBINATIONS:
        out, _ = compute_experts(p.x, s.to(wide), p.plan, up, down, options(flags, 2))
        assert out.dtype == torch.bfloat16


@by_flags
def test_autograd_without_the_dispatcher(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager step calls no operator; its bits, kernels and saved tensors are those of the registered operators."""
    block = fused_block(**flags)
    x, dy = block_data(9)
    found = []
    for observed in (False, True):
        monkeypatch.setattr(library, "_observed", lambda observed=observed: observed)
        with record_launches() as names, torch.profiler.profile(acc_events=True) as profile:
            results = step(block, block, x, dy)
        packed, _ = saved_by(lambda: block(x.clone().requires_grad_())[0])
        called = any(event.name.startswith("moefactory::") for event in profile.events())
        assert called == observed
        found.append((results, names, [(t.shape, t.dtype) for t in packed]))
    assert differing(found[0][0], found[1][0]) == []
    assert found[0][1:] == found[1][1:]


# --- compile ----------------------------------------------------------------------------------------------------------


def step(run: Callable[..., Any], block: Any, x: Tensor, dy: Tensor) -> Tensors:
    """Output and every gradient of one step through `run`."""
    block.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = run(x)[0]
    out.backward(dy)
    found = {"dx": x.grad, **{name: getattr(block, name).grad for name in WEIGHTS}}
    return {"out": out.detach(), **{name: grad for name, grad in found.items() if grad is not None}}


@by_edge
def test_compiled_without_a_graph_break(flags: dict[str, bool]) -> None:
    """fullgraph, tokens marked dynamic: one graph serves every T, the same kernels run, the bits are the eager ones."""
    torch._dynamo.reset()
    block = fused_block(**flags, autotune=False, kernel_config_fwd=small_kernels()[0][2])
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (70, 66, 90):  # few are a graph of their own where their number is known, else these kernels
        x, dy = block_data(tokens)
        with record_launches() as names:  # compiled first: nothing may rely on an eager call before
            got = step(compiled, block, x, dy)
        with record_launches() as eager_names:
            assert differing(got, step(block, block, x, dy)) == []
        assert names == eager_names
    assert len(graphs) == 1


@pytest.mark.parametrize("only", ["dW_only", "dX_only", "trace"])
def test_compiled_flags(only: str) -> None:
    torch._dynamo.reset()
    block = fused_block(**{only: True})
    x, dy = block_data(7)

    def run(x: Tensor) -> Any:
        out, logits = block(x)
        return getattr(out, "hidden_states", out), logits

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = step(compiled, block, x, dy)
    expected = step(run, block, x, dy)
    assert differing(got, expected) == []
    assert ("dx" in expected, "gate" in expected) == (only != "dW_only", only != "dX_only")


def test_exported() -> None:
    """torch.export with the number of tokens dynamic: the operators are in the graph, the bits are the eager ones."""
    block = fused_block()
    count = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(block, (block_data(5)[0],), dynamic_shapes=({1: count},), strict=False)
    assert "moefactory.block_forward" in str(program.graph)
    x, _ = block_data(9)
    assert torch.equal(program.module()(x)[0], block(x)[0])


def test_compiled_under_autocast() -> None:
    torch._dynamo.reset()
    block = fused_block()
    x, _ = block_data(7)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = torch.compile(block, backend="aot_eager", fullgraph=True)(x)[0]
        assert torch.equal(out, block(x)[0])
    assert out.dtype == torch.bfloat16


def test_compiled_without_gradients() -> None:
    """no_grad and inference_mode have graphs of their own, which do not store H."""
    torch._dynamo.reset()
    block = fused_block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x, _ = block_data(7)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), record_launches() as names:
            out = compiled(x)[0]
        assert torch.equal(out, block(x)[0])
        assert "forward_up" in names


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_second_derivative_is_refused() -> None:
    block = fused_block()
    x, _ = block_data(5)
    x.requires_grad_()
    for power in (1, 2):
        (grad,) = torch.autograd.grad(block(x)[0].pow(power).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="moefactory: the triton backend has no second derivative; choose moe/"):
            grad.sum().backward()


@by_edge
def test_second_derivative_of_each_operator_is_refused(flags: dict[str, bool]) -> None:
    """The experts without the router, and the router without the experts."""
    p = fused.problem(Shape(6, 3, 2, 20, 12), torch.float32).to(DEVICE)
    x, s, up, down = leaves_of(p)
    logits = torch.randn(6, 5, device=DEVICE).requires_grad_()
    out = compute_experts(x, s, p.plan, up, down, options(flags, 2))[0]
    for result, leaf in ((out, x), (router.top_k_softmax(logits, 2, True)[0], logits)):
        (grad,) = torch.autograd.grad(result.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="moefactory: the triton backend has no second derivative"):
            grad.sum().backward()


FORWARD_MODE = ("x", *WEIGHTS)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, at first use
@pytest.mark.parametrize("name", FORWARD_MODE)
@pytest.mark.parametrize("way", ["jvp", "dual"])
def test_forward_mode_is_refused(name: str, way: str) -> None:
    """A tangent on tokens or on any weight: an error in our words, never a tangent that is silently zero."""
    block = fused_block()
    values = {"x": block_data(5)[0], **{n: getattr(block, n).detach() for n in WEIGHTS}}

    def run(one: Tensor) -> Tensor:
        with_one = {**values, name: one}
        return torch.func.functional_call(block, {n: with_one[n] for n in WEIGHTS}, (with_one["x"],))[0]

    with pytest.raises(RuntimeError, match="moefactory: the triton backend has no forward-mode derivative"):
        if way == "jvp":
            torch.func.jvp(run, (values[name],), (torch.ones_like(values[name]),))
        else:
            with fwAD.dual_level():
                run(fwAD.make_dual(values[name], torch.ones_like(values[name])))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_functorch_gradients_are_refused(transform: Any) -> None:
    """torch's own words: an operator with a registered backward is no functorch function."""
    block = fused_block()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        transform(lambda x: block(x)[0].sum())(block_data(5)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_is_slow_but_right() -> None:
    """There is no batching rule: torch calls the operators once for each entry."""
    block = fused_block().requires_grad_(False)
    xs = torch.stack([block_data(5)[0], block_data(5)[0] * 2])
    got = torch.func.vmap(lambda x: block(x)[0])(xs)
    assert torch.equal(got, torch.stack([block(x)[0] for x in xs]))


@pytest.mark.parametrize("name", ["x", *WEIGHTS, "routing_weights"])
def test_a_saved_tensor_that_changed_is_noticed(name: str) -> None:
    """In-place changes between forward and backward: torch's version counter, no wrong gradient."""
    if name == "routing_weights":
        p = fused.problem(SMALL, torch.float32).to(DEVICE)
        x, _, up, down = leaves_of(p)
        scores = p.routing_weights.clone()
        out, _ = compute_experts(x, scores, p.plan, up, down, options(COMBINATIONS[0], 2))
        scores.mul_(2)
    else:
        block = fused_block()
        x = block_data(5)[0].requires_grad_()
        out, _ = block(x)
        with torch.no_grad():
            (x if name == "x" else getattr(block, name)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- what is kept -----------------------------------------------------------------------------------------------------


def saved_by(run: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """(the tensors that autograd packs, the output)."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return packed, out


@by_flags
def test_saved_tensors_are_those_promised(flags: dict[str, bool]) -> None:
    """x, H, routing weights, plan and weights, none of them copied; without fuse_combine torch's sum saves its own."""
    p = fused.problem(Shape(7, 5, 2, 20, 12), torch.float32).to(DEVICE)
    leaves = leaves_of(p)
    plan = p.plan
    o = options(flags, p.top_k)
    packed, _ = saved_by(lambda: compute_experts(leaves[0], leaves[1], plan, leaves[2], leaves[3], o)[0])
    rows, width = 14, 24
    indices = (plan.group_offsets.shape, plan.gather_indices.shape, plan.scatter_indices.shape)
    wanted = [*(t.shape for t in leaves), (rows, width), *indices]
    if not flags["fuse_combine"]:  # rows times weights, in torch
        wanted += [(7, 2, 20), (7, 2, 1)]
    assert sorted(map(tuple, wanted)) == sorted(tuple(t.shape) for t in packed)
    held = {t.untyped_storage().data_ptr() for t in packed}
    assert {t.untyped_storage().data_ptr() for t in (leaves[0], leaves[2], leaves[3])} <= held  # no copies


@by_edge
def test_no_saved_shape_depends_on_the_routing(flags: dict[str, bool]) -> None:
    """One expert with all rows, rows dropped, rows spread: recomputation and CUDA graphs see the same shapes."""
    found = []
    for routing in ("random", "one", "dropped", "none", "gaps"):
        p = fused.problem(Shape(7, 5, 2, 20, 12, routing), torch.float32).to(DEVICE)
        leaves, plan = leaves_of(p), p.plan
        packed, _ = saved_by(
            lambda leaves=leaves, plan=plan: compute_experts(  # type: ignore[misc]
                leaves[0], leaves[1], plan, leaves[2], leaves[3], options(flags, 2)
            )[0]
        )
        found.append([(t.shape, t.dtype) for t in packed])
    assert all(other == found[0] for other in found)


@by_edge
def test_nothing_is_kept_without_gradients(flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """no_grad, inference_mode, or nothing that requires a gradient: H is not stored, results have the same bits."""
    p = fused.problem(Shape(7, 5, 2, 20, 12), torch.float32).to(DEVICE)
    leaves, o = leaves_of(p), options(flags, p.top_k)

    def run(leaves: list[Tensor]) -> Tensor:
        return compute_experts(leaves[0], leaves[1], p.plan, leaves[2], leaves[3], o)[0]

    expected = run(leaves)
    stored: list[bool] = []

    def forward(*args: Any) -> Any:
        stored.append(args[-2])
        return real(*args)

    real = ops.experts_forward
    monkeypatch.setattr(ops, "experts_forward", forward)
    assert torch.equal(run(leaves), expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(run(leaves), expected)
    assert torch.equal(run([t.detach() for t in leaves]), expected)
    assert stored == [True, False, False, False]
    made = allocated_by(p, o, save_h=False)
    assert made.count((14, 24)) == (0 if flags["fuse_swiglu"] else 1)  # unfused, H is the GEMM's own output


def test_backward_of_an_inference_output_is_refused() -> None:
    block = fused_block()
    x, _ = block_data(5)
    with torch.inference_mode():
        out, _ = block(x)
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.sum().backward()


class Allocations(TorchDispatchMode):
    """The shape of every tensor with memory of its own that an operator returns, but for the interpreter's copies."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self._known: list[Tensor] = []
        self._launching = False

    def __enter__(self) -> Any:
        if not GPU:
            executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
            self._launch, self._executor = executor.__call__, executor

            def launch(*args: Any, **kwargs: Any) -> None:
                self._launching = True
                self._launch(*args, **kwargs)
                self._launching = False

            executor.__call__ = launch
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        if not GPU:
            self._executor.__call__ = self._launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if self._launching or not isinstance(tensor, Tensor):
                continue
            if tensor.untyped_storage().data_ptr() not in given and tensor.numel():
                self._known.append(tensor)  # alive, so that no address is used twice
                self.shapes.append(tuple(tensor.shape))
        return out


def allocated_by(p: fused.Problem, o: FusedOptions, save_h: bool = True) -> list[tuple[int, ...]]:
    """Shapes that a forward allocates, by the operator's own function: a mode sees no deeper than an operator."""
    pipeline = ops.Pipeline(
        p.plan.group_offsets, p.plan.gather_indices, p.plan.scatter_indices, o, p.gate_up_proj, p.down_proj
    )
    with torch.no_grad(), Allocations() as made:
        a, _ = pipeline.up(p.x, save_h=save_h)
        pipeline.combine(pipeline.down(a), p.routing_weights)
    return made.shapes


def allocated_backward(p: fused.Problem, o: FusedOptions) -> list[tuple[int, ...]]:
    pipeline = ops.Pipeline(
        p.plan.group_offsets, p.plan.gather_indices, p.plan.scatter_indices, o, p.gate_up_proj, p.down_proj
    )
    h = torch.randn(p.plan.gather_indices.shape[0], p.gate_up_proj.shape[1], device=DEVICE)
    dout = p.dy if o.fuse_combine else p.dy.repeat_interleave(p.top_k, 0)
    with torch.no_grad(), Allocations() as made:
        dh, _, _ = pipeline.d_down(dout, h, p.routing_weights, need_dh=True, need_dw=True)
        assert dh is not None
        pipeline.dx_up(dh)
        pipeline.dw_up(dh, p.x)
    return made.shapes


@by_flags
def test_allocations(flags: dict[str, bool]) -> None:
    """Of size [T*K, H] only the down GEMM's output and dX's: with the permute flags no permuted copy exists."""
    shape = Shape(7, 5, 2, 20, 12)
    p, o = fused.problem(shape, torch.float32).to(DEVICE), options(flags, shape.top_k)
    rows = (14, 20)
    forward, backward = allocated_by(p, o), allocated_backward(p, o)
    copies = (not flags["permute_x"]) + (0 if flags["fuse_combine"] else 1)
    assert forward.count(rows) == 1 + copies
    assert backward.count(rows) == 1 + (not flags["permute_x"]) + (not flags["permute_y"])
    assert forward.count((14, 24)) == 1  # H
    assert backward.count((14, 24)) == 1  # dH
    assert backward.count((5, 24, 20)) == backward.count((5, 20, 12)) == 1


# --- recomputation ----------------------------------------------------------------------------------------------------


@by_edge
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(flags: dict[str, bool], reentrant: bool) -> None:
    """Gradients of a recomputed forward have the same bits; the forward runs twice."""
    block = fused_block(**flags)
    x, dy = block_data(9)
    expected = step(block, block, x, dy)
    with record_launches() as names:
        got = step(lambda x: checkpoint(block, x, use_reentrant=reentrant), block, x, dy)
    assert differing(got, expected) == []
    assert names.count("route_few_tokens") == 2


def test_two_backwards_need_retain_graph() -> None:
    block = fused_block()
    x, dy = block_data(5)
    x.requires_grad_()
    out, _ = block(x)
    (first,) = torch.autograd.grad(out, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(out, x, dy)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, x, dy)


def test_gradients_accumulate() -> None:
    """Two backwards add up in .grad; the routing logits' own gradient adds to the experts'."""
    block = fused_block()
    x, dy = block_data(9)
    once = step(block, block, x, dy)
    block.zero_grad(set_to_none=True)
    for _ in range(2):
        block(x)[0].backward(dy)
    for name in WEIGHTS:
        torch.testing.assert_close(getattr(block, name).grad, 2 * once[name])
    plain = Qwen3MoeGroupedGEMMBlock(TINY, *(getattr(block, name).detach().clone() for name in WEIGHTS), trace=False)
    for one in (block, plain):
        one.zero_grad(set_to_none=True)
        out, logits = one(x)
        (out.sum() + logits.square().sum()).backward()
    torch.testing.assert_close(block.gate.grad, plain.gate.grad)


def test_hooks_and_frozen_parts() -> None:
    """A frozen weight gets no gradient and costs none; a hook on the output sees dY once."""
    block = fused_block()
    block.gate_up_proj.requires_grad_(False)
    x, dy = block_data(9)
    seen: list[Tensor] = []
    out, _ = block(x)
    out.register_hook(seen.append)
    with record_launches() as names:
        out.backward(dy)
    assert block.gate_up_proj.grad is None
    assert names.count("dW") == 1
    assert len(seen) == 1
    assert torch.equal(seen[0], dy)


@by_edge
def test_expanded_gradient_of_a_sum(flags: dict[str, bool]) -> None:
    """sum() hands back one number expanded over [T,H]: stride 0 in every dimension."""
    p = fused.problem(Shape(9, 3, 2, 36, 20), torch.float32).to(DEVICE)
    found = []
    for dy in (torch.ones(1, 1, device=DEVICE).expand(9, 36), torch.ones(9, 36, device=DEVICE)):
        leaves = leaves_of(p)
        out, _ = compute_experts(leaves[0], leaves[1], p.plan, leaves[2], leaves[3], options(flags, 2))
        found.append(fused.gradients(out, leaves, dy))
    assert differing(*found) == []
