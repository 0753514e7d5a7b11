"""One safetensors file: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes.

Why not `safetensors.safe_open`: it maps the file, and mapped pages count as resident memory once they are touched, so
copying a layer out of it peaks at twice the layer; it also has no way to read into memory that is already there. Here
the header is parsed by the documented format, each file is opened once, and plain reads go through one small buffer
into the final tensor: the peak is the layer and that buffer. Nothing is unpickled, ever.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import WeightsError
from .layout import show

# The largest real ones (a trillion parameters in small tensors) have about 15 MB; the format itself allows 100 MB.
MAX_JSON_BYTES = 32 * 2**20
BUFFER_BYTES = 4 * 2**20  # large enough to amortise a read call, small enough to stay in the cache

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64} | {
    name: bits
    for bits, names in {
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "I16 U16 F16 BF16",
        32: "I32 U32 F32",
        64: "I64 U64 F64",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file: `begin` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_json(raw: bytes | bytearray, where: str) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no repeated keys, no NaN. WeightsError otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise WeightsError(f"{where}: key {show(twice)} appears twice")
        return made

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except WeightsError:
        raise
    except RecursionError:
        raise WeightsError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise WeightsError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{where}: holds {show(value)}; needed: a JSON object")
    return value


class Shard:
    """An open safetensors file whose header was checked in full; use it as a context manager.

    Attributes:
        tensors: `Entry` of each tensor, by name.

    Raises:
        WeightsError: the file cannot be read, or its header is not what the format says.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.where = where
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed in __exit__
        except OSError as error:
            raise WeightsError(f"{where}: cannot be opened: {error.strerror}") from None
        try:
            self.tensors = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_exactly(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`; a single read may stop early (Linux: at 2 GiB), so go on until it is full."""
        try:
            self._file.seek(offset)
            while view:
                count = self._file.readinto(view)
                if not count:
                    raise WeightsError(f"{self.where}: the file ends early, at byte {self._file.tell()}")
                view = view[count:]
        except OSError as error:
            raise WeightsError(f"{self.where}: cannot be read: {error.strerror}") from None

    def _read_header(self) -> dict[str, Entry]:
        size = self._file.seek(0, 2)
        length = bytearray(8)
        self._read_exactly(0, memoryview(length))
        count = int.from_bytes(length, "little")
        if count > min(size - 8, MAX_JSON_BYTES):
            limit = f"at most {MAX_JSON_BYTES}, in a file of {size}"
            raise WeightsError(f"{self.where}: the header has {count} bytes; allowed: {limit} (is the file truncated?)")
        raw = bytearray(count)
        self._read_exactly(8, memoryview(raw))
        if not raw.startswith(b"{"):
            raise WeightsError(f"{self.where}: the header does not begin with '{{': not a safetensors file")
        header = parse_json(raw, self.where)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise WeightsError(f"{self.where}: __metadata__ is not an object of strings")
        tensors = {name: self._entry(name, value, 8 + count, size) for name, value in header.items()}
        end = 8 + count
        for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                what = f"{show(name)} begins at byte {entry.begin}, needed: {end}"
                raise WeightsError(f"{self.where}: {what} (hole or overlap)")
            end = entry.end
        if end != size:
            what = f"the tensors end at byte {end}, the file at {size}"
            raise WeightsError(f"{self.where}: {what} (truncated or corrupt)")
        return tensors

    def _entry(self, name: str, value: Any, start: int, size: int) -> Entry:
        """One checked line of the header; `start` is the first byte after it."""
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise WeightsError(f"{self.where}: {show(name)} needs dtype, shape and data_offsets; got {show(value)}")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise WeightsError(f"{self.where}: {show(name)} has the unknown dtype {show(dtype)}")
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                raise WeightsError(f"{self.where}: {show(name)} has {what} {show(numbers)}; needed: whole numbers")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise WeightsError(f"{self.where}: {show(name)} has data_offsets {show(offsets)}; needed: [begin, end]")
        bits = 0 if 0 in shape else _BITS[dtype]
        for n in shape:
            bits = min(bits * n, 16 * (size + 1))  # beyond the file is wrong anyway: keep the numbers small
        if bits != 8 * (offsets[1] - offsets[0]):
            came = f"shape {show(shape)} of {dtype} and data_offsets {show(offsets)}"
            raise WeightsError(f"{self.where}: {show(name)} has {came}, which disagree")
        return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])

    def copy_into(self, name: str, target: Tensor, buffer: bytearray) -> None:
        """Copy a tensor of as many elements as `target`, whose rows [R, C] may be of another dtype or device.

        `buffer` must hold a row at least; it is all the memory that this needs.
        """
        entry = self.tensors[name]
        dtype = DTYPES[entry.dtype]
        rows, columns = target.shape
        row_bytes = columns * dtype.itemsize
        step = len(buffer) // row_bytes
        for first in range(0, rows, step):
            part = target[first : first + step]
            count = part.shape[0]
            self._read_exactly(entry.begin + first * row_bytes, memoryview(buffer)[: count * row_bytes])
            part.copy_(torch.frombuffer(buffer, dtype=dtype, count=count * columns).view(count, columns))
