"""The test matrix is complete: judged from its printed JSON alone, with coverage recomputed here.

Nothing of the generator is imported but `config_of`, which is checked against Hydra. What must be in the matrix comes
from elsewhere: the options from Hydra's search path, the fields from the dataclasses, the rules from their table, the
TMA table from the design. `demands` lists what is needed and which rows hold it; a demand without a row is a hole.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from moefactory.config import GEMMS, PASSES, Backend, DType, MoeConfig, Saved, WeightsSource, as_dict, from_mapping
from moefactory.rules import RULES, broken_rules, make_case

FLAGS = ("permute_x", "permute_y", "fuse_swiglu", "fuse_combine", "dW_only", "dX_only", "autotune", "trace")
SIZES = ("hidden_size", "moe_intermediate_size", "num_experts", "top_k", "norm_topk_prob")
TMA = {  # launch -> (flag, the TMA flag that it forbids), from the design and from what the fused epilogue adds
    ("fwd", "up"): [("permute_x", "use_tma_load_x")],
    ("fwd", "down"): [("permute_y", "use_tma_store")],
    ("bwd_dX", "up"): [("permute_x", "use_tma_store")],
    ("bwd_dX", "down"): [("permute_y", "use_tma_load_dy"), ("fuse_swiglu", "use_tma_store")],
    ("bwd_dW", "up"): [("permute_x", "use_tma_load_x")],
    ("bwd_dW", "down"): [("permute_y", "use_tma_load_dy")],
}
GATHER = "kernels.bwd_dW.{}.gather_first"  # with it the operand is in order before the product: nothing is forbidden
SPECIALIZED = {  # launch -> the tiles of its warp-specialised kernel, and the switches that change it
    ("fwd", "up"): ([(128, 256, 64)], ["permute_x", "fuse_swiglu"]),
    ("fwd", "down"): ([(128, 256, 64)], ["permute_y"]),
    ("bwd_dX", "up"): ([(128, 64, 256)], ["permute_x"]),
    ("bwd_dX", "down"): ([(128, 64, 256)], ["permute_y", "fuse_swiglu", "fuse_combine"]),
    ("bwd_dW", "up"): ([(64, 128, 256), (64, 256, 128)], ["permute_x"]),
    ("bwd_dW", "down"): ([(64, 128, 256), (64, 256, 128)], ["permute_y"]),
}
NOT_RUN_HERE = {  # the whole skip budget of a CPU: which legal rows it cannot run, and the reason it must give
    "device=cuda": (lambda config: config["device"] == "cuda", r"^device=cuda but torch sees no GPU here$"),
    "interpreted warp_specialize": (
        lambda config: any(value is True for key, value in config.items() if key.endswith(".warp_specialize")),
        r"^kernels\.(fwd|bwd_dX|bwd_dW)\.(up|down)\.warp_specialize=true needs a GPU: its kernel is compiled only",
    ),
    "interpreted bfloat16": (
        lambda config: (config["backend.name"], config["dtype"]) == ("triton", "bfloat16"),
        r"^Triton's interpreter does not compute bfloat16 rightly",
    ),
}
Flat = dict[str, Any]
Rows = list[dict[str, Any]]


# --- what a row is, without the generator -----------------------------------------------------------------------------


def leaves(nodes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nodes.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


DEFAULT: Flat = dict(leaves(as_dict(MoeConfig())))
CONF = Path(__file__).parent.parent / "conf" / "moe"
OPTIONS = {
    group.name: {file.stem: dict(leaves(OmegaConf.to_container(OmegaConf.load(file)))) for file in group.glob("*.yaml")}
    for group in CONF.iterdir()
    if group.is_dir()
}


def flat(overrides: list[str]) -> Flat:
    """Every key of the config with these overrides, enums by name."""
    config = dict(DEFAULT)
    stated = [text.split("=", 1) for text in overrides]
    for key, value in stated:
        if key.startswith("moe/"):
            group = key.removeprefix("moe/")
            config.update({f"{group}.{name}": v for name, v in OPTIONS[group][value].items()})
    for key, value in stated:
        if key.startswith("moe."):
            words = {"true": True, "false": False, "null": None}
            plain = words[value] if value in words else int(value) if re.fullmatch(r"-?\d+", value) else value
            assert key.removeprefix("moe.") in config, key
            config[key.removeprefix("moe.")] = plain
    return config


ENUMS = {"backend.name": Backend, "weights.source": WeightsSource, "dtype": DType, "saved": Saved}


def broken(config: Flat) -> list[str]:
    """The ids of the rules that a flat config breaks."""
    made = MoeConfig()
    for key, value in config.items():
        if value != DEFAULT[key]:
            *above, name = key.split(".")
            node: Any = made
            for part in above:
                node = getattr(node, part)
            setattr(node, name, ENUMS[key][value] if key in ENUMS and value is not None else value)
    return [rule.id for rule, _ in broken_rules(make_case(made))]


def kernels(config: Flat) -> str:
    """The stated kernel fields, as one value; empty when nothing is stated."""
    return json.dumps({key: v for key, v in config.items() if key.startswith("kernels.") and v is not None})


# --- what is demanded -------------------------------------------------------------------------------------------------

Holders = dict[tuple[Any, ...], list[str]]  # what is demanded -> the ids of the rows that hold it


def demands(rows: Rows) -> Holders:
    """Every demand on the matrix, with the rows that meet it."""
    configs = {row["id"]: flat(row["overrides"]) for row in rows}
    needed: Holders = {}
    for part in (_flags, _tma, _specialized, _tiles, _options, _fields, _rules, _covering):
        for demand in part(rows, configs, needed):
            needed.setdefault(demand, [])
    return needed


def holes(rows: Rows) -> list[tuple[Any, ...]]:
    return [demand for demand, held in demands(rows).items() if not held]


def _hold(needed: Holders, demand: tuple[Any, ...], row: dict[str, Any]) -> None:
    needed.setdefault(demand, []).append(row["id"])


def _flags(rows: Rows, configs: dict[str, Flat], needed: Holders) -> Iterator[tuple[Any, ...]]:
    """Every combination of backend, explicit kernels and the eight flags, all else at its default."""
    small = kernels(flat(["moe/kernels=small"]))
    for row in rows:
        config = configs[row["id"]]
        rest = {k: v for k, v in config.items() if k not in {*FLAGS, "backend.name"} and not k.startswith("kernels.")}
        if kernels(config) in {"{}", small} and all(DEFAULT[k] == v for k, v in rest.items()) and row["tokens"] == 5:
            chosen = (config["backend.name"], kernels(config) != "{}", *(config[flag] for flag in FLAGS))
            _hold(needed, ("flags", *chosen), row)
    for backend, *switches in product(("torch", "triton"), *[(False, True)] * (1 + len(FLAGS))):
        yield ("flags", backend, *switches)


def _tma(rows: Rows, configs: dict[str, Flat], needed: Holders) -> Iterator[tuple[Any, ...]]:
    """For each launch its three TMA flags and the switches tied to them, in every combination, all else at default."""
    free = {"backend.name": "triton", "autotune": False}
    for row in rows:
        config = {key: value for key, value in configs[row["id"]].items() if value != {**DEFAULT, **free}[key]}
        for launch in TMA:
            names = switches(launch)
            if set(tma_keys(*launch)) <= set(config) <= set(names):
                _hold(needed, ("tma", *((name, configs[row["id"]][name]) for name in names)), row)
    for names in map(switches, TMA):
        for values in product((False, True), repeat=len(names)):
            yield ("tma", *zip(names, values, strict=True))


def switches(launch: tuple[str, str]) -> list[str]:
    gather = [GATHER.format(launch[1])] if launch[0] == "bwd_dW" else []
    return [*(flag for flag, _ in TMA[launch]), *gather, *tma_keys(*launch)]


def _specialized(rows: Rows, configs: dict[str, Flat], needed: Holders) -> Iterator[tuple[Any, ...]]:
    """Each launch alone as its warp-specialised kernel, each dW GEMM with gather_first, and all six at once.

    A launch alone: its tiles, its switches and both 16-bit dtypes, on sizes that end inside a tile. All six: the other
    number of stages and every switch, on sizes of whole tiles. Always so many rows that an expert has several tiles.
    """
    wanted: dict[tuple[Any, ...], Flat] = {}
    ragged = {"model.hidden_size": 264, "model.moe_intermediate_size": 136, "model.num_experts": 4}
    for (pass_name, gemm), (tiles, names) in SPECIALIZED.items():
        node = f"{pass_name}.{gemm}"
        for dtype, tile, *values in product(("bfloat16", "float16"), tiles, *[(False, True)] * len(names)):
            config = {**specialized(node, tile), **ragged, "dtype": dtype, **dict(zip(names, values, strict=True))}
            wanted["specialized", dtype, node, tile, *values] = config
        if pass_name == "bwd_dW":
            config = {**specialized(node, tiles[0]), **ragged, "dtype": "bfloat16", GATHER.format(gemm): True}
            wanted["specialized", node, "gather_first"] = config
    nodes = [("fwd", (128, 256, 64), 4), ("bwd_dX", (128, 64, 256), 4), ("bwd_dW", (64, 128, 256), 4)]
    six = {key: value for node, tile, stages in nodes for key, value in specialized(node, tile, stages).items()}
    six |= {"model.hidden_size": 256, "model.moe_intermediate_size": 128, "model.num_experts": 4, "dtype": "bfloat16"}
    names = ["permute_x", "permute_y", "fuse_swiglu", "fuse_combine"]
    for values in product((False, True), repeat=len(names)):
        wanted["specialized", "all", *values] = {**six, **dict(zip(names, values, strict=True))}
    for demand, config in wanted.items():
        whole = {**DEFAULT, "backend.name": "triton", "autotune": False, **config}
        for row in rows:
            if configs[row["id"]] == whole and row["tokens"] == 700 and row["valid"]:
                _hold(needed, demand, row)
        yield demand


def specialized(node: str, tile: tuple[int, int, int], stages: int | None = None) -> Flat:
    """What a kernel node states to run its warp-specialised kernel."""
    fields = {"warp_specialize": True, "num_warps": 8, "num_stages": stages}
    fields |= dict(zip(("block_m", "block_n", "block_k"), tile, strict=True))
    return {f"kernels.{node}.{name}": value for name, value in fields.items()}


def _tiles(rows: Rows, configs: dict[str, Flat], needed: Holders) -> Iterator[tuple[Any, ...]]:
    """For each kernel node (both GEMMs, up, down) a legal row that states all of its tile fields and nothing else.

    Not `warp_specialize`, which has tiles of its own.
    """
    nodes = {
        node: {f"kernels.{node}.{name}" for name in vars(kernel()) if not re.match("use_tma|warp_specialize", name)}
        for pass_name, kernel in PASSES.items()
        for node in (pass_name, f"{pass_name}.up", f"{pass_name}.down")
    }
    for row in rows:
        config = configs[row["id"]]
        stated = {key for key, value in config.items() if value != DEFAULT[key]} - {"backend.name", "autotune"}
        for node, names in nodes.items():
            if stated == names and row["valid"]:
                _hold(needed, ("tiles", node), row)
    yield from (("tiles", node) for node in nodes)


def tma_keys(pass_name: str, gemm: str) -> list[str]:
    return [f"kernels.{pass_name}.{gemm}.{name}" for name in vars(PASSES[pass_name]()) if name.startswith("use_tma")]


def _options(rows: Rows, configs: dict[str, Flat], needed: Holders) -> Iterator[tuple[Any, ...]]:
    """Every option of every group in a legal row of each backend that may have it; layers, seeds and devices."""
    for row in rows:
        if row["valid"]:
            chosen = dict(text.split("=", 1) for text in row["overrides"])
            backend = configs[row["id"]]["backend.name"]
            for group, option in ((k.removeprefix("moe/"), v) for k, v in chosen.items() if k.startswith("moe/")):
                _hold(needed, ("option", backend, group, option), row)
            for key in ("weights.layer", "weights.seed", "device"):
                _hold(needed, ("value", backend, key, configs[row["id"]][key]), row)
    presets = {"backend": "torch", "model": "auto", "weights": "auto", "kernels": "shipped"}
    for backend, (group, names) in product(("torch", "triton"), OPTIONS.items()):
        for name in set(names) - {presets[group]}:
            if group == "backend":
                yield "option", name, group, name
            elif not (backend == "torch" and group == "kernels"):  # the rule torch-kernels
                yield "option", backend, group, name
    for backend in ("torch", "triton"):
        yield from (("value", backend, "weights.layer", n) for n in (None, 0, 1))
        yield from (("value", backend, "weights.seed", n) for n in (0, 1))
        yield from (("value", backend, "device", name) for name in (None, "cpu", "cuda"))


def _fields(rows: Rows, configs: dict[str, Flat], needed: Holders) -> Iterator[tuple[Any, ...]]:
    """Every field of the schema: not stated and stated, or two values of one that is always stated; in legal rows."""
    for row in rows:
        if row["valid"]:
            for key, value in configs[row["id"]].items():
                if value != DEFAULT[key]:
                    _hold(needed, ("field", key), row)
    yield from (("field", key) for key in DEFAULT)
    for field, default in DEFAULT.items():  # a row with the default exists as soon as any row leaves the field alone
        assert any(config[field] == default for config in configs.values()), field


def _rules(rows: Rows, configs: dict[str, Flat], needed: Holders) -> Iterator[tuple[Any, ...]]:
    """Each rule broken alone, by its own example and by a row with a legal neighbour at most two keys away."""
    for rule in RULES:
        example = {**DEFAULT, **rule.example}
        twin = {**example, **rule.repaired}
        for row in rows:
            config = configs[row["id"]]
            if config == example and row["rule"] == rule.id:
                _hold(needed, ("example", rule.id), row)
            if config == twin and row["valid"]:
                _hold(needed, ("twin", rule.id), row)
        yield "example", rule.id
        yield "twin", rule.id
        assert broken(example) == [rule.id]
        assert sum(example[key] != twin[key] for key in DEFAULT) <= 2


# --- pairs and triples ------------------------------------------------------------------------------------------------

UNREAD = {"fuse_combine", "norm_topk_prob", "tokens"}  # no rule reads them: they are feasible with anything


def _settings(row: dict[str, Any], config: Flat) -> Flat:
    """What a row of the pairs or triples chooses, by field; explicit kernels are one choice."""
    chosen = {flag: config[flag] for flag in FLAGS} | {name: config[f"model.{name}"] for name in SIZES}
    chosen |= {"dtype": config["dtype"], "tokens": row["tokens"]}
    if row["part"] == "pairs":
        return chosen | {"hidden_act": config["model.hidden_act"]}
    return chosen | {"kernels": kernels(config), "saved": config["saved"], "sm_margin": config["sm_margin"]}


_FEASIBLE: dict[tuple[str, frozenset[Any]], bool] = {}


def _feasible(backend: str, others: list[Flat]) -> Any:
    """A function that says whether some legal row has these settings: tried on top of every row there is."""

    def feasible(settings: Flat) -> bool:
        read = {key: value for key, value in settings.items() if key not in UNREAD}
        key = (backend, frozenset(read.items()))
        if key not in _FEASIBLE:
            _FEASIBLE[key] = not read or any(not broken(_with(backend, {**other, **read})) for other in others)
        return _FEASIBLE[key]

    return feasible


def _with(backend: str, settings: Flat) -> Flat:
    config = {**DEFAULT, "backend.name": backend}
    for key, value in settings.items():
        if key == "kernels":
            config.update(json.loads(value))
        elif key != "tokens":
            config[f"model.{key}" if key in {*SIZES, "hidden_act"} else key] = value
    return config


def _covering(rows: Rows, configs: dict[str, Flat], needed: Holders) -> Iterator[tuple[Any, ...]]:
    """Every feasible pair of settings on torch, every feasible triple on triton, each part by itself."""
    for part, backend, strength in (("pairs", "torch", 2), ("triples", "triton", 3)):
        own = [(row, _settings(row, configs[row["id"]])) for row in rows if row["part"] == part]
        assert all(configs[row["id"]]["backend.name"] == backend for row, _ in own)
        for row, settings in own:
            for chosen in combinations(sorted(settings.items()), strength):
                _hold(needed, (part, *chosen), row)
        values = {key: sorted({s[key] for _, s in own}, key=str) for key in own[0][1]}
        assert set(values["dtype"]) == {dtype.name for dtype in DType}
        assert {0, 1} < set(values["tokens"])
        assert min(len(found) for found in values.values()) >= 2
        feasible = _feasible(backend, [settings for _, settings in own])
        for names in combinations(sorted(values), strength):
            for chosen in product(*(values[name] for name in names)):
                settings = dict(zip(names, chosen, strict=True))
                if (part, *settings.items()) in needed or feasible(settings):
                    yield (part, *settings.items())


# --- the tests --------------------------------------------------------------------------------------------------------


def run_matrix(*arguments: str) -> Any:
    command = [sys.executable, "-m", "moefactory.matrix", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return run_matrix("--judge")["rows"]


@pytest.fixture(scope="module")
def needed(rows: Rows) -> Holders:
    return demands(rows)


def test_no_holes(needed: Holders) -> None:
    assert [demand for demand, held in needed.items() if not held] == []


def test_every_row_is_needed(rows: Rows, needed: Holders) -> None:
    """Each row alone meets some demand: take any one away and there is a hole."""
    alone = {held[0] for held in needed.values() if len(held) == 1}
    assert [row["id"] for row in rows if row["id"] not in alone] == []


PARTS = ["flags", "tma", "specialized", "tiles", "options", "pairs", "triples", "rules"]


@pytest.mark.parametrize("part", PARTS)
def test_a_deleted_row_is_missed(rows: Rows, part: str) -> None:
    """The judgement itself, on the matrix without one row of the part."""
    own = [row for row in rows if row["part"] == part]
    gone = own[len(own) // 2]
    assert holes([row for row in rows if row is not gone]) != []


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_missed(rows: Rows, part: str) -> None:
    """Without all rows of a part; the pairs and triples cannot vanish without an error either."""
    rest = [row for row in rows if row["part"] != part]
    assert len(rest) < len(rows)
    try:
        assert holes(rest) != []
    except (IndexError, AssertionError):
        assert part in {"pairs", "triples"}


def test_verdicts(rows: Rows) -> None:
    """Each row's verdict is that of the rules on a config that was put together here; 480 of 1024 flags are legal."""
    for row in rows:
        found = broken(flat(row["overrides"]))
        assert (row["valid"], row["rule"]) == (not found, found[0] if found else None), row["id"]
    flags = [row["valid"] for row in rows if row["part"] == "flags"]
    # 3 of 4 gradient choices, 2^6 other flags; explicit kernels: triton only, and not with autotune
    assert (len(flags), sum(flags)) == (1024, 3 * 2**6 + 3 * 2**6 + 3 * 2**5)
    tma = [row for row in rows if row["part"] == "tma"]
    # of 8 combinations of TMA flags with the switch on 4 are forbidden; by gather_first none; by two switches 6 of 8
    assert len(tma) == 3 * 2**4 + 3 * 2**5
    assert sum(row["valid"] for row in tma) == 3 * (8 + 4) + (8 + 4 + 4 + 2) + 2 * (8 + 8 + 8 + 4)
    for row in tma:
        config = flat(row["overrides"])
        forbidden = [
            f"kernels.{p}.{g}.{key}"
            for (p, g), ties in TMA.items()
            for flag, key in ties
            if config[flag] and not (p == "bwd_dW" and config[GATHER.format(g)])
        ]
        assert row["valid"] == (not any(config[key] for key in forbidden)), row["id"]
    special = [row["valid"] for row in rows if row["part"] == "specialized"]
    # two dtypes of each launch's tiles and switches; gather_first of two GEMMs; four switches of all six at once
    assert len(special) == sum(special) == 2 * (4 + 2 + 2 + 8 + 2 * 2 + 2 * 2) + 2 + 2**4


def test_ids(rows: Rows) -> None:
    """Unique, at most 80 characters, the overrides themselves where they fit, whitespace-free."""
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids)
    configs = [json.dumps([flat(row["overrides"]), row["tokens"]]) for row in rows]
    assert len(set(configs)) == len(configs)
    for row in rows:
        assert row["overrides"] == sorted(row["overrides"])
        tokens = [] if row["tokens"] == 5 else [f"tokens={row['tokens']}"]
        text = ",".join([*row["overrides"], *tokens]) or "default"
        assert row["id"] == text or (len(text) > 80 and row["id"][:71] == text[:71] and len(row["id"]) == 80)
        assert not re.search(r"\s", row["id"])


def undeclared(rows: Rows) -> list[str]:
    """Rows that are not run although nobody declared so, and declared ones that are run or give another reason."""
    found = []
    for row in rows:
        config = flat(row["overrides"])
        reasons = [reason for applies, reason in NOT_RUN_HERE.values() if row["valid"] and applies(config)]
        as_declared = bool(reasons) and row["runnable"] is False and bool(re.search(reasons[0], row["reason"]))
        if not as_declared and (reasons or row["runnable"] is not (True if row["valid"] else None)):
            found.append(row["id"])
    return found


def test_no_undeclared_skip(rows: Rows) -> None:
    """Every legal row can be run here, but for the declared ones; an illegal row has no second answer."""
    assert undeclared(rows) == []
    skipped = [flat(row["overrides"]) for row in rows if row["runnable"] is False]
    assert all(any(applies(config) for config in skipped) for applies, _ in NOT_RUN_HERE.values())


def test_an_undeclared_skip_is_found(rows: Rows) -> None:
    """A row that stops running, a declared one for another reason or in vain, an illegal one with a second answer."""
    runs = next(row for row in rows if row["runnable"])
    skipped = next(row for row in rows if row["runnable"] is False)
    illegal = next(row for row in rows if not row["valid"])
    assert undeclared([runs, skipped, illegal]) == []
    assert undeclared([{**runs, "runnable": False, "reason": "no time"}]) == [runs["id"]]
    assert undeclared([{**runs, "runnable": None}]) == [runs["id"]]
    assert undeclared([{**skipped, "reason": "no time"}]) == [skipped["id"]]
    assert undeclared([{**skipped, "runnable": True, "reason": None}]) == [skipped["id"]]
    assert undeclared([{**illegal, "runnable": True}]) == [illegal["id"]]


def test_same_output_in_every_process(rows: Rows) -> None:
    """Also under another hash seed, and without torch or triton in the process."""
    code = (
        "import sys; from moefactory import matrix; matrix.main([]); assert not {'torch', 'triton'} & set(sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}
    ).stdout
    unjudged = [{**row, "runnable": None, "reason": None} for row in rows]
    assert json.loads(out)["rows"] == unjudged


def test_rows_as_hydra_composes_them(rows: Rows) -> None:
    """Legal rows of each part: Hydra's config, `config_of` and the one put together here agree."""
    from moefactory.matrix import Row, config_of

    sample = [row for part in PARTS for row in some(rows, part)]
    with foreign_app():
        for row in sample:
            cfg = compose("app", overrides=row["overrides"])
            nodes = {key: cfg.moe[key] for key in cfg.moe if not str(key).startswith("_")}
            composed = from_mapping(nodes)
            merged = config_of(Row(**{**row, "overrides": tuple(row["overrides"])}))
            assert composed == merged, row["id"]
            assert dict(leaves(as_dict(composed))) == flat(row["overrides"]), row["id"]


def some(rows: Rows, part: str) -> Rows:
    own = [row for row in rows if row["part"] == part and row["valid"]]
    return own[:: max(1, len(own) // 5)]


class foreign_app:
    """An application that only says ``defaults: - moe: qwen3``."""

    def __enter__(self) -> None:
        import tempfile

        GlobalHydra.instance().clear()
        self.folder = tempfile.TemporaryDirectory()
        (Path(self.folder.name) / "app.yaml").write_text("defaults:\n  - moe: qwen3\n  - _self_\n")
        self.context = initialize_config_dir(self.folder.name, version_base="1.3")
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
        self.folder.cleanup()


def test_options_are_those_hydra_sees() -> None:
    """The groups read from the folder above are what a foreign application can choose from."""
    with foreign_app():
        loader = GlobalHydra.instance().config_loader()
        groups = {g: set(loader.get_group_options(f"moe/{g}")) for g in loader.list_groups("moe")}
    assert groups == {group: set(names) for group, names in OPTIONS.items()}
    assert set(GEMMS) == {"up", "down"}


# --- shards -----------------------------------------------------------------------------------------------------------


def test_github_shards(rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """GitHub takes an include list of at most 256 jobs; every legal row is in exactly one shard, none is empty."""
    from moefactory.matrix import github_shards, main, shard_of

    assert main(["--github"]) == 0
    matrix = json.loads(capsys.readouterr().out)
    assert matrix == github_shards()
    jobs = matrix["include"]
    count = len(jobs)
    assert 1 < count <= 256
    assert [job["shard"] for job in jobs] == [f"{i}/{count}" for i in range(1, count + 1)]
    assert len({job["name"] for job in jobs}) == count
    shards = [shard_of(row["id"], count) for row in rows if row["valid"]]
    assert set(shards) == set(range(1, count + 1))
    main(["--github", "--max-jobs", "3"])
    assert json.loads(capsys.readouterr().out)["include"][-1]["shard"] == "3/3"
    assert github_shards(1)["include"] == [{"name": "matrix 1/1", "shard": "1/1"}]
    with pytest.raises(ValueError, match="max_jobs: got 0; allowed: 1 or more"):
        github_shards(0)


def test_shard_of_is_stable() -> None:
    """By a hash of the id alone; these values must never change, or a row would change its job between versions."""
    from moefactory.matrix import shard_of

    assert [shard_of(text, 8) for text in ("default", "moe/backend=triton", "x")] == [8, 1, 2]
