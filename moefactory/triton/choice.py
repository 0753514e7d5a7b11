"""Which kernel config a launch uses: the stated one, else a tuned one, else the shipped choice. Nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
import triton

from ..config import PASSES, DType, KernelConfig
from ..rules import MAX_SHARED_MEMORY, SPECIALIZED_TILES, shared_memory
from . import replay
from .launch import interpreting, power_of_2
from .options import FusedOptions

SPECIALIZED_TRITON = ("3.6.", "3.7.")  # the releases whose Gluon compiles the kernels; it changes with each
SPECIALIZED_FROM = {  # rows per expert from which the warp-specialised kernels are shipped: results/specialized.json,
    # whose row kernels skipped the halves of tiles without rows; below 128 rows those of now are not measured
    ("fwd", "up"): 32,
    ("fwd", "down"): 128,
    ("bwd_dX", "up"): 128,
    ("bwd_dX", "down"): 32,
    ("bwd_dW", "up"): 1,
    ("bwd_dW", "down"): 1,  # measured down to 16 rows; below, a tile's store is still all there is
}
_chosen: dict[tuple[Launch, torch.device, int], tuple[KernelConfig, str]] = {}


@dataclass(frozen=True)
class Launch:
    """One grouped GEMM to be launched: what a kernel config is chosen (and tuned) for.

    Attributes:
        pass_name, gemm: fwd, bwd_dX or bwd_dW; up or down.
        experts, n, k: the weight is [experts, n, k].
        rows_per_expert: T*K / E, rounded up to a power of two (at least 1).
        dtype: of the operands.
        options: the block's flags.
        aligned: whether the weight starts at a multiple of 16 bytes, as TMA needs.
    """

    pass_name: str
    gemm: str
    experts: int
    n: int
    k: int
    rows_per_expert: int
    dtype: DType
    options: FusedOptions
    aligned: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.pass_name, self.gemm, self.n, self.k, self.rows_per_expert)))

    def __hash__(self) -> int:
        """Of what tells launches apart best, kept: the fields' own took 3 us, several times a launch."""
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def may_use(self, flag: str) -> bool:
        """Whether the rules and the alignment allow this TMA flag here."""
        o = self.options
        forbidden = {
            ("fwd", "up", "use_tma_load_x"): o.permute_x,
            ("fwd", "down", "use_tma_store"): o.permute_y,
            ("bwd_dX", "up", "use_tma_store"): o.permute_x,
            ("bwd_dX", "down", "use_tma_load_dy"): o.permute_y,
            ("bwd_dX", "down", "use_tma_store"): o.fuse_swiglu,
            ("bwd_dW", "up", "use_tma_load_x"): o.permute_x,
            ("bwd_dW", "down", "use_tma_load_dy"): o.permute_y,
        }
        return self.whole_rows and not forbidden.get((self.pass_name, self.gemm, flag), False)

    @property
    def whole_rows(self) -> bool:
        """Whether every row starts at a multiple of 16 bytes, as TMA needs."""
        widths = (self.k, self.n, self.n // 2 if self.gemm == "up" else self.n)
        return self.aligned and all(width * self.dtype.itemsize % 16 == 0 for width in widths)


def forget() -> None:
    """Choose anew from now on."""
    _chosen.clear()
    replay.forget()


def bucket(rows: int, experts: int) -> int:
    """Rows per expert as a power of two: the part of a key that follows the number of tokens."""
    return power_of_2(max(1, -(-rows // experts)))


def choose(launch: Launch, device: torch.device) -> tuple[KernelConfig, str]:
    """(config, where it is from: stated, tuned or shipped). Kept until a search has news: see `lookup`."""
    key = (launch, device, _capability(device))
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(launch, device)
    return found


def _choose(launch: Launch, device: torch.device) -> tuple[KernelConfig, str]:
    if (stated := launch.options.stated(launch.pass_name, launch.gemm)) is not None:
        return stated, "stated"
    if launch.options.autotune and (tuned := _tuned(launch, device)) is not None:
        return tuned, "tuned"
    return shipped(launch, _capability(device)), "shipped"


def _tuned(launch: Launch, device: torch.device) -> KernelConfig | None:
    from .lookup import tuned  # which needs the shipped choice below

    return tuned(launch, device)


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    """10 * major + minor of the GPU; 0 in the interpreter."""
    if device.type != "cuda" or interpreting():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=4096)
def shipped(launch: Launch, capability: int) -> KernelConfig:
    """The shipped choice: sane tiles for any GPU, more for Hopper. Always legal, always within shared memory."""
    sides: dict[str, Any] = _interpreter_tiles(launch) if capability == 0 else _gpu_tiles(launch, capability)
    config: Any = PASSES[launch.pass_name](**sides)
    while shared_memory(launch.pass_name, config, launch.dtype) > _shared_limit(capability):
        config = _smaller(config)
    return config


def _shared_limit(capability: int) -> int:
    limits = {75: 65_536, 80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 120: 101_376}
    return limits.get(capability, MAX_SHARED_MEMORY if capability in {0, 90, 100} else 65_536)


def _smaller(config: KernelConfig) -> KernelConfig:
    """One stage less, or, at two stages, half the longest side."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    if config.num_stages > 2:
        values["num_stages"] -= 1
    else:
        side = max(("block_m", "block_n", "block_k"), key=lambda s: values[s])
        values[side] //= 2
    return type(config)(**values)


def _interpreter_tiles(launch: Launch) -> dict[str, Any]:
    """Few, large tiles: the interpreter's time goes with their number."""

    def side(size: int) -> int:
        return min(64, max(16, power_of_2(size)))

    n = max(32, side(launch.n))
    return {"block_m": side(launch.rows_per_expert), "block_n": n, "block_k": side(launch.k)}


def _gpu_tiles(launch: Launch, capability: int) -> dict[str, Any]:
    """Tiles for a GPU; the shares of cuBLAS behind Hopper's are in benchmarks/results/sweep_*.json."""
    rows = launch.rows_per_expert
    if launch.dtype.itemsize > 2:
        return {"block_m": 64 if rows > 32 else 16, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 2}
    known = triton.__version__.startswith(SPECIALIZED_TRITON)
    if capability == 90 and known and rows >= SPECIALIZED_FROM[launch.pass_name, launch.gemm] and launch.whole_rows:
        return _specialized(launch)
    if capability < 90:
        tiles = {"block_m": min(64, max(16, rows)), "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 3}
    elif launch.pass_name == "bwd_dW":
        tiles = _hopper_dW(launch)
    else:
        tiles = _hopper_few_rows(launch) if rows <= 64 else _hopper_rows(launch)
    return {**tiles, **_tma_loads(launch, capability)}


def _specialized(launch: Launch) -> dict[str, Any]:
    """The warp-specialised kernel; in dW the operand that is reached through an index takes the narrow side."""
    tile = SPECIALIZED_TILES[launch.pass_name][launch.pass_name == "bwd_dW" and launch.gemm == "up"]
    sides = dict(zip(("block_m", "block_n", "block_k"), tile, strict=True))
    return {**sides, "num_stages": 4, "num_warps": 8, "warp_specialize": True}


def _tma_loads(launch: Launch, capability: int) -> dict[str, Any]:
    """TMA for every operand that it may move. Not for stores."""
    loads = ("use_tma_load_x", "use_tma_load_w", "use_tma_load_dy")
    names = {"fwd": loads[:2], "bwd_dX": loads[1:], "bwd_dW": loads[::2]}[launch.pass_name]
    return {name: True for name in names if capability >= 90 and launch.may_use(name)}


def _hopper_few_rows(launch: Launch) -> dict[str, Any]:
    """Up to 64 rows an expert: weights are read once, and the product hides behind them."""
    rows, up = launch.rows_per_expert, launch.gemm == "up"
    if launch.pass_name == "bwd_dX":
        m, k = (64 if up and rows == 64 else 32), (128 if rows == 1 and not up else 256)
        return {"block_m": m, "block_n": 64, "block_k": k, "num_warps": 4, "num_stages": 4}
    if rows == 64:
        return {"block_m": 64, "block_n": 256 if up else 128, "block_k": 64, "num_warps": 4, "num_stages": 4}
    return {"block_m": 32 if rows == 32 else 16, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 3}


def _hopper_rows(launch: Launch) -> dict[str, Any]:
    """Forward and dX: 128 rows by 256 columns, 64 deep."""
    many = launch.rows_per_expert > 256
    if launch.pass_name == "fwd":
        stages = 3 if many and launch.gemm == "up" else 4
        return {"block_m": 128, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": stages, "flatten": many}
    m = 64 if launch.gemm == "down" and launch.options.fuse_swiglu and not many else 128
    stages = 4 if m == 64 else 3
    return {"block_m": m, "block_n": 64, "block_k": 256, "num_warps": 8, "num_stages": stages, "flatten": many}


def _hopper_dW(launch: Launch) -> dict[str, Any]:
    """dW: with a few reduction steps a tile the store shows, and two programs a multiprocessor hide it."""
    rows = launch.rows_per_expert
    if rows <= 16:
        return {"block_m": 16, "block_n": 64, "block_k": 256, "num_warps": 4, "num_stages": 2}
    if rows <= 64:
        return {"block_m": 32, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 3}
    if launch.gemm == "down":
        return {"block_m": 64, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 3, "flatten": True}
    if rows > 256 and launch.options.permute_x:
        return {"block_m": 64, "block_n": 256, "block_k": 128, "num_warps": 8, "num_stages": 3}
    return {"block_m": 32, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 5}
