"""`sm_margin`: how many programs the GEMMs are, the same bits whatever that number, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import fused
import judge
import pytest
import torch
from fused import COMBINATIONS, DEVICE, GPU, Shape, differing, flag_id, options
from torch import Tensor

from moefactory import MoeConfig, Qwen3MoeFusedGroupedGEMMBlock, build
from moefactory.config import Backend, BackendConfig, ConfigError, DType, ResolvedModel
from moefactory.machine import why_not_here
from moefactory.triton import backward_dW, backward_dX, decode, forward
from moefactory.triton.launch import num_programs
from moefactory.triton.options import parse

SHAPE = Shape(75, 7, 3, 96, 40, "dropped")
MODEL = ResolvedModel(64, 32, 8, 2, True, "silu")
PERSISTENT = {"forward", "forward_up", "dX", "dX_dswiglu", "dW", "decode_experts"}
THERE = num_programs(torch.device(DEVICE), 0)  # multiprocessors; in the interpreter as many programs as stand for them
MARGINS = sorted({1, THERE - 1})


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():
        yield


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(name, programs) of the persistent kernels that were launched."""
    found: list[tuple[str, int]] = []

    for module in (forward, backward_dX, backward_dW, decode):
        monkeypatch.setattr(module, "launch", fused.noting(module.launch, found, PERSISTENT))  # type: ignore[attr-defined]
    return found


def block(sm_margin: int = 0) -> Qwen3MoeFusedGroupedGEMMBlock:
    return fused.fused_block(MODEL, torch.float32, sm_margin=sm_margin)


@pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
def test_the_same_bits_by_fewer_programs(flags: dict[str, bool], programs: list[tuple[str, int]]) -> None:
    """Every GEMM of a step is as many programs as multiprocessors are left, or a whole multiple, as without a margin;
    which program computes a tile changes nothing: output and gradients, on ragged experts with dropped slots."""
    p, o = fused.problem(SHAPE, torch.float32), options(flags, SHAPE.top_k)
    expected = fused.run(p, o)
    names, full = zip(*programs, strict=True)
    assert set(names) >= {"dW", "forward"}
    for margin in MARGINS:
        programs.clear()
        assert differing(fused.run(p, replace(o, sm_margin=margin)), expected) == [], margin
        assert [name for name, _ in programs] == list(names)
        for (_, got), before in zip(programs, full, strict=True):
            assert got <= min(before, 2 * (THERE - margin))
            assert GPU or (before, got) == (THERE, THERE - margin)  # here each has more tiles than programs


@pytest.mark.parametrize("tokens", [1, 3])
def test_decode(tokens: int, programs: list[tuple[str, int]]) -> None:
    """A forward of few tokens without gradients: its programs, which wait for each other, are as many as fit beside the
    margin, or fewer that share its work evenly, half of them at least; the same bits."""
    torch.manual_seed(tokens)
    x = torch.randn(1, tokens, 64, device=DEVICE)
    with torch.no_grad():
        expected = block()(x)
        for margin in MARGINS:
            most = num_programs(torch.device(DEVICE), margin, decode.PROGRAMS)
            programs.clear()
            got = block(margin)(x)
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
            assert {name for name, _ in programs} == {"decode_experts"}
            assert all(max(1, most // 2) <= number <= most for _, number in programs)


def test_a_whole_step() -> None:
    """Of the block, from its constructor and from a config: both hold the margin, and give the default's bits."""
    nodes = {"backend": {"name": "triton"}, "sm_margin": 1, "device": DEVICE}
    model = {name: getattr(MODEL, name) for name in ("hidden_size", "moe_intermediate_size", "num_experts", "top_k")}
    plain, margin = build({**nodes, "model": model, "sm_margin": 0}), build({**nodes, "model": model})
    assert (plain.fused.sm_margin, margin.fused.sm_margin, block(1).fused.sm_margin) == (0, 1, 1)
    assert parse(margin.fused.text) == margin.fused
    assert "GEMMs leave 1 of the GPU's multiprocessors to others" in margin.explain(20)
    assert "multiprocessors" not in plain.explain(20)
    x, dy = judge.data(20, MODEL, torch.float32)
    results: list[tuple[Tensor, ...]] = []
    for one in (plain, margin):
        leaf = x.to(DEVICE).requires_grad_()
        out = one(leaf[None])[0]
        results.append((out, *torch.autograd.grad(out, [leaf, *one.parameters()], dy.to(DEVICE)[None])))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("nodes", "complaint"),
    [
        ({"sm_margin": 16}, "sm-margin: sm_margin=16 with backend torch; set sm_margin to 0 or more"),
        ({"sm_margin": -1, "backend": {"name": "triton"}}, "sm-margin: sm_margin=-1 is no number of multiprocessors"),
        ({"sm_margin": "many", "backend": {"name": "triton"}}, "sm_margin: got 'many'; allowed: an integer"),
        ({"sm_margin": 1.5, "backend": {"name": "triton"}}, "sm_margin: got 1.5; allowed: an integer"),
        ({"sm_margin": None, "backend": {"name": "triton"}}, "sm_margin: got None; allowed: an integer"),
    ],
)
def test_refused(nodes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build(nodes)
    assert str(refusal.value).startswith(complaint)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("margin", ["1", 1.0, True, None])
def test_refused_by_the_constructor(margin: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^sm_margin: got {margin!r}; allowed: an integer$"):
        block(margin)


@pytest.mark.parametrize(("margin", "left"), [(0, True), (16, True), (131, True), (132, False), (500, False)])
def test_a_multiprocessor_is_left(margin: int, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of 132: a margin of all of them is refused with both numbers, before anything runs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: gpu)
    config = MoeConfig(BackendConfig(Backend.triton), sm_margin=margin, device="cuda", dtype=DType.bfloat16)
    reason = f"sm_margin={margin} leaves none of this GPU's 132 multiprocessors"
    assert why_not_here(config) == (None if left else reason)
