"""A compiled kernel's launch without Triton's layers of Python: the one place that knows how Triton launches.

`CompiledKernel.__getitem__` makes a closure, asks for device and stream, fills a dictionary for hooks that nobody has
set, and encodes every TMA descriptor anew: 10 us a launch and 10 more a descriptor, on a slow host twice that. At the
end of it is one C function, which takes addresses as plain integers. What precedes the kernel's own arguments there is
fixed once a kernel is compiled, but for grid and stream; its order differs between the releases of Triton.

`direct` returns None where it does not know its way: another release, a kernel that wants scratch memory, a descriptor
that Triton takes apart. The caller then launches as Triton's documentation says.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs

KNOWN = ("3.6.", "3.7.")  # the releases whose C function was read
MAX_MAPS = 4096  # 128 bytes each and their key: some 2 MiB
_maps: dict[tuple[Any, ...], Any] = {}
_metadata: dict[str, Metadata] = {}


def _no_stream(device: int) -> int:
    raise RuntimeError("moefactory: this torch was built without CUDA and has no streams")


current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _no_stream)


def hooked() -> bool:
    """Whether somebody (a profiler) wants to know of launches: those then take Triton's own way."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Metadata:
    """What Triton compiled a descriptor for, as a key that is quick to compare: by identity."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


class Direct(NamedTuple):
    """The C function of a compiled kernel, and what it is called with each time.

    Attributes:
        function: takes grid, stream, `fixed` and the kernel's arguments.
        fixed: the kernel's handle, its launch options, and None for hooks and scratch memory.
        packs: whether the kernel's arguments are one sequence (3.7), not arguments of the function (3.6).
        constants: the constexprs, which follow the kernel's arguments.
        descriptors: (place, metadata) of the descriptors among the arguments, from the last to the first.
    """

    function: Any
    fixed: tuple[Any, ...]
    packs: bool
    constants: tuple[Any, ...]
    descriptors: tuple[tuple[int, Metadata], ...]

    def run(self, grid: tuple[int, ...], stream: int, args: list[Any]) -> None:
        """Launch with integers (addresses among them) and descriptors; the list is used up."""
        for place, metadata in self.descriptors:  # from the last on: several arguments stand for one
            one = args[place]
            shape, strides = tuple(one.shape), tuple(one.strides)
            args[place : place + 1] = tensor_map(one, one.base.data_ptr(), shape, strides, metadata), *shape, *strides
        args.extend(self.constants)
        self.call(grid, stream, args)

    def call(self, grid: tuple[int, ...], stream: int, args: Sequence[Any]) -> None:
        """Launch with all that the C function takes."""
        if self.packs:
            self.function(*grid, stream, *self.fixed, args)
        else:
            self.function(*grid, stream, *self.fixed, *args)


def direct(compiled: Any, constants: tuple[Any, ...]) -> Direct | None:
    """How to launch `compiled`, which `kernel[grid](...)` returned, with these constexprs; None: as documented."""
    launcher: Any = compiled.run
    if type(launcher).__module__ != "triton.backends.nvidia.driver" or not triton.__version__.startswith(KNOWN):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    function, descriptors = _c_function(launcher), _descriptors(compiled)
    if function is None or descriptors is None:
        return None
    start = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl
    packed, no_hooks, no_scratch = compiled.packed_metadata, (None, None, None), (None, None)
    if hasattr(launcher, "arg_annotations"):  # 3.7: one C function for all kernels, told of their signature
        fixed = (*start, packed, *no_hooks, *no_scratch, launcher.arg_annotations, launcher.kernel_signature)
        return Direct(function, fixed, True, constants, descriptors)
    return Direct(function, (*start, *no_scratch, packed, *no_hooks), False, constants, descriptors)


def _c_function(launcher: Any) -> Any:
    """Triton's C function, which it wraps for kernels with descriptors."""
    function = launcher.launch
    if not isinstance(function, BuiltinFunctionType):
        function = inspect.getclosurevars(function).nonlocals.get("launcher")
    return function if isinstance(function, BuiltinFunctionType) else None


def _descriptors(compiled: Any) -> tuple[tuple[int, Metadata], ...] | None:
    types = list(compiled.src.signature.values())
    places = [i for i, kind in enumerate(types) if isinstance(kind, str) and kind.startswith("tensordesc")]
    metas = getattr(compiled.metadata, "tensordesc_meta", None) or []
    if len(metas) != len(places) or None in metas:
        return None
    known = [_metadata.setdefault(repr(sorted(meta.items())), Metadata(meta)) for meta in metas]
    return tuple(zip(places, known, strict=True))[::-1]


class _At:
    """Stands for a tensor where only its address counts."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def tensor_map(
    descriptor: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...], metadata: Metadata
) -> Any:
    """The tensor map of a descriptor like this one of memory at `address`.

    It is a function of its key and of nothing else, whoever owns that memory now: a kept one is right.
    """
    key = (address, shape, strides, metadata)
    found = _maps.get(key)
    if found is None:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        if len(_maps) >= MAX_MAPS:
            _maps.clear()
        here = copy.copy(descriptor)
        here.base = _At(address)
        found = _maps[key] = make_tensordesc_arg(here, metadata.values)[0]
    return found


__all__ = ["Direct", "Metadata", "current_stream", "direct", "hooked", "tensor_map"]
