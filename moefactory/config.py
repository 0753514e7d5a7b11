"""The configuration of a Mixture-of-Experts block: names, types and defaults. Imports neither torch nor triton.

The dataclasses below are the schema. Hydra's YAML presets (``moefactory.conf``) are merged into them, so a typo or a
wrong type fails at composition; `from_mapping` checks the same again for whatever reaches us without Hydra. ``None``
means *not stated*: the weights' source brings the value, and a stated value that differs from it is refused.
Which combinations are legal is the table in `moefactory.rules`.

Vocabulary: tokens T, experts E, ``top_k`` K, ``hidden_size`` H, ``moe_intermediate_size`` I, rows M = T*K.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, TypeAlias, TypeVar

import omegaconf
from omegaconf import OmegaConf


class ConfigError(ValueError):
    """A configuration that cannot be: the message is one line with the key, what came and what is allowed."""


class WeightsError(ValueError):
    """Weights that cannot be used: the message is one line with the tensor or file and what is wrong with it."""


class Backend(Enum):
    """Which implementation computes the experts."""

    torch = "torch"
    triton = "triton"


class DType(Enum):
    """Floating-point type of weights and activations."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[self.value]


class WeightsSource(Enum):
    """Where the weights come from."""

    random = "random"
    checkpoint = "checkpoint"
    live = "live"


@dataclass
class BackendConfig:
    """The backend, by name."""

    name: Backend = Backend.torch


@dataclass
class ModelConfig:
    """Sizes and routing of the block. What is left at None the weights' source brings (random: the tiny model)."""

    hidden_size: int | None = None
    moe_intermediate_size: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    norm_topk_prob: bool | None = None
    hidden_act: str | None = None


@dataclass(frozen=True)
class ResolvedModel:
    """Sizes and routing of a block that exists: the fields of `ModelConfig`, none left open."""

    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    hidden_act: str


@dataclass
class WeightsConfig:
    """Where the weights come from; a source of None is the live block that was given, else random weights."""

    source: WeightsSource | None = None
    seed: int = 0
    path: str | None = None
    layer: int | None = None


@dataclass(frozen=True)
class KernelConfigForward:
    """Tiles of a forward grouped GEMM, y[M, N] = x[M, K] * weight[e][N, K]^T.

    block_m counts rows, block_n output features, block_k input features, in elements. ``use_tma_*`` moves that operand
    with Hopper's tensor memory accelerator, which cannot follow an index: see the rules on permute_x and permute_y.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    use_tma_load_x: bool = False
    use_tma_load_w: bool = False
    use_tma_store: bool = False


@dataclass(frozen=True)
class KernelConfigBackward_dX:
    """Tiles of dX[M, K] = dy[M, N] * weight[e][N, K]; the block sizes mean what they mean in the forward."""

    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    use_tma_load_dy: bool = False
    use_tma_load_w: bool = False
    use_tma_store: bool = False


@dataclass(frozen=True)
class KernelConfigBackward_dW:
    """Tiles of dW[e][N, K] = dy[M_e, N]^T * x[M_e, K]; block_m is the step of the sum over an expert's rows."""

    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    use_tma_load_dy: bool = False
    use_tma_load_x: bool = False
    use_tma_store: bool = False


KernelConfig: TypeAlias = KernelConfigForward | KernelConfigBackward_dX | KernelConfigBackward_dW
_K = TypeVar("_K", KernelConfigForward, KernelConfigBackward_dX, KernelConfigBackward_dW)


def _schema_node(kernel: type) -> type:
    """The schema of one kernel's node: its fields, none stated, once for both GEMMs and once more under up and down."""
    stated = [(f.name, f"{f.type} | None", field(default=None)) for f in fields(kernel)]
    one = make_dataclass(f"{kernel.__name__}One", stated, namespace={"__module__": __name__})
    globals()[one.__name__] = one  # dataclasses are pickled and resolved by name
    both = [(gemm, one, field(default_factory=one)) for gemm in ("up", "down")]
    node = make_dataclass(f"{kernel.__name__}Node", stated + both, namespace={"__module__": __name__})
    globals()[node.__name__] = node
    return node


_ForwardNode: Any = _schema_node(KernelConfigForward)
_dXNode: Any = _schema_node(KernelConfigBackward_dX)
_dWNode: Any = _schema_node(KernelConfigBackward_dW)


@dataclass
class KernelsConfig:
    """Explicit kernel configs: ``fwd.block_m`` holds for both GEMMs, ``fwd.up.block_m`` for the up GEMM alone.

    Nothing stated: the shipped choice. Stated in part: the rest is the dataclass's default. In Python a field also
    takes a kernel config or a pair of them, ``KernelsConfig(fwd=KernelConfigForward(block_m=128))``.
    """

    fwd: _ForwardNode = field(default_factory=_ForwardNode)  # type: ignore[valid-type]
    bwd_dX: _dXNode = field(default_factory=_dXNode)  # type: ignore[valid-type]
    bwd_dW: _dWNode = field(default_factory=_dWNode)  # type: ignore[valid-type]


@dataclass
class MoeConfig:
    """How a block is computed and where its weights come from. See the README's table of options."""

    backend: BackendConfig = field(default_factory=BackendConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    permute_x: bool = True  # the up GEMM gathers token rows itself: no permuted copy of X
    permute_y: bool = True  # the down GEMM scatters its rows to token order itself
    fuse_swiglu: bool = True  # the activation is the up GEMM's epilogue
    fuse_combine: bool = True  # one kernel unpermutes and sums
    dW_only: bool = False  # weight gradients only
    dX_only: bool = False  # the input's gradient only
    autotune: bool = True  # tuned kernel configs where the cache has them
    trace: bool = False  # return every intermediate
    dtype: DType | None = None  # None: the source's own, float32 for random weights
    device: str | None = None  # None: the source's own, cpu for random weights


PASSES = {"fwd": KernelConfigForward, "bwd_dX": KernelConfigBackward_dX, "bwd_dW": KernelConfigBackward_dW}
GEMMS = ("up", "down")


@dataclass(frozen=True)
class KernelChoice:
    """The stated kernel configs, one per pass and GEMM; None where nothing is stated (the shipped choice decides)."""

    configs: Mapping[tuple[str, str], KernelConfig | None]

    @property
    def explicit(self) -> bool:
        """Whether any kernel config was stated."""
        return any(c is not None for c in self.configs.values())

    def get(self, pass_name: str, gemm: str) -> KernelConfig | None:
        """The config of one launch: pass fwd, bwd_dX or bwd_dW; GEMM up or down."""
        return self.configs[pass_name, gemm]


def resolve_kernels(kernels: KernelsConfig) -> KernelChoice:
    """Turn the nodes (or kernel configs, or pairs) of `KernelsConfig` into one config per launch."""
    configs: dict[tuple[str, str], KernelConfig | None] = {}
    for name, kind in PASSES.items():
        pair = kernel_pair(getattr(kernels, name), kind, f"kernels.{name}")
        configs[name, "up"], configs[name, "down"] = pair
    return KernelChoice(configs)


def kernel_pair(value: Any, kind: type[_K], key: str) -> tuple[_K | None, _K | None]:
    """(up, down) from None, one config, a pair of configs (None: shipped), or a schema node. ConfigError otherwise."""
    if value is None or isinstance(value, kind):
        return value, value
    if isinstance(value, tuple | list) and len(value) == 2 and all(v is None or isinstance(v, kind) for v in value):
        return value[0], value[1]
    if not all(hasattr(value, gemm) for gemm in GEMMS):
        raise ConfigError(f"{key}: got {value!r}; allowed: None, a {kind.__name__}, or a pair of them (up, down)")
    shared = {f.name: v for f in fields(kind) if (v := getattr(value, f.name)) is not None}
    pair = []
    for gemm in GEMMS:
        own = {f.name: v for f in fields(kind) if (v := getattr(getattr(value, gemm), f.name)) is not None}
        pair.append(kind(**{**shared, **own}) if shared or own else None)
    return pair[0], pair[1]


@cache
def model_preset(name: str) -> ResolvedModel:
    """The sizes of a shipped preset, ``conf/moe/model/<name>.yaml``."""
    from importlib.resources import files

    text = files("moefactory.conf").joinpath("moe", "model", f"{name}.yaml").read_text()
    return ResolvedModel(**OmegaConf.to_container(OmegaConf.create(text)))  # type: ignore[arg-type]


def resolve_model(stated: ModelConfig, brought: ResolvedModel | None = None) -> ResolvedModel:
    """The block's sizes: those the source brought, which a stated one may not contradict, else stated and tiny ones.

    Raises:
        ConfigError: a stated field differs from what the weights bring.
    """
    given = {f.name: v for f in fields(stated) if (v := getattr(stated, f.name)) is not None}
    if brought is None:
        return replace(model_preset("tiny"), **given)
    for name, value in given.items():
        if value != getattr(brought, name):
            found = getattr(brought, name)
            raise ConfigError(f"model.{name}: the config states {value!r}, the weights bring {found!r}")
    return brought


def nearest(name: str, allowed: list[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest allowed name, or nothing."""
    close = difflib.get_close_matches(name, allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def field_paths(schema: Any = None, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted, such as ``model.top_k``."""
    node = OmegaConf.structured(MoeConfig) if schema is None else schema
    paths = []
    for key in node:
        child = node._get_node(key)
        if OmegaConf.is_dict(child):
            paths += field_paths(child, f"{prefix}{key}.")
        paths.append(f"{prefix}{key}")
    return paths


def _unknown_keys(node: Any, schema: Any, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """(path, allowed names) of each key of `node` that `schema` lacks, without resolving any interpolation."""
    if isinstance(node, str | int | float | list | None):
        allowed = ", ".join(str(k) for k in schema)
        raise ConfigError(f"{prefix[:-1]}: got {node!r}; allowed: a mapping with {allowed}")
    if not isinstance(node, Mapping) and not OmegaConf.is_dict(node):
        return  # a dataclass: OmegaConf checks it
    allowed = [str(k) for k in schema]
    for key in list(node):
        path = f"{prefix}{key}"
        if str(key) not in allowed:
            yield path, allowed
            continue
        child = node._get_node(key) if OmegaConf.is_dict(node) else node[key]
        below = schema._get_node(key)
        if OmegaConf.is_dict(below):
            yield from _unknown_keys(child, below, f"{path}.")


def from_mapping(nodes: Mapping[str, Any]) -> MoeConfig:
    """A `MoeConfig` from plain or Hydra nodes, every key and type checked.

    Raises:
        ConfigError: an unknown key (with the nearest name), a key that begins with ``_``, or a value of the wrong type.
    """
    schema = OmegaConf.structured(MoeConfig)
    for path, allowed in _unknown_keys(nodes, schema, ""):
        last = path.rsplit(".", 1)[-1]
        if last.startswith("_"):
            raise ConfigError(f"{path}: keys that begin with '_' are not accepted; choose backend and weights by name")
        hint = nearest(last, allowed) or nearest(path, field_paths()) or _same_field(last)
        raise ConfigError(f"{path}: no such key; allowed here: {', '.join(allowed)}{hint}")
    try:
        merged = OmegaConf.merge(schema, dict(nodes))
        config = OmegaConf.to_object(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ConfigError(_one_line(error, schema)) from None
    assert isinstance(config, MoeConfig)
    return config


def _same_field(name: str) -> str:
    """A hint to a field of nearly that name anywhere in the schema."""
    by_leaf = {path.rsplit(".", 1)[-1]: path for path in reversed(field_paths())}
    close = difflib.get_close_matches(name, list(by_leaf), n=1)
    return f" (did you mean {by_leaf[close[0]]!r}?)" if close else ""


def _one_line(error: Exception, schema: Any) -> str:
    """OmegaConf's error as key: what came; allowed. The value itself is OmegaConf's wording, its first line."""
    key = str(getattr(error, "full_key", None) or "moe")
    text = str(error).splitlines()[0]
    return f"{key}: {text}{allowed_values(key)}"


def allowed_values(key: str) -> str:
    """``; allowed: ...`` for a schema key (its type or its options), or nothing for a key the schema lacks."""
    node: Any = OmegaConf.structured(MoeConfig)
    for part in key.split("."):
        if not OmegaConf.is_dict(node) or part not in node:
            return ""
        node = node._get_node(part)
    if OmegaConf.is_dict(node):
        return f"; allowed: a mapping with {', '.join(str(k) for k in node)}"
    kind = node._metadata.ref_type
    if isinstance(node, omegaconf.EnumNode):
        return f"; allowed: {', '.join(m.name for m in node.enum_type)}"
    names = {bool: "true or false", int: "an integer", str: "a string"}
    null = ", or null" if node._metadata.optional else ""
    return f"; allowed: {names.get(kind, kind)}{null}"


def as_dict(config: MoeConfig) -> dict[str, Any]:
    """The config as plain containers (enums by name), for JSON and tables."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return value

    return {k: plain(v) for k, v in asdict(config).items()}
