"""The table of rules: each is broken alone by its example and mended by its repair, without torch, in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from moefactory.config import (
    GEMMS,
    PASSES,
    Backend,
    BackendConfig,
    ConfigError,
    DType,
    KernelConfigBackward_dW,
    KernelConfigForward,
    KernelsConfig,
    ModelConfig,
    MoeConfig,
    ResolvedModel,
    WeightsConfig,
    WeightsSource,
    field_paths,
    from_mapping,
)
from moefactory.rules import (
    MAX_SHARED_MEMORY,
    RULES,
    Case,
    Rule,
    broken_rules,
    check_rules,
    make_case,
    shared_memory,
)

BY_ID = {rule.id: rule for rule in RULES}
EACH = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
TMA = {  # pass, GEMM, the operand's flag -> the permute flag that forbids it, from the design's table
    ("fwd", "up", "use_tma_load_x"): "permute_x",
    ("fwd", "down", "use_tma_store"): "permute_y",
    ("bwd_dX", "up", "use_tma_store"): "permute_x",
    ("bwd_dX", "down", "use_tma_load_dy"): "permute_y",
    ("bwd_dW", "up", "use_tma_load_x"): "permute_x",
    ("bwd_dW", "down", "use_tma_load_dy"): "permute_y",
}
SPECIALIZED = {  # pass -> the tiles of its warp-specialised kernels
    "fwd": [(128, 256, 64)],
    "bwd_dX": [(128, 64, 256)],
    "bwd_dW": [(64, 128, 256), (64, 256, 128)],
}


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested nodes."""
    nodes: dict[str, Any] = {}
    for key, value in overrides.items():
        *above, name = key.split(".")
        node = nodes
        for part in above:
            node = node.setdefault(part, {})
        node[name] = value
    return nodes


def case(*overrides: Mapping[str, Any]) -> Case:
    merged: dict[str, Any] = {}
    for some in overrides:
        merged.update(some)
    return make_case(from_mapping(nested(merged)))


def specialized(node: str, **fields: Any) -> dict[str, Any]:
    """A legal config in bfloat16 with the warp-specialised kernel of a pass, or of one GEMM of it, but for `fields`."""
    tile = SPECIALIZED[node.partition(".")[0]][0]
    sides = dict(zip(("block_m", "block_n", "block_k"), tile, strict=True))
    kernel = {"warp_specialize": True, "num_warps": 8, **sides, **fields}
    stated = {f"kernels.{node}.{name}": value for name, value in kernel.items()}
    return {"backend.name": "triton", "autotune": False, "dtype": "bfloat16", **stated}


def ids(judged: Case) -> list[str]:
    return [rule.id for rule, _ in broken_rules(judged)]


def test_ids_are_unique_and_plain() -> None:
    assert len(BY_ID) == len(RULES)
    assert all(re.fullmatch(r"[A-Za-z_-]+", rule.id) for rule in RULES)


def test_the_default_is_legal() -> None:
    assert ids(make_case(MoeConfig())) == []


@EACH
def test_example_breaks_this_rule_alone(rule: Rule) -> None:
    assert ids(case(rule.example)) == [rule.id]


@EACH
def test_repaired_twin_breaks_none(rule: Rule) -> None:
    """And the repair changes a key that the rule reads: it is the cure, not another config."""
    assert ids(case(rule.example, rule.repaired)) == []
    assert any(_covers(key, changed) for changed in rule.repaired for key in rule.keys)


def _covers(key: str, changed: str) -> bool:
    """Whether a key that a rule reads (``kernels.fwd.up``) is meant by a changed one (``kernels.fwd.block_m``)."""
    above = changed.split(".")[:-1]
    return key == changed or changed.startswith(f"{key}.") or key.split(".")[: len(above)] == above != []


@EACH
def test_keys_are_schema_keys(rule: Rule) -> None:
    assert set(rule.keys) <= set(field_paths())
    assert rule.keys


@EACH
def test_message(rule: Rule) -> None:
    """One line: the id, a key that the rule reads with what came, and the repair."""
    with pytest.raises(ConfigError) as caught:
        check_rules(case(rule.example))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{rule.id}: ")
    assert text.endswith(f"; {rule.repair}")
    came = text.removeprefix(f"{rule.id}: ").removesuffix(f"; {rule.repair}")
    leaves = {key.rsplit(".", 1)[-1] for key in rule.keys} | {"backend", "kernel"}
    assert any(re.search(rf"\b{re.escape(leaf)}", came) for leaf in leaves), came
    assert re.search(r"\d|true|torch|checkpoint|'|without|null", came), came


def test_first_rule_is_raised_and_all_are_listed() -> None:
    judged = case(BY_ID["seed"].example, BY_ID["top-k"].example, BY_ID["dW_only-dX_only"].example)
    assert ids(judged) == ["dW_only-dX_only", "top-k", "seed"]
    with pytest.raises(ConfigError, match=r"^dW_only-dX_only: "):
        check_rules(judged)
    assert check_rules(case({})) is None


@pytest.mark.parametrize("place", TMA, ids=".".join)
@pytest.mark.parametrize("stated", ["launch", "both"])
def test_tma_table(place: tuple[str, str, str], stated: str) -> None:
    """An operand reached through an index is not moved by TMA: for its launch alone, however the flag is stated."""
    pass_name, gemm, flag = place
    key = f"kernels.{pass_name}.{gemm}.{flag}" if stated == "launch" else f"kernels.{pass_name}.{flag}"
    free = {"backend.name": "triton", "autotune": False, "fuse_swiglu": False}
    off = {"permute_x": False, "permute_y": False}
    forbids = TMA[place]
    other = "permute_y" if forbids == "permute_x" else "permute_x"
    assert ids(case(free, off, {key: True})) == []
    name = f"{forbids}-{pass_name}-{flag.removeprefix('use_').replace('_', '-')}"
    assert name in ids(case(free, off, {key: True, forbids: True}))
    if stated == "launch":
        assert ids(case(free, off, {key: True, other: True})) == []
    if pass_name == "bwd_dW":  # copied into order first: no index is left
        gather = key.replace(flag, "gather_first")
        assert name not in ids(case(free, off, {key: True, forbids: True, gather: True}))


def test_every_other_tma_flag_is_free() -> None:
    """With both permutations on, the TMA flags outside of the table are legal (weights, and the plain sides)."""
    free = {"backend.name": "triton", "autotune": False, "fuse_swiglu": False}
    for pass_name, kernel in PASSES.items():
        for gemm in GEMMS:
            for flag in (name for name in vars(kernel()) if name.startswith("use_tma")):
                legal = ids(case(free, {f"kernels.{pass_name}.{gemm}.{flag}": True})) == []
                assert legal == ((pass_name, gemm, flag) not in TMA), (pass_name, gemm, flag)


@pytest.mark.parametrize("side", ["block_m", "block_n", "block_k"])
@pytest.mark.parametrize(("size", "legal"), [(8, 0), (15, 0), (16, 1), (24, 0), (64, 1), (256, 1), (512, 0), (-16, 0)])
def test_tile_sizes(side: str, size: int, legal: int) -> None:
    small = {"dtype": "float16", "kernels.bwd_dW.num_stages": 1}
    judged = case({"backend.name": "triton", "autotune": False, f"kernels.bwd_dW.down.{side}": size}, small)
    assert ids(judged) == ([] if legal else ["tile-size"])


@pytest.mark.parametrize(("key", "size", "legal"), [("num_warps", n, n in {1, 2, 4, 8, 16}) for n in (0, 1, 3, 16, 32)])
def test_warps(key: str, size: int, legal: bool) -> None:
    judged = case({"backend.name": "triton", "autotune": False, f"kernels.fwd.{key}": size})
    assert ids(judged) == ([] if legal else ["num-warps"])


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [({"weights.seed": 2**32 - 1}, None), ({"weights.seed": 2**32}, "seed"), ({"weights.seed": 0}, None),
     ({"model.top_k": 8}, None), ({"model.top_k": 1, "model.num_experts": 1}, None), ({"model.top_k": 0}, "sizes"),
     ({"model.num_experts": -1}, "sizes"), ({"backend.name": "triton", "model.hidden_act": "silu"}, None)],
)  # fmt: skip
def test_borders(overrides: dict[str, Any], rule: str | None) -> None:
    assert ids(case(overrides)) == ([] if rule is None else [rule])


@pytest.mark.parametrize(("stages", "legal"), [(-1, 0), (0, 0), (1, 1), (8, 1), (9, 0)])
def test_stages(stages: int, legal: int) -> None:
    tile = {f"kernels.bwd_dX.block_{side}": 16 for side in "mnk"}
    judged = case({"backend.name": "triton", "autotune": False, "kernels.bwd_dX.num_stages": stages}, tile)
    assert ids(judged) == ([] if legal else ["num-stages"])


@pytest.mark.parametrize("dtype", DType)
def test_alignment(dtype: DType) -> None:
    """TMA needs rows of a multiple of 16 bytes: H and I from 1 to 40, every dtype."""
    base = {"backend.name": "triton", "autotune": False, "permute_x": False, "permute_y": False, "dtype": dtype.name}
    for h, i in ((h, 16) for h in range(1, 41)):
        for sizes in ({"model.hidden_size": h, "model.moe_intermediate_size": i},
                      {"model.hidden_size": i, "model.moe_intermediate_size": h}):  # fmt: skip
            judged = case(base, sizes, {"kernels.fwd.use_tma_load_w": True})
            assert ids(judged) == ([] if h * dtype.itemsize % 16 == 0 else ["tma-alignment"]), (h, dtype)
    assert ids(case(base, {"model.hidden_size": 47, "kernels.fwd.block_m": 32})) == []


def test_shared_memory_counts_both_operands() -> None:
    """bytes = stages * (both tiles' elements) * itemsize, by pass; the limit itself is legal."""
    forward = KernelConfigForward(block_m=128, block_n=64, block_k=32, num_stages=3)
    assert shared_memory("fwd", forward, DType.float16) == 3 * (128 * 32 + 64 * 32) * 2
    weights = KernelConfigBackward_dW(block_m=16, block_n=64, block_k=32, num_stages=2)
    assert shared_memory("bwd_dW", weights, DType.float64) == 2 * (16 * 64 + 16 * 32) * 8
    for pass_name, kernel in PASSES.items():
        for stages in range(1, 9):
            config = kernel(block_m=64, block_n=128, block_k=128, num_stages=stages)
            base = {"backend.name": "triton", "autotune": False, "dtype": "float32"}
            fields = {
                f"kernels.{pass_name}.{name}": getattr(config, name) for name in ("block_m", "block_n", "block_k")
            }
            judged = case(base, fields, {f"kernels.{pass_name}.num_stages": stages})
            fits = shared_memory(pass_name, config, DType.float32) <= MAX_SHARED_MEMORY
            assert ids(judged) == ([] if fits else ["shared-memory"]), (pass_name, stages)


# --- the warp-specialised kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_name", PASSES)
def test_specialized_tiles(pass_name: str) -> None:
    """Of all tiles of these sides those of the kernels alone, for both GEMMs or for one."""
    legal = []
    for tile in product((64, 128, 256), repeat=3):
        sides = dict(zip(("block_m", "block_n", "block_k"), tile, strict=True))
        found = {node: ids(case(specialized(node, **sides))) for node in (pass_name, f"{pass_name}.up")}
        assert len({tuple(broken) for broken in found.values()}) == 1, found
        legal += [tile] if found[pass_name] == [] else []
        assert ("warp-specialize" in found[pass_name]) == (found[pass_name] != [])
    assert legal == SPECIALIZED[pass_name]


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize(("name", "values"), [("num_stages", range(1, 9)), ("num_warps", (1, 2, 4, 8, 16))])
def test_specialized_stages_and_warps(pass_name: str, name: str, values: Any) -> None:
    legal = {n for n in values if "warp-specialize" not in ids(case(specialized(pass_name, **{name: n})))}
    assert legal == ({3, 4} if name == "num_stages" else {8})
    assert all(ids(case(specialized(pass_name, **{name: n}))) == [] for n in legal)


@pytest.mark.parametrize("dtype", DType)
def test_specialized_dtypes(dtype: DType) -> None:
    """Two bytes, and nothing wider; what is unknown until the weights were looked at is not judged."""
    for pass_name in PASSES:
        overrides = {**specialized(pass_name), "dtype": dtype.name}
        found = ids(case(overrides))
        assert found == [] if dtype.itemsize == 2 else found[0] == "warp-specialize", (pass_name, found)
        live = from_mapping(nested({**overrides, "dtype": None, "weights.source": "live"}))
        assert ids(make_case(live)) == []
        assert ids(make_case(live, ResolvedModel(64, 32, 8, 2, True, "silu"), dtype)) == found


def test_specialized_kernels_leave_the_other_flags_alone() -> None:
    """flatten and each TMA flag, in every pass and GEMM; nothing else is wrong with these configs."""
    free = {"permute_x": False, "permute_y": False, "fuse_swiglu": False}
    for (pass_name, kernel), gemm in product(PASSES.items(), GEMMS):
        node = f"{pass_name}.{gemm}"
        for flag in (name for name in vars(kernel()) if name == "flatten" or name.startswith("use_tma")):
            judged = case(specialized(node, **{flag: True}), free)
            assert ids(judged) == ["warp-specialize"], (node, flag)
            with pytest.raises(ConfigError, match=rf": kernels\.{node}\.warp_specialize=true with {flag}=true; "):
                check_rules(judged)
            assert ids(case(specialized(node, **{flag: True, "warp_specialize": False}), free)) == []


def test_specialized_kernels_say_what_came() -> None:
    """The GEMM that is wrong, and of a tile, its warps and its stages all three; a dtype by its name."""
    wrong = specialized("bwd_dW.down", block_m=32)
    with pytest.raises(ConfigError, match=r"bwd_dW\.down\.\w+=true with tile 32x128x256, num_warps=8, num_stages=3; "):
        check_rules(case(wrong))
    with pytest.raises(ConfigError, match=r"^warp-specialize: kernels\.fwd\.up\.warp_specialize=true in float32; "):
        check_rules(case(specialized("fwd"), {"dtype": "float32"}))


@pytest.mark.parametrize("switches", list(product((False, True), repeat=4)))
def test_specialized_kernels_follow_an_index(switches: tuple[bool, ...]) -> None:
    """All six launches with every setting of the switches: TMA moves only what is in expert order."""
    names = ("permute_x", "permute_y", "fuse_swiglu", "fuse_combine")
    assert ids(case(*map(specialized, PASSES), dict(zip(names, switches, strict=True)))) == []


@pytest.mark.parametrize("size", ["hidden_size", "moe_intermediate_size"])
def test_specialized_kernels_need_aligned_rows(size: str) -> None:
    """They move by TMA: rows of a multiple of 16 bytes, 8 elements."""
    for pass_name, width in product(PASSES, (8, 50, 56, 60)):
        judged = case(specialized(pass_name), {f"model.{size}": width})
        assert ids(judged) == ([] if width % 8 == 0 else ["tma-alignment"]), (pass_name, width)
    row = rf"warp_specialize=true with model\.{size}=50 in bfloat16: 100 bytes a row; TMA needs rows"
    with pytest.raises(ConfigError, match=rf"^tma-alignment: kernels\.bwd_dX\.up\.{row}"):
        check_rules(case(specialized("bwd_dX"), {f"model.{size}": 50}))


def test_specialized_shared_memory() -> None:
    """A ring of operands, and half as much as a tile of 128 x 256 results beside it. The longest ring fits."""
    for pass_name, tile in ((p, tile) for p, tiles in SPECIALIZED.items() for tile in tiles):
        for stages in (3, 4):
            plain = PASSES[pass_name](*tile, num_warps=8, num_stages=stages)
            ring = stages * (64 * 128 + 64 * 256) * 2
            assert shared_memory(pass_name, plain, DType.bfloat16) == ring
            special = replace(plain, warp_specialize=True)
            assert shared_memory(pass_name, special, DType.float16) == ring + 128 * 128 * 2 <= MAX_SHARED_MEMORY


# --- what is known, and in which process ------------------------------------------------------------------------------


def test_unknown_sizes_are_not_judged() -> None:
    """A live block's sizes and dtype are unknown before it was looked at; given, they are judged."""
    kernels = KernelsConfig(fwd=KernelConfigForward(use_tma_load_w=True))
    config = MoeConfig(backend=BackendConfig(Backend.triton), kernels=kernels, autotune=False)
    config.weights = WeightsConfig(source=WeightsSource.live)
    config.permute_x = config.permute_y = False
    assert ids(make_case(config)) == []
    odd = ResolvedModel(50, 32, 8, 2, True, "silu")
    assert ids(make_case(config, odd, DType.float32)) == ["tma-alignment"]
    assert ids(make_case(config, odd, DType.float64)) == []
    assert ids(make_case(config, replace(odd, hidden_act="gelu"))) == ["triton-activation"]


def test_a_case_of_random_weights_is_the_tiny_model_in_float32() -> None:
    made = make_case(MoeConfig(model=ModelConfig(top_k=3)))
    assert made.model == ResolvedModel(64, 32, 8, 3, True, "silu")
    assert made.dtype is DType.float32
    assert make_case(MoeConfig(), dtype=DType.float16).dtype is DType.float16
    checkpoint = MoeConfig(weights=WeightsConfig(WeightsSource.checkpoint, path="x", layer=0))
    assert (make_case(checkpoint).dtype, make_case(checkpoint).model.hidden_size) == (None, None)


def test_kernels_given_in_python_are_judged_alike() -> None:
    """A kernel config, a pair, or a node: the same rule."""
    wrong = KernelConfigForward(use_tma_load_x=True)
    for given in (wrong, (wrong, None), (wrong, KernelConfigForward())):
        kernels = KernelsConfig(fwd=given)
        config = MoeConfig(backend=BackendConfig(Backend.triton), kernels=kernels, autotune=False)
        assert ids(make_case(config)) == ["permute_x-fwd-tma-load-x"]
    config.kernels = KernelsConfig(fwd=(None, KernelConfigForward(use_tma_load_x=True)))
    assert ids(make_case(config)) == []


def test_judged_without_torch() -> None:
    """The whole table on examples and twins, in a process that loads neither torch nor triton; seconds, no GPU."""
    code = """
import json, sys
from moefactory.config import from_mapping
from moefactory.rules import RULES, broken_rules, make_case
def nested(overrides):
    nodes = {}
    for key, value in overrides.items():
        node = nodes
        *above, name = key.split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[name] = value
    return nodes
found = [[r.id for r, _ in broken_rules(make_case(from_mapping(nested(rule.example))))] for rule in RULES]
print(json.dumps([found, sorted({"torch", "triton", "transformers", "hydra"} & set(sys.modules))]))
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == [[[rule.id] for rule in RULES], []]
