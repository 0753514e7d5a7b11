"""What a call's router and plan leave for its experts and its backward, in one piece of memory.

On the host each tensor that is made, handed on by autograd and saved takes longer than a launch: one stands for six.

    routing_weights   [T, K]        in x's dtype
    selected_experts  [T, K] int64
    exact             [T, K]        the weights before the cast, float32 or wider; empty without norm_topk_prob
    offsets           [E+2]  int32  the plan's
    gather, scatter   [T*K]  int32  the plan's
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNED = 16  # bytes: what each part starts at a multiple of, as memory of its own does

Part = tuple[tuple[int, ...], torch.dtype]
Three = tuple[Tensor, Tensor, Tensor]


class Routed(NamedTuple):
    """The parts, as views of the memory."""

    routing_weights: Tensor
    selected_experts: Tensor
    exact: Tensor
    offsets: Tensor
    gather: Tensor
    scatter: Tensor

    @property
    def chosen(self) -> Three:
        """What the router fills."""
        return self.routing_weights, self.selected_experts, self.exact

    @property
    def indices(self) -> Three:
        """What the plan fills."""
        return self.offsets, self.gather, self.scatter


def parts_chosen(tokens: int, top_k: int, dtype: torch.dtype, norm_topk_prob: bool) -> list[Part]:
    """(shape, dtype) of what the router fills."""
    exact = (tokens if norm_topk_prob else 0, top_k), torch.promote_types(dtype, torch.float32)
    return [((tokens, top_k), dtype), ((tokens, top_k), torch.int64), exact]


def parts_planned(experts: int, rows: int) -> list[Part]:
    """(shape, dtype) of what the plan fills."""
    return [((experts + 2,), torch.int32), ((rows,), torch.int32), ((rows,), torch.int32)]


def parts_of(tokens: int, experts: int, top_k: int, dtype: torch.dtype, norm_topk_prob: bool) -> list[Part]:
    """(shape, dtype) of each part."""
    return parts_chosen(tokens, top_k, dtype, norm_topk_prob) + parts_planned(experts, tokens * top_k)


def apart(parts: list[Part], device: torch.device) -> Three:
    """Three parts in memory of their own."""
    a, b, c = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in parts)
    return a, b, c


def _bytes(part: Part) -> int:
    return math.prod(part[0]) * part[1].itemsize


def _room(part: Part) -> int:
    return -(-_bytes(part) // ALIGNED) * ALIGNED


def size_of(parts: list[Part]) -> int:
    """Bytes of the memory; also where a shape has no number yet."""
    return sum(_room(part) for part in parts)


def views_of(memory: Tensor, parts: list[Part]) -> Routed:
    """The parts of `memory`, uint8 of `size_of` bytes."""
    views, start = [], 0
    for part in parts:
        shape, dtype = part
        views.append(memory[start : start + _bytes(part)].view(dtype).view(shape))
        start += _room(part)
    return Routed(*views)
