"""The test matrix: which configurations are tested, generated from the schema's choices and the table of rules.

Imports neither torch nor triton. A row is a list of Hydra overrides of ``moe: qwen3``; an illegal row is as valuable as
a legal one: it must be refused, by the id of its first broken rule. The parts, and what is complete in each:

    flags        every combination of backend, permute_x, permute_y, fuse_swiglu, fuse_combine, dW_only, dX_only,
                 autotune, trace and explicit kernels (moe/kernels=small) or not: 1024 rows, nothing sampled, because
                 rules tie these flags to each other and a kernel is compiled for each of them.
    tma          for each of the six launches every combination of its three TMA flags with the switches that a rule
                 ties to them (permute_x, permute_y, fuse_swiglu, gather_first). TMA flags of two launches meet in no
                 rule, so launches are not multiplied.
    specialized  each of the six launches as its warp-specialised kernel, alone: each of its tiles, both 16-bit dtypes,
                 every setting of the switches that change that kernel; each dW GEMM once with gather_first. Then all
                 six at once, in bfloat16: every setting of permute_x, permute_y, fuse_swiglu and fuse_combine.
    tiles        for each kernel node (both GEMMs, up, down; of each pass) one row that states every tile field.
    options      every option of every config group, every source, seed and device, on each backend.
    pairs        backend torch: every feasible pair of flags, dtype, sizes, activation and number of tokens.
    triples      backend triton: every feasible triple of the same with kernel configs in place of activations.
    rules        for each rule the example that breaks it, and its repaired twin.

The legal rows are small enough to build and run, forward and backward, on a CPU; the specialised ones need a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Any

from omegaconf import OmegaConf

from .config import GEMMS, PASSES, Backend, DType, MoeConfig, Saved, WeightsSource, as_dict
from .covering import Axes, Overrides, covering_array
from .rules import RULES, SPECIALIZED_TILES, broken_rules, make_case

DEFAULT_TOKENS = 5
ROWS_PER_JOB = 64
MAX_ID = 80
PRESET = "qwen3"
_ENUMS = {"backend.name": Backend, "weights.source": WeightsSource, "dtype": DType, "saved": Saved}


@dataclass(frozen=True)
class Row:
    """One configuration of the matrix.

    Attributes:
        id: the sorted overrides, shortened by a stable hash beyond 80 characters; unique.
        part: the part of the matrix (see the module's docstring).
        overrides: Hydra overrides of an application with ``defaults: - moe: qwen3``.
        tokens: how many tokens to run it with, T.
        valid: whether no rule is broken.
        rule: the id of the first broken rule, None for a legal row.
        runnable: whether this machine can run it; None until `judge`, and for an illegal row.
        reason: why this machine cannot run it.
    """

    id: str
    part: str
    overrides: Overrides
    tokens: int
    valid: bool
    rule: str | None
    runnable: bool | None = None
    reason: str | None = None


# --- axes -------------------------------------------------------------------------------------------------------------


def _choose(key: str, *values: Any) -> tuple[Overrides, ...]:
    """Settings of one key; None leaves it at the preset's default."""
    return tuple(() if value is None else (f"{key}={_text(value)}",) for value in values)


def _flag(name: str, *values: bool) -> tuple[Overrides, ...]:
    """Settings of one flag, the default unsaid."""
    default = getattr(MoeConfig(), name)
    return _choose(f"moe.{name}", *(None if value == default else value for value in values))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


_BACKEND = _choose("moe/backend", None, "triton")
_FLAGS = ("permute_x", "permute_y", "fuse_swiglu", "fuse_combine", "dW_only", "dX_only", "autotune", "trace")
_SMALL = "moe/kernels=small"
_EXPLICIT = ("moe/backend=triton", "moe.autotune=false")
_SPECIALIZED_SWITCHES = {  # what changes the warp-specialised kernel of a launch
    ("fwd", "up"): ("permute_x", "fuse_swiglu"),
    ("fwd", "down"): ("permute_y",),
    ("bwd_dX", "up"): ("permute_x",),
    ("bwd_dX", "down"): ("permute_y", "fuse_swiglu", "fuse_combine"),
    ("bwd_dW", "up"): ("permute_x",),
    ("bwd_dW", "down"): ("permute_y",),
}
# About 350 rows an expert: three row tiles of 128, the last one ragged. More experts bring ties in bfloat16's logits.
_MANY_ROWS = ("moe.model.num_experts=4", "tokens=700")
_RAGGED = ("moe.model.hidden_size=264", "moe.model.moe_intermediate_size=136")  # 8 more than whole tiles, each way
_WHOLE = ("moe.model.hidden_size=256", "moe.model.moe_intermediate_size=128")  # no tile is masked


def _flag_axes() -> Axes:
    every = {name: _flag(name, False, True) for name in _FLAGS}
    return {"backend": _BACKEND, "kernels": _choose("moe/kernels", None, "small"), **every}


def _common_axes() -> Axes:
    """What the pairs and the triples share. float64 comes first: its rows are the easiest to align for TMA."""
    return {
        **{name: _flag(name, False, True) for name in _FLAGS},
        "dtype": _choose("moe.dtype", "float64", "float32", "float16", "bfloat16"),
        "hidden_size": _choose("moe.model.hidden_size", 64, 32, 50),
        "moe_intermediate_size": _choose("moe.model.moe_intermediate_size", 32, 16, 47),
        "num_experts": _choose("moe.model.num_experts", 8, 5, 1),
        "top_k": _choose("moe.model.top_k", 1, 2, 5),
        "norm_topk_prob": _choose("moe.model.norm_topk_prob", True, False),
        "tokens": _choose("tokens", DEFAULT_TOKENS, 0, 1, 33),
    }


def _torch_axes() -> Axes:
    return {**_common_axes(), "hidden_act": _choose("moe.model.hidden_act", "silu", "gelu", "relu")}


def _triton_axes() -> Axes:
    weights_by_tma = [f"moe.kernels.{p}.use_tma_load_w=true" for p in ("fwd", "bwd_dX")]
    all_by_tma = [f"moe.kernels.{p}.{name}=true" for p in PASSES for name in _tma_flags(p)]
    uneven = [f"moe.kernels.{p}.{key}" for p in PASSES for key in ("up.block_n=64", "down.block_m=32", "block_k=16")]
    kernels = ((), (_SMALL,), (_SMALL, *weights_by_tma), (_SMALL, *all_by_tma), tuple(uneven))
    return {
        **_common_axes(),
        "kernels": kernels,
        "saved": _choose("moe.saved", None, "h_reused", "x"),
        "sm_margin": _choose("moe.sm_margin", None, 1),
    }


def _tma_flags(pass_name: str) -> list[str]:
    return [name for name in vars(PASSES[pass_name]()) if name.startswith("use_tma")]


# --- parts ------------------------------------------------------------------------------------------------------------


def _parts(strength: int) -> Iterator[tuple[str, Overrides]]:
    """(part, overrides) of every row; `tokens=N` among the overrides is no override but the number of tokens."""
    yield from (("flags", sum(combination, ())) for combination in product(*_flag_axes().values()))
    yield from (("tma", overrides) for overrides in _tma_rows())
    yield from (("specialized", overrides) for overrides in _specialized_rows())
    yield from (("tiles", overrides) for overrides in _tile_rows())
    yield from (("options", overrides) for overrides in _option_rows())
    yield from (("pairs", overrides) for overrides in covering_array(_torch_axes(), 2, _legal))
    triton = covering_array(_triton_axes(), strength, lambda overrides: _legal(("moe/backend=triton", *overrides)))
    yield from (("triples", ("moe/backend=triton", *overrides)) for overrides in triton)
    for rule in RULES:
        yield "rules", tuple(f"moe.{key}={_text(value)}" for key, value in rule.example.items())
        twin = {**rule.example, **rule.repaired}
        yield "rules", tuple(f"moe.{key}={_text(value)}" for key, value in twin.items())


def _tma_rows() -> Iterator[Overrides]:
    """The six launches, each with its three TMA flags and the switches that a rule ties to one of them."""
    for pass_name, gemm in product(PASSES, GEMMS):
        tma = [f"kernels.{pass_name}.{gemm}.{name}" for name in _tma_flags(pass_name)]
        tied = {key for rule in RULES if set(tma) & set(rule.keys) for key in rule.keys} - set(tma)
        settings = [_flag(name, False, True) for name in _FLAGS if name in tied]
        kernel = sorted(key for key in tied if key.startswith(f"kernels.{pass_name}.{gemm}."))
        settings += [_choose(f"moe.{key}", False, True) for key in (*kernel, *tma)]
        yield from ((*_EXPLICIT, *sum(c, ())) for c in product(*settings))


def _specialized_rows() -> Iterator[Overrides]:
    """Each launch alone on sizes that end inside a tile; all six, with the other number of stages, on whole tiles."""
    for (pass_name, gemm), names in _SPECIALIZED_SWITCHES.items():
        alone = (*_EXPLICIT, *_MANY_ROWS, *_RAGGED)
        tiles = [_specialized(f"{pass_name}.{gemm}", tile) for tile in SPECIALIZED_TILES[pass_name]]
        settings = [_flag(name, False, True) for name in names]
        for chosen in product(_choose("moe.dtype", "bfloat16", "float16"), tiles, *settings):
            yield (*alone, *sum(chosen, ()))
        if pass_name == "bwd_dW":
            yield (*alone, "moe.dtype=bfloat16", *tiles[0], f"moe.kernels.{pass_name}.{gemm}.gather_first=true")
    every = [(*_specialized(p, tiles[0]), f"moe.kernels.{p}.num_stages=4") for p, tiles in SPECIALIZED_TILES.items()]
    switches = [_flag(name, False, True) for name in ("permute_x", "permute_y", "fuse_swiglu", "fuse_combine")]
    for chosen in product(*switches):
        yield (*_EXPLICIT, *_MANY_ROWS, *_WHOLE, "moe.dtype=bfloat16", *sum(every, ()), *sum(chosen, ()))


def _specialized(node: str, tile: tuple[int, int, int]) -> Overrides:
    """What a kernel node states to run its warp-specialised kernel."""
    sides = dict(zip(("block_m", "block_n", "block_k"), tile, strict=True))
    stated = {"warp_specialize": True, "num_warps": 8, **sides}
    return tuple(f"moe.kernels.{node}.{name}={_text(value)}" for name, value in stated.items())


def _tile_rows() -> Iterator[Overrides]:
    """`warp_specialize` stays out: its tiles are others."""
    tile = {"block_m": 32, "block_n": 128, "block_k": 16, "num_warps": 2, "num_stages": 1}
    for (pass_name, kernel), node in product(PASSES.items(), ("", "up.", "down.")):
        values = {name: not v if isinstance(v, bool) else tile[name] for name, v in vars(kernel()).items()}
        names = [name for name in values if "tma" not in name and name != "warp_specialize"]
        yield (*_EXPLICIT, *(f"moe.kernels.{pass_name}.{node}{name}={_text(values[name])}" for name in names))


def _option_rows() -> Iterator[Overrides]:
    """Each option that is not the preset's own. Large models are made narrow."""
    stored = ("moe/weights=checkpoint", "moe.weights.path=checkpoint")  # the test puts its own folder there
    for backend in _BACKEND:
        for name in _other_options("model"):
            yield (*backend, f"moe/model={name}", *_narrow(_read(f"model/{name}")))
        for name in _other_options("weights"):
            if name == "checkpoint":
                yield from ((*backend, *stored, f"moe.weights.layer={layer}") for layer in (0, 1))
            else:
                yield (*backend, f"moe/weights={name}")
        yield (*backend, "moe.weights.seed=1")
        yield from ((*backend, f"moe.device={name}") for name in ("cpu", "cuda"))


def _narrow(model: Mapping[str, Any]) -> Overrides:
    """The widths of a large model divided by 32."""
    widths = ("hidden_size", "moe_intermediate_size")
    return tuple(f"moe.model.{name}={model[name] // 32}" for name in widths if model.get(name, 0) >= 512)


def _other_options(group: str) -> list[str]:
    return [name for name in group_options(group) if name != _preset()[0][group]]


# --- rows -------------------------------------------------------------------------------------------------------------


@cache
def rows(strength: int = 3) -> tuple[Row, ...]:
    """Every row of the matrix, in an order that is always the same.

    Args:
        strength: how many settings of the Triton backend are combined exhaustively, 2 or 3.
    """
    made: dict[str, Row] = {}
    for part, overrides in _parts(strength):
        row = _row(part, overrides)
        same = json.dumps([as_dict(config_of(row)), row.tokens])
        made.setdefault(same, row)  # a rule's example may be a row of the flags
    return tuple(made.values())


def _row(part: str, texts: Overrides) -> Row:
    overrides = tuple(sorted(text for text in texts if not text.startswith("tokens=")))
    tokens = [int(text.removeprefix("tokens=")) for text in texts if text.startswith("tokens=")]
    broken = broken_rules(make_case(config_from(overrides)))
    rule = broken[0][0].id if broken else None
    number = tokens[0] if tokens else DEFAULT_TOKENS
    return Row(_row_id(overrides, number), part, overrides, number, rule is None, rule)


def _row_id(overrides: Overrides, tokens: int) -> str:
    text = ",".join([*overrides, *([] if tokens == DEFAULT_TOKENS else [f"tokens={tokens}"])]) or "default"
    return text if len(text) <= MAX_ID else f"{text[: MAX_ID - 9]}-{_digest(text)[:8]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _legal(overrides: Overrides) -> bool:
    stated = tuple(text for text in overrides if not text.startswith("tokens="))
    return not broken_rules(make_case(config_from(stated)))


def judge(row: Row) -> Row:
    """The row with the second answer: whether this machine can run it, and why not. Imports torch."""
    from .machine import why_not_here

    if not row.valid:
        return row
    reason = why_not_here(config_of(row))
    return replace(row, runnable=reason is None, reason=reason)


def config_of(row: Row) -> MoeConfig:
    """The row's config: what Hydra composes and `moefactory.config.from_mapping` checks, merged directly."""
    return config_from(row.overrides)


def config_from(overrides: Iterable[str]) -> MoeConfig:
    """The preset's config with these overrides (``moe/group=option`` and ``moe.key=value``)."""
    config = MoeConfig()
    chosen, own = _preset()
    stated = [text.split("=", 1) for text in overrides]
    options = {**chosen, **{key.removeprefix("moe/"): value for key, value in stated if key.startswith("moe/")}}
    for group, option in options.items():
        for key, value in _leaves(_read(f"{group}/{option}"), f"{group}."):
            _set(config, key, value)
    for key, value in own:
        _set(config, key, value)
    for key, text in stated:
        if key.startswith("moe."):
            _set(config, key.removeprefix("moe."), _value(text))
    return config


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "null": None}
    return words[text] if text in words else int(text) if text.lstrip("-").isdecimal() else text


@cache
def _preset() -> tuple[dict[str, str], list[tuple[str, Any]]]:
    """(option of each group, values) of the preset that rows start from."""
    nodes = dict(_read(PRESET))
    chosen: dict[str, str] = {}
    for entry in nodes.pop("defaults"):
        if isinstance(entry, dict):
            chosen.update(entry)
    return chosen, list(_leaves(nodes, ""))


@cache
def _read(name: str) -> dict[str, Any]:
    nodes = OmegaConf.to_container(
        OmegaConf.create(files("moefactory.conf").joinpath("moe", f"{name}.yaml").read_text())
    )
    return dict(nodes)  # type: ignore[arg-type]


@cache
def group_options(group: str) -> tuple[str, ...]:
    """The options that ``moe/<group>`` ships with, sorted."""
    folder = files("moefactory.conf").joinpath("moe", group)
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def _leaves(nodes: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in nodes.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(config: MoeConfig, key: str, value: Any) -> None:
    *above, name = key.split(".")
    node: Any = config
    for part in above:
        node = getattr(node, part)
    setattr(node, name, _ENUMS[key][value] if key in _ENUMS and value is not None else value)


# --- shards -----------------------------------------------------------------------------------------------------------


def shard_of(row_id: str, count: int) -> int:
    """Which of `count` shards (1 to count) a row belongs to: the same on every machine and in every order."""
    return int(_digest(row_id), 16) % count + 1


def github_shards(max_jobs: int = 256) -> dict[str, list[dict[str, str]]]:
    """The matrix of a GitHub workflow, ``{"include": [{"name": ..., "shard": "1/8"}, ...]}``, at most `max_jobs` jobs.

    Raises:
        ValueError: max_jobs below 1.
    """
    if max_jobs < 1:
        raise ValueError(f"max_jobs: got {max_jobs}; allowed: 1 or more")
    legal = sum(row.valid for row in rows())
    count = min(max_jobs, -(-legal // ROWS_PER_JOB))
    return {"include": [{"name": f"matrix {i}/{count}", "shard": f"{i}/{count}"} for i in range(1, count + 1)]}


def main(arguments: list[str] | None = None) -> int:
    """Print the matrix as JSON: ``python -m moefactory.matrix [--judge | --github]``."""
    parser = argparse.ArgumentParser(prog="python -m moefactory.matrix", description="the test matrix as JSON")
    parser.add_argument("--judge", action="store_true", help="also say what this machine can run")
    parser.add_argument("--github", action="store_true", help="the shards of a GitHub workflow instead of the rows")
    parser.add_argument("--max-jobs", type=int, default=256, help="at most so many shards (default 256)")
    options = parser.parse_args(arguments)
    if options.github:
        print(json.dumps(github_shards(options.max_jobs)))
    else:
        print(json.dumps({"rows": [asdict(judge(row) if options.judge else row) for row in rows()]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
