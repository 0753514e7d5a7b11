"""moefactory inside of other people's Hydra applications: found by the plugin, typed, refused in one line, polite.

Each test composes as an application that knows nothing of moefactory but ``defaults: - moe: qwen3``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import judge
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from hydra.utils import instantiate
from judge import MODEL
from omegaconf import DictConfig, OmegaConf

from moefactory.block import GroupedGEMMResult, Qwen3MoeGroupedGEMMBlock
from moefactory.config import Backend, ConfigError, ResolvedModel, as_dict, from_mapping, model_preset
from moefactory.factory import build

CONF = Path(__file__).parent.parent / "conf"
App = Callable[..., DictConfig]


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    """compose(*overrides, defaults=..., files=...) of an application in a folder of its own."""
    entered: list[Any] = []

    def composed(*overrides: str, defaults: str = "- moe: qwen3", files: dict[str, str] | None = None) -> DictConfig:
        for name, text in {"app.yaml": f"defaults:\n  {defaults}\n  - _self_\n", **(files or {})}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        if not entered:
            GlobalHydra.instance().clear()
            context = initialize_config_dir(str(tmp_path), version_base="1.3")
            context.__enter__()
            entered.append(context)
        return compose("app", overrides=list(overrides))

    yield composed
    for context in entered:
        context.__exit__(None, None, None)
    GlobalHydra.instance().clear()


def checked(node: DictConfig) -> Any:
    """The config as the factory gets it: the node's keys but for the two that Hydra takes."""
    return from_mapping({key: node[key] for key in node if key not in {"_target_", "_recursive_"}})


def fails(call: Callable[[], Any]) -> str:
    """The first line of what an application's user sees."""
    with pytest.raises((HydraException, InstantiationException, ConfigError)) as caught:
        call()
    cause = caught.value.__cause__
    return str(cause if isinstance(cause, ConfigError) else caught.value)


# --- composing --------------------------------------------------------------------------------------------------------


def test_the_plugin_is_found_once() -> None:
    assert [p.__name__ for p in Plugins.instance().discover() if "moefactory" in p.__module__] == [
        "MoefactorySearchPath"
    ]


def test_the_bare_preset_is_the_default(app: App) -> None:
    from moefactory.config import MoeConfig

    cfg = app()
    assert checked(cfg.moe) == MoeConfig()
    assert cfg.moe._target_ == "moefactory.factory.from_nodes"
    assert cfg.moe._recursive_ is False
    assert list(cfg) == ["moe"]


def test_overrides(app: App) -> None:
    """Groups by name, fields by path, typed."""
    cfg = app("moe/backend=triton", "moe/model=qwen3_30b_a3b", "moe.permute_x=false", "moe.kernels.fwd.up.block_m=32",
              "moe.autotune=false", "moe.dtype=bfloat16")  # fmt: skip
    config = checked(cfg.moe)
    assert config.backend.name is Backend.triton
    assert vars(config.model) == vars(model_preset("qwen3_30b_a3b"))
    assert (config.permute_x, config.kernels.fwd.up.block_m, config.kernels.fwd.block_m) == (False, 32, None)


def test_every_option_file_composes(app: App) -> None:
    """Each file in conf/moe, chosen by name; the sizes of the presets are whole."""
    files = [path.relative_to(CONF / "moe").with_suffix("") for path in (CONF / "moe").rglob("*.yaml")]
    assert len(files) > 10
    for path in files:
        override = f"moe={path}" if len(path.parts) == 1 else f"moe/{path.parent}={path.name}"
        config = checked(app(override).moe)
        if path.parts[0] == "model" and path.name != "auto":
            assert ResolvedModel(**vars(config.model)) == model_preset(path.name)


def test_two_blocks_in_one_application(app: App) -> None:
    """`moe@ffn.a` and `moe@ffn.b`: two nodes, overridden apart, built apart."""
    cfg = app(
        "moe/backend@ffn.b.backend=triton", "ffn.a.model.top_k=3", "ffn.a.trace=true", "ffn.b.dtype=float16",
        defaults="- moe@ffn.a: qwen3\n  - moe@ffn.b: qwen3",
    )  # fmt: skip
    assert list(cfg) == ["ffn"]
    a, b = checked(cfg.ffn.a), checked(cfg.ffn.b)
    assert (a.backend.name, a.model.top_k, a.trace, a.dtype) == (Backend.torch, 3, True, None)
    assert (b.backend.name, b.model.top_k, b.trace, b.dtype.name) == (Backend.triton, None, False, "float16")
    blocks = instantiate(cfg.ffn.a), instantiate(cfg.ffn.a)
    assert blocks[0].model.top_k == 3
    assert blocks[0].gate is not blocks[1].gate


def test_a_block_for_each_layer(app: App) -> None:
    """instantiate walks into the application's own nodes and builds every block it finds."""
    cfg = app(defaults="- moe@layers.first: qwen3\n  - moe@layers.second: qwen3")
    layers = instantiate(cfg.layers)
    assert type(layers["first"]) is type(layers["second"]) is Qwen3MoeGroupedGEMMBlock


def test_the_users_own_preset(app: App) -> None:
    """`moe/mine.yaml` on top of ours, an option of their own, and their file wins over ours of the same name."""
    files = {
        "moe/mine.yaml": """
            defaults:
              - qwen3
              - override backend: triton
              - override model: wide
              - _self_
            permute_y: false
            """,
        "moe/model/wide.yaml": "hidden_size: 128\nnum_experts: 16\n",
        "moe/model/tiny.yaml": "hidden_size: 16\n",
    }
    config = checked(app(defaults="- moe: mine", files=files).moe)
    assert (config.backend.name, config.permute_y) == (Backend.triton, False)
    assert (config.model.hidden_size, config.model.num_experts, config.model.top_k) == (128, 16, None)
    config = checked(app("moe/model=tiny", defaults="- moe: qwen3", files=files).moe)
    assert (config.model.hidden_size, config.model.top_k) == (16, None)


def test_interpolation_from_the_application(app: App) -> None:
    """`${width}` of the user's root, resolved through instantiate and through build."""
    cfg = app("+width=48", "moe.model.hidden_size=${width}", "moe.trace=${moe.dX_only}")
    assert instantiate(cfg.moe).model.hidden_size == 48
    assert build({key: cfg.moe[key] for key in ("model", "weights")}).model.hidden_size == 48


# --- typed errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("moe.permute_z=true", ["permute_z"]),
        ("moe.permute_x=perhaps", ["moe.permute_x", "bool"]),
        ("moe.model.top_k=two", ["moe.model.top_k", "Integer"]),
        ("moe.model.top_k=1.5", ["moe.model.top_k", "Integer"]),
        ("moe.dtype=fp8", ["moe.dtype", "float16", "bfloat16"]),
        ("moe.backend.name=cuda", ["moe.backend.name", "torch", "triton"]),
        ("moe/backend=cuda", ["moe/backend", "torch", "triton"]),
        ("moe/model=qwen4", ["moe/model", "qwen3_30b_a3b", "tiny"]),
        ("moe.kernels.fwd.up.block=32", ["block"]),
        ("moe.kernels.fwd.up=null", ["up"]),
    ],
)
def test_typed_errors(app: App, override: str, parts: list[str]) -> None:
    """Refused at composition, with the key and what is allowed; the application never imported moefactory."""
    with pytest.raises((ConfigCompositionException, HydraException)) as caught:
        app(override)
    text = f"{caught.value} {caught.value.__cause__}"
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+moe.typo=1", "typo: no such key; allowed here: backend"),
        ("+moe.permute_z=1", "permute_z: no such key; .*did you mean 'permute_[xy]'"),
        ("+moe.kernels.fwd.blok_m=1", "kernels.fwd.blok_m: no such key; .*did you mean 'block_m'"),
        ("+moe.model.topk=1", "model.topk: no such key; .*did you mean 'top_k'"),
        ("+moe.backend._target_=os.system", "backend._target_: keys that begin with '_' are not accepted"),
        ("+moe.backend._partial_=true", "backend._partial_: keys that begin with '_' are not accepted"),
        ("+moe.kernels.fwd.up._target_=no_such_module.call", "kernels.fwd.up._target_: keys that begin with"),
        ("++moe.weights._args_=[1]", "weights._args_: keys that begin with"),
        ("moe.dW_only=true moe.dX_only=true", "dW_only-dX_only: .*; set at most one"),
        ("moe.model.top_k=9", "top-k: model.top_k=9 with model.num_experts=8"),
        ("moe/weights=live", "weights.source: live, but no block was given"),
        ("moe/weights=checkpoint", "checkpoint-path: .* without weights.path and weights.layer"),
        ("moe.model.hidden_act=silly", "model.hidden_act: got 'silly'"),
        ("moe.model.top_k=???", "top_k: got \\?\\?\\?|Missing mandatory value: moe.model.top_k"),
    ],
)  # fmt: skip
def test_refused_when_built(app: App, override: str, message: str) -> None:
    """What composition lets through (`+`, rules, missing values) is refused before anything is imported or called."""
    import re

    cfg = app(*override.split())
    before = set(sys.modules)
    text = fails(lambda: instantiate(cfg.moe))
    assert re.search(message, text), text
    assert set(sys.modules) == before


@pytest.mark.parametrize("node", ["backend", "model", "weights", "kernels", "kernels.fwd", "kernels.fwd.up"])
def test_a_nested_target_is_never_called(app: App, tmp_path: Path, node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that would say that it was imported: it is not, whatever node names it."""
    (tmp_path / "moefactory_trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = app(f"+moe.{node}._target_=moefactory_trap.call")
    assert f"{node}._target_" in fails(lambda: instantiate(cfg.moe))
    assert "moefactory_trap" not in sys.modules


def test_untyped_nodes_are_checked_alike() -> None:
    """A user's YAML without our schema: texts for enums are taken, wrong ones refused."""
    target = {"_target_": "moefactory.factory.from_nodes", "_recursive_": False}
    block = instantiate(OmegaConf.create({**target, "backend": {"name": "torch"}, "dtype": "float64", "trace": True}))
    assert block.gate.dtype == torch.float64
    text = fails(lambda: instantiate(OmegaConf.create({**target, "dtype": "float65"})))
    assert text == "dtype: got 'float65'; allowed: float16, bfloat16, float32, float64, or null"


# --- building ---------------------------------------------------------------------------------------------------------


def test_instantiate(app: App) -> None:
    """The bare preset builds a block that runs; the same seed gives the same bits, another others."""
    block = instantiate(app().moe)
    assert type(block) is Qwen3MoeGroupedGEMMBlock
    x = judge.unit_tokens(3, block.model, torch.float32)
    out, logits = block(x)
    assert (out.shape, logits.shape) == ((1, 3, 64), (3, 8))
    assert torch.equal(instantiate(app().moe)(x)[0], out)
    assert not torch.equal(instantiate(app("moe.weights.seed=1").moe)(x)[0], out)
    traced, _ = instantiate(app("moe.trace=true").moe)(x)
    assert isinstance(traced, GroupedGEMMResult)
    assert torch.equal(traced.hidden_states, out)


@pytest.mark.parametrize("weights", ["auto", "live"])
def test_instantiate_with_a_live_block(app: App, weights: str) -> None:
    """By position: transformers 5 shares its very Parameters, sizes and dtype are its own."""
    theirs = judge.hf_block(MODEL, judge.unit_weights(MODEL, torch.float64)).eval()
    block = instantiate(app(f"moe/weights={weights}").moe, theirs)
    assert (block.model, block.gate.dtype, block.training) == (MODEL, torch.float64, False)
    block.check_weights(theirs)
    if hasattr(theirs.experts, "gate_up_proj"):
        assert block.gate_up_proj is theirs.experts.gate_up_proj
        assert block.gate is theirs.gate.weight


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moe.model.hidden_size=128", "model.hidden_size: the config states 128, the weights bring 64"),
        ("moe/model=tiny", "model.top_k: the config states 2, the weights bring 3"),
        ("moe.dtype=float16", "dtype: the config states torch.float16, the live block has torch.float64"),
        ("moe/weights=random", "weights.source: the config states random, and a live block was given; allowed: live"),
        ("moe.device=meta", "device: the config states meta, the live block is on cpu"),
    ],
)
def test_a_live_block_is_not_contradicted(app: App, override: str, message: str) -> None:
    theirs = judge.hf_block(MODEL, judge.unit_weights(MODEL, torch.float64))
    assert fails(lambda: instantiate(app(override).moe, theirs)) == message


@pytest.mark.parametrize("wrong", ["model.layers.0", 3, {"gate": 1}, torch.zeros(2)])
def test_what_is_no_block_is_refused(app: App, wrong: Any) -> None:
    text = fails(lambda: instantiate(app().moe, wrong))
    assert text.startswith("source: got ")
    assert text.endswith("; allowed: a Hugging Face sparse MoE block")


def test_as_dict_round_trip(app: App) -> None:
    """The config that is printed is the config that builds it."""
    config = checked(app("moe/backend=triton", "moe/kernels=small", "moe.autotune=false", "moe.dtype=float16").moe)
    assert from_mapping(json.loads(json.dumps(as_dict(config)))) == config


# --- being a good guest -----------------------------------------------------------------------------------------------


def test_no_generic_names_leak(app: App) -> None:
    """Into an application's search path: a group `moe`, our schemas' group, roots named moefactory_*, no more."""
    app()
    loader = GlobalHydra.instance().config_loader()
    ours = {"moe", "moefactory"}
    assert set(loader.list_groups("")) - {"hydra", "_dummy_empty_config_"} == ours
    roots = set(loader.get_group_options("", None)) - {"app", "hydra", "_dummy_empty_config_"}
    assert all(name.startswith("moefactory_") for name in roots - ours), roots
    own = {path.stem for path in CONF.glob("*.yaml")}
    assert all(name.startswith("moefactory_") for name in own), own


def test_the_schema_is_no_choice(app: App) -> None:
    """Neither in the moe group nor in its sub-groups, so that `moe=glob(*)` is a list of presets."""
    app()
    loader = GlobalHydra.instance().config_loader()
    assert loader.get_group_options("moe") == sorted(path.stem for path in (CONF / "moe").glob("*.yaml"))
    assert set(loader.list_groups("moe")) == {path.name for path in (CONF / "moe").iterdir() if path.is_dir()}
    assert list(ConfigStore.instance().repo["moefactory"]) == ["schema"]


def test_no_key_of_a_preset_repeats_a_default() -> None:
    """YAML owns choices, Python owns defaults: a preset states no value that the dataclass has already."""
    defaults = as_dict(from_mapping({}))
    for path in (CONF / "moe").rglob("*.yaml"):
        nodes = OmegaConf.to_container(OmegaConf.load(path))
        nodes.pop("defaults", None)
        group = path.parent.relative_to(CONF / "moe").parts
        here = defaults[group[0]] if group else defaults
        same = [key for key, value in nodes.items() if here.get(key) == value and path.stem != "torch"]
        assert same == [], path


def test_a_real_application(tmp_path: Path) -> None:
    """A process of its own: `@hydra.main`, our presets, an override; composing loads neither torch nor triton."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("defaults:\n  - moe: qwen3\n  - _self_\nsteps: 3\n")
    (tmp_path / "train.py").write_text(
        textwrap.dedent(
            """
            import sys, hydra
            @hydra.main(config_path="conf", config_name="train", version_base="1.3")
            def main(cfg):
                heavy = sorted({"torch", "triton", "transformers"} & set(sys.modules))
                block = hydra.utils.instantiate(cfg.moe)
                print(heavy, type(block).__name__, block.model.top_k, cfg.steps)
            main()
            """
        )
    )
    arguments = ["moe.model.top_k=3", "hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    command = [sys.executable, "-W", "error::UserWarning", "train.py", *arguments]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.stdout == "[] Qwen3MoeGroupedGEMMBlock 3 3\n", run.stderr
    run = subprocess.run([*command, "moe/backend=cuda"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "Could not find 'moe/backend/cuda'" in run.stderr
    assert "triton" in run.stderr
