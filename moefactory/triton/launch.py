"""Launching kernels and naming those that ran; where they run and how many programs that takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..machine import interpreting

INTERPRETED_PROGRAMS = 3  # few, so that a persistent program walks several tiles on a CPU too
_recorders: list[list[str]] = []
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


@contextmanager
def record_launches() -> Iterator[list[str]]:
    """Collect the names of the kernels that are launched within, in order."""
    names: list[str] = []
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders[:] = [other for other in _recorders if other is not names]


def launch(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel` over `grid` under `name`; `args` are its first parameters, `meta` the constexprs after them.

    Triton's own launch binds and specialises some thirty arguments anew, 50 us each time. What it specialises on is
    kept here with the compiled kernel, which is then called directly: alignment, and integers that are 1 or multiples
    of 16.
    """
    for names in _recorders:
        names.append(name)
    if interpreting():
        kernel[grid](*args, **meta)
        return
    key = (id(kernel), torch.cuda.current_device(), *meta.values(), *map(_specialisation, args))
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*args, **meta)
        _compiled[key] = compiled, tuple(meta[parameter] for parameter in kernel.arg_names[len(args) :])
        return
    compiled, constants = known
    compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _specialisation(arg: Any) -> Any:
    """What a compiled kernel depends on of one argument."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg < 2**31
    return arg.base.dtype, *arg.block_shape


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make the tensors' own the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@triton.jit
def _cast(source_ptr, target_ptr):
    tl.store(target_ptr, tl.load(source_ptr).to(target_ptr.dtype.element_ty))


def bfloat16_is_rounded() -> bool:
    """Whether kernels of this process round float32 to the nearest bfloat16, as a GPU does; asked of a kernel."""
    source = torch.tensor([1.0 + 2.0**-8 + 2.0**-9])  # between two bfloat16 numbers, nearer to the upper
    target = torch.empty(1, dtype=torch.bfloat16)
    _cast[(1,)](source, target)
    return bool(target == source.bfloat16())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is made for kernels: 5 us a call on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is n or more, for n of 1 or more."""
    return 1 << (n - 1).bit_length()


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_programs(device: torch.device, per_multiprocessor: int = 1) -> int:
    """How many persistent programs fill this device."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    index = torch.cuda.current_device() if device.index is None else device.index
    return _multiprocessors(index) * per_multiprocessor


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type sums are held in: float32, or float64 for float64 (interpreter only)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def refuse_misaligned(tensor: Tensor) -> None:
    """ValueError for a tensor that TMA cannot move."""
    if tensor.data_ptr() % 16:
        raise ValueError(
            "a tensor moved by TMA must start at a multiple of 16 bytes; clone it or set its flag to false"
        )


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where a view of somebody's memory starts at no multiple of 16 bytes.

    The warp-specialised kernels copy 16 bytes at a time also where they follow an index.
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A host TMA descriptor of a contiguous tensor. ValueError where the address is not a multiple of 16 bytes."""
    refuse_misaligned(tensor)
    return TensorDescriptor.from_tensor(tensor, block)


__all__ = [
    "accumulator",
    "aligned",
    "cdiv",
    "descriptor",
    "interpreting",
    "launch",
    "num_programs",
    "power_of_2",
    "record_launches",
    "refuse_misaligned",
]
