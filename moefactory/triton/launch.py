"""Launching kernels, compiling them ahead, naming those that ran; where they run and how many programs that takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Context, ContextVar
from functools import cache
from threading import get_ident
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..config import MachineError
from ..machine import NO_BFLOAT16, interpreting
from .direct import Direct, current_stream, direct, hooked

INTERPRETED_PROGRAMS = 3  # few, so that a persistent program walks several tiles on a CPU too
_HERE = nullcontext()
Watcher = Callable[[str, Direct | None, tuple[int, ...], tuple[Any, ...]], None]
_recorders: list[list[str]] = []
_rounding: list[bool] = []
_watchers: dict[int, Watcher] = {}
_ahead: ContextVar[list[tuple[Any, Any]] | None] = ContextVar("ahead", default=None)  # (kernel, what Triton answered)
MAX_COMPILERS = 8  # threads: a step launches some ten kernels, of which four take most of the time
_compiled: dict[tuple[Any, ...], _Compiled] = {}
MAX_CHECKED = 4096
_checked: dict[tuple[Any, ...], dict[str, Any]] = {}


@contextmanager
def record_launches() -> Iterator[list[str]]:
    """Collect the names of the kernels that are launched within, in order."""
    names: list[str] = []
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders[:] = [other for other in _recorders if other is not names]


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of this thread's launches: name, how it was launched (None: another way), grid, arguments."""
    _watchers[get_ident()] = watcher
    try:
        yield
    finally:
        del _watchers[get_ident()]


def compile_ahead(run: Callable[[], Any]) -> None:
    """Call `run` with launches that run nothing; by the end the kernels that it lacked are compiled, several at a time.

    What does not compile is left to the launch that needs it, and its error.
    """
    Context().run(_compile_ahead, run)  # modes, Triton's and ours, end with it, also where an interrupt ends it


def _compile_ahead(run: Callable[[], Any]) -> None:
    asked: list[tuple[Any, Any]] = []
    _ahead.set(asked)
    workers = ThreadPoolExecutor(min(MAX_COMPILERS, len(os.sched_getaffinity(0))), "moefactory-compiles")
    try:
        with workers, triton.AsyncCompileMode(workers, ignore_errors=True):
            run()
    finally:
        for kernel, answer in asked:
            if isinstance(answer, triton.FutureKernel) and answer.kernel is None:
                _forget(kernel, answer)


def _forget(kernel: Any, answer: Any) -> None:
    """Let Triton compile a kernel again: it would keep the failure, which may have been for want of memory."""
    for known, *_ in kernel.device_caches.values():
        for key in [key for key, value in known.items() if value is answer]:
            del known[key]


class _Compiled(NamedTuple):
    """A kernel compiled for what its arguments are."""

    kernel: Any  # kept, so that its id stays its own
    compiled: Any
    constants: tuple[Any, ...]  # the constexprs that follow the arguments
    direct: Direct | None


def launch(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel` over `grid` under `name`; `args` are its first parameters, `meta` the constexprs after them.

    Triton's own launch binds and specialises some thirty arguments anew, 50 us each time. What it specialises on is
    kept here with the compiled kernel, which is then launched by `direct`: dtypes, alignment, and integers that are 1
    or multiples of 16.
    """
    if (asked := _ahead.get()) is not None:
        asked.append((kernel, kernel.warmup(*args, grid=grid, **meta)))
        return
    for names in _recorders:
        names.append(name)
    if not isinstance(kernel, JITFunction):  # interpreted
        if any(isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 for arg in args) and not bfloat16_is_rounded():
            raise MachineError(NO_BFLOAT16)  # also where autocast or a new weight has brought it in
        kernel[grid](*args, **meta)
        return
    device = torch.cuda.current_device()
    key: list[Any] = [id(kernel), device, *meta.values()]
    values: list[Any] = []
    any_bits = 0
    for arg in args:
        if type(arg) is int:
            key.append(2 if arg == 1 else (arg % 16 == 0 if arg < 2**31 else -(arg % 16)))
            values.append(arg)
        elif isinstance(arg, Tensor):
            address = arg.data_ptr()
            any_bits |= address
            key.append(arg.dtype)
            values.append(address)
        else:
            key.append((arg.base.dtype, *arg.block_shape))
            values.append(arg)
    if any_bits % 16:
        key.extend(arg.data_ptr() % 16 == 0 for arg in args if isinstance(arg, Tensor))
    known = _compiled.get(tuple(key))
    if _watchers and (watcher := _watchers.get(get_ident())):
        watcher(name, known.direct if known else None, grid, args)
    if known is None:
        compiled = kernel[grid](*args, **meta)
        if isinstance(compiled, triton.FutureKernel):  # another thread compiles it ahead
            compiled = compiled.result()
        constants = tuple(meta[parameter] for parameter in kernel.arg_names[len(args) :])
        _compiled[tuple(key)] = _Compiled(kernel, compiled, constants, direct(compiled, constants))
    elif hooked():
        kernel[grid](*args, **meta)
    elif known.direct is None:
        known.compiled[(*grid, 1, 1)[:3]](*args, *known.constants)
    else:
        known.direct.run((*grid, 1, 1)[:3], current_stream(device), values)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make the tensors' own the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@triton.jit
def _cast(source_ptr, target_ptr):
    tl.store(target_ptr, tl.load(source_ptr).to(target_ptr.dtype.element_ty))


def bfloat16_is_rounded() -> bool:
    """Whether kernels of this process round float32 to the nearest bfloat16, as a GPU does; asked of a kernel."""
    if not _rounding:
        source = torch.tensor([1.0 + 2.0**-8 + 2.0**-9])  # between two bfloat16 numbers, nearer to the upper
        target = torch.empty(1, dtype=torch.bfloat16)
        _cast[(1,)](source, target)
        if target == source.bfloat16():
            _rounding.append(True)  # asked at each interpreted launch
    return bool(_rounding)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is made for kernels: 5 us a call on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is n or more, for n of 1 or more."""
    return 1 << (n - 1).bit_length()


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_programs(device: torch.device, sm_margin: int, per_multiprocessor: int = 1) -> int:
    """How many persistent programs fill this device but for `sm_margin` of its multiprocessors; at least one's."""
    there = _multiprocessors(_index(device)) if device.type == "cuda" else INTERPRETED_PROGRAMS
    return max(1, there - sm_margin) * (per_multiprocessor if device.type == "cuda" else 1)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def memory_bandwidth(device: torch.device) -> float:
    """GB/s of the device's memory at its highest clock; 0 for a CPU."""
    return _memory_bandwidth(_index(device)) if device.type == "cuda" else 0.0


@cache
def _memory_bandwidth(index: int) -> float:
    from triton.testing import get_dram_gbps

    return float(get_dram_gbps(index))


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type sums are held in: float32, or float64 for float64 (interpreter only)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def refuse_misaligned(tensor: Tensor) -> None:
    """ValueError for a tensor that TMA cannot move."""
    if tensor.data_ptr() % 16:
        raise ValueError(
            "a tensor moved by TMA must start at a multiple of 16 bytes; clone it or set its flag to false"
        )


def laid_out(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is not contiguous or starts at no multiple of 16 bytes, as a view of memory may.

    The warp-specialised kernels copy 16 bytes at a time also where they follow an index.
    """
    plain = tensor.data_ptr() % 16 == 0 and tensor.is_contiguous()
    return tensor if plain else tensor.clone(memory_format=torch.contiguous_format)


def descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A host TMA descriptor of a contiguous tensor. ValueError where the address is not a multiple of 16 bytes.

    Triton's own checks (4 us) run once for a shape, the address is checked each time.
    """
    refuse_misaligned(tensor)
    key = (tensor.dtype, *tensor.shape, *tensor.stride(), *block)
    if key not in _checked:
        if len(_checked) >= MAX_CHECKED:
            _checked.clear()
        made = TensorDescriptor.from_tensor(tensor, block)
        _checked[key] = {name: value for name, value in vars(made).items() if name != "base"}
        return made
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_checked[key], base=tensor)
    return made


__all__ = [
    "accumulator",
    "cdiv",
    "compile_ahead",
    "descriptor",
    "interpreting",
    "laid_out",
    "launch",
    "memory_bandwidth",
    "num_programs",
    "power_of_2",
    "record_launches",
    "refuse_misaligned",
]
