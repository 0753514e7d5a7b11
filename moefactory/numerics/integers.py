"""The integer problem: every sum ends in a small number that each dtype holds, and passes large ones on its way.

The rule on errors lets one fault through: accumulating in bfloat16, which is about as bad as Hugging Face's own
rounding. Here float32 accumulation is exact in any order and any low-precision accumulation is not, so the answer is
compared bit for bit. The block has the configuration's flags, kernels, dtype and sizes, and weights of its own:

  * Both expert matrices are  P x [[1,-1],[-1,1]] + D x [[1,0],[0,1]]  (Kronecker products over halves of the rows and
    of the columns; P large, D small and sparse). All vectors that meet them are paired, (v, v): P cancels, after half
    of the sum has run up to a large number, and D decides the result. So it is in the forward and, transposed, in dX.
  * Gate pre-activations are 64 or 128, where silu(g) = g and silu'(g) = 1 to the last bit of float64.
  * Tokens come in cancelling pairs, the same x and opposite gradients, far apart; one more token of each group of
    experts, in the middle, has a small x and a small gradient: the weights' gradients run up, and end as its own.
  * The router's columns hold a code of +-1 that the experts ignore: the K experts of a token's group tie, all others
    are 768 or more behind, so that every routing weight is exactly 1/K or 0. For that K is a power of two, 8 at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import ResolvedModel
from ..weights import BlockWeights

CODE = 384.0  # a router weight: logits of different groups differ by at least 2 * CODE, and exp(-746) is 0 in float64
HEAVY_PAIRS, LIGHT_PAIRS = 64, 2  # cancelling pairs of tokens: of the first group, of each other one
MAX_TOP_K = 8
MAX_MIXED = 16  # rows of A added and subtracted again in an output row
LEAST_HIDDEN, LEAST_INTERMEDIATE = 32, 16
LARGE_WEIGHT = (40, 120)  # P
LARGE_INPUT = 60  # x and dO, where D is zero, are a third of that to that
EXACT_WIDTH = 4096  # half of H products of two such numbers stay below 2**24, where float32 is exact


@dataclass(frozen=True)
class IntegerProblem:
    """Weights, tokens and gradient, exact in the dtype they have."""

    weights: BlockWeights
    hidden_states: Tensor  # [T,H]
    grad_output: Tensor  # [T,H]
    selected_experts: Tensor  # [T,K]


def integer_sizes(model: ResolvedModel) -> ResolvedModel:
    """The sizes of the problem for a model: its own, but at least 32 x 16, and the power of two in its top_k."""
    top_k = 1 << (min(model.top_k, MAX_TOP_K).bit_length() - 1)
    hidden = max(model.hidden_size, LEAST_HIDDEN)
    return replace(
        model,
        top_k=top_k,
        hidden_size=hidden,
        moe_intermediate_size=max(model.moe_intermediate_size, LEAST_INTERMEDIATE),
    )


class _Draw:
    """Random integers from one seeded stream, as float32 on the CPU."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform in low..high."""
        return torch.randint(low, high + 1, shape, generator=self.generator).float()


@dataclass(frozen=True)
class _Layout:
    """Which columns of x mean what, and which group of experts a token belongs to."""

    groups: int
    code: int  # columns 0..code: the group, as +-1
    pairs: int  # columns base+p and base+pairs+p hold the same number
    small: int  # the first `small` pairs are those that D reads

    @property
    def base(self) -> int:
        """First paired column, after the code and two columns for the gate."""
        return self.code + 2

    @classmethod
    def of(cls, model: ResolvedModel) -> _Layout:
        """One group is left out where there are enough of them: its experts get no tokens."""
        groups = model.num_experts // model.top_k
        groups -= groups > 2
        code = max(2, (groups - 1).bit_length())
        pairs = (model.hidden_size - code - 2) // 2
        return cls(groups, code, pairs, max(1, pairs // 2))


def integer_problem(model: ResolvedModel, dtype: torch.dtype, device: torch.device | str) -> IntegerProblem:
    """The problem for sizes that `integer_sizes` gave."""
    layout, draw = _Layout.of(model), _Draw(0)
    x, grad_output, group = _tokens(model, layout, draw)
    first = group.unsqueeze(1) * model.top_k
    selected = first + torch.arange(model.top_k)
    gate = torch.zeros(model.num_experts, model.hidden_size)
    used = layout.groups * model.top_k
    gate[:used, : layout.code] = CODE * _codes(layout)[torch.arange(used) // model.top_k]
    e, h, i = model.num_experts, model.hidden_size, model.moe_intermediate_size
    gate_up = torch.empty(e, 2 * i, h, dtype=dtype, device=device)
    down = torch.empty(e, h, i, dtype=dtype, device=device)
    for n, (up_n, down_n) in enumerate(_experts(model, layout, draw)):
        gate_up[n], down[n] = up_n, down_n
    place: dict[str, Any] = {"dtype": dtype, "device": device}
    weights = BlockWeights(model, gate.to(**place), gate_up, down)
    return IntegerProblem(weights, x.to(**place), grad_output.to(**place), selected.to(device))


def _codes(layout: _Layout) -> Tensor:
    """[groups, code]: the bits of the group's number as +-1."""
    bits = torch.arange(layout.groups).unsqueeze(1) >> torch.arange(layout.code) & 1
    return (2 * bits - 1).float()


def _tokens(model: ResolvedModel, layout: _Layout, draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
    """x [T,H], dO [T,H], group [T]: the first tokens of all pairs, a small one of each group, the second tokens."""
    counts = torch.full((layout.groups,), LIGHT_PAIRS)
    counts[0] = HEAVY_PAIRS
    every = torch.arange(layout.groups)
    group = torch.repeat_interleave(every, counts)
    x, grad = _rows(model, layout, draw, group, large=True)
    middle, small_grad = _rows(model, layout, draw, every, large=False)
    return torch.cat([x, middle, x]), torch.cat([grad, small_grad, -grad]), torch.cat([group, every, group])


def _rows(model: ResolvedModel, layout: _Layout, draw: _Draw, group: Tensor, large: bool) -> tuple[Tensor, Tensor]:
    """x and dO of some tokens: small numbers in the columns that D reads, large ones (or 0 and 1) in the others."""
    tokens, half = len(group), model.hidden_size // 2
    top = LARGE_INPUT if model.hidden_size <= EXACT_WIDTH else max(3, LARGE_INPUT * EXACT_WIDTH // model.hidden_size)
    low, high = (top // 3, top) if large else (0, 1)
    x = torch.zeros(tokens, model.hidden_size)
    x[:, : layout.code] = _codes(layout)[group]
    x[:, layout.code] = 1
    x[:, layout.code + 1] = draw.integers(0, 1, tokens)
    other = draw.integers(low, high, tokens, layout.pairs - layout.small)
    paired = torch.cat([draw.integers(1, 2, tokens, layout.small), other], 1)
    x[:, layout.base : layout.base + 2 * layout.pairs] = torch.cat([paired, paired], 1)
    written = half // 2  # output rows that D writes: one of the first few has a gradient of 1
    grad = torch.zeros(tokens, half)
    grad[:, written:] = draw.integers(low, high, tokens, half - written)
    grad[torch.arange(tokens), draw.integers(0, min(written, 4) - 1, tokens).long()] = 1
    grad_output = torch.zeros(tokens, model.hidden_size)
    grad_output[:, : 2 * half] = torch.cat([grad, grad], 1)
    return x, grad_output


def _paired(large: Tensor, small: Tensor) -> Tensor:
    """P x [[1,-1],[-1,1]] + D x [[1,0],[0,1]] for P and D of the same shape [..., R, C]: [..., 2R, 2C]."""
    return torch.cat([torch.cat([large + small, -large], -1), torch.cat([-large, large + small], -1)], -2)


def _experts(model: ResolvedModel, layout: _Layout, draw: _Draw) -> Iterator[tuple[Tensor, Tensor]]:
    """(gate_up_proj[e] [2I,H], down_proj[e] [H,I]) for each expert in turn."""
    i, m = model.moe_intermediate_size, model.moe_intermediate_size // 2
    for _ in range(model.num_experts):
        gate_up = torch.zeros(2 * i, model.hidden_size)
        gate, up = gate_up[:i], gate_up[i:]
        columns = slice(layout.base, layout.base + 2 * layout.pairs)
        # gate: 64, and 64 more where the token's second column is 1
        gate[:, layout.code : layout.base] = 64
        none = torch.zeros(m, layout.pairs)
        gate[: 2 * m, columns] = _paired(draw.integers(*LARGE_WEIGHT, m, layout.pairs), none)
        # up: one of the small columns, so 1 or 2; rows j and m // 2 + j read the same one
        picks = draw.integers(0, layout.small - 1, m // 2).long().repeat(2)
        picks = torch.cat([picks, picks[: m % 2]])
        read = none.scatter(1, picks.unsqueeze(1), 1.0)
        up[: 2 * m, columns] = _paired(draw.integers(*LARGE_WEIGHT, m, layout.pairs), read)
        _cross(gate, up, layout, draw)
        yield gate_up, _down(model, draw)


def _crossing(m: int) -> int:
    """How many of the first m // 2 rows (and of the next) are `_cross`ed."""
    return m // 4


def _cross(gate: Tensor, up: Tensor, layout: _Layout, draw: _Draw) -> None:
    """Let some rows' dX cancel between their gate and their up row, so that it is large between the two halves as well.

    There the gate is 64 and up is 1 for every token, so d(up) = 64 * d(gate), and the gate row is -64 times the up row.
    """
    m = up.shape[0] // 2
    first = torch.arange(_crossing(m))
    rows = torch.cat([first, first + m // 2, first + m, first + m + m // 2])
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat_interleave(len(first))  # of their gradients, see `_down`
    v = draw.integers(*LARGE_WEIGHT, len(rows), layout.pairs) * signs.unsqueeze(1)
    v = torch.cat([v, -v], 1)
    gate[rows, layout.code + 1] = 0
    up[rows, layout.code] = 1
    gate[rows, layout.base : layout.base + 2 * layout.pairs] = 64 * v
    up[rows, layout.base : layout.base + 2 * layout.pairs] = -v


def _down(model: ResolvedModel, draw: _Draw) -> Tensor:
    """down_proj of one expert: an output row is one row of A; others are added and their equals subtracted again, so
    that the gradient of A is not as sparse as the output."""
    h, i = model.hidden_size, model.moe_intermediate_size
    half, m = h // 2, i // 2
    written, crossed = half // 2, _crossing(m)
    mixes = torch.zeros(half, m)
    order = crossed + torch.rand(written, m // 2 - crossed, generator=draw.generator).argsort(1)[:, : MAX_MIXED + 1]
    mixes[:written].scatter_(1, order, 1.0)
    mixes[:written].scatter_(1, order[:, 1:] + m // 2, -1.0)
    mixes[:written, :crossed], mixes[:written, m // 2 : m // 2 + crossed] = 1, -1
    down = torch.zeros(h, i)
    down[: 2 * half, : 2 * m] = _paired(draw.integers(*LARGE_WEIGHT, half, m), mixes)
    return down
