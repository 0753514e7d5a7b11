"""Which configurations are legal: one table, read by the validator, the test matrix, the tuner, the docs and the tests.

A rule judges a configuration on any machine, with or without a GPU. Whether *this* machine can run a legal one is a
second question (`moefactory.machine`). The heart of the table: an operand reached through an index cannot be moved by
TMA, whose descriptors address whole tiles of consecutive rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import (
    GEMMS,
    PASSES,
    Backend,
    ConfigError,
    DType,
    KernelChoice,
    KernelConfig,
    ModelConfig,
    MoeConfig,
    ResolvedModel,
    Saved,
    WeightsSource,
    resolve_kernels,
    resolve_model,
)

MAX_SHARED_MEMORY = 232_448  # bytes a program may take on the largest GPU we know (Hopper, 227 KiB)
MAX_BLOCK = 256
SPECIALIZED_TILES = {  # (block_m, block_n, block_k) of the warp-specialised kernels
    "fwd": ((128, 256, 64),),
    "bwd_dX": ((128, 64, 256),),
    "bwd_dW": ((64, 128, 256), (64, 256, 128)),
}
SPECIALIZED_STAGES = (3, 4)  # of theirs
TRITON_ACTIVATIONS = ("silu",)


@dataclass(frozen=True)
class Case:
    """A configuration as the rules see it. Sizes and dtype may be unknown (None) until the weights were looked at."""

    config: MoeConfig
    model: ModelConfig | ResolvedModel
    kernels: KernelChoice
    dtype: DType | None


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        id: the name by which a refusal is known.
        keys: the config keys that it reads.
        broken: what is wrong with a case, or None.
        repair: what to do, in words.
        example: overrides of the default config that break this rule and no other.
        repaired: overrides on top of `example` that make it legal.
    """

    id: str
    keys: tuple[str, ...]
    broken: Callable[[Case], str | None]
    repair: str
    example: Mapping[str, Any]
    repaired: Mapping[str, Any]


def _explicit(*stated: tuple[str, Any]) -> dict[str, Any]:
    """Overrides for a legal config with explicit kernels, and what is stated on top."""
    return {"backend.name": "triton", "autotune": False, **dict(stated)}


def _saved(case: Case) -> str | None:
    config = case.config
    if config.backend.name is Backend.torch and config.saved is not Saved.h:
        return f"saved={config.saved.name} with backend torch"
    if config.trace and config.saved is Saved.h_reused:
        return "saved=h_reused writes over H, and trace=true returns it"
    return None


def _sm_margin(case: Case) -> str | None:
    margin = case.config.sm_margin
    if margin < 0:
        return f"sm_margin={margin} is no number of multiprocessors"
    torch = case.config.backend.name is Backend.torch
    return f"sm_margin={margin} with backend torch" if torch and margin else None


def _each_kernel(case: Case, check: Callable[[str, KernelConfig], str | None]) -> str | None:
    """The first complaint of `check(key, config)` over the stated kernel configs."""
    for pass_name in PASSES:
        for gemm in GEMMS:
            config = case.kernels.get(pass_name, gemm)
            if config is not None and (found := check(f"kernels.{pass_name}.{gemm}", config)):
                return found
    return None


def _gradients(case: Case) -> str | None:
    both = case.config.dW_only and case.config.dX_only
    return "dW_only=true and dX_only=true leave nothing to compute" if both else None


def _torch_kernels(case: Case) -> str | None:
    torch = case.config.backend.name is Backend.torch
    return "backend torch with kernel configs" if torch and case.kernels.explicit else None


def _autotune(case: Case) -> str | None:
    triton = case.config.backend.name is Backend.triton
    return "autotune=true with kernel configs" if triton and case.kernels.explicit and case.config.autotune else None


def _permute_tma(flag: str, gemm: str, pass_name: str, tma: str) -> Rule:
    """The rule that an operand which `flag` reaches through an index is not moved by TMA."""
    key = f"kernels.{pass_name}.{gemm}.{tma}"

    def broken(case: Case) -> str | None:
        config = case.kernels.get(pass_name, gemm)
        indexed = getattr(case.config, flag) and not getattr(config, "gather_first", False)
        clash = indexed and config is not None and getattr(config, tma)
        return f"{flag}=true reaches this operand through an index, and {key}=true moves it by TMA" if clash else None

    keys: tuple[str, ...] = (flag, key)
    repair = f"set {flag}=false or {key}=false"
    if pass_name == "bwd_dW":
        keys += (f"kernels.{pass_name}.{gemm}.gather_first",)
        repair += f", or {keys[-1]}=true"
    name = f"{flag}-{pass_name}-{tma.removeprefix('use_').replace('_', '-')}"
    return Rule(name, keys, broken, repair, _explicit((key, True)), {flag: False})


def _tile(key: str, config: KernelConfig) -> str | None:
    for side in ("block_m", "block_n", "block_k"):
        size = getattr(config, side)
        if size < 16 or size > MAX_BLOCK or size & (size - 1):
            return f"{key}.{side}={size}"
    return None


def _warps(key: str, config: KernelConfig) -> str | None:
    if config.num_warps not in {1, 2, 4, 8, 16}:
        return f"{key}.num_warps={config.num_warps}"
    return None


def _stages(key: str, config: KernelConfig) -> str | None:
    return None if 1 <= config.num_stages <= 8 else f"{key}.num_stages={config.num_stages}"


def _swiglu_tile(case: Case) -> str | None:
    config = case.kernels.get("fwd", "up")
    if case.config.fuse_swiglu and config is not None and 16 <= config.block_n < 32:
        return f"fuse_swiglu=true with kernels.fwd.up.block_n={config.block_n}: half of the tile is gate, half is up"
    return None


def _swiglu_store(case: Case) -> str | None:
    config = case.kernels.get("bwd_dX", "down")
    if case.config.fuse_swiglu and config is not None and config.use_tma_store:
        return (
            "fuse_swiglu=true stores dH in slices, and kernels.bwd_dX.down.use_tma_store=true moves whole tiles by TMA"
        )
    return None


def _specialized(case: Case) -> str | None:
    def check(key: str, config: KernelConfig) -> str | None:
        if not config.warp_specialize:
            return None
        if case.dtype is not None and case.dtype.itemsize != 2:
            return f"{key}.warp_specialize=true in {case.dtype.name}"
        pass_name = key.split(".")[1]
        tile = config.block_m, config.block_n, config.block_k
        flags = [f for f in ("flatten", *tma_flags(config)) if getattr(config, f)]
        if flags:
            return f"{key}.warp_specialize=true with {flags[0]}=true"
        if (
            tile not in SPECIALIZED_TILES[pass_name]
            or config.num_warps != 8
            or config.num_stages not in SPECIALIZED_STAGES
        ):
            stated = f"tile {'x'.join(map(str, tile))}, num_warps={config.num_warps}, num_stages={config.num_stages}"
            return f"{key}.warp_specialize=true with {stated}"
        return None

    return _each_kernel(case, check)


def tma_flags(config: KernelConfig) -> list[str]:
    """The names of a kernel config's TMA flags."""
    return [name for name in config.__dataclass_fields__ if name.startswith("use_tma")]


def _alignment(case: Case) -> str | None:
    model, dtype = case.model, case.dtype
    if dtype is None:
        return None

    def check(key: str, config: KernelConfig) -> str | None:
        used = [f for f in (*tma_flags(config), "warp_specialize") if getattr(config, f)]
        sizes = {"hidden_size": model.hidden_size, "moe_intermediate_size": model.moe_intermediate_size}
        for name, size in sizes.items():
            if used and size is not None and size * dtype.itemsize % 16:
                row = f"model.{name}={size} in {dtype.name}: {size * dtype.itemsize} bytes a row"
                return f"{key}.{used[0]}=true with {row}"
        return None

    return _each_kernel(case, check)


def shared_memory(pass_name: str, config: KernelConfig, dtype: DType) -> int:
    """Bytes of shared memory that a program's buffers take: stages times both tiles.

    In the warp-specialised kernels half a result's as well, which is staged apart; those of rows use it for a quarter's
    and one more stage of rows, which in their tiles is as much, and gathered ones for a quarter's alone.
    """
    m, n, k = config.block_m, config.block_n, config.block_k
    elements = {"fwd": m * k + n * k, "bwd_dX": m * n + n * k, "bwd_dW": m * n + m * k}[pass_name]
    result = {"fwd": m * n, "bwd_dX": m * k, "bwd_dW": n * k}[pass_name]
    return (config.num_stages * elements + (result // 2 if config.warp_specialize else 0)) * dtype.itemsize


def _shared_memory(case: Case) -> str | None:
    dtype = case.dtype
    if dtype is None:
        return None

    def check(key: str, config: KernelConfig) -> str | None:
        need = shared_memory(key.split(".")[1], config, dtype)
        return f"{key} in {dtype.name} takes {need} bytes of shared memory" if need > MAX_SHARED_MEMORY else None

    return _each_kernel(case, check)


def _triton_activation(case: Case) -> str | None:
    act = case.model.hidden_act
    unknown = case.config.backend.name is Backend.triton and act is not None and act not in TRITON_ACTIVATIONS
    return f"model.hidden_act={act!r} with backend triton" if unknown else None


def _sizes(case: Case) -> str | None:
    for name in ("hidden_size", "moe_intermediate_size", "num_experts", "top_k"):
        size = getattr(case.model, name)
        if size is not None and size < 1:
            return f"model.{name}={size}"
    return None


def _top_k(case: Case) -> str | None:
    k, e = case.model.top_k, case.model.num_experts
    if k is not None and e is not None and k > e >= 1:
        return f"model.top_k={k} with model.num_experts={e}"
    return None


def _checkpoint(case: Case) -> str | None:
    weights = case.config.weights
    missing = [f"weights.{name}" for name in ("path", "layer") if getattr(weights, name) is None]
    if weights.source is WeightsSource.checkpoint and missing:
        return f"weights.source=checkpoint without {' and '.join(missing)}"
    return None


def _unread_weights(case: Case) -> str | None:
    weights = case.config.weights
    stated = [f"weights.{name}" for name in ("path", "layer") if getattr(weights, name) is not None]
    if weights.source is not WeightsSource.checkpoint and stated:
        source = weights.source.name if weights.source else "null"
        return f"{' and '.join(stated)} stated with weights.source={source}, which does not read them"
    return None


def _seed(case: Case) -> str | None:
    return f"weights.seed={case.config.weights.seed}" if not 0 <= case.config.weights.seed < 2**32 else None


def _tiles_in_words() -> str:
    """The tiles and stages of the specialised kernels, for a message."""
    words = {p: " or ".join("x".join(map(str, tile)) for tile in tiles) for p, tiles in SPECIALIZED_TILES.items()}
    tiles = ", ".join(f"{tiles} ({p})" for p, tiles in words.items())
    return f"{tiles} with num_stages {' or '.join(map(str, SPECIALIZED_STAGES))}"


_KERNEL_KEYS = tuple(f"kernels.{p}.{g}" for p in PASSES for g in GEMMS)
_MODEL_KEYS = ("model.hidden_size", "model.moe_intermediate_size")

RULES: tuple[Rule, ...] = (
    Rule("dW_only-dX_only", ("dW_only", "dX_only"), _gradients, "set at most one of them",
         {"dW_only": True, "dX_only": True}, {"dX_only": False}),
    Rule("torch-kernels", ("backend.name", *_KERNEL_KEYS), _torch_kernels,
         "choose moe/backend=triton or moe/kernels=shipped",
         {"kernels.fwd.block_m": 32, "autotune": False}, {"backend.name": "triton"}),
    Rule("autotune-kernels", ("autotune", *_KERNEL_KEYS), _autotune, "set autotune=false or choose moe/kernels=shipped",
         _explicit(("kernels.fwd.block_m", 32), ("autotune", True)), {"autotune": False}),
    Rule("saved", ("saved", "backend.name", "trace"), _saved,
         "set saved=h; backend torch keeps what autograd keeps, and what is traced is not written over",
         {"saved": "x"}, {"backend.name": "triton"}),
    Rule("sm-margin", ("sm_margin", "backend.name"), _sm_margin,
         "set sm_margin to 0 or more; backend torch launches what torch launches and takes 0",
         {"sm_margin": 16}, {"backend.name": "triton"}),
    _permute_tma("permute_x", "up", "fwd", "use_tma_load_x"),
    _permute_tma("permute_y", "down", "fwd", "use_tma_store"),
    _permute_tma("permute_x", "up", "bwd_dX", "use_tma_store"),
    _permute_tma("permute_y", "down", "bwd_dX", "use_tma_load_dy"),
    _permute_tma("permute_x", "up", "bwd_dW", "use_tma_load_x"),
    _permute_tma("permute_y", "down", "bwd_dW", "use_tma_load_dy"),
    Rule("swiglu-dX-store", ("fuse_swiglu", "kernels.bwd_dX.down.use_tma_store"), _swiglu_store,
         "set fuse_swiglu=false or kernels.bwd_dX.down.use_tma_store=false",
         _explicit(("kernels.bwd_dX.down.use_tma_store", True)), {"fuse_swiglu": False}),
    Rule("warp-specialize", ("dtype", *_KERNEL_KEYS), _specialized,
         "it needs dtype bfloat16 or float16, num_warps=8, flatten and use_tma_* at false, and as block_m x block_n x "
         f"block_k {_tiles_in_words()}",
         _explicit(("dtype", "bfloat16"), ("kernels.fwd.warp_specialize", True),
                   ("kernels.fwd.block_m", 128), ("kernels.fwd.block_n", 256)), {"kernels.fwd.num_warps": 8}),
    Rule("tile-size", _KERNEL_KEYS, lambda case: _each_kernel(case, _tile),
         f"block_m, block_n and block_k are powers of two from 16 to {MAX_BLOCK}",
         _explicit(("kernels.fwd.block_m", 33)), {"kernels.fwd.block_m": 32}),
    Rule("num-warps", _KERNEL_KEYS, lambda case: _each_kernel(case, _warps), "num_warps is 1, 2, 4, 8 or 16",
         _explicit(("kernels.bwd_dX.num_warps", 3)), {"kernels.bwd_dX.num_warps": 4}),
    Rule("num-stages", _KERNEL_KEYS, lambda case: _each_kernel(case, _stages), "num_stages is 1 to 8",
         _explicit(("kernels.bwd_dW.num_stages", 0)), {"kernels.bwd_dW.num_stages": 2}),
    Rule("swiglu-tile", ("fuse_swiglu", "kernels.fwd.up"), _swiglu_tile, "set kernels.fwd.up.block_n to 32 or more",
         _explicit(("kernels.fwd.up.block_n", 16)), {"fuse_swiglu": False}),
    Rule("tma-alignment", ("dtype", *_MODEL_KEYS, *_KERNEL_KEYS), _alignment,
         "TMA needs rows of a multiple of 16 bytes: choose other sizes or set that flag to false",
         _explicit(("kernels.fwd.use_tma_load_w", True), ("model.hidden_size", 50)), {"model.hidden_size": 52}),
    Rule("shared-memory", ("dtype", *_KERNEL_KEYS), _shared_memory,
         f"at most {MAX_SHARED_MEMORY} bytes: choose smaller blocks or fewer stages",
         _explicit(("kernels.fwd.block_m", 256), ("kernels.fwd.block_n", 256)), {"kernels.fwd.num_stages": 1}),
    Rule("triton-activation", ("backend.name", "model.hidden_act"), _triton_activation,
         f"backend triton knows {', '.join(TRITON_ACTIVATIONS)}; choose moe/backend=torch for the others",
         {"backend.name": "triton", "model.hidden_act": "gelu"}, {"backend.name": "torch"}),
    Rule("sizes", ("model.num_experts", "model.top_k", *_MODEL_KEYS), _sizes, "sizes are 1 or more",
         {"model.hidden_size": 0}, {"model.hidden_size": 16}),
    Rule("top-k", ("model.top_k", "model.num_experts"), _top_k, "top_k is at most num_experts",
         {"model.top_k": 9}, {"model.num_experts": 9}),
    Rule("checkpoint-path", ("weights.source", "weights.path", "weights.layer"), _checkpoint,
         "state weights.path (a folder) and weights.layer (a number)",
         {"weights.source": "checkpoint"}, {"weights.path": "checkpoint", "weights.layer": 0}),
    Rule("unread-weights", ("weights.source", "weights.path", "weights.layer"), _unread_weights,
         "choose moe/weights=checkpoint, or leave weights.path and weights.layer out",
         {"weights.path": "checkpoint", "weights.layer": 0}, {"weights.source": "checkpoint"}),
    Rule("seed", ("weights.seed",), _seed,
         "weights.seed is 0 or more and below 2**32, all that torch's CPU generator reads",
         {"weights.seed": -1}, {"weights.seed": 1}),
)  # fmt: skip


def make_case(config: MoeConfig, model: ModelConfig | ResolvedModel | None = None, dtype: DType | None = None) -> Case:
    """The case of a config; sizes and dtype as stated unless given.

    What random weights are not told is the tiny model in float32; other sources are unknown until they were looked at.
    """
    drawn = config.weights.source in {None, WeightsSource.random}
    known = dtype or config.dtype or (DType.float32 if drawn else None)
    sizes = model or (resolve_model(config.model) if drawn else config.model)
    return Case(config, sizes, resolve_kernels(config.kernels), known)


def broken_rules(case: Case) -> list[tuple[Rule, str]]:
    """Every rule that the case breaks, each with what is wrong."""
    return [(rule, found) for rule in RULES if (found := rule.broken(case)) is not None]


def check_rules(case: Case) -> None:
    """Raise ConfigError for the first broken rule: ``rule id: what came; what is allowed``."""
    for rule, found in broken_rules(case):
        raise ConfigError(f"{rule.id}: {found}; {rule.repair}")
