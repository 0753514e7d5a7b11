"""The fused experts as torch operators: fake implementations for torch.compile, registered autograd, no graph break.

`moefactory::experts_forward` and `moefactory::experts_backward` wrap `pipeline`. Every shape that they save or return
depends on T, K and the weights only, never on the routing, so recomputation and CUDA graphs see the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..routing import RoutingPlan, combine
from .launch import laid_out, on_device
from .library import call, define, differentiate, given_back, no_second_derivative, refuse_forward_mode
from .options import FusedOptions, parse
from .pipeline import Pipeline, empty_like_none
from .schedule import WORDS, most_tiles


def _table(
    tile_expert: Tensor | None, tile_row: Tensor | None, num_tiles: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    return None if tile_expert is None or tile_row is None or num_tiles is None else (tile_expert, tile_row, num_tiles)


def _forward_fake(
    x: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    gather: Tensor,
    scatter: Tensor,
    tile_expert: Tensor | None,
    tile_row: Tensor | None,
    num_tiles: Tensor | None,
    block_m: int,
    options: str,
    save_h: bool,
    trace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = gather.shape[0], gate_up_proj.shape[1]
    out = x.new_empty(x.shape[0] if parse(options).fuse_combine else rows, x.shape[1])
    h = x.new_empty((rows, width) if save_h or trace else 0)
    a = x.new_empty((rows, width // 2) if trace else 0)
    y = x.new_empty((rows, x.shape[1]) if trace else 0)
    return out, h, a, y


def _experts_forward(
    x: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    gather: Tensor,
    scatter: Tensor,
    tile_expert: Tensor | None,
    tile_row: Tensor | None,
    num_tiles: Tensor | None,
    block_m: int,
    options: str,
    save_h: bool,
    trace: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`experts_forward`, with None for what is not asked for."""
    table = _table(tile_expert, tile_row, num_tiles)
    pipeline = Pipeline(offsets, gather, scatter, parse(options), gate_up_proj, down_proj, table, block_m)
    x = laid_out(x)
    with on_device(x.device):
        a, h = pipeline.up(x, save_h=save_h or trace)
        y = pipeline.down(a)
        out = pipeline.combine(y, routing_weights)
    return out, h if save_h or trace else None, a if trace else None, y if trace else None


@define(
    "experts_forward(Tensor x, Tensor routing_weights, Tensor gate_up_proj, Tensor down_proj, Tensor offsets, "
    "Tensor gather, Tensor scatter, Tensor? tile_expert, Tensor? tile_row, Tensor? num_tiles, int block_m, "
    "str options, bool save_h, bool trace) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def experts_forward(
    x: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    offsets: Tensor,
    gather: Tensor,
    scatter: Tensor,
    tile_expert: Tensor | None,
    tile_row: Tensor | None,
    num_tiles: Tensor | None,
    block_m: int,
    options: str,
    save_h: bool,
    trace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, h, a, y): out [T,H], or token-order rows [T*K,H] without fuse_combine; h with `save_h`; a, y to trace."""
    tensors = (x, routing_weights, gate_up_proj, down_proj, offsets, gather, scatter, tile_expert, tile_row, num_tiles)
    out, h, a, y = _experts_forward(*tensors, block_m, options, save_h, trace)
    return out, empty_like_none(h, x), empty_like_none(a, x), empty_like_none(y, x)


def empty_gradients(
    of: tuple[Tensor, Tensor, Tensor, Tensor], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stands for the gradients of four tensors in a fake: like each, and empty where it is not needed."""
    a, b, c, d = (t.new_empty(t.shape if need else 0) for t, need in zip(of, needs, strict=True))
    return a, b, c, d


def _backward_fake(
    dout: Tensor,
    x: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    h: Tensor,
    offsets: Tensor,
    gather: Tensor,
    scatter: Tensor,
    tile_expert: Tensor | None,
    tile_row: Tensor | None,
    num_tiles: Tensor | None,
    block_m: int,
    options: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients((x, routing_weights, gate_up_proj, down_proj), needs)


@define(
    "experts_backward(Tensor dout, Tensor x, Tensor routing_weights, Tensor gate_up_proj, Tensor down_proj, Tensor h, "
    "Tensor offsets, Tensor gather, Tensor scatter, Tensor? tile_expert, Tensor? tile_row, Tensor? num_tiles, "
    "int block_m, str options, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def experts_backward(
    dout: Tensor,
    x: Tensor,
    routing_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    h: Tensor,
    offsets: Tensor,
    gather: Tensor,
    scatter: Tensor,
    tile_expert: Tensor | None,
    tile_row: Tensor | None,
    num_tiles: Tensor | None,
    block_m: int,
    options: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, routing_weights, gate_up_proj, down_proj); one that `needs` does not ask for is empty."""
    need_x, need_s, need_up, need_down = needs
    o = parse(options)
    dout = laid_out(dout)
    tokens = dout.shape[0] // (1 if o.fuse_combine else o.top_k)
    routing_weights = given_back("routing_weights", routing_weights, (tokens, o.top_k), dout, routing_weights.dtype)
    gate_up_proj, down_proj = gate_up_proj.contiguous(), down_proj.contiguous()
    x = given_back("x", x, (tokens, dout.shape[1]), dout)
    check_weights(x, gate_up_proj.shape[0], gate_up_proj, down_proj)
    rows = tokens * o.top_k
    if o.saved != "x":
        h = given_back("h", h, (rows, gate_up_proj.shape[1]), dout)
    offsets = given_back("offsets", offsets, (gate_up_proj.shape[0] + 2,), dout, torch.int32)
    gather, scatter = (
        given_back(n, t, (rows,), dout, torch.int32) for n, t in (("gather", gather), ("scatter", scatter))
    )
    most = most_tiles(offsets.shape[0] - 1, rows, block_m) if block_m else 0
    of_tiles = (
        None if t is None else given_back("tile table", t, shape, dout, torch.int32)
        for t, shape in ((tile_expert, (most,)), (tile_row, (most,)), (num_tiles, (WORDS,)))
    )
    pipeline = Pipeline(offsets, gather, scatter, o, gate_up_proj, down_proj, _table(*of_tiles), block_m)
    need_dh = need_x or need_s or need_up
    with on_device(x.device):
        if o.saved == "x":
            h = pipeline.h_again(x)
        dh, ds, d_down = pipeline.d_down(dout, h, routing_weights, need_dh=need_dh, need_dw=need_down)
        dx = pipeline.dx_up(dh) if need_x and dh is not None else None  # before dW: their buffers take turns
        d_up = pipeline.dw_up(dh, x) if need_up and dh is not None else None
    ds = ds.to(routing_weights.dtype).view(routing_weights.shape) if need_s and ds is not None else None
    return (
        empty_like_none(dx, x),
        empty_like_none(ds, x),
        empty_like_none(d_up, x),
        empty_like_none(d_down, x),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    x, routing_weights, gate_up_proj, down_proj, *plan, block_m, options, save_h, _ = inputs
    ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
    ctx.set_materialize_grads(False)  # h, a and y get no gradient: no zeros of their size
    ctx.block_m, ctx.options, ctx.saved_h, ctx.spent = block_m, options, save_h, False
    ctx.of_weights = routing_weights.dtype
    h = empty_like_none(output[1], x)
    ctx.save_for_backward(x, routing_weights, gate_up_proj, down_proj, h, *plan)


def spend(ctx: Any) -> None:
    """RuntimeError where a backward cannot run: nothing was kept for it, or the one before has overwritten it."""
    saved = parse(ctx.options).saved
    if not ctx.saved_h and saved != "x":
        raise RuntimeError("moefactory: this forward ran without gradients, nothing was saved for a backward")
    if ctx.spent:
        raise RuntimeError(
            "moefactory: a second backward, but saved=h_reused lets the first write dH over H; set saved=h"
        )
    ctx.spent = saved == "h_reused"


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 14
    spend(ctx)
    refuse_forward_mode(dout)
    needs, saved = list(ctx.needs_input_grad[:4]), ctx.saved_tensors
    if saved[1].dtype != ctx.of_weights:  # the others' follows from dout
        came = f"got {saved[1].dtype} for the backward"
        raise ValueError(f"routing_weights: {came}; needed: {ctx.of_weights}, as it was saved")
    grads = call(experts_backward, dout.contiguous(), *saved, ctx.block_m, ctx.options, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 10)


differentiate(experts_forward, _backward, _save, _experts_forward)
differentiate(experts_backward, no_second_derivative)


def compute_experts(
    x: Tensor,
    routing_weights: Tensor,
    plan: RoutingPlan,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    options: FusedOptions,
    *,
    trace: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The experts' part of the block, as `moefactory.reference.compute_experts`: [T,H] and, with `trace`, (h, a, y).

    Raises:
        ValueError: shapes, dtypes or a plan that do not fit each other; a weight that is not contiguous (the kernels
            read Hugging Face's layout without a copy).
        RuntimeError: forward-mode differentiation, which the kernels do not have.
    """
    _check(x, routing_weights, plan, gate_up_proj, down_proj, options)
    # without fuse_combine the weighted sum is torch's below, and so is the routing weights' gradient
    weights = routing_weights.contiguous() if options.fuse_combine else routing_weights.detach().contiguous()
    tensors = (x.contiguous(), weights, gate_up_proj, down_proj)
    save_h = options.saved != "x" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    refuse_compiled_reuse(options)
    indices = (plan.group_offsets, plan.gather_indices, plan.scatter_indices, *(plan.table or (None,) * 3))
    refuse_forward_mode(*tensors)
    out, h, a, y = call(experts_forward, *tensors, *indices, plan.block_m, options.text, save_h, trace)
    if not options.fuse_combine:
        if trace:
            y = out.detach()
        out = combine(out, routing_weights)
    return out, (h, a, y) if trace else None


def refuse_compiled_reuse(options: FusedOptions) -> None:
    """RuntimeError for saved=h_reused under torch.compile."""
    if options.saved == "h_reused" and torch.compiler.is_compiling():
        raise RuntimeError("moefactory: saved=h_reused cannot be compiled, a graph may run twice; set saved=h or x")


def check_weights(
    x: Tensor, num_experts: int, gate_up_proj: Tensor, down_proj: Tensor, gate: Tensor | None = None
) -> None:
    """ValueError for weights that do not fit x [T,H]: the kernels could only answer with a wrong address."""
    if gate_up_proj.ndim != 3:
        raise ValueError(f"gate_up_proj: got shape {tuple(gate_up_proj.shape)}; needed: [E,2I,H]")
    (experts, width, _), columns = gate_up_proj.shape, x.shape[1]
    wanted = [
        ("gate_up_proj", gate_up_proj, (num_experts, width, columns)),
        ("down_proj", down_proj, (experts, columns, width // 2)),
    ]
    for name, weight, shape in wanted if gate is None else [("gate", gate, (num_experts, columns)), *wanted]:
        if weight.shape != shape or weight.dtype != x.dtype:
            raise ValueError(f"{name}: got {tuple(weight.shape)} {weight.dtype}; needed: {shape} {x.dtype}")
        if weight is not gate and not weight.is_contiguous():
            raise ValueError(f"{name}: got strides {tuple(weight.stride())}; needed: a contiguous tensor")
        if weight.device != x.device:  # a launch takes addresses: Triton no longer asks whose they are
            raise ValueError(f"{name}: on {weight.device}; needed: x's device {x.device}")


def _check(
    x: Tensor,
    routing_weights: Tensor,
    plan: RoutingPlan,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    options: FusedOptions,
) -> None:
    """What the kernels rely on and could only answer with a wrong address."""
    check_weights(x, plan.num_experts, gate_up_proj, down_proj)
    if plan.gather_indices.device != x.device:
        raise ValueError(f"plan: on {plan.gather_indices.device}; needed: x's device {x.device}")
    slots = (x.shape[0], options.top_k)
    if plan.top_k != options.top_k or plan.gather_indices.shape[0] != slots[0] * slots[1]:
        raise ValueError(f"plan: got {plan.gather_indices.shape[0]} rows of top_k {plan.top_k}; needed: {slots}")
    if routing_weights.shape != slots:
        raise ValueError(f"routing_weights: got shape {tuple(routing_weights.shape)}; needed: {slots}")
