"""The schema's gate, `from_mapping`: what comes from files, Hydra or Python is checked, and refused in one line.

Each refusal names the key, what came and what is allowed; the value of an interpolation is never shown.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import fields
from typing import Any

import pytest
from omegaconf import OmegaConf

from moefactory.config import (
    Backend,
    BackendConfig,
    ConfigError,
    DType,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
    KernelsConfig,
    ModelConfig,
    MoeConfig,
    ResolvedModel,
    WeightsConfig,
    WeightsSource,
    allowed_values,
    as_dict,
    field_paths,
    from_mapping,
    kernel_pair,
    model_preset,
    resolve_kernels,
    resolve_model,
)
from moefactory.schema import MoeNode

SECRET = "hunter2-the-secret"


def refused(nodes: Any) -> str:
    """The message of the refusal: one line, short, in no time."""
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        from_mapping(nodes)
    assert time.monotonic() - start < 1
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"permut_x": True}, "permut_x: no such key; allowed here: backend, model, .* (did you mean 'permute_x'?)"),
        ({"hidden_size": 3}, "hidden_size: no such key; .* (did you mean 'model.hidden_size'?)"),
        ({"model": {"topk": 3}}, "model.topk: no such key; allowed here: hidden_size, .* (did you mean 'top_k'?)"),
        ({"kernels": {"fwd": {"up": {"blok_m": 3}}}}, "kernels.fwd.up.blok_m: .* (did you mean 'block_m'?)"),
        ({"model.top_k": 3}, "model.top_k: no such key; .* (nest it: model: {top_k: ...})"),
        ({"zzz": 3}, "zzz: no such key; allowed here: .*, device"),
        ({1: 2}, "1: no such key; .*"),
        ({None: 2}, "None: no such key; .*"),
        ({"a\nb": 2}, r"a\\nb: no such key; .*"),
        ({"x" * 100_000: 2}, "xxx.*: no such key; .*"),
    ],
)  # fmt: skip
def test_unknown_keys(nodes: Any, message: str) -> None:
    import re

    pattern = re.escape(message).replace(r"\.\*", ".*").replace(r"\\\\n", r"\\n")
    assert re.fullmatch(pattern, refused(nodes)), refused(nodes)


@pytest.mark.parametrize("key", ["_target_", "_recursive_", "_partial_", "_args_", "_convert_", "__class__", "_"])
@pytest.mark.parametrize("place", [(), ("backend",), ("weights",), ("kernels", "fwd", "up")], ids=".".join)
@pytest.mark.parametrize("made", [dict, OmegaConf.create])
def test_underscore_keys(key: str, place: tuple[str, ...], made: Any) -> None:
    """At any depth, in plain nodes and in OmegaConf's; whatever stands there is neither imported nor called."""
    nodes: Any = {key: "no_such_module.call"}
    for name in reversed(place):
        nodes = {name: nodes}
    path = ".".join([*place, key])
    text = refused(made(nodes))
    assert text == f"{path}: keys that begin with '_' are not accepted; choose backend and weights by name"
    assert "no_such_module" not in sys.modules


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("permute_x", None, "permute_x: got None; allowed: true or false"),
        ("permute_x", 1, "permute_x: got 1; allowed: true or false"),
        ("permute_x", 2, "permute_x: got 2; allowed: true or false"),
        ("permute_x", 0.0, "permute_x: got 0.0; allowed: true or false"),
        ("permute_x", "maybe", "permute_x: got 'maybe'; allowed: true or false"),
        ("permute_x", [True], "permute_x: got a list; allowed: true or false"),
        ("model.norm_topk_prob", 1, "model.norm_topk_prob: got 1; allowed: true or false, or null"),
        ("model.top_k", True, "model.top_k: got True; allowed: an integer, or null"),
        ("model.top_k", 4.0, "model.top_k: got 4.0; allowed: an integer, or null"),
        ("model.top_k", float("nan"), "model.top_k: got nan; allowed: an integer, or null"),
        ("model.top_k", "four", "model.top_k: got 'four'; allowed: an integer, or null"),
        ("model.top_k", {"a": 1}, "model.top_k: got a dict; allowed: an integer, or null"),
        ("model.top_k", 10**30, "model.top_k: got an integer of 100 bits; allowed: an integer, or null; the largest is "
         "9223372036854775807"),
        ("weights.seed", 2**63, "weights.seed: got 9223372036854775808; allowed: an integer; the largest is "
         "9223372036854775807"),
        ("device", 10**30, "device: got an integer of 100 bits; allowed: a string, or null"),
        ("weights.seed", None, "weights.seed: got None; allowed: an integer"),
        ("device", ["cpu"], "device: got a list; allowed: a string, or null"),
        ("device", b"cpu", "device: got a bytes; allowed: a string, or null"),
        ("device", object(), "device: got a object; allowed: a string, or null"),
        ("backend.name", "cuda", "backend.name: got 'cuda'; allowed: torch, triton"),
        ("backend.name", None, "backend.name: got None; allowed: torch, triton"),
        ("backend.name", DType.float16, "backend.name: got DType.float16; allowed: torch, triton"),
        ("backend.name", 1, "backend.name: got 1; allowed: torch, triton"),
        ("dtype", "fp16", "dtype: got 'fp16'; allowed: float16, bfloat16, float32, float64, or null"),
        ("dtype", "a\nb", r"dtype: got 'a\nb'; allowed: float16, bfloat16, float32, float64, or null"),
        ("kernels.fwd.up.block_m", 1.5, "kernels.fwd.up.block_m: got 1.5; allowed: an integer, or null"),
        ("kernels.bwd_dW.use_tma_store", 1, "kernels.bwd_dW.use_tma_store: got 1; allowed: true or false, or null"),
        ("kernels.fwd.warp_specialize", 1, "kernels.fwd.warp_specialize: got 1; allowed: true or false, or null"),
        ("backend", "triton", "backend: got 'triton'; allowed: a mapping with name"),
        ("backend", Backend.triton, "backend: got Backend.triton; allowed: a mapping with name"),
        ("backend", None, "backend: got None; allowed: a mapping with name"),
        ("backend", BackendConfig, "backend: got a type; allowed: a mapping with name"),
        ("kernels.bwd_dX", [], "kernels.bwd_dX: got a list; allowed: None, a KernelConfigBackward_dX, or a pair "
         "of them (up, down)"),
        ("device", "???", "device: got ???, which stands for a value that must be stated; state it"),
    ],
)  # fmt: skip
def test_wrong_values(key: str, value: Any, message: str) -> None:
    assert refused(nested(key, value)) == message


def nested(key: str, value: Any) -> Any:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("whole", [None, 3, "moe", [1], (), object()])
def test_not_a_mapping(whole: Any) -> None:
    assert refused(whole).startswith("moe: got ")
    assert "allowed: a mapping with backend, model, weights" in refused(whole)


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("backend.name", "triton", Backend.triton),
        ("backend.name", Backend.triton, Backend.triton),
        ("dtype", "bfloat16", DType.bfloat16),
        ("dtype", DType.bfloat16, DType.bfloat16),
        ("dtype", None, None),
        ("weights.source", "live", WeightsSource.live),
        ("weights.source", WeightsSource.checkpoint, WeightsSource.checkpoint),
        ("permute_x", False, False),
        ("permute_x", "false", False),
        ("model.top_k", "4", 4),
        ("weights.path", "a folder", "a folder"),
    ],
)
@pytest.mark.parametrize("made", [dict, OmegaConf.create])
def test_right_values(key: str, value: Any, result: Any, made: Any) -> None:
    """Enums as text and as members; the words and digits that a shell or an environment brings."""
    config: Any = from_mapping(made(nested(key, value)))
    for name in key.split("."):
        config = getattr(config, name)
    assert config == result
    assert type(config) is type(result)


def test_every_field_goes_through() -> None:
    """Each leaf of the schema, set to another value, comes back; nothing else changes."""
    others: dict[str, Any] = {"backend.name": "triton", "dtype": "float16", "weights.source": "live", "saved": "x"}
    for key in field_paths():
        node: Any = OmegaConf.structured(MoeConfig)
        for part in key.split("."):
            node = node._get_node(part)
        if OmegaConf.is_dict(node):
            continue
        kind = node._metadata.ref_type
        value = others.get(key, {bool: not node._value(), int: 7, str: "x"}.get(kind))
        assert value is not None, key
        got = as_dict(from_mapping(nested(key, value)))
        merged = OmegaConf.merge(as_dict(MoeConfig()), nested(key, value))
        assert got == OmegaConf.to_container(merged), key


def test_dataclasses_as_nodes() -> None:
    """A whole MoeConfig, with text where enums belong, and parts of one."""
    config = MoeConfig(backend=BackendConfig("triton"), dtype="float16")  # type: ignore[arg-type]
    checked = from_mapping(config)
    assert (checked.backend.name, checked.dtype) == (Backend.triton, DType.float16)
    assert from_mapping(MoeConfig()) == MoeConfig()
    assert from_mapping({"model": ModelConfig(top_k=3)}).model.top_k == 3
    assert from_mapping({"model": model_preset("tiny")}).model.hidden_size == 64
    assert refused(MoeConfig(permute_x="perhaps")) == "permute_x: got 'perhaps'; allowed: true or false"  # type: ignore[arg-type]
    assert refused({"model": WeightsConfig()}).startswith("model.source: no such key")


def test_the_input_is_left_alone() -> None:
    nodes = {"model": {"top_k": 3}, "kernels": {"fwd": (None, KernelConfigForward())}}
    copy = {"model": {"top_k": 3}, "kernels": {"fwd": (None, KernelConfigForward())}}
    config = from_mapping(nodes)
    assert nodes == copy
    config.model.top_k = 5
    assert from_mapping(nodes).model.top_k == 3
    assert from_mapping({}).model.top_k is None


# --- kernel configs ---------------------------------------------------------------------------------------------------


def test_kernel_nodes() -> None:
    """`fwd.x` holds for both GEMMs, `fwd.up.x` for one and wins; nothing stated is None; the rest is the default."""
    stated = {"fwd": {"block_m": 32, "up": {"block_n": 128, "block_m": 16}}, "bwd_dX": {"down": {"num_warps": 8}}}
    choice = resolve_kernels(from_mapping({"kernels": stated}).kernels)
    assert choice.explicit
    assert choice.get("fwd", "up") == KernelConfigForward(block_m=16, block_n=128)
    assert choice.get("fwd", "down") == KernelConfigForward(block_m=32)
    assert choice.get("bwd_dX", "up") is None
    assert choice.get("bwd_dX", "down") == KernelConfigBackward_dX(num_warps=8)
    assert choice.get("bwd_dW", "up") is choice.get("bwd_dW", "down") is None
    assert not resolve_kernels(KernelsConfig()).explicit
    assert resolve_kernels(from_mapping({"kernels": {"fwd": {"use_tma_store": False}}}).kernels).explicit
    but_one = {"bwd_dW": {"warp_specialize": True, "down": {"warp_specialize": False}}}
    choice = resolve_kernels(from_mapping({"kernels": but_one}).kernels)
    assert choice.get("bwd_dW", "up") == KernelConfigBackward_dW(warp_specialize=True)
    assert choice.get("bwd_dW", "down") == KernelConfigBackward_dW()


@pytest.mark.parametrize("through", [False, True], ids=["direct", "from_mapping"])
def test_kernel_configs_and_pairs(through: bool) -> None:
    """A config for both, a pair, None in a pair: the same choice directly and through the gate."""
    one, other = KernelConfigForward(block_m=128), KernelConfigForward(block_k=32)
    for given, pair in {
        None: (None, None),
        one: (one, one),
        (one, None): (one, None),
        (one, other): (one, other),
    }.items():
        kernels = KernelsConfig(fwd=given)
        if through:
            kernels = from_mapping(MoeConfig(kernels=kernels)).kernels
        choice = resolve_kernels(kernels)
        assert (choice.get("fwd", "up"), choice.get("fwd", "down")) == pair
    assert kernel_pair([one, other], KernelConfigForward, "key") == (one, other)


@pytest.mark.parametrize(
    "wrong",
    [KernelConfigBackward_dX(), (KernelConfigForward(),), (KernelConfigForward(),) * 3,
     (KernelConfigForward(), KernelConfigBackward_dW()), 64, "big", [[[]]]],
)  # fmt: skip
def test_wrong_kernel_configs(wrong: Any) -> None:
    message = "kernels.fwd: got .*; allowed: None, a KernelConfigForward, or a pair of them"
    with pytest.raises(ConfigError, match=message):
        resolve_kernels(KernelsConfig(fwd=wrong))
    assert refused({"kernels": {"fwd": wrong}}).startswith("kernels.fwd: got ")


def test_kernel_schema_has_every_field() -> None:
    """The nodes are derived from the kernel configs: no field is missing in YAML, none stated by default."""
    kernels = {"fwd": KernelConfigForward, "bwd_dX": KernelConfigBackward_dX, "bwd_dW": KernelConfigBackward_dW}
    for name, kernel in kernels.items():
        leaves = {field.name for field in fields(kernel)}
        for prefix in (f"kernels.{name}", f"kernels.{name}.up", f"kernels.{name}.down"):
            assert {f"{prefix}.{leaf}" for leaf in leaves} <= set(field_paths())


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_resolve_model() -> None:
    """Not stated: tiny, or what the weights bring; stated: it holds, and may not contradict the weights."""
    tiny = ResolvedModel(64, 32, 8, 2, True, "silu")
    brought = ResolvedModel(128, 48, 16, 4, False, "gelu")
    assert model_preset("tiny") == tiny
    assert resolve_model(ModelConfig()) == tiny
    assert resolve_model(ModelConfig(top_k=3)).top_k == 3
    assert resolve_model(ModelConfig(), brought) == brought
    assert resolve_model(ModelConfig(**vars(brought)), brought) == brought
    for field in fields(ModelConfig):
        with pytest.raises(ConfigError) as caught:
            resolve_model(ModelConfig(**{field.name: getattr(tiny, field.name)}), brought)
        mine, theirs = getattr(tiny, field.name), getattr(brought, field.name)
        text = f"model.{field.name}: the config states {mine!r}, the weights bring {theirs!r}"
        assert str(caught.value) == text
    assert resolve_model(ModelConfig(norm_topk_prob=False), brought).norm_topk_prob is False


# --- interpolations ---------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOEFACTORY_TEST_SECRET", SECRET)
    return "${oc.env:MOEFACTORY_TEST_SECRET}"


@pytest.mark.parametrize(
    "key", ["model.top_k", "dtype", "backend.name", "permute_x", "backend", "kernels.fwd", "weights"]
)
def test_secrets_are_not_shown(secret: str, key: str) -> None:
    """An environment variable of the wrong type: neither a plain mapping nor an OmegaConf config shows it."""
    assert SECRET not in refused(nested(key, secret))
    text = refused(OmegaConf.create(nested(key, secret)))
    assert SECRET not in text
    assert text.startswith(f"{key}: ")


def test_plain_mappings_hold_values(secret: str) -> None:
    """No interpolation is resolved for a plain mapping, not even one that would fit."""
    for text in (secret, "${model.top_k}", "a${b}", "${", "$${x}"):
        message = "device: got an interpolation; allowed in a Hydra or OmegaConf config only: state the value"
        assert refused({"device": text}) == message
    assert from_mapping({"device": "$HOME"}).device == "$HOME"


def test_interpolations_are_resolved_where_they_live(secret: str) -> None:
    """To the user's own root, to the environment, to a whole node; with the schema and without."""
    for schema in ({}, MoeNode):
        root = OmegaConf.create({"width": 48, "sizes": {"top_k": 3}, "moe": schema})
        root.moe = OmegaConf.merge(
            root.moe, {"model": {"hidden_size": "${width}", "top_k": "${sizes.top_k}"}, "device": secret}
        )
        nodes = {key: root.moe._get_node(key) if key == "model" else root.moe[key] for key in ("model", "device")}
        config = from_mapping(nodes)
        assert (config.model.hidden_size, config.model.top_k, config.device) == (48, 3, SECRET)
    root = OmegaConf.create({"sizes": {"top_k": 3}, "moe": {"model": "${sizes}"}})
    assert from_mapping(root.moe).model.top_k == 3


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"device": "${nope}"}, "device: the interpolation '${nope}' cannot be resolved"),
        ({"device": "${device}"}, "device: the interpolation '${device}' cannot be resolved"),
        ({"device": "${oc.env:NOT_SET_}"}, "device: the interpolation '${oc.env:NOT_SET_}' cannot be resolved"),
        ({"model": {"top_k": "???"}}, "model.top_k: got ???, which stands for a value that must be stated; state it"),
        ({"model": "???"}, "model: got ???, which stands for a value that must be stated; state it"),
        ({"weights": None}, "weights: got None; allowed: a mapping with source, seed, path, layer"),
        ({"device": [1]}, "device: got a ListConfig; allowed: a string, or null"),
    ],
)  # fmt: skip
def test_omegaconf_nodes(nodes: Any, message: str) -> None:
    assert refused(OmegaConf.create(nodes)) == message


def test_a_value_from_the_environment_is_not_resolved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFACTORY_TEST_SECRET", "${oc.env:HOME}")
    text = refused(OmegaConf.create({"device": "${oc.env:MOEFACTORY_TEST_SECRET}"}))
    assert "brings another one" in text


# --- bombs ------------------------------------------------------------------------------------------------------------


def deep(levels: int, name: str | None = None) -> Any:
    node: Any = 1
    for _ in range(levels):
        node = [node] if name is None else {name: node}
    return node


def cycle() -> Any:
    node: dict[str, Any] = {}
    node["fwd"] = node["model"] = node["kernels"] = node
    return node


BOMBS = {
    "deep mapping": {"model": deep(3000, "model")},
    "deep list": {"device": deep(3000)},
    "deep list for a node": {"model": deep(3000)},
    "deep list for a kernel": {"kernels": {"fwd": deep(3000)}},
    "a mapping in itself": cycle(),
    "many keys": {str(i): i for i in range(200_000)},
    "a long text": {"device": "x" * 10_000_000},
    "a long number": {"weights": {"seed": 10**4400}},
    "a long key": {"k" * 1_000_000: 1},
    "interpolations that multiply": {"device": "${weights.path}" * 10, "weights": {"path": "${dtype}" * 10}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    """Refused in less than a second, in a line of ordinary length."""
    refused(BOMBS[name])


# --- small things -----------------------------------------------------------------------------------------------------


def test_allowed_values_names_types() -> None:
    assert allowed_values("dtype") == "; allowed: float16, bfloat16, float32, float64, or null"
    assert allowed_values("backend.name") == "; allowed: torch, triton"
    assert allowed_values("permute_x") == "; allowed: true or false"
    assert allowed_values("model.top_k") == "; allowed: an integer, or null"
    assert allowed_values("backend") == "; allowed: a mapping with name"
    assert allowed_values("nope.nope") == ""


def test_errors_are_value_errors() -> None:
    assert issubclass(ConfigError, ValueError)


def test_config_loads_neither_torch_nor_triton() -> None:
    code = "import moefactory.config, moefactory.matrix, sys; print({'torch', 'triton'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "set()\n"
