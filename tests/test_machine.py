"""The second answer: which legal configurations this machine cannot run, each refusal in one line with its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moefactory.config import (
    PASSES,
    Backend,
    BackendConfig,
    DType,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
    KernelsConfig,
    MachineError,
    MoeConfig,
)
from moefactory.describe import require_here
from moefactory.machine import why_not_here
from moefactory.rules import broken_rules, make_case

SPECIALIZED = {
    "fwd": KernelConfigForward(128, 256, 64, num_warps=8, warp_specialize=True),
    "bwd_dX": KernelConfigBackward_dX(128, 64, 256, num_warps=8, warp_specialize=True),
    "bwd_dW": KernelConfigBackward_dW(64, 128, 256, num_warps=8, warp_specialize=True),
}
BY_TMA = {
    "fwd": KernelConfigForward(use_tma_load_w=True),
    "bwd_dX": KernelConfigBackward_dX(use_tma_load_w=True),
    "bwd_dW": KernelConfigBackward_dW(use_tma_store=True),
}
CAPABILITIES = [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
by_pass = pytest.mark.parametrize("pass_name", PASSES)
by_dtype = pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float16])


def config_of(pass_name: str, kernel: Any, dtype: DType, device: str | None) -> MoeConfig:
    """A legal config of these kernels."""
    kernels = KernelsConfig(**{pass_name: kernel})
    config = MoeConfig(BackendConfig(Backend.triton), kernels=kernels, autotune=False, dtype=dtype, device=device)
    assert broken_rules(make_case(config)) == []
    return config


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes this a machine with a GPU of some compute capability, kernels compiled."""

    def of(capability: tuple[int, int]) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return of


@by_pass
@by_dtype
@pytest.mark.parametrize("gemm", ["up", "down"])
def test_the_interpreter_does_not_specialize(
    pass_name: str, gemm: str, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else keeps it from running, such as bfloat16: the reason names the launch, and what would help."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    special = SPECIALIZED[pass_name]
    pair = (special, None) if gemm == "up" else (replace(special, warp_specialize=False), special)
    key = f"kernels.{pass_name}.{gemm}.warp_specialize=true"
    reason = f"{key} needs a GPU: its kernel is compiled only, Triton does not interpret it"
    assert why_not_here(config_of(pass_name, pair, dtype, "cpu")) == reason


def test_the_interpreter_runs_the_plain_kernel_of_the_same_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for pass_name, kernel in SPECIALIZED.items():
        assert why_not_here(config_of(pass_name, replace(kernel, warp_specialize=False), DType.float16, "cpu")) is None


@by_pass
@by_dtype
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_specialized_kernels_are_for_hopper_alone(
    pass_name: str, dtype: DType, capability: tuple[int, int], gpu: Any
) -> None:
    """Neither an older GPU nor a newer one: their warp-group product is Hopper's."""
    gpu(capability)
    need = f"kernels.{pass_name}.up.warp_specialize=true needs compute capability 9.0"
    reason = f"{need}, this GPU has {capability[0]}.{capability[1]}"
    found = why_not_here(config_of(pass_name, SPECIALIZED[pass_name], dtype, "cuda"))
    assert found == (None if capability == (9, 0) else reason)


@by_pass
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_tma_came_with_hopper(pass_name: str, capability: tuple[int, int], gpu: Any) -> None:
    """A newer GPU has it, too."""
    gpu(capability)
    kernel = BY_TMA[pass_name]
    flag = next(name for name, value in vars(kernel).items() if value is True)
    need = f"kernels.{pass_name}.down.{flag}=true needs compute capability 9.0"
    found = why_not_here(config_of(pass_name, (None, kernel), DType.float16, "cuda"))
    assert found == (None if capability >= (9, 0) else f"{need}, this GPU has {capability[0]}.{capability[1]}")


def test_plain_kernels_run_on_any_gpu(gpu: Any) -> None:
    gpu((7, 5))
    for pass_name, kernel in PASSES.items():
        assert why_not_here(config_of(pass_name, kernel(), DType.float16, "cuda")) is None


def test_a_kernel_that_is_not_interpreted_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels on a CPU: the reason of every Triton kernel, before that of the specialised ones."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = why_not_here(config_of("fwd", SPECIALIZED["fwd"], DType.bfloat16, None))
    assert found == "backend triton on device=cpu needs a GPU, or TRITON_INTERPRET=1 from the start"


@pytest.mark.parametrize(("device", "there"), [("cuda", True), ("cuda:0", True), ("cuda:1", False), ("cuda:9", False)])
def test_a_gpu_beyond_those_there(device: str, there: bool, gpu: Any) -> None:
    """On a machine with one GPU: the second is refused with both numbers, not by CUDA's own words."""
    gpu((9, 0))
    reason = f"device={device} but torch sees 1 GPU here"
    assert why_not_here(MoeConfig(device=device)) == (None if there else reason)


@pytest.mark.parametrize("device", ["xpu", "mps", "hpu"])
@pytest.mark.parametrize("backend", Backend)
def test_a_device_of_another_torch(device: str, backend: Backend) -> None:
    """Torch knows the name, and says in each case something else: AssertionError, RuntimeError, a missing module."""
    reason = f"device={device} but this torch cannot use it here; allowed: cpu, cuda, cuda:0, ..."
    assert why_not_here(MoeConfig(BackendConfig(backend), device=device)) == reason


def test_the_meta_device_holds_no_numbers() -> None:
    """A block may be built there; what computes refuses it."""
    config = MoeConfig(device="meta")
    assert why_not_here(config) is None
    require_here(config, numbers=False)
    with pytest.raises(MachineError, match=r"^this machine cannot run it: device=meta holds no numbers; allowed: cpu"):
        require_here(config)
