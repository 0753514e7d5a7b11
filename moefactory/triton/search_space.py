"""Which kernel configs a search tries for a launch: the shipped choice and its nearest legal neighbours.

Each field has a short ordered list of values (an axis). The distance of two configs is the number of steps between
them, summed over the axes; weights without TMA are two, since that rarely pays. The list begins with the shipped choice
and goes outward, larger tiles first. What `moefactory.rules` refuses, what exceeds this GPU's shared memory and what
cannot stay in registers is left out.

On Hopper there are two centers, since a warp-specialised kernel has few tiles, each of which is whole or not at all:
all specialised configs come behind the shipped choice, then the plain choice for this launch and its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import lru_cache
from itertools import islice, product
from typing import Any

from ..config import PASSES, Backend, BackendConfig, KernelConfig, KernelsConfig, MoeConfig, ResolvedModel
from ..rules import SPECIALIZED_STAGES, SPECIALIZED_TILES, broken_rules, make_case, shared_memory
from .choice import Launch, _shared_limit, _tma_loads, shipped

MAX_CANDIDATES = 40  # seconds each, most of them for the compiler
MAX_ACCUMULATORS = 128  # float32 sums a thread can hold in registers, of 255, beside its addresses and operands
TMA_CAPABILITY = 90
SPECIALIZED_CAPABILITY = 90  # and no other: the kernels are written for Hopper's instructions


@lru_cache(maxsize=1024)
def candidates(launch: Launch, capability: int) -> tuple[KernelConfig, ...]:
    """The configs to try, the shipped choice first, at most `MAX_CANDIDATES`; the same at every call."""
    first = shipped(launch, capability)
    others = (*_specialized(launch, capability), *_neighbours(launch, capability, _plain(launch, capability, first)))
    return (first, *islice((config for config in others if config != first), MAX_CANDIDATES - 1))


def _specialized(launch: Launch, capability: int) -> Iterator[KernelConfig]:
    """Every warp-specialised config: a handful, the deepest ring first."""
    if capability != SPECIALIZED_CAPABILITY or not launch.whole_rows:
        return
    copies = [False, True] if _copied(launch) else [False]
    for stages, tile, copy in product(SPECIALIZED_STAGES[::-1], SPECIALIZED_TILES[launch.pass_name], copies):
        more: dict[str, Any] = dict(zip(("block_m", "block_n", "block_k"), tile, strict=True))
        more |= {"gather_first": True} if copy else {}
        config: KernelConfig = PASSES[launch.pass_name](num_warps=8, num_stages=stages, warp_specialize=True, **more)
        if possible(launch, config, capability):
            yield config


def _plain(launch: Launch, capability: int, first: KernelConfig) -> KernelConfig:
    """The shipped choice; where that is specialised, what is shipped for weights that TMA cannot move, with TMA."""
    if not first.warp_specialize:
        return first
    return replace(shipped(replace(launch, aligned=False), capability), **_tma_loads(launch, capability))


def _neighbours(launch: Launch, capability: int, center: KernelConfig) -> Iterator[KernelConfig]:
    """Every possible config on the axes, the center first, then the nearest."""
    axes = _interpreter_axes(center) if capability == 0 else _gpu_axes(launch, capability, center)
    home = [values.index(getattr(center, name)) for name, values in axes.items()]
    step = [2 if name == "use_tma_load_w" else 1 for name in axes]

    def order(spot: tuple[int, ...]) -> tuple[int, ...]:
        distance = sum(s * abs(here - there) for s, here, there in zip(step, spot, home, strict=True))
        return distance, *(-place for place in spot)

    spots = product(*(range(len(values)) for values in axes.values()))
    for spot in sorted(spots, key=order):
        chosen = {name: values[place] for (name, values), place in zip(axes.items(), spot, strict=True)}
        config = replace(center, **chosen)
        if possible(launch, config, capability):
            yield config


def _gpu_axes(launch: Launch, capability: int, center: KernelConfig) -> dict[str, list[Any]]:
    """Field -> the values to try, in order."""
    narrow = launch.dtype.itemsize <= 2
    rows = min(128, max(16, launch.rows_per_expert))
    near = [m for m in (16, 32, 64, 128) if rows // 2 <= m <= rows * 2]
    outer = [64, 128, 256] if narrow else [32, 64, 128]
    inner = ([64, 128, 256] if rows <= 32 else [64, 128]) if narrow else [16, 32, 64]
    sides = {
        "fwd": (near, outer, inner),
        "bwd_dX": (near, inner, outer),
        "bwd_dW": ([m for m in (16, 32, 64, 128) if rows // 4 <= m <= rows], outer, outer),
    }[launch.pass_name]
    axes: dict[str, list[Any]] = dict(zip(("block_m", "block_n", "block_k"), sides, strict=True))
    axes |= {"num_warps": [4, 8], "num_stages": [2, 3, 4, 5] if narrow else [1, 2, 3], "flatten": [False, True]}
    copied = _copied(launch)
    axes |= {"gather_first": [False, True]} if copied else {}
    loads = [f.name for f in fields(center) if f.name.startswith("use_tma_load")]  # stores keep the shipped value
    usable = [name for name in loads if launch.may_use(name) or (copied and launch.may_use("use_tma_load_w"))]
    axes |= {name: [False, True] for name in usable if capability >= TMA_CAPABILITY}
    known = {f.name for f in fields(center)}
    return {name: sorted({*values, getattr(center, name)}) for name, values in axes.items() if name in known}


def _copied(launch: Launch) -> bool:
    """Whether a gathered copy of the indexed operand is one more way; TMA may move that."""
    indexed = launch.options.permute_x if launch.gemm == "up" else launch.options.permute_y
    return launch.pass_name == "bwd_dW" and indexed


def _interpreter_axes(center: KernelConfig) -> dict[str, list[Any]]:
    """Each side, and half of it: enough to run a search where nothing that is timed means anything."""
    least = {"block_m": 16, "block_n": 32, "block_k": 16}
    sides = {name: getattr(center, name) for name in least}
    return {name: sorted({max(least[name], side // 2), side}) for name, side in sides.items()}


def possible(launch: Launch, config: KernelConfig, capability: int) -> bool:
    """Whether the rules allow this config for this launch, and whether this GPU has room for it."""
    if capability and shared_memory(launch.pass_name, config, launch.dtype) > _shared_limit(capability):
        return False
    m, n, k = config.block_m, config.block_n, config.block_k
    sums = {"fwd": m * n, "bwd_dX": m * k, "bwd_dW": n * k}[launch.pass_name]
    if capability and sums > MAX_ACCUMULATORS * 32 * config.num_warps:
        return False
    return not refusals(launch, config)


def refusals(launch: Launch, config: KernelConfig) -> list[str]:
    """The ids of the rules that this config breaks for this launch."""
    o = launch.options
    hidden, width = (launch.k, launch.n // 2) if launch.gemm == "up" else (launch.n, launch.k)
    pair = (config, None) if launch.gemm == "up" else (None, config)
    case = MoeConfig(
        backend=BackendConfig(Backend.triton), kernels=KernelsConfig(**{launch.pass_name: pair}), autotune=False,
        permute_x=o.permute_x, permute_y=o.permute_y, fuse_swiglu=o.fuse_swiglu, fuse_combine=o.fuse_combine,
    )  # fmt: skip
    model = ResolvedModel(hidden, width, launch.experts, o.top_k, norm_topk_prob=True, hidden_act="silu")
    return [rule.id for rule, _ in broken_rules(make_case(case, model, launch.dtype))]
