"""The configuration of a Mixture-of-Experts block: names, types and defaults. Imports neither torch nor triton.

The dataclasses below are the schema. Hydra's YAML presets (``moefactory.conf``) are merged into them, so a typo or a
wrong type fails at composition; `from_mapping` checks the same again for whatever reaches us without Hydra. ``None``
means *not stated*: the weights' source brings the value, and a stated value that differs from it is refused.
Which combinations are legal is the table in `moefactory.rules`.

Vocabulary: tokens T, experts E, ``top_k`` K, ``hidden_size`` H, ``moe_intermediate_size`` I, rows M = T*K.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from enum import Enum
from functools import cache, partial
from typing import Any, TypeAlias, TypeVar

import omegaconf
from omegaconf import OmegaConf


class ConfigError(ValueError):
    """A configuration that cannot be: the message is one line with the key, what came and what is allowed."""


class MachineError(ConfigError):
    """A legal configuration that this machine cannot run: the message is one line with the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"this machine cannot run it: {reason}")


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


class Saved(Enum):
    """What a training forward keeps for its backward besides x, the routing weights and the plan."""

    h = "h"  # the pre-activation H [T*K,2I]
    h_reused = "h_reused"  # H, over which the backward writes dH: there is no second backward
    x = "x"  # nothing: the backward computes H again


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
class KernelTiles:
    """What every kernel config states. The block sizes mean the same in all of them.

    block_m counts rows, block_n output features, block_k input features, in elements. ``flatten`` makes one loop of a
    program's tiles, so that the loads of the next start under the last steps of this one. ``use_tma_*`` moves that
    operand with Hopper's tensor memory accelerator, which cannot follow an index: see the rules on the permute flags.

    ``warp_specialize`` runs another kernel, for Hopper alone: four warps load, eight multiply, and what is in expert
    order moves by TMA, loads and stores. Its tiles are few, see the rule; it leaves ``flatten`` and ``use_tma_*``
    at false.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    flatten: bool = False
    warp_specialize: bool = False


@dataclass(frozen=True)
class KernelConfigForward(KernelTiles):
    """Tiles of a forward grouped GEMM, y[M, N] = x[M, K] * weight[e][N, K]^T."""

    use_tma_load_x: bool = False
    use_tma_load_w: bool = False
    use_tma_store: bool = False


@dataclass(frozen=True)
class KernelConfigBackward_dX(KernelTiles):
    """Tiles of dX[M, K] = dy[M, N] * weight[e][N, K]."""

    use_tma_load_dy: bool = False
    use_tma_load_w: bool = False
    use_tma_store: bool = False


@dataclass(frozen=True)
class KernelConfigBackward_dW(KernelTiles):
    """Tiles of dW[e][N, K] = dy[M_e, N]^T * x[M_e, K]; block_m is the step of the sum over an expert's rows.

    ``gather_first`` copies the operand that permute_x (up GEMM) or permute_y (down GEMM) reaches through the index into
    expert order before the product, which then reads whole tiles, by TMA if asked: more memory, often less time.
    """

    gather_first: bool = False
    use_tma_load_dy: bool = False
    use_tma_load_x: bool = False
    use_tma_store: bool = False


KernelConfig: TypeAlias = KernelConfigForward | KernelConfigBackward_dX | KernelConfigBackward_dW
_K = TypeVar("_K", bound=KernelConfig)


def _schema_node(kernel: type) -> type:
    """The schema of one kernel's node: its fields, none stated, once for both GEMMs and once more under up and down."""
    stated: list[Any] = [(f.name, f"{f.type} | None", field(default=None)) for f in fields(kernel)]
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
    saved: Saved = Saved.h  # what a training forward keeps for its backward
    sm_margin: int = 0  # multiprocessors that the GEMMs leave to what runs beside them
    trace: bool = False  # return every intermediate
    dtype: DType | None = None  # None: the source's own, float32 for random weights
    device: str | None = None  # None: the source's own, cpu for random weights


PASSES: dict[str, type[KernelConfig]] = {
    "fwd": KernelConfigForward,
    "bwd_dX": KernelConfigBackward_dX,
    "bwd_dW": KernelConfigBackward_dW,
}
GEMMS = ("up", "down")
MAX_TEXT = 4096  # characters of a value; a path is shorter
MAX_INTEGER = 2**63 - 1  # torch counts in 64 bits


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
        raise ConfigError(
            f"{key}: got {shorten(value)}; allowed: None, a {kind.__name__}, or a pair of them (up, down)"
        )
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


@cache
def _schema() -> Any:
    """The schema as OmegaConf sees it. Read only: it is one for the whole process."""
    schema = OmegaConf.structured(MoeConfig)
    OmegaConf.set_readonly(schema, True)
    return schema


def field_paths(schema: Any = None, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted, such as ``model.top_k``."""
    node = _schema() if schema is None else schema
    paths = []
    for key in node:
        child = node._get_node(key)
        if OmegaConf.is_dict(child):
            paths += field_paths(child, f"{prefix}{key}.")
        paths.append(f"{prefix}{key}")
    return paths


def from_mapping(nodes: Mapping[str, Any] | MoeConfig) -> MoeConfig:
    """A `MoeConfig` from plain or Hydra nodes or from another one, every key and type checked, enums as members.

    Nodes of an OmegaConf config are resolved where they live. A plain mapping holds values, not interpolations: text
    with ``${`` in it is refused, so that nothing read from a file can name the environment or grow without bound.
    What an interpolation brought is never shown in a message.

    Raises:
        ConfigError: an unknown key (with the nearest name), a key that begins with ``_``, a value that is missing
            (``???``) or of the wrong type.
    """
    schema, hidden = _schema(), set[str]()
    plain = _plain(nodes, schema, "", hidden)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, plain))
    except omegaconf.errors.OmegaConfBaseException as error:
        key = str(error.full_key)
        value: Any = plain
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else value
        raise ConfigError(f"{key}: got {_came(value, key, hidden)}{allowed_values(key)}") from None
    assert isinstance(config, MoeConfig)
    return config


def _plain(nodes: Any, schema: Any, path: str, hidden: set[str]) -> dict[str, Any]:
    """`nodes` as a plain dict with the schema's keys and scalars only; `hidden` collects keys of interpolations."""
    allowed = [str(key) for key in schema]
    plain: dict[str, Any] = {}
    for key, read in _items(nodes, path, allowed, hidden):
        here = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str) or key not in allowed:
            raise ConfigError(_unknown_key(here, str(key), allowed))
        value = read(here, hidden)
        below = schema._get_node(key)
        if path == "kernels" and (value is None or isinstance(value, KernelConfig | tuple | list)):
            up, down = kernel_pair(value, PASSES[key], here)
            value = {"up": asdict(up) if up else {}, "down": asdict(down) if down else {}}
        if OmegaConf.is_dict(below):
            plain[key] = _plain(value, below, here, hidden)
        else:
            plain[key] = _scalar(value, below, here, hidden)
    return plain


_Read: TypeAlias = Callable[[str, set[str]], Any]


def _items(nodes: Any, path: str, allowed: list[str], hidden: set[str]) -> Iterator[tuple[Any, _Read]]:
    """(key, reader of its value) of a mapping, an OmegaConf node or a dataclass."""
    if OmegaConf.is_dict(nodes) and not (nodes._is_none() or nodes._is_missing()):
        yield from ((key, partial(_resolved, nodes, key)) for key in nodes)
    elif isinstance(nodes, Mapping) and not OmegaConf.is_config(nodes):
        yield from ((key, partial(_stated, value)) for key, value in nodes.items())
    elif is_dataclass(nodes) and not isinstance(nodes, type | KernelConfig):
        yield from ((f.name, partial(_stated, getattr(nodes, f.name))) for f in fields(nodes))
    else:
        came = _came(nodes, path, hidden)
        raise ConfigError(f"{path or 'moe'}: got {came}; allowed: a mapping with {', '.join(allowed)}")


def _stated(value: Any, path: str, hidden: set[str]) -> Any:
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path}: got an interpolation; allowed in a Hydra or OmegaConf config only: state the value")
    return _not_missing(value, path)


def _resolved(nodes: Any, key: Any, path: str, hidden: set[str]) -> Any:
    if not OmegaConf.is_interpolation(nodes, key):
        return _not_missing("???" if OmegaConf.is_missing(nodes, key) else nodes[key], path)
    hidden.add(path)
    text = shorten(nodes._get_node(key)._value())
    try:
        value = nodes[key]
    except (omegaconf.errors.OmegaConfBaseException, RecursionError):
        raise ConfigError(f"{path}: the interpolation {text} cannot be resolved") from None
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{path}: the interpolation {text} brings another one; allowed: a value")
    return value


def _not_missing(value: Any, path: str) -> Any:
    if isinstance(value, str) and value == "???":
        raise ConfigError(f"{path}: got ???, which stands for a value that must be stated; state it")
    return value


def _scalar(value: Any, schema: Any, path: str, hidden: set[str]) -> Any:
    """The value of a leaf, or ConfigError where OmegaConf would be too generous: containers, long texts, 2 as true."""
    number_for_bool = schema._metadata.ref_type is bool and not isinstance(value, bool | str | None)
    too_long = isinstance(value, str) and len(value) > MAX_TEXT
    huge = isinstance(value, int) and abs(value) > MAX_INTEGER
    empty = isinstance(value, str) and not value and schema._metadata.ref_type is str
    if number_for_bool or too_long or huge or empty or not isinstance(value, bool | int | float | str | Enum | None):
        largest = f"; the largest is {MAX_INTEGER}" if huge and schema._metadata.ref_type is int else ""
        raise ConfigError(f"{path}: got {_came(value, path, hidden)}{allowed_values(path)}{largest}")
    return value


def shorten(value: Any) -> str:
    """What came, for one line of an error message: at most 60 characters, a container by its type."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | int | float | Enum | None):
        return brief(repr(value[:80]) if isinstance(value, str) else str(value))
    return f"a {type(value).__name__}"


def brief(text: str) -> str:
    """At most 60 characters of a text, for one line of an error message."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def _came(value: Any, path: str, hidden: set[str]) -> str:
    """What came, unless an interpolation brought it: that may be a secret of the environment."""
    return "the value of an interpolation" if path in hidden else shorten(value)


def _unknown_key(path: str, key: str, allowed: list[str]) -> str:
    """The message for a key that the schema lacks."""
    shown = brief(repr(path[:80])[1:-1])
    if key.startswith("_"):
        return f"{shown}: keys that begin with '_' are not accepted; choose backend and weights by name"
    if "." in key and key in field_paths():
        hint = f" (nest it: {key.replace('.', ': {')}: ...{'}' * key.count('.')})"
    else:
        hint = nearest(key[:80], allowed) or nearest(path[:80], field_paths()) or _same_field(key[:80])
    return f"{shown}: no such key; allowed here: {', '.join(allowed)}{hint}"


def _same_field(name: str) -> str:
    """A hint to a field of nearly that name anywhere in the schema."""
    by_leaf = {path.rsplit(".", 1)[-1]: path for path in reversed(field_paths())}
    close = difflib.get_close_matches(name, list(by_leaf), n=1)
    return f" (did you mean {by_leaf[close[0]]!r}?)" if close else ""


def allowed_values(key: str) -> str:
    """``; allowed: ...`` for a schema key (its type or its options), or nothing for a key the schema lacks."""
    node: Any = _schema()
    for part in key.split("."):
        if not OmegaConf.is_dict(node) or part not in node:
            return ""
        node = node._get_node(part)
    if OmegaConf.is_dict(node):
        return f"; allowed: a mapping with {', '.join(str(k) for k in node)}"
    kind = node._metadata.ref_type
    null = ", or null" if node._metadata.optional else ""
    if isinstance(node, omegaconf.EnumNode):
        return f"; allowed: {', '.join(m.name for m in node.enum_type)}{null}"
    names = {bool: "true or false", int: "an integer", str: "a string"}
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
