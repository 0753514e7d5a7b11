"""Launching: the driver is told what Triton tells it, descriptors are encoded once, profilers still hear of everything.

The launchers are Triton's own, over a driver that does nothing (`driverless`): no GPU is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import driverless
import pytest
import torch
from fused import DEVICE
from triton.tools.tensor_descriptor import TensorDescriptor

from moefactory.triton.launch import descriptor

no_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's launchers are compiled: needs cc")


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{case of `driverless`: what it found}."""
    command = [sys.executable, driverless.__file__, str(tmp_path_factory.mktemp("driver"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    cases: dict[str, Any] = json.loads(done.stdout)
    return cases


@pytest.mark.interpreter
@no_compiler
def test_what_is_missing_is_compiled_before_the_first_launch(found: dict[str, Any]) -> None:
    """A step in a process that has compiled nothing: a forward's kernels all together before the first of them is
    launched, and a backward's, by several threads, each once; as many launches as later steps have. Other numbers of
    tokens want other kernels: 26 x 2 rows are no multiple of 16, 24 x 2 are."""
    ahead = found["ahead"]
    first, again, near = ahead["first"], ahead["again"], ahead["near"]
    forward = first["names"].index("combine") + 1
    assert {begun for _, _, begun in first["compiled"]} == {0, forward}
    assert [begun for *_, begun in first["compiled"]].count(0) == forward
    assert len(first["compiled"]) == first["launched"] == len(first["names"]) == 13
    assert again["launched"] == near["launched"] == 13
    assert again["compiled"] == []
    assert {name for name, _, _ in near["compiled"]} == {"_grouped_dX"}
    threads = {thread for one in (first, near) for _, thread, _ in one["compiled"]}
    assert all(thread.startswith("moefactory-compiles") for thread in threads)
    assert len(threads) > 1 or len(os.sched_getaffinity(0)) == 1


@pytest.mark.interpreter
@no_compiler
def test_compiling_ahead_keeps_nobody_from_launching(found: dict[str, Any]) -> None:
    """A kernel that does not compile is not spoken of before it is launched, and then in Triton's own words. Others are
    launched after an interrupt, after a failure that was not theirs, where no thread can be started, and in an
    asynchronous mode of the caller's."""
    ahead = found["ahead, in trouble"]
    assert ahead["refused"] == "one is not two"
    assert "no interrupt by interrupted" not in ahead
    assert ahead["launched after interrupted"] == ahead["launched after failing"] == 1
    assert "no interrupt at its start" not in ahead
    assert ahead["launched without threads"] == [26, 26]
    assert ahead["launched in a mode of the caller's"] == [13, 15]


@pytest.mark.interpreter
@no_compiler
def test_the_driver_is_told_what_triton_tells_it(found: dict[str, Any]) -> None:
    """Function, stream, grid, block, shared memory and every parameter, byte for byte, tensor maps among them."""
    kernels = {"tile_table", "forward_up", "forward", "combine", "dX_dswiglu", "dX", "dW", "gather_rows"}
    few = {"gate", "route_few_tokens", "route_backward", "gate_gradient", "sum_dX", "decode_gate", "decode_experts"}
    assert set(found["same parameters"]) == kernels | {"swiglu_forward", "swiglu_backward"} | few
    assert all(found["same parameters"].values()), found["same parameters"]


@pytest.mark.interpreter
@no_compiler
def test_a_descriptor_is_encoded_once(found: dict[str, Any]) -> None:
    """The same tensor's map is kept; another shape at the same address, or another address, has its own.

    Fewer rows alone, too: a map of more would let TMA read and write behind the last.
    """
    assert found["descriptors"] == {"first": 1, "again": 0, "sides": 1, "rows": 1, "address": 1, "all": 0}


@pytest.mark.interpreter
@no_compiler
def test_hooks_hear_of_every_launch(found: dict[str, Any]) -> None:
    """A profiler's hook set later is called for kernels that were launched before, and names are recorded as ever."""
    names, heard = found["hooks"]["names"], found["hooks"]["heard"]
    assert found["hooks"]["again"] == names
    assert len(heard) == len(names) > 0
    assert [heard[0], heard[1], heard[3]] == ["_tile_table", "_grouped_forward", "_combine"]


@pytest.mark.interpreter
@no_compiler
def test_a_tape_launches_what_the_code_does(found: dict[str, Any]) -> None:
    """For all flags, with TMA: the same kernels, grids, numbers and names at each of four steps; all of it on tapes."""
    for one in found["played"]:
        assert one["same"]
        assert one["launches"] == len(one["names"]) >= 9  # without the fused combine
        assert one["tapes"] == ["Tape"] * (4 if one["few"] else 2)
    *_, few = found["played"]
    assert few["names"][:4] == ["route_few_tokens", "forward_up", "forward", "combine"]
    assert "tile_table" not in few["names"]
    assert len(found["played"]) == 17


@pytest.mark.interpreter
@no_compiler
def test_a_block_is_taped(found: dict[str, Any]) -> None:
    """Steps as one operator, and decoding: the same launches four times, and a tape for each of the operators.

    Few tokens with tiles higher than usual take no table of their own in the forward, recorded or not.
    """
    kinds = {one["case"]: one for one in found["blocks"]}
    assert set(kinds) == {"decoding", "few tokens", "high tiles", "many tokens", "recomputed", "reused"}
    for name, one in kinds.items():
        assert one["same"], name
        assert one["tapes"] == ["Tape"] * (1 if name == "decoding" else 2), name
    for name, gate in (("few tokens", ["gate"]), ("high tiles", [])):  # of 24 tokens, of 64
        front = [*gate, "route_few_tokens", "forward_up", "forward", "combine"]
        assert kinds[name]["names"][: len(front)] == front
    assert kinds["decoding"]["names"] == ["decode_gate", "decode_experts"]


@pytest.mark.interpreter
@no_compiler
def test_a_weight_that_has_moved_is_refused(found: dict[str, Any]) -> None:
    """Also where a tape is there for its kind: an address of another device must not reach a kernel."""
    names = {2: "gate_up_proj", 3: "down_proj"}
    for way in ("block", "decode"):
        for index, name in names.items():
            assert found["moved"][f"{way} {index}"] == f"ValueError: {name}: on meta; needed: x's device cpu"


def test_a_descriptor_is_checked_where_its_shape_is_new() -> None:
    """Triton's checks hold for a shape, whatever the address; the address is checked each time."""
    memory = torch.zeros(4096, device=DEVICE).half()
    first, second = (descriptor(memory[start:][:1024].view(32, 32), [16, 16]) for start in (0, 2048))
    assert second == TensorDescriptor(second.base, second.shape, second.strides, [16, 16])
    assert second.base.data_ptr() - first.base.data_ptr() == 4096
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        descriptor(memory[1:][:1024].view(32, 32), [16, 16])
    for _ in range(2):
        with pytest.raises(AssertionError, match="strides must be 16-byte aligned"):
            descriptor(memory[: 32 * 30].view(32, 30), [16, 16])
