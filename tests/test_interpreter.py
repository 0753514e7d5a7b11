"""Each instrument of `interpreter.py` must find what it looks for, and stay silent where nothing is wrong."""

# mypy: allow-untyped-defs

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import triton
import triton.language as tl
from interpreter import (
    bounds_checker,
    far_apart,
    install_bfloat16_shim,
    install_launch_fixes,
    nan_filled_empty,
    overflow_checker,
    poisoned_lanes,
    without_bfloat16_shim,
    write_recorder,
)
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def instruments() -> None:
    """Overrides conftest's fixture of this name, if any: here each test turns on for itself what it looks at."""
    install_bfloat16_shim()
    install_launch_fixes()


# --- bfloat16 ---------------------------------------------------------------------------------------------------------

EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@triton.jit
def cast_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def truncate_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * N + columns[None, :])
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], tl.dot(a, b, input_precision="ieee"))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros(x.shape, dtype=dtype)
    cast_kernel[(triton.cdiv(x.numel(), 8192),)](x, y, x.numel(), BLOCK=8192)
    return y


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = torch.zeros(a.shape[0], b.shape[1])
    dot_kernel[(1,)](a, b, c, a.shape[0], b.shape[1], a.shape[1])
    return c


def float32_probes() -> torch.Tensor:
    """Random bit patterns, every bf16 with its two ties, the largest finite number, and the lowest subnormals."""
    exact = EVERY_BFLOAT16.float().view(torch.int32)
    random = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    edges = torch.tensor([0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 1, 0x7FFF, 0x8000, 0x8001], dtype=torch.int32)
    bits = torch.cat([random, exact, exact + 0x7FFF, exact + 0x8000, exact + 0x8001, edges])
    return bits.view(torch.float32)


def same_or_nan(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bitwise equality, where any NaN equals any other."""
    bits = torch.int16 if got.element_size() == 2 else torch.int32
    both_nan = got.isnan() & expected.isnan()
    return got.dtype == expected.dtype and bool((both_nan | (got.view(bits) == expected.view(bits))).all())


def test_bfloat16_goes_through_a_kernel_bit_by_bit() -> None:
    assert torch.equal(cast(EVERY_BFLOAT16, torch.bfloat16).view(torch.int16), EVERY_BFLOAT16.view(torch.int16))


def test_float32_rounds_to_bfloat16_as_torch_does() -> None:
    x = float32_probes()
    assert same_or_nan(cast(x, torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bfloat16_widens_as_torch_does(dtype: torch.dtype) -> None:
    assert same_or_nan(cast(EVERY_BFLOAT16, dtype), EVERY_BFLOAT16.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64])
def test_bfloat16_converts_to_wide_types_as_torch_does(dtype: torch.dtype) -> None:
    x = EVERY_BFLOAT16[EVERY_BFLOAT16.float().abs() < 2**30]
    assert torch.equal(cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.int64, torch.int8])
def test_other_types_convert_to_bfloat16_as_torch_does(dtype: torch.dtype) -> None:
    x = (torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 100).to(dtype)
    assert same_or_nan(cast(x, torch.bfloat16), x.to(torch.bfloat16))


def test_rounding_toward_zero_drops_the_low_bits() -> None:
    x = torch.tensor([1.0 + 2**-7 + 2**-9, -1.0 - 2**-7 - 2**-8, 3.4028234e38, float("inf")])
    y = torch.zeros(4, dtype=torch.bfloat16)
    truncate_kernel[(1,)](x, y, BLOCK=4)
    assert torch.equal(y.view(torch.int16), (x.view(torch.int32) >> 16).to(torch.int16))


@pytest.mark.parametrize("shape", [(16, 32, 64), (1, 1, 1), (2, 4, 128)])
def test_dot_of_bfloat16_is_the_float32_product(shape: tuple[int, int, int]) -> None:
    """Against float64, within K float32 roundings of the sum of magnitudes (a bf16 accumulator is 2^16 times worse)."""
    m, n, k = shape
    gen = torch.Generator().manual_seed(2)
    a, b = torch.randn(m, k, generator=gen).bfloat16(), torch.randn(k, n, generator=gen).bfloat16()
    bound = k * 2**-24 * (a.double().abs() @ b.double().abs())
    assert ((dot(a, b).double() - a.double() @ b.double()).abs() <= bound).all()


def bfloat16_is_right() -> dict[str, bool]:
    """Tell for each thing the shim mends whether the interpreter gets it right now."""
    ties = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-16, 3.4028234e38])
    ones = torch.ones(16, 16, dtype=torch.bfloat16)
    try:
        product = torch.equal(dot(ones, ones), torch.full((16, 16), 16.0))
    except InterpreterError:
        product = False
    return {"dot": product, "rounding": torch.equal(cast(ties, torch.bfloat16), ties.bfloat16())}


def test_shim_is_still_needed() -> None:
    """Fails on the first Triton whose interpreter handles bf16 by itself."""
    assert bfloat16_is_right() == {"dot": True, "rounding": True}
    with without_bfloat16_shim():
        mended = [part for part, right in bfloat16_is_right().items() if right]
    assert bfloat16_is_right() == {"dot": True, "rounding": True}, "the shim did not come back"
    if mended:
        pytest.fail(f"shim no longer needed for {mended}: Triton {triton.__version__} does it right; take it out")


@triton.jit
def add_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 8)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x + x)


@triton.jit
def scale_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 8)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * 2.0)


@triton.jit
def negate_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 8)
    tl.store(y_ptr + offs, -tl.load(x_ptr + offs))


@triton.jit
def compare_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 8)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.where(x >= tl.abs(x), x, 0.0))


@triton.jit
def sum_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 8)), axis=0))


@triton.jit
def cumsum_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 8)
    tl.store(y_ptr + offs, tl.associative_scan(tl.load(x_ptr + offs), 0, combine_kernel))


@triton.jit
def combine_kernel(a, b):
    return a + b


@pytest.mark.parametrize(
    "kernel",
    [add_kernel, scale_kernel, negate_kernel, compare_kernel, sum_kernel, cumsum_kernel],
    ids=lambda k: k.__name__,
)
def test_bfloat16_arithmetic_is_refused(kernel: Any) -> None:
    """And the same kernels run on float32, so it is bf16 that is refused."""
    x = torch.arange(8).float() - 4
    kernel[(1,)](x, torch.zeros(8))
    with pytest.raises(InterpreterError, match="upcast with"):
        kernel[(1,)](x.bfloat16(), torch.zeros(8, dtype=torch.bfloat16))


@triton.jit
def move_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 8)
    x = tl.load(x_ptr + offs)
    x = tl.where(offs % 2 == 0, x, tl.full((8,), 1.5, tl.bfloat16))
    x = tl.reshape(tl.trans(tl.reshape(x, (2, 4))), (8,))
    tl.store(y_ptr + offs, tl.abs(x))
    tl.store(y_ptr + 8, tl.max(x, axis=0))


def test_moving_bfloat16_is_allowed() -> None:
    """where, full, reshape, trans, abs and the upcasting max need no arithmetic on bf16."""
    x = torch.arange(8).bfloat16() - 4
    y = torch.zeros(9, dtype=torch.bfloat16)
    move_kernel[(1,)](x, y)
    moved = torch.where(torch.arange(8) % 2 == 0, x, 1.5).bfloat16().reshape(2, 4).T.reshape(8)
    assert torch.equal(y, torch.cat([moved.abs(), moved.max()[None]]))


@triton.jit
def nan_padding_kernel(x_ptr, y_ptr):
    x = tl.make_tensor_descriptor(x_ptr, [6, 8], [8, 1], [4, 8], padding_option="nan")
    tl.store(y_ptr + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :], x.load([4, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_descriptor_pads_with_nan(dtype: torch.dtype) -> None:
    """Triton pads bf16 with zeros where NaN was asked for."""
    y = torch.zeros(4, 8, dtype=dtype)
    nan_padding_kernel[(1,)](torch.ones(6, 8, dtype=dtype), y)
    assert (y[:2] == 1).all() and y[2:].isnan().all()


# --- the launch -------------------------------------------------------------------------------------------------------


@triton.jit
def silu_softmax_kernel(x_ptr, y_ptr, N):
    offs = tl.arange(0, 4)
    for row in tl.range(0, tl.load(N)):
        x = tl.load(x_ptr + row * 4 + offs)
        top = tl.max(x, axis=0)
        y = x / (1 + tl.exp(-x)) + tl.zeros((4,), tl.float32) + (top - top)
        tl.store(y_ptr + row * 4 + offs, y.to(tl.float16))


def test_inf_and_nan_in_a_kernel_raise_no_warning() -> None:
    """exp overflows, inf - inf, NaN rows, float16 overflow; the loop bound is a tensor (3.6 with numpy >= 2.4)."""
    x = torch.tensor([[-1e4, 0.0, 1.0, 1e5], [float("inf"), 1.0, 2.0, 3.0], [float("nan")] * 4])
    y = torch.zeros(3, 4, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silu_softmax_kernel[(1,)](x, y, torch.tensor([3], dtype=torch.int32))
    assert torch.allclose(y[0], torch.tensor([0.0, 0.0, 0.7310586, float("inf")], dtype=torch.float16), atol=1e-3)
    assert y[1:].isnan().all()


@triton.jit
def failing_kernel(x_ptr):
    tl.static_assert(tl.sum(tl.zeros((4,), tl.float32), axis=0) != 0, "planned")


@triton.jit
def no_helper_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 4), tl.arange(0, 4))


def test_language_is_put_back_after_each_launch() -> None:
    """A launch must patch `tl` again whatever ran before, also after one that failed in a helper."""
    plain = tl.load
    x = torch.zeros(4)
    for _ in range(2):
        with pytest.raises(InterpreterError, match="planned"):
            failing_kernel[(1,)](x)
        assert tl.load is plain
        no_helper_kernel[(1,)](x)
        assert tl.load is plain and torch.equal(x, torch.arange(4.0))
        assert torch.equal(cast(x.zero_(), torch.float64), torch.zeros(4, dtype=torch.float64))


@triton.jit
def undefined_kernel(x_ptr, y_ptr, N, NAMED: tl.constexpr):
    offs = tl.arange(0, 8)
    if NAMED:
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N, other=0))
    else:
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool],
)
def test_undefined_lanes_are_poisoned(dtype: torch.dtype) -> None:
    """Only those of a masked load without `other`; the interpreter itself gives zero."""
    x = torch.ones(8, dtype=dtype)

    def loaded(n: int, named: bool) -> torch.Tensor:
        y = torch.zeros(8, dtype=dtype)
        undefined_kernel[(1,)](x, y, n, NAMED=named)
        assert (y[:n] == 1).all()
        return y[n:]

    with poisoned_lanes():
        tail = loaded(5, named=False)
        if dtype.is_floating_point:
            assert tail.isnan().all()
        else:
            assert (tail == (1 if dtype == torch.bool else torch.iinfo(dtype).max)).all()
        assert not loaded(5, named=True).any()
        loaded(8, named=False)
    assert not loaded(5, named=False).any()


@triton.jit
def helpers_kernel(x_ptr, COUNT: tl.constexpr):
    for _ in tl.static_range(COUNT):
        tl.store(x_ptr, tl.sum(tl.zeros((4,), tl.float32), axis=0))


def test_helpers_do_not_patch_the_language_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty calls of jitted functions cost as many patches of `tl` as two."""
    tri: Any = importlib.import_module("triton.runtime.interpreter")
    counter = Mock(side_effect=tri._patch_builtin)
    monkeypatch.setattr(tri, "_patch_builtin", counter)
    helpers_kernel[(1,)](torch.zeros(1), 1)
    few = counter.call_count
    helpers_kernel[(1,)](torch.zeros(1), 20)
    assert few > 0 and counter.call_count == 2 * few


def test_installing_twice_changes_nothing() -> None:
    tri: Any = importlib.import_module("triton.runtime.interpreter")
    before = tri.GridExecutor.__call__, tri._patch_lang, tri.InterpreterBuilder.cast_impl
    install_bfloat16_shim()
    install_launch_fixes()
    assert before == (tri.GridExecutor.__call__, tri._patch_lang, tri.InterpreterBuilder.cast_impl)


# --- bounds -----------------------------------------------------------------------------------------------------------


@triton.jit
def copy_kernel(x_ptr, y_ptr, first, last, BLOCK: tl.constexpr):
    offs = first + tl.arange(0, BLOCK)
    mask = offs < last
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def put_kernel(y_ptr, first, last, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    offs = first + tl.arange(0, BLOCK)
    if ATOMIC:
        tl.atomic_add(y_ptr + offs, 1.0, mask=offs < last)
    else:
        tl.store(y_ptr + offs, 1.0, mask=offs < last)


OUTSIDE = {"4 bytes past the end": (9, 17), "one before": (-1, 7), "wild": (10**12, 10**12 + 8), "last lane": (8, 17)}


@pytest.mark.parametrize("span", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("access", ["load", "store", "atomic"])
def test_out_of_bounds_names_kernel_and_address(access: str, span: tuple[int, int]) -> None:
    x, (first, last) = torch.zeros(16), span
    bad = x.data_ptr() + 4 * (first if not 0 <= first < 16 else 16)
    with bounds_checker():
        with pytest.raises(IndexError, match=rf"kernel (copy|put)_kernel.*{access} of 4 bytes at 0x{bad:x} is out of"):
            if access == "load":
                copy_kernel[(1,)](x, torch.zeros(16), first, last, BLOCK=16)
            else:
                put_kernel[(1,)](x, first, last, access == "atomic", BLOCK=16)
    assert not x.any()


@pytest.mark.parametrize("access", ["load", "store", "atomic"])
def test_the_last_element_is_in_bounds(access: str) -> None:
    """Masked-off lanes past the end do not count."""
    x, y = torch.arange(16.0), torch.zeros(16)
    with bounds_checker():
        if access == "load":
            copy_kernel[(1,)](x, y, 12, 16, BLOCK=16)
            assert torch.equal(y[:4], x[12:])
        else:
            put_kernel[(1,)](y, 12, 16, access == "atomic", BLOCK=16)
            assert torch.equal(y[12:], torch.ones(4)) and not y[:12].any()


VIEWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int, int]] = {
    "past its end": (lambda base: base[:1], 1, 9),
    "before its start": (lambda base: base[1:], -1, 8),
    "gap between rows": (lambda base: base[:, :4], 0, 5),
    "gap in an inner dimension": (lambda base: base.view(2, 4, 8)[:, :2, :4], 16, 17),
    "gap in an expanded view": (lambda base: base[:, None, :4].expand(8, 3, 4), 0, 5),
    "gap beside a dimension of one": (lambda base: base.as_strided((4, 1, 4), (8, 2, 1)), 0, 5),
    "every other element": (lambda base: base.as_strided((16,), (2,)), 0, 2),
}


@pytest.mark.parametrize(("view", "first", "last"), VIEWS.values(), ids=VIEWS)
def test_a_view_counts_exactly(view: Callable[[torch.Tensor], torch.Tensor], first: int, last: int) -> None:
    """The storage around the view is readable memory: without the checker nothing happens."""
    x, y = view(torch.ones(8, 8)), torch.zeros(16)
    copy_kernel[(1,)](x, y, first, last, BLOCK=16)
    assert y.sum() == last - first
    with bounds_checker(), pytest.raises(IndexError, match="x_ptr"):
        copy_kernel[(1,)](x, y, first, last, BLOCK=16)


def test_a_view_with_gaps_at_two_levels_holds_its_own() -> None:
    """[2, 2, 4] with strides 32, 8, 1: the four runs are inside, what lies between them is not."""
    x, y = torch.arange(64.0).view(2, 4, 8)[:, :2, :4], torch.zeros(16)
    with bounds_checker():
        for first in (0, 8, 32, 40):
            copy_kernel[(1,)](x, y, first, first + 4, BLOCK=16)
            assert y[0] == first
        for first in (4, 16, 24, 36, 44, 64):
            with pytest.raises(IndexError, match="x_ptr"):
                copy_kernel[(1,)](x, y, first, first + 4, BLOCK=16)


@triton.jit
def tuple_kernel(xs, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(xs[0] + offs) + tl.load(xs[1] + offs))


def test_tensors_in_a_tuple_are_arguments() -> None:
    xs, y = (torch.ones(8), torch.ones(16)[:8]), torch.zeros(16)
    with bounds_checker():
        tuple_kernel[(1,)](xs, y, BLOCK=8)
        with pytest.raises(IndexError, match=r"past the end of xs\[[01]\]"):
            tuple_kernel[(1,)](xs, y, BLOCK=16)
    assert y[:8].eq(2).all()


@triton.jit
def swap_kernel(x_ptr, at):
    tl.atomic_cas(x_ptr + at, 0, 1)


def test_compare_and_swap_is_observed() -> None:
    x = torch.zeros(4, dtype=torch.int32)
    with bounds_checker(), write_recorder() as recorder:
        swap_kernel[(2,)](x, 3)
        with pytest.raises(IndexError, match="atomic of 4 bytes"):
            swap_kernel[(1,)](x, 4)
    assert [d.element for d in recorder.duplicates(x)] == [(3,)]


def test_an_empty_tensor_holds_nothing() -> None:
    """Without the checker this read ends the process by a segmentation fault: its address is null."""
    with bounds_checker(), pytest.raises(IndexError, match="x_ptr"):
        copy_kernel[(1,)](torch.zeros(8)[:0], torch.zeros(16), 0, 1, BLOCK=16)


@triton.jit
def rows_kernel(x_ptr, y_ptr, ROWS, COLUMNS, x_stride, y_stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    if WIDE:
        rows = rows.to(tl.int64)
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + rows[:, None] * y_stride + columns[None, :], x, mask=mask)


STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda base: base,
    "columns": lambda base: base[:, 2:6],
    "rows": lambda base: base[1::3],
    "expanded": lambda base: base[:1].expand(5, 8),
    "overlapping": lambda base: base.as_strided((5, 8), (3, 1)),
    "bytes": lambda base: base.to(torch.int8)[:, 1:4],
    "boolean": lambda base: base > 0,
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strided_views_raise_no_false_alarm(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = view(torch.arange(-32.0, 32.0).view(8, 8))
    y = torch.zeros(x.shape, dtype=x.dtype)
    with bounds_checker(), write_recorder() as recorder:
        rows_kernel[(1,)](x, y, x.shape[0], x.shape[1], x.stride(0), y.stride(0), BLOCK=8, WIDE=True)
    assert torch.equal(x, y)
    recorder.check_written_once(y)


def test_misaligned_address_is_refused() -> None:
    x = torch.zeros(8, dtype=torch.int32)
    with bounds_checker(), pytest.raises(IndexError, match="not a multiple of 4"):
        misaligned_kernel[(1,)](x)


@triton.jit
def misaligned_kernel(x_ptr):
    x = (x_ptr.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.int32))
    tl.store(x, 1)


@triton.jit
def null_kernel(x_ptr):
    address = x_ptr.to(tl.int64) - x_ptr.to(tl.int64)
    tl.load(address.to(tl.pointer_type(tl.float32)))


def test_null_pointer_is_an_error_and_no_segfault() -> None:
    with bounds_checker(), pytest.raises(IndexError, match="at 0x0 "):
        null_kernel[(1,)](torch.zeros(4))


@triton.jit
def device_descriptor_kernel(x_ptr, y_ptr, ROWS, COLUMNS, x_stride, y_stride, R: tl.constexpr, C: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [ROWS, COLUMNS], [x_stride, 1], [R, C])
    y = tl.make_tensor_descriptor(y_ptr, [ROWS, COLUMNS], [y_stride, 1], [R, C])
    pid = tl.program_id(0)
    y.store([pid * R, 0], x.load([pid * R, 0]))


@triton.jit
def host_descriptor_kernel(x, y, R: tl.constexpr):
    pid = tl.program_id(0)
    y.store([pid * R, 0], x.load([pid * R, 0]))


def copy_by_descriptor(kind: str, x: torch.Tensor, y: torch.Tensor, shape: list[int]) -> None:
    if kind == "device":
        device_descriptor_kernel[(2,)](x, y, *shape, x.stride(0), y.stride(0), 4, 8)
    else:
        descriptors = [TensorDescriptor(t, shape, list(t.stride()), [4, 8]) for t in (x, y)]
        host_descriptor_kernel[(2,)](*descriptors, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["device", "host"])
def test_descriptors_are_observed(kind: str, dtype: torch.dtype) -> None:
    """Lanes clipped by the descriptor are fine; a descriptor larger than its tensor is not; its stores are recorded."""
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.zeros(7, 8, dtype=dtype)
    with bounds_checker(), write_recorder() as recorder:
        copy_by_descriptor(kind, x, y, [7, 8])
    assert torch.equal(x, y)
    recorder.check_written_once(y)
    with bounds_checker(), pytest.raises(IndexError, match="past the end of x"):
        copy_by_descriptor(kind, x, y, [8, 8])


def test_checker_goes_away() -> None:
    """Outside the block a read just past a view is what it was: silent."""
    base, y = torch.ones(16), torch.zeros(16)
    with bounds_checker():
        pass
    copy_kernel[(1,)](base[:8], y, 0, 16, BLOCK=16)
    assert torch.equal(y, base)


# --- index width ------------------------------------------------------------------------------------------------------


def test_int32_row_offsets_are_caught() -> None:
    """Row 2 of a matrix with rows 2^30 apart needs int64: right with it, an overflow error or an IndexError without."""
    x = far_apart(torch.arange(12.0).view(3, 4).to(torch.float16), 2**30)
    y = torch.zeros(3, 4, dtype=torch.float16)
    arguments = (x, y, 3, 4, x.stride(0), y.stride(0), 4)
    with overflow_checker(), bounds_checker():
        rows_kernel[(1,)](*arguments, WIDE=True)
        assert torch.equal(y, x)
        with pytest.raises(InterpreterError, match="int32 overflow detected"):
            rows_kernel[(1,)](*arguments, WIDE=False)
    with bounds_checker(), pytest.raises(IndexError, match="before x_ptr"):
        rows_kernel[(1,)](*arguments, WIDE=False)


@triton.jit
def device_assert_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "not positive")


def test_overflow_checker_wakes_device_assert() -> None:
    device_assert_kernel[(1,)](torch.zeros(1))
    with overflow_checker(), pytest.raises(InterpreterError, match="not positive"):
        device_assert_kernel[(1,)](torch.zeros(1))


# --- writes -----------------------------------------------------------------------------------------------------------


@triton.jit
def racy_kernel(y_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Programs whose tiles overlap by BLOCK - STEP elements."""
    pid = tl.program_id(0)
    tl.store(y_ptr + pid * STEP + tl.arange(0, BLOCK), pid.to(tl.float32) + tl.zeros((BLOCK,), tl.float32))


@triton.jit
def scatter_kernel(index_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.load(index_ptr + offs), offs.to(tl.float32))


@triton.jit
def twice_kernel(y_ptr):
    for value in tl.range(0, 2):
        tl.store(y_ptr + tl.arange(0, 4), tl.arange(0, 4) + value)


def test_recorder_finds_a_race() -> None:
    """4 programs with tiles of 8, 6 apart: 3 seams of 2 elements, each named with both programs."""
    y = torch.zeros(26)
    with write_recorder() as recorder:
        racy_kernel[(4,)](y, 6, 8)
    found = recorder.duplicates(y)
    assert [d.element for d in found] == [(6,), (7,), (12,), (13,), (18,), (19,)]
    assert {d.kernel for d in found} == {"racy_kernel"}
    assert (found[0].first, found[0].second) == ((0, 0, 0), (1, 0, 0))
    assert recorder.writers(y)[12,] == [(1, 0, 0), (2, 0, 0)]
    with pytest.raises(AssertionError, match=r"0 never written .*6 written again"):
        recorder.check_written_once(y)


def test_recorder_accepts_a_partition() -> None:
    """And answers in the indices of the tensor it is asked about, here also the transposed one."""
    y = torch.zeros(4, 8)
    with write_recorder() as recorder:
        racy_kernel[(4,)](y, 8, 8)
    recorder.check_written_once(y)
    assert len(recorder.writers(y)) == 32 and recorder.writers(y)[2, 3] == [(2, 0, 0)]
    assert recorder.writers(y.T)[3, 2] == [(2, 0, 0)] and recorder.writers(y[1:])[0, 0] == [(1, 0, 0)]


def test_recorder_finds_what_was_never_written() -> None:
    """Tiles of 6 placed 8 apart leave two columns; a strided view is judged by its own elements."""
    y = torch.zeros(4, 8)
    with write_recorder() as recorder:
        racy_kernel[(4,)](y, 8, 4)
    assert recorder.never_written(y) == [(row, column) for row in range(4) for column in range(4, 8)]
    assert recorder.never_written(y[:, :4]) == []
    with pytest.raises(AssertionError, match=r"16 never written .*0 written again"):
        recorder.check_written_once(y)


def test_recorder_finds_one_program_writing_twice() -> None:
    """In two stores, and in two lanes of one store (where the order is undefined on a GPU)."""
    y, z = torch.zeros(4), torch.zeros(8)
    with write_recorder() as recorder:
        twice_kernel[(1,)](y)
        scatter_kernel[(1,)](torch.tensor([0, 1, 1, 7]), z, 4)
    assert [d.element for d in recorder.duplicates(y)] == [(0,), (1,), (2,), (3,)]
    assert [(d.element, d.first, d.second) for d in recorder.duplicates(z)] == [((1,), (0, 0, 0), (0, 0, 0))]


def test_two_launches_are_no_race() -> None:
    """Launches of one stream follow each other; the second may overwrite."""
    y = torch.zeros(16)
    with write_recorder() as recorder:
        racy_kernel[(2,)](y, 8, 8)
        racy_kernel[(2,)](y, 8, 8)
    recorder.check_written_once(y)
    assert recorder.writers(y)[8,] == [(1, 0, 0), (1, 0, 0)]


@triton.jit
def accumulate_kernel(y_ptr):
    tl.atomic_add(y_ptr + tl.arange(0, 4), 1.0)


def test_atomics_count_as_writes() -> None:
    """Two programs adding to one float in either order are not bitwise reproducible."""
    y = torch.zeros(4)
    with write_recorder() as recorder:
        accumulate_kernel[(2,)](y)
    assert len(recorder.duplicates(y)) == 4 and recorder.never_written(y) == []


def test_recorder_refuses_questions_that_it_cannot_answer() -> None:
    """A tensor no launch had; a store of another width than the elements."""
    y = torch.zeros(8)
    with write_recorder() as recorder:
        scatter_kernel[(1,)](torch.arange(4), y, 4)
    with pytest.raises(ValueError, match="shares memory with no argument"):
        recorder.check_written_once(torch.zeros(8))
    with pytest.raises(ValueError, match="4-byte values into elements of 2 bytes"):
        recorder.duplicates(y.view(torch.float16))


# --- memory -----------------------------------------------------------------------------------------------------------

FRESH: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "empty": lambda dtype: torch.empty(64, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(64, dtype=dtype)),
    "new_empty": lambda dtype: torch.zeros(1).new_empty((64,), dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((8, 8), (8, 1), dtype=dtype),
}


@pytest.mark.parametrize("fresh", FRESH.values(), ids=FRESH)
def test_fresh_memory_is_poisoned(fresh: Callable[[torch.dtype], torch.Tensor]) -> None:
    with nan_filled_empty():
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            assert fresh(dtype).isnan().all()
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            assert (fresh(dtype) == torch.iinfo(dtype).max).all()


def test_unwritten_output_shows_as_nan() -> None:
    with nan_filled_empty():
        y = torch.empty(32)
    racy_kernel[(3,)](y, 8, 8)
    assert y[24:].isnan().all() and not y[:24].isnan().any()


def test_poison_and_deterministic_mode_end_with_the_block() -> None:
    """Also when the block raises, and whatever the mode was before."""
    deterministic: Any = torch.utils.deterministic
    for mode in (0, 1):
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = False
        try:
            with pytest.raises(KeyError), nan_filled_empty():
                assert torch.empty(8).isnan().all()
                raise KeyError
            assert torch.get_deterministic_debug_mode() == mode
            assert deterministic.fill_uninitialized_memory is False
        finally:
            torch.set_deterministic_debug_mode(0)
            deterministic.fill_uninitialized_memory = True


def test_ops_without_deterministic_version_still_run() -> None:
    """`put_` has none: torch's warning, an error in this suite, must not come out; other warnings must."""
    x = torch.zeros(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with nan_filled_empty():
            x.put_(torch.tensor([0, 2]), torch.ones(2))
            with pytest.raises(UserWarning, match="another"):
                warnings.warn("another", UserWarning, stacklevel=1)
    assert x.tolist() == [1.0, 0.0, 1.0, 0.0]
