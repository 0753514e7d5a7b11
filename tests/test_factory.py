"""build: from a config to a block, and every way in which it says no."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import judge
import pytest
import torch
from judge import MODEL, WEIGHTS
from torch import nn

import moefactory.factory
from moefactory import build
from moefactory.block import Qwen3MoeGroupedGEMMBlock
from moefactory.config import (
    Backend,
    BackendConfig,
    ConfigError,
    DType,
    KernelConfigForward,
    KernelsConfig,
    ModelConfig,
    MoeConfig,
    ResolvedModel,
    WeightsConfig,
    WeightsError,
    WeightsSource,
    as_dict,
)

TINY = ResolvedModel(64, 32, 8, 2, True, "silu")


def sized(**sizes: Any) -> MoeConfig:
    return MoeConfig(model=ModelConfig(**sizes))


def random(**weights: Any) -> MoeConfig:
    return MoeConfig(weights=WeightsConfig(**weights))


@pytest.mark.parametrize("config", [None, {}, MoeConfig(), {"backend": {"name": "torch"}}, as_dict(MoeConfig())])
def test_the_default(config: Any) -> None:
    """Torch, tiny, random weights of seed 0 in float32 on the CPU, training, not traced."""
    block = build(config)
    assert type(block) is Qwen3MoeGroupedGEMMBlock
    assert (block.model, block.trace, block.training) == (TINY, False, True)
    assert {(p.dtype, p.device.type, p.requires_grad) for p in block.parameters()} == {(torch.float32, "cpu", True)}
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), build().parameters(), strict=True))


def test_random_weights() -> None:
    """Finite, of unit-scale use, the same for a seed in every dtype up to rounding, others for another seed."""
    wide = build(MoeConfig(dtype=DType.float32))
    low = build(MoeConfig(dtype=DType.bfloat16))
    other = build(random(seed=1))
    for name in WEIGHTS:
        weight = getattr(wide, name).detach()
        assert weight.isfinite().all()
        assert 0.8 < weight.std() * weight.shape[-1] ** 0.5 < 1.2, name
        assert torch.equal(getattr(low, name), weight.bfloat16())
        assert not torch.equal(getattr(other, name), weight)
    x = judge.unit_tokens(64, TINY, torch.float32)
    assert 0.1 < wide(x)[0].std() < 2


def test_fresh_blocks_share_nothing() -> None:
    one, two = build(), build()
    with torch.no_grad():
        one.gate.zero_()
    assert two.gate.any()


@pytest.mark.parametrize("stated", [{}, {"dtype": DType.float64}, {"model": ModelConfig(**vars(MODEL))}])
def test_live(stated: dict[str, Any]) -> None:
    """A live block brings sizes and dtype, which may be stated as they are; its parameters stay its own."""
    theirs = judge.hf_block(MODEL, judge.unit_weights(MODEL, torch.float64)).eval()
    theirs.gate.weight.requires_grad_(False)
    block = build(MoeConfig(**stated), theirs)
    assert (block.model, block.gate.dtype, block.training) == (MODEL, torch.float64, False)
    assert [p.requires_grad for p in block.parameters()] == [False, True, True]
    block.check_weights(theirs)


def test_checkpoint(tmp_path: Path) -> None:
    """One layer of a folder, its sizes from config.json, converted to the stated dtype."""
    weights = judge.write_checkpoint(tmp_path, MODEL)
    block = build(random(source=WeightsSource.checkpoint, path=str(tmp_path), layer=1))
    assert block.model == MODEL
    assert all(torch.equal(getattr(block, name), weights[name]) for name in WEIGHTS)
    config = random(source=WeightsSource.checkpoint, path=str(tmp_path), layer=1)
    half = build(replace(config, dtype=DType.float16))
    assert all(torch.equal(getattr(half, name), weights[name].half()) for name in WEIGHTS)
    with pytest.raises(ConfigError, match=r"model.top_k: the config states 2, the weights bring 3"):
        build(replace(config, model=ModelConfig(top_k=2)))


def test_flags_arrive() -> None:
    block = build(MoeConfig(dX_only=True, trace=True))
    assert (block.dW_only, block.dX_only, block.trace) == (False, True, True)


REFUSED: dict[str, tuple[Any, str]] = {
    "no mapping": ("qwen3", "moe: got 'qwen3'; allowed: a mapping with backend"),
    "no device": (MoeConfig(device="gpu"), "this machine cannot run it: device='gpu' is no torch device"),
    "device of another torch": (
        MoeConfig(device="xpu"),
        "this machine cannot run it: device=xpu but this torch cannot use it here; allowed: cpu, cuda, cuda:0, ...$",
    ),
    "device of nothing": (MoeConfig(device=""), "device: got ''; allowed: a string, or null$"),
    "path of nothing": (random(source=WeightsSource.checkpoint, path="", layer=0), "weights.path: got ''; allowed: "),
    "two lines": (MoeConfig(device="a\nb"), r"this machine cannot run it: device='a\\nb' is no torch device"),
    "both gradients": (MoeConfig(dW_only=True, dX_only=True), "dW_only-dX_only: "),
    "top_k": (sized(top_k=9), "top-k: model.top_k=9 with model.num_experts=8; top_k is at most num_experts"),
    "no size": (sized(hidden_size=0), "sizes: model.hidden_size=0; sizes are 1 or more"),
    "seed": (random(seed=-1), "seed: weights.seed=-1; weights.seed is 0 or more"),
    "live without a block": (random(source=WeightsSource.live), "weights.source: live, but no block was given"),
    "no path": (random(source=WeightsSource.checkpoint), "checkpoint-path: .* without weights.path and weights.layer"),
    "path in vain": (random(path="x"), "unread-weights: weights.path stated with weights.source=random"),
    "activation": (sized(hidden_act="sillu"), r"model.hidden_act: got 'sillu'.*\(did you mean 'silu'\?\)"),
    "kernels on torch": (
        MoeConfig(kernels=KernelsConfig(fwd=KernelConfigForward()), autotune=False),
        "torch-kernels: backend torch with kernel configs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, before any weight is made."""
    config, text = REFUSED[name]
    monkeypatch.setattr(moefactory.factory, "init_random", lambda *args: pytest.fail("weights were drawn"))
    with pytest.raises(ConfigError, match=text) as caught:
        build(config)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu_here(device: str) -> None:
    """A legal config on a machine that cannot run it: the second answer, not a fallback to the CPU."""
    with pytest.raises(ConfigError, match=f"this machine cannot run it: device={device} but torch sees no GPU here"):
        build(MoeConfig(device=device))


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_size": 10**6, "moe_intermediate_size": 10**6, "num_experts": 10**3}, {"num_experts": 10**12},
     {"hidden_size": 10**15}],
)  # fmt: skip
def test_too_large_for_this_machine(sizes: dict[str, int]) -> None:
    """Refused by arithmetic, nothing is allocated."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with pytest.raises(ConfigError, match=rf"model: its weights take \d+ bytes, this device has {memory}"):
        build(sized(**sizes))


def test_rules_on_what_the_weights_bring() -> None:
    """A live block's width and dtype are known only when it was looked at, and judged then."""
    odd = replace(MODEL, hidden_size=50)
    theirs = judge.hf_block(odd, judge.unit_weights(odd, torch.float32))
    kernels = KernelsConfig(fwd=KernelConfigForward(use_tma_load_w=True))
    config = MoeConfig(BackendConfig(Backend.triton), kernels=kernels, autotune=False)
    with pytest.raises(ConfigError, match=r"tma-alignment: .*model.hidden_size=50 in float32: 200 bytes a row"):
        build(config, theirs)


@pytest.mark.parametrize("source", [nn.Linear(2, 2), Qwen3MoeGroupedGEMMBlock])
def test_a_source_that_is_no_block(source: Any) -> None:
    with pytest.raises((ConfigError, WeightsError), match=r"a Hugging Face sparse MoE block|needed: a sparse"):
        build(None, source)


def test_the_config_is_left_alone() -> None:
    config = MoeConfig()
    before = as_dict(config)
    build(config)
    build(config, judge.hf_block(MODEL, judge.unit_weights(MODEL, torch.float32)))
    assert as_dict(config) == before


# --- configs made in Python -------------------------------------------------------------------------------------------

# build takes a MoeConfig as it is; passing it through from_mapping first would check its types and turn text into enums


@pytest.mark.parametrize(
    "config",
    [MoeConfig(backend=BackendConfig("torch")), MoeConfig(dtype="float32")],  # type: ignore[arg-type]
    ids=["backend", "dtype"],
)
def test_text_for_enums(config: MoeConfig) -> None:
    """The names of members stand for them, as in YAML; unchecked, "torch" builds the Triton block."""
    assert type(build(config)) is Qwen3MoeGroupedGEMMBlock


def test_text_for_a_source() -> None:
    """Unchecked, "live" without a block draws random weights."""
    with pytest.raises(ConfigError, match=r"weights.source: live, but no block was given"):
        build(random(source="live"))


WRONG_TYPES = {
    "backend": (MoeConfig(backend=Backend.torch), "backend: got Backend.torch; allowed: a mapping with name"),
    "text for a flag": (MoeConfig(permute_x="no way"), "permute_x: got 'no way'; allowed: true or false"),
    "text for a size": (sized(top_k="two"), "model.top_k: got 'two'; allowed: an integer, or null"),
    "a fraction": (sized(top_k=2.0), "model.top_k: got 2.0; allowed: an integer, or null"),
    "no kernels": (MoeConfig(kernels=None), "kernels: got None; allowed: a mapping with fwd"),
    "no model": (MoeConfig(model=None), "model: got None; allowed: a mapping with hidden_size"),
    "a tile": (
        MoeConfig(BackendConfig(Backend.triton), kernels=KernelsConfig(fwd=KernelConfigForward("x")), autotune=False),
        "kernels.fwd.up.block_m: got 'x'; allowed: an integer, or null",
    ),
    "False": (False, "moe: got False; allowed: a mapping with backend"),
}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types_in_python(name: str) -> None:
    config, text = WRONG_TYPES[name]
    with pytest.raises(ConfigError, match=text):
        build(config)
