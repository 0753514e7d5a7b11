"""Instruments for kernels that run in Triton's interpreter on a CPU.

Installed once, by `conftest.py`, before the first launch:
    install_bfloat16_shim   bf16 casts round, `tl.dot` multiplies values and not bits, bf16 arithmetic is refused
    install_launch_fixes    no numpy warnings for inf and NaN, cheaper launches, Triton 3.6 with numpy >= 2.4
Used around launches, in any nesting:
    bounds_checker          a lane that reads or writes outside every tensor argument raises IndexError
    overflow_checker        integer arithmetic that wraps, and a false `tl.device_assert`, raise
    poisoned_lanes          masked-off lanes of a load without `other` hold NaN, not the interpreter's zero
    write_recorder          which program wrote each element: what was written twice, what never
    nan_filled_empty        fresh memory holds NaN (serves GPU runs too)
    far_apart               a small matrix whose rows lie gigabytes apart, for tests of the index width

`TRITON_INTERPRET=1` must be in the environment before the process first imports triton. Launches patch
`triton.language` for the whole process: neither they nor these instruments stand two threads at once.
Tried with Triton 3.6.0, 3.7.1 and 3.9.0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import mmap
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Program = tuple[int, int, int]
Index = tuple[int, ...]

_BFLOAT16_NAN = np.uint16(0x7FC0)
_POISON: dict[str, Callable[[np.dtype], Any]] = {  # by numpy's kind of dtype
    "f": lambda dtype: np.nan,
    "i": lambda dtype: np.iinfo(dtype).max,
    "u": lambda dtype: np.iinfo(dtype).max,  # all ones: the bits of a bf16 too, where they are a NaN
    "b": lambda dtype: True,
}
_MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on


def _interpreter() -> Any:
    """Return Triton's interpreter module, or raise RuntimeError where kernels are not interpreted."""
    tri: Any = importlib.import_module("triton.runtime.interpreter")
    # `tl.sum` was decorated when triton was imported, so it tells the mode of that moment; the environment may lie.
    if not isinstance(tri.tl.sum, tri.InterpretedFunction):
        raise RuntimeError("TRITON_INTERPRET: was not 1 when this process first imported triton; set it before that")
    return tri


@contextlib.contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of a class or object and put the former ones back at the end."""
    former = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in former.items():
            setattr(owner, name, value)


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def float32_from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Widen bf16 bit patterns (uint16, any shape) to float32, exactly."""
    return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_from_float32(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """Narrow float32 (any shape) to bf16 bit patterns, to nearest even or toward zero; any NaN gives 0x7FC0."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    # Just under half an ulp, plus the last bit kept: ties go to even, and the carry runs over into inf by itself.
    rounded = bits if toward_zero else bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return np.where(np.isnan(values), _BFLOAT16_NAN, (rounded >> 16).astype(np.uint16))


_unshimmed: dict[tuple[Any, str], Any] = {}  # (class, method name) -> Triton's own; empty while the shim is away


def install_bfloat16_shim() -> None:
    """Make bf16 honest in the interpreter for the rest of the process; a second call does nothing.

    `tl.dot` widens bf16 operands exactly to float32, and adds products of float32 and float16 up in float64. Casts to
    bf16 round to nearest even (float64 and integers go through float32, as in torch); casts from bf16 are exact.
    Arithmetic, comparison, reduction and scan of bf16, which the interpreter does on raw bits, raise TypeError: upcast
    first. Moving bits (where, reshape, join) is fine.
    """
    if _unshimmed:
        return
    tri = _interpreter()
    shims = [(tri.InterpreterBuilder, name, shim) for name, shim in _conversions(tri).items()]
    # `ternary_op` is refused for clamp and let through for select, whose first operand is the condition.
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        shims.append((tri.InterpreterBuilder, name, _refusing(getattr(tri.InterpreterBuilder, name))))
    shims.append((tri.ReduceScanOpInterface, "check_tensor", _refusing_reduction(tri)))
    for owner, name, shim in shims:
        _unshimmed[owner, name] = getattr(owner, name, None)
        setattr(owner, name, shim)


@contextlib.contextmanager
def without_bfloat16_shim() -> Iterator[None]:
    """Show for a while what the installed Triton does by itself."""
    installed = bool(_unshimmed)
    for (owner, name), original in _unshimmed.items():
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    _unshimmed.clear()
    try:
        yield
    finally:
        if installed:
            install_bfloat16_shim()


def _conversions(tri: Any) -> dict[str, Any]:
    """Return the builder's methods that make, cast or multiply bf16."""
    builder, tl, handle = tri.InterpreterBuilder, tri.tl, tri.TensorHandle
    cast, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    descriptor_load = builder.create_descriptor_load

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return handle(float32_from_bfloat16(operand.data), tl.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast(self, src, dst_type)
        values = widened(src).data
        if target == tl.bfloat16:
            return handle(bfloat16_from_float32(values.astype(np.float32)), target)
        return handle(values.astype(tri._get_np_dtype(target)), target)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return fp_to_fp(self, src, dst_type, rounding_mode)
        toward_zero = rounding_mode == tri._ir.ROUNDING_MODE.RTZ
        return handle(bfloat16_from_float32(src.data, toward_zero), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        a, b = widened(a), widened(b)
        if acc.data.dtype != np.float32 or not {a.data.dtype, b.data.dtype} <= {np.dtype("f2"), np.dtype("f4")}:
            return dot(self, a, b, acc, *rest)
        # numpy's products of float32 differ in their last bits by how wide an operand is, on some processors
        with np.errstate(all="ignore"):
            product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return handle(product + acc.data, acc.dtype.scalar)

    def get_bf16(self: Any, value: float) -> Any:  # missing before 3.9: `tl.full(shape, 1.5, tl.bfloat16)` failed
        return handle(bfloat16_from_float32(np.array([value], dtype=np.float32)), tl.bfloat16)

    def create_descriptor_load(self: Any, desc: Any, indices: Any, *rest: Any, **more: Any) -> Any:
        loaded = descriptor_load(self, desc, indices, *rest, **more)
        if loaded.dtype.scalar == tl.bfloat16 and desc.padding == tri._ir.PADDING_OPTION.PAD_NAN:
            loaded.data[~_lanes(desc.materialize_pointers(indices)[1])] = _BFLOAT16_NAN  # Triton padded with 0
        return loaded

    return {f.__name__: f for f in (cast_impl, create_fp_to_fp, create_dot, get_bf16, create_descriptor_load)}


def _refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
    def refusing(self: Any, first: Any, *rest: Any) -> Any:
        if first.dtype.scalar.name == "bf16":
            raise TypeError("bf16 operand: the interpreter computes on its raw bits; upcast with .to(tl.float32) first")
        return operation(self, first, *rest)

    return refusing


def _refusing_reduction(tri: Any) -> Callable[..., None]:
    check = tri.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, input: Any) -> None:
        check(self, input)
        if any(arg.dtype.scalar.name == "bf16" for arg in input):
            raise TypeError("bf16 reduction: the interpreter computes on raw bits; upcast with .to(tl.float32) first")

    return check_tensor


def _lanes(mask: Any) -> np.ndarray:
    """Return a mask as an array: descriptor accesses of 3.6 and 3.7 pass one bare, the rest in a handle."""
    lanes: np.ndarray = mask if isinstance(mask, np.ndarray) else mask.data
    return lanes


# --- the launch -------------------------------------------------------------------------------------------------------

_fixed: list[Any] = []  # the interpreter module, once its launches are fixed


def install_launch_fixes() -> None:
    """Make launches quiet and cheaper for the rest of the process, with the same results; a second call does nothing.

    - inf, NaN and overflow inside a launch give no RuntimeWarning, as on a GPU.
    - A call of a jitted helper (`tl.zeros`, `tl.sum`) no longer patches all of `triton.language` again: 0.2 ms each.
    - The wide copy of each integer operation is computed only where somebody looks at it (`overflow_checker`).
    - A tensor can be a loop bound with Triton 3.6 and numpy >= 2.4.
    """
    if _fixed:
        return
    tri = _interpreter()
    launch, patch_tensor = tri.GridExecutor.__call__, tri._patch_lang_tensor
    patched: set[int] = set()

    def quiet_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All-NaN", category=RuntimeWarning)
            return launch(self, *args, **kwargs)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    tri.GridExecutor.__call__ = quiet_launch
    tri._patch_lang_tensor = patch_lang_tensor
    tri._patch_lang = _patching_once(tri, patched)
    builder = tri.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _fixed.append(tri)


def _patching_once(tri: Any, patched: set[int]) -> Callable[[Any], Any]:
    """Return a `_patch_lang` that leaves alone what is already in `patched`, which each launch begins by emptying."""
    patch = tri._patch_lang
    needs: dict[Any, frozenset[int]] = {}  # function -> the modules among its globals that Triton patches for it

    def patch_lang(fn: Any) -> Any:
        if fn not in needs:
            present = {id(value) for value in fn.__globals__.values()}
            needs[fn] = frozenset({id(tri.tl), id(tri.tl.core)} & present)
        if needs[fn] and needs[fn] <= patched:
            return tri._LangPatchScope()
        patched.update(needs[fn])
        return patch(fn)

    return patch_lang


@contextlib.contextmanager
def overflow_checker() -> Iterator[None]:
    """Make wrapped 32-bit (or narrower) integer arithmetic and a false `tl.device_assert` raise.

    Triton wraps what a kernel raises: expect `triton.runtime.errors.InterpreterError` with 'overflow detected'.
    """
    builder = _interpreter().interpreter_builder
    with _replaced(builder, options=dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)):
        yield


@contextlib.contextmanager
def poisoned_lanes() -> Iterator[None]:
    """Give the masked-off lanes of a load without `other`, undefined on a GPU, NaN, the largest integer or True."""
    tri = _interpreter()
    load = tri.InterpreterBuilder.create_masked_load

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **more: Any) -> Any:
        if other is None and not _lanes(mask).all():
            element = ptrs.get_element_ty()
            dtype = tri._get_np_dtype(element)
            other = tri.TensorHandle(np.full(ptrs.data.shape, _POISON[dtype.kind](dtype), dtype=dtype), element)
        return load(self, ptrs, mask, other, *rest, **more)

    with _replaced(tri.InterpreterBuilder, create_masked_load=create_masked_load):
        yield


# --- memory accesses --------------------------------------------------------------------------------------------------


class OutOfBoundsError(IndexError):
    """A kernel touched memory outside its tensor arguments."""


@dataclass(frozen=True)
class _Launch:
    kernel: str
    arguments: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Access:
    kind: str  # load, store or atomic
    addresses: np.ndarray  # of the active lanes, uint64
    width: int  # bytes per lane
    program: Program


@contextlib.contextmanager
def _observed(on_launch: Callable[[_Launch], None], on_access: Callable[[_Access], None]) -> Iterator[None]:
    """Report each launch when its arguments are known, and each access to memory before it happens."""
    tri = _interpreter()
    builder, executor = tri.InterpreterBuilder, tri.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas, init_args = builder.create_atomic_rmw, builder.create_atomic_cas, executor._init_args_hst

    def active(pointers: Any, mask: Any) -> np.ndarray:
        lanes = _lanes(mask)
        addresses: np.ndarray = pointers.data
        return addresses.ravel() if lanes.all() else np.broadcast_to(addresses, lanes.shape)[lanes]

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        on_access(_Access("load", active(ptrs, mask), width, self.grid_idx))
        return load(self, ptrs, mask, *rest, **more)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        on_access(_Access("store", active(ptrs, mask), value.data.itemsize, self.grid_idx))
        return store(self, ptrs, value, mask, *rest, **more)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        on_access(_Access("atomic", active(ptr, mask), val.data.itemsize, self.grid_idx))
        return rmw(self, op, ptr, val, mask, *rest)

    def create_atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
        on_access(_Access("atomic", ptr.data.ravel(), val.data.itemsize, self.grid_idx))
        return cas(self, ptr, cmp, val, *rest)

    def init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args, named = init_args(self, args_dev, kwargs)
        tensors: dict[str, torch.Tensor] = {}
        for name, value in [*zip(self.arg_names, args, strict=False), *named.items()]:
            _collect(name, value, tensors)
        on_launch(_Launch(self.fn.__name__, tensors))
        return args, named

    methods = (create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas)
    with _replaced(builder, **{f.__name__: f for f in methods}), _replaced(executor, _init_args_hst=init_args_hst):
        yield


def _collect(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Add the tensors in an argument: itself, a tuple's items, a descriptor's or a reinterpreted tensor's base."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            _collect(f"{name}[{i}]", item, tensors)
    elif hasattr(value, "base"):
        _collect(name, value.base, tensors)


@dataclass(frozen=True)
class _Extent:
    """The bytes of one tensor: runs of `run` bytes, repeated `count` times every `step` bytes for each of `outer`."""

    what: str
    start: int
    span: int
    run: int
    outer: tuple[tuple[int, int], ...]

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> _Extent:
        size = tensor.element_size()
        dims = sorted(
            (stride * size, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and stride
        )
        span = size + sum(step * (n - 1) for step, n in dims) if tensor.numel() else 0
        run, covered, outer = size, size, list[tuple[int, int]]()
        for step, n in dims:
            if step < covered:  # rows overlap: take the whole span
                run, outer = span, []
                break
            if step == run:
                run *= n
            else:
                outer.insert(0, (step, n))
            covered += step * (n - 1)
        what = f"{name} ({tensor.dtype}, shape {list(tensor.shape)}, strides {list(tensor.stride())})"
        return _Extent(what, tensor.data_ptr(), span, run, tuple(outer))

    def holds(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Tell for each address (uint64) whether `width` bytes from it on belong to the tensor."""
        if self.span < width:
            return np.zeros(addresses.shape, dtype=bool)
        rest = addresses - np.uint64(self.start)  # below the start: wraps to a huge number
        inside = rest <= np.uint64(self.span - width)
        for step, count in self.outer:
            inside &= rest // np.uint64(step) < count
            rest = rest % np.uint64(step)
        return inside & (rest <= np.uint64(self.run - width)) if self.outer else inside

    def distance(self, address: int) -> int:
        return max(self.start - address, address - self.start - self.span, 0)

    def place(self, address: int) -> str:
        offset = address - self.start
        if offset < 0:
            return f"{-offset} bytes before {self.what}"
        if offset >= self.span:
            return f"{offset - self.span} bytes past the end of {self.what}"
        return f"{offset} bytes into {self.what}, in a gap between its rows or at its edge"


@contextlib.contextmanager
def bounds_checker() -> Iterator[None]:
    """Raise `OutOfBoundsError`, an IndexError, before an active lane leaves the tensor arguments of its launch.

    Views count exactly: the gaps between the rows of a padded or sliced view are outside too. A misaligned address is
    refused as well. Covers pointers, block pointers, atomics and descriptors; lanes outside a *descriptor's* shape are
    masked off, as TMA does. Not seen: a wrong address that lies inside another argument.
    """
    tri = _interpreter()
    call, errors = tri.GridExecutor.__call__, tri.InterpreterError
    kernel, extents = "", list[_Extent]()

    def on_launch(launch: _Launch) -> None:
        nonlocal kernel, extents
        kernel = launch.kernel
        extents = [_Extent.of(name, tensor) for name, tensor in launch.arguments.items()]

    def on_access(access: _Access) -> None:
        addresses, width = access.addresses, access.width
        if not addresses.size:
            return
        aligned = not int(np.bitwise_or.reduce(addresses)) % width
        low, end = int(addresses.min()), int(addresses.max()) + width
        if aligned and any(e.start <= low and end <= e.start + e.span and not e.outer for e in extents):
            return  # the common case: all lanes in one dense tensor
        good = np.zeros(addresses.shape, dtype=bool)
        for extent in extents:
            good |= extent.holds(addresses, width)
        good &= addresses % np.uint64(width) == 0
        if not good.all():
            raise OutOfBoundsError(f"kernel {kernel}{_kernel_line()}: {_complaint(access, good, extents)}")

    def unwrapping_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except errors as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OutOfBoundsError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    with _observed(on_launch, on_access), _replaced(tri.GridExecutor, __call__=unwrapping_call):
        yield


def _complaint(access: _Access, good: np.ndarray, extents: list[_Extent]) -> str:
    address = int(access.addresses[~good][0])
    nearest = min(extents, key=lambda e: e.distance(address), default=None)
    place = "the kernel has no tensor argument" if nearest is None else nearest.place(address)
    if address % access.width:
        place = f"not a multiple of {access.width}; {place}"
    return (
        f"{access.kind} of {access.width} bytes at 0x{address:x} is out of bounds: {place}; "
        f"program {access.program}, {int((~good).sum())} of {good.size} active lanes"
    )


def _kernel_line() -> str:
    """Return ' (file:line)' of the innermost frame that is neither Triton's nor ours."""
    ours = (os.path.dirname(importlib.import_module("triton").__file__ or "") + os.sep, __file__)
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return "" if frame is None else f" ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


# --- writes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duplicate:
    """One element that one launch wrote more than once, with the two programs (possibly the same one)."""

    element: Index
    kernel: str
    first: Program
    second: Program


@dataclass
class WriteRecorder:
    """The writes of every launch inside `write_recorder()`; atomics count as writes. CPU tensors only.

    Keeps the launches' tensors alive, so that an address means one thing for as long as the recorder lives.
    """

    _launches: list[_Launch] = field(default_factory=list)
    _writes: list[tuple[int, _Access]] = field(default_factory=list)  # with the number of the launch

    def writers(self, tensor: torch.Tensor) -> dict[Index, list[Program]]:
        """Return for each written element (its index in `tensor`) the programs that wrote it, in order."""
        result: dict[Index, list[Program]] = {}
        elements, writes = self._hits(tensor)
        for element, write in zip(elements.tolist(), writes.tolist(), strict=True):
            result.setdefault(_unravel(element, tensor), []).append(self._writes[write][1].program)
        return result

    def duplicates(self, tensor: torch.Tensor) -> list[Duplicate]:
        """Return where one launch wrote an element again: a race if by another program or in the same store."""
        elements, writes = self._hits(tensor)
        launches = np.array([launch for launch, _ in self._writes], dtype=np.int64)[writes]
        order = np.lexsort((writes, launches, elements))
        elements, writes, launches = elements[order], writes[order], launches[order]
        again = np.flatnonzero((elements[1:] == elements[:-1]) & (launches[1:] == launches[:-1])) + 1
        return [
            Duplicate(
                _unravel(int(elements[i]), tensor),
                self._launches[launches[i]].kernel,
                self._writes[writes[i - 1]][1].program,
                self._writes[writes[i]][1].program,
            )
            for i in again
        ]

    def never_written(self, tensor: torch.Tensor) -> list[Index]:
        """Return the indices of the elements that no launch wrote, in row-major order."""
        missed = np.setdiff1d(np.arange(tensor.numel()), self._hits(tensor)[0])
        return [_unravel(int(element), tensor) for element in missed]

    def check_written_once(self, *tensors: torch.Tensor) -> None:
        """Raise AssertionError unless every element of each tensor was written, and by one launch at most once."""
        for tensor in tensors:
            missed, twice = self.never_written(tensor), self.duplicates(tensor)
            if missed or twice:
                raise AssertionError(
                    f"of {tensor.numel()} elements {list(tensor.shape)}: {len(missed)} never written {missed[:3]}, "
                    f"{len(twice)} written again {twice[:3]}"
                )

    def _hits(self, tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return flat element numbers of `tensor` and, beside each, the number of the write that hit it, in order."""
        storage = tensor.untyped_storage().data_ptr()
        arguments = [a for each in self._launches for a in each.arguments.values()]
        if not any(a.untyped_storage().data_ptr() == storage for a in arguments):
            raise ValueError(f"tensor: {list(tensor.shape)} shares memory with no argument of the recorded launches")
        size = tensor.element_size()
        own = np.full(tensor.shape, tensor.data_ptr(), dtype=np.int64)
        for dim, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            own += (np.arange(n) * stride * size).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
        order = np.argsort(own, axis=None)
        ordered = own.ravel()[order]
        elements, writes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for number, (launch, write) in enumerate(self._writes):
            at = np.searchsorted(ordered, write.addresses)
            hit = at[ordered[np.minimum(at, ordered.size - 1)] == write.addresses] if ordered.size else at[:0]
            if hit.size and write.width != size:
                kernel = self._launches[launch].kernel
                raise ValueError(f"kernel {kernel}: wrote {write.width}-byte values into elements of {size} bytes")
            elements.append(order[hit])
            writes.append(np.full(hit.size, number))
        return np.concatenate(elements), np.concatenate(writes)


def _unravel(element: int, tensor: torch.Tensor) -> Index:
    return tuple(int(i) for i in np.unravel_index(element, tensor.shape))


@contextlib.contextmanager
def write_recorder() -> Iterator[WriteRecorder]:
    """Record which program writes each address; ask the recorder inside the block or after it."""
    recorder = WriteRecorder()

    def on_access(access: _Access) -> None:
        if access.kind != "load":
            taken = access.addresses.astype(np.int64)  # a copy; user-space addresses fit
            recorder._writes.append((len(recorder._launches) - 1, dataclasses.replace(access, addresses=taken)))

    with _observed(recorder._launches.append, on_access):
        yield recorder


# --- memory -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Let `torch.empty`, `empty_like`, `new_empty` and their kin return NaN, the largest integer or True.

    Uses torch's deterministic mode (process-wide, so also in the thread that runs a GPU backward) as a warning only,
    and keeps that warning quiet; the former settings come back at the end.
    """
    deterministic: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        # Not `use_deterministic_algorithms`: that one imports Inductor (0.9 s) and changes how it compiles.
        torch.set_deterministic_debug_mode("warn")
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            deterministic.fill_uninitialized_memory = fill


def far_apart(matrix: torch.Tensor, row_stride: int) -> torch.Tensor:
    """Return a copy of `matrix` [R, C] with rows `row_stride` elements apart, so that int32 row offsets overflow.

    The memory is virtual: only pages that hold rows are committed (three bf16 rows 2^30 apart: 4 GiB, 12 KiB real).
    """
    rows, columns = matrix.shape
    length = max(1, (rows - 1) * row_stride + columns) * matrix.element_size()
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    flat = torch.frombuffer(memory, dtype=matrix.dtype)
    return flat.as_strided((rows, columns), (row_stride, 1)).copy_(matrix)
