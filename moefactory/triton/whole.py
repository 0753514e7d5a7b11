"""The block as one torch operator and one node of autograd: router, plan and experts.

Two things are had by that. Host time: one operator with its tape, and one node with its saved tensors, in place of
three. And a pass over dX: what the router adds to it, dlogits @ gate, is added where a token's K rows are summed
(`combine.sum_dX`), in one rounding, where autograd would add two tensors of [T,H].

The parts are the functions behind `router`, `plan`, `few_tokens` and `ops`, which stay operators of their own for who
routes otherwise, traces, or leaves the weighted sum to torch.

Saved between forward and backward: x, the weights, and

    h         [T*K, 2I]   empty where it is not kept
    routed    uint8       see `routed`
    logits    [T, E]      where norm_topk_prob is false; with it the backward does not need them
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import few_tokens
from .gate import gate_gradient, gate_logits
from .launch import laid_out, on_device
from .library import call, define, differentiate, given_back, no_second_derivative, refuse_forward_mode
from .ops import check_weights, empty_gradients, refuse_compiled_reuse, spend
from .options import FusedOptions, parse
from .pipeline import Pipeline, config_of, empty_like_none
from .plan import BLOCK, BLOCK_ALONE, plan_and_table
from .routed import Part, Routed, Three, parts_of, size_of, views_of
from .router import backward_of_parts, counted, select_and_count


def _forward_fake(
    x: Tensor,
    gate: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    norm_topk_prob: bool,
    options: str,
    save_h: bool,
) -> tuple[Tensor, ...]:
    o = parse(options)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], gate.shape[0]),
        x.new_empty((x.shape[0] * o.top_k, gate_up_proj.shape[1]) if save_h else 0),
        x.new_empty(size_of(_parts(x, gate, o, norm_topk_prob)), dtype=torch.uint8),
    )


def _parts(x: Tensor, gate: Tensor, options: FusedOptions, norm_topk_prob: bool) -> list[Part]:
    return parts_of(x.shape[0], gate.shape[0], options.top_k, x.dtype, norm_topk_prob)


def _block_m(gate_up_proj: Tensor, num_rows: int, options: FusedOptions) -> int:
    """The rows of a tile of the up GEMM. An operator's tensors are real ones, also while its tape is recorded."""
    return config_of("fwd", "up", gate_up_proj, num_rows, options).block_m


def _route(
    routed: Routed, logits: Tensor, gate_up_proj: Tensor, norm_topk_prob: bool, options: FusedOptions
) -> tuple[Three | None, int]:
    """Fill `routed`; a tile table and its height if one was made."""
    tokens, experts = logits.shape
    block_m = _block_m(gate_up_proj, tokens * options.top_k, options) if tokens else 0
    if few_tokens.few(tokens, experts):
        return few_tokens.route_into(routed.chosen, routed.indices, logits, norm_topk_prob, block_m), block_m
    slots = BLOCK if tokens * options.top_k > BLOCK_ALONE and counted(options.top_k, experts, BLOCK) else 0
    counts = select_and_count(logits, norm_topk_prob, slots, routed.chosen)
    _, table = plan_and_table(routed.selected_experts, experts, counts, block_m, routed.indices)
    return table, block_m


def _block_forward(
    x: Tensor,
    gate: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    norm_topk_prob: bool,
    options: str,
    save_h: bool,
) -> tuple[Tensor | None, ...]:
    """`block_forward`, with None for an h that is not kept."""
    o = parse(options)
    check_weights(x, gate.shape[0], gate_up_proj, down_proj, gate)
    x = laid_out(x)
    logits = gate_logits(x, gate)
    parts = _parts(x, gate, o, norm_topk_prob)
    memory = torch.empty(size_of(parts), dtype=torch.uint8, device=x.device)
    routed = views_of(memory, parts)
    table, block_m = _route(routed, logits, gate_up_proj, norm_topk_prob, o)
    with on_device(x.device):
        pipeline = Pipeline(*routed.indices, o, gate_up_proj, down_proj, table, block_m)
        a, h = pipeline.up(x, save_h=save_h)
        out = pipeline.combine(pipeline.down(a), routed.routing_weights)
    return out, logits, h if save_h else None, memory


@define(
    "block_forward(Tensor x, Tensor gate, Tensor gate_up_proj, Tensor down_proj, bool norm_topk_prob, str options, "
    "bool save_h) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def block_forward(
    x: Tensor,
    gate: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    norm_topk_prob: bool,
    options: str,
    save_h: bool,
) -> tuple[Tensor, ...]:
    """(out [T,H], router logits [T,E], and what the backward needs: see above) of x [T,H].

    Raises:
        ValueError: a weight of another shape, dtype or device than x needs, or one that is not contiguous.
    """
    found = _block_forward(x, gate, gate_up_proj, down_proj, norm_topk_prob, options, save_h)
    return tuple(empty_like_none(tensor, x) for tensor in found)


def _backward_fake(
    dout: Tensor, x: Tensor, gate: Tensor, gate_up_proj: Tensor, down_proj: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, needs = rest
    return empty_gradients((x, gate, gate_up_proj, down_proj), needs)


@define(
    "block_backward(Tensor dout, Tensor x, Tensor gate, Tensor gate_up_proj, Tensor down_proj, Tensor h, "
    "Tensor routed, Tensor? logits, Tensor? dlogits, bool norm_topk_prob, str options, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def block_backward(
    dout: Tensor,
    x: Tensor,
    gate: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    h: Tensor,
    routed: Tensor,
    logits: Tensor | None,
    dlogits: Tensor | None,
    norm_topk_prob: bool,
    options: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, gate, gate_up_proj, down_proj) for dout [T,H] and, if the logits were used, dlogits [T,E].

    One that `needs` does not ask for is empty.
    """
    need_x, need_gate, need_up, need_down = needs
    o = parse(options)
    dout, gate = laid_out(dout), gate.contiguous()
    gate_up_proj, down_proj = gate_up_proj.contiguous(), down_proj.contiguous()
    x = given_back("x", x, dout.shape, dout)
    check_weights(x, gate.shape[0], gate_up_proj, down_proj, gate)
    tokens, experts = x.shape[0], gate.shape[0]
    if o.saved != "x":
        h = given_back("h", h, (tokens * o.top_k, gate_up_proj.shape[1]), dout)
    logits = None if logits is None else given_back("logits", logits, (tokens, experts), dout)
    listed = _parts(x, gate, o, norm_topk_prob)
    memory = given_back("routed", routed, (size_of(listed),), dout, torch.uint8)
    weights, selected, exact, offsets, gather, scatter = views_of(memory, listed)
    pipeline = Pipeline(offsets, gather, scatter, o, gate_up_proj, down_proj)
    dx = d_gate = d_up = d_router = None
    with on_device(x.device):
        if o.saved == "x":
            h = pipeline.h_again(x)
        dh, parts, d_down = pipeline.d_down(dout, h, weights, need_dh=any(needs[:3]), need_dw=need_down, in_parts=True)
        if parts is not None and (need_x or need_gate):
            saved = exact if logits is None else logits
            d_router = backward_of_parts(parts, x.dtype, saved, selected, gate.shape[0], norm_topk_prob)
            d_router = d_router if dlogits is None else d_router + dlogits
            d_gate = gate_gradient(d_router, x) if need_gate else None
        if dh is not None and d_router is not None and need_x:
            dx = pipeline.dx_up(dh, (d_router, gate))  # before dW: their buffers take turns
        if dh is not None and need_up:
            d_up = pipeline.dw_up(dh, x)
    return (
        empty_like_none(dx, x),
        empty_like_none(d_gate, x),
        empty_like_none(d_up, x),
        empty_like_none(d_down, x),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    *tensors, ctx.norm_topk_prob, ctx.options, ctx.saved_h = inputs
    ctx.mark_non_differentiable(*(tensor for tensor in output[2:] if tensor is not None))
    ctx.set_materialize_grads(False)  # what is only saved gets no gradient: no zeros of its size
    ctx.spent = False
    _, logits, h, routed = output
    ctx.save_for_backward(*tensors, empty_like_none(h, tensors[0]), routed, None if ctx.norm_topk_prob else logits)


def _backward(ctx: Any, dout: Tensor | None, dlogits: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    constants, needs = (None,) * 3, list(ctx.needs_input_grad[:4])
    if dout is None and dlogits is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # once: a checkpoint hands them out, and computes them anew for it
    if dout is None:  # a loss of the logits alone
        assert dlogits is not None
        dx = dlogits @ saved[1] if needs[0] else None
        d_gate = dlogits.t() @ saved[0] if needs[1] else None
        return dx, d_gate, None, None, *constants
    spend(ctx)
    refuse_forward_mode(dout, dlogits)
    more = None if dlogits is None else dlogits.contiguous()
    grads = call(block_backward, dout.contiguous(), *saved, more, ctx.norm_topk_prob, ctx.options, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *constants


differentiate(block_forward, _backward, _save, _block_forward)
differentiate(block_backward, no_second_derivative)


def compute_block(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], norm_topk_prob: bool, options: FusedOptions
) -> tuple[Tensor, Tensor]:
    """(out [T,H], router logits [T,E]) of (x [T,H], gate, gate_up_proj, down_proj), differentiable in all four.

    For `fuse_combine`. Under autocast it computes in the tensors' own dtype, too: the block has cast them.

    Raises as `block_forward`, and RuntimeError for forward-mode differentiation, which it lacks.
    """
    x, gate, *weights = tensors
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        with torch.autocast(kind, enabled=False):
            return compute_block(tensors, norm_topk_prob, options)
    save_h = options.saved != "x" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    refuse_compiled_reuse(options)
    refuse_forward_mode(*tensors)
    out, logits, *_ = call(block_forward, x.contiguous(), gate, *weights, norm_topk_prob, options.text, save_h)
    return out, logits
