"""The fused experts, step by step: which kernel runs after which. Plain functions of tensors, no autograd here.

    forward    up GEMM (+ SwiGLU) -> down GEMM -> combine
    backward   dX of down (+ dSwiGLU, routing-weight gradient) -> dW of down -> dX of up -> dW of up -> sum over K

Saved between the two: x, the pre-activation h, the routing weights and the plan. The permuted x, the activation and
the down GEMM's output are not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import DType, KernelConfig
from .activation import swiglu_backward, swiglu_forward
from .backward_dW import dW_gemm
from .backward_dX import dX_gemm, dX_gemm_dswiglu
from .choice import Launch, bucket, choose
from .combine import combine_rows, sum_dX
from .forward import Rows, forward_gemm
from .gather import gather_rows
from .library import traced
from .options import FusedOptions
from .schedule import TileTable, tile_table

FEW_ROWS = 16  # the height of a row tile where experts have few rows each
_launches: dict[tuple[Any, ...], Launch] = {}  # made once: building and hashing one took a sixth of a call's host time


def config_of(pass_name: str, gemm: str, weight: Tensor, num_rows: int, options: FusedOptions) -> KernelConfig:
    """The kernel config of a grouped GEMM over `num_rows` rows: a stated, tuned or shipped one (`choice`)."""
    shape = weight.shape
    rows = bucket(num_rows, shape[0])
    aligned = weight.data_ptr() % 16 == 0
    key = (pass_name, gemm, shape, weight.dtype, rows, options.text, aligned)
    launch = _launches.get(key)
    if launch is None:
        experts, n, k = shape
        dtype = DType(str(weight.dtype).removeprefix("torch."))
        launch = _launches[key] = Launch(pass_name, gemm, experts, n, k, rows, dtype, options, aligned)
    return choose(launch, weight.device)[0]


def first_block_m(gate_up_proj: Tensor, num_rows: int, options: FusedOptions) -> int:
    """The rows of a tile in the first GEMM, for who makes its tile table before it.

    Where code is traced, a weight has no address and a shape may have no number: then the usual height for few rows. A
    table of another height than a GEMM's is not used.
    """
    return FEW_ROWS if traced(gate_up_proj) else config_of("fwd", "up", gate_up_proj, num_rows, options).block_m


class Pipeline:
    """The kernels of one call: its plan, its options and the configs that were chosen for it.

    Args:
        offsets: the plan's group_offsets [E+2].
        gather, scatter: the plan's indices [T*K].
        options: flags and stated configs.
        gate_up_proj, down_proj: [E,2I,H], [E,H,I].
        table: the plan's tile table, for row tiles of `block_m`; those of other heights are made here.
    """

    def __init__(
        self,
        offsets: Tensor,
        gather: Tensor,
        scatter: Tensor,
        options: FusedOptions,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        table: tuple[Tensor, Tensor, Tensor] | None = None,
        block_m: int = 0,
    ) -> None:
        self.offsets, self.gather, self.scatter, self.options = offsets, gather, scatter, options
        self.weights = {"up": gate_up_proj, "down": down_proj}
        self.num_rows = gather.shape[0]
        self._by_block: dict[int, Rows] = {}
        if table is not None:
            self._by_block[block_m] = self._on(TileTable(*table, table[0].shape[0]))

    def _config(self, pass_name: str, gemm: str) -> KernelConfig:
        return config_of(pass_name, gemm, self.weights[gemm], self.num_rows, self.options)

    def _rows(self, block_m: int) -> Rows:
        """The rows with the tile table of this block size; two GEMMs of one block size share it."""
        rows = self._by_block.get(block_m)
        if rows is None:
            table = tile_table(self.offsets, self.num_rows, block_m) if self.num_rows else self._no_table()
            rows = self._by_block[block_m] = self._on(table)
        return rows

    def _on(self, table: TileTable) -> Rows:
        return Rows(self.offsets, self.gather, self.options.top_k, table, self.options.sm_margin)

    def _no_table(self) -> TileTable:
        return TileTable(self.offsets, self.offsets, self.offsets, 0)

    def _take(self, rows: Tensor, divisor: int) -> Tensor:
        """A copy of `rows` in expert order: row gather // divisor."""
        return gather_rows(rows, self.gather, divisor)

    def up(self, x: Tensor, *, save_h: bool) -> tuple[Tensor, Tensor]:
        """(A [T*K,I], H [T*K,2I], or an empty tensor where H is neither needed nor made)."""
        options = self.options
        config = self._config("fwd", "up")
        rows = x if options.permute_x else self._take(x, options.top_k)
        fused = {"swiglu": options.fuse_swiglu, "store_h": save_h}
        y, h = forward_gemm(
            rows, self.weights["up"], self._rows(config.block_m), config, permute_x=options.permute_x, **fused  # type: ignore[arg-type]
        )  # fmt: skip
        if options.fuse_swiglu:
            return y, x.new_empty(0) if h is None else h
        return swiglu_forward(y, self.gather, None), y

    def h_again(self, x: Tensor) -> Tensor:
        """H [T*K,2I] of the forward, bit for bit: the up GEMM without its epilogue."""
        options, config = self.options, self._config("fwd", "up")
        rows = x if options.permute_x else self._take(x, options.top_k)
        tiles = self._rows(config.block_m)
        return forward_gemm(rows, self.weights["up"], tiles, config, permute_x=options.permute_x)[0]  # type: ignore[arg-type]

    def down(self, a: Tensor) -> Tensor:
        """Y [T*K,H], in token order with permute_y, else in expert order."""
        config = self._config("fwd", "down")
        rows = self._rows(config.block_m)
        return forward_gemm(a, self.weights["down"], rows, config, permute_y=self.options.permute_y)[0]  # type: ignore[arg-type]

    def combine(self, y: Tensor, routing_weights: Tensor) -> Tensor:
        """[T,H]; without fuse_combine only the unpermuted rows [T*K,H], whose sum is left to torch."""
        options = self.options
        if options.fuse_combine:
            return combine_rows(y, self.scatter, routing_weights, options.top_k, token_order=options.permute_y)
        return y.clone() if options.permute_y else gather_rows(y, self.scatter, 1)

    def d_down(
        self,
        dout: Tensor,
        h: Tensor,
        routing_weights: Tensor,
        *,
        need_dh: bool,
        need_dw: bool,
        in_parts: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dH [T*K,2I], ds [T*K], ddown_proj) of dout, [T,H] with fuse_combine, else [T*K,H] in token order.

        `in_parts`: ds is [P,T*K], and its sum over P counts.
        """
        options = self.options
        divisor = options.top_k if options.fuse_combine else 1
        weights = routing_weights.reshape(-1) if options.fuse_combine else None
        dy, dy_divisor = (dout, divisor) if options.permute_y else (self._take(dout, divisor), 0)
        dh = ds = dw = None
        if need_dh:
            dh, scaled_a, ds = self._d_activation(dy, dy_divisor, h, weights, in_parts)
        else:
            scaled_a = swiglu_forward(h, self.gather, weights)
        if need_dw:
            config = self._config("bwd_dW", "down")
            rows = self._rows_of_dW()
            if config.gather_first and dy_divisor:  # type: ignore[union-attr]
                dy, dy_divisor = self._take(dy, dy_divisor), 0
            dw = dW_gemm(dy, scaled_a, rows, self.offsets.shape[0] - 2, config, dy_divisor=dy_divisor)  # type: ignore[arg-type]
        return dh, ds, dw

    def _d_activation(
        self, dy: Tensor, dy_divisor: int, h: Tensor, weights: Tensor | None, in_parts: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self._config("bwd_dX", "down")
        rows = self._rows(config.block_m)
        over_h = self.options.saved == "h_reused"
        if self.options.fuse_swiglu:
            how = {"dy_divisor": dy_divisor, "over_h": over_h, "in_parts": in_parts}
            return dX_gemm_dswiglu(dy, self.weights["down"], h, weights, rows, config, **how)  # type: ignore[arg-type]
        da = dX_gemm(dy, self.weights["down"], rows, config, dy_divisor=dy_divisor)  # type: ignore[arg-type]
        dh, scaled_a, ds = swiglu_backward(da, h, self.gather, weights, over_h=over_h)
        return dh, scaled_a, ds.unsqueeze(0) if in_parts else ds

    def _rows_of_dW(self) -> Rows:
        """dW walks experts, not row tiles: no table."""
        return self._on(self._no_table())

    def dw_up(self, dh: Tensor, x: Tensor) -> Tensor:
        """dgate_up_proj [E,2I,H]."""
        config, options = self._config("bwd_dW", "up"), self.options
        indexed = options.permute_x and not config.gather_first  # type: ignore[union-attr]
        rows, divisor = (x, options.top_k) if indexed else (self._take(x, options.top_k), 0)
        experts = self.offsets.shape[0] - 2
        return dW_gemm(dh, rows, self._rows_of_dW(), experts, config, x_divisor=divisor)  # type: ignore[arg-type]

    def dx_up(self, dh: Tensor, router: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """dX [T,H]: the experts' part and, of `router` (dlogits [T,E], gate [E,H]), the router's."""
        config, options = self._config("bwd_dX", "up"), self.options
        rows = self._rows(config.block_m)
        dx = dX_gemm(dh, self.weights["up"], rows, config, scatter=options.permute_x)  # type: ignore[arg-type]
        if router is None:
            return combine_rows(dx, self.scatter, None, options.top_k, token_order=options.permute_x)
        return sum_dX(dx, self.scatter, *router, options.top_k, token_order=options.permute_x)


__all__ = ["Pipeline"]


def empty_like_none(tensor: Tensor | None, like: Tensor) -> Tensor:
    """`tensor`, or an empty one: a custom op returns tensors only."""
    return torch.empty(0, dtype=like.dtype, device=like.device) if tensor is None else tensor
