"""The tuned kernel configs on disk: one small JSON file for each launch, which nothing can make dangerous.

    <root>/<hash of the environment>/<pass>-<gemm>-<hash of the key>.json
    {"environment": {...}, "key": {...}, "value": {...}}

The root is $MOEFACTORY_CACHE, else $XDG_CACHE_HOME/moefactory, else ~/.cache/moefactory, read at each use. The
environment is all that makes a timing stale: versions, the kernels' sources, the GPU. Both are repeated inside the file
and compared, so a file that was renamed, copied or truncated is a miss. A file is written beside its place and moved
there: a reader sees the old one or the new one, never a half, whoever is killed when, and there are no locks. Any
defect is a miss and one warning, never an exception; where the root cannot be written, results stay in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .._version import __version__

if TYPE_CHECKING:  # imported where needed: a process that only reads or writes files needs no torch
    import torch

SCHEMA = 1  # raise it when the meaning of a field changes
MAX_BYTES = 1 << 20  # a file of ours is below 4 KiB

_MEMORY_ONLY = "results last as long as this process"
_T = TypeVar("_T")
_kept: dict[str, Any] = {}  # what this process stored, by file name and environment: found again without a disk
_warned: set[str] = set()


def root() -> Path | None:
    """The folder of all environments; None where there is no home."""
    with suppress(RuntimeError):  # no home directory
        if stated := os.environ.get("MOEFACTORY_CACHE"):
            return Path(stated).expanduser()
        shared = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return (shared if shared.is_absolute() else Path("~/.cache").expanduser()) / "moefactory"
    return None


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or into the nearest one above it that exists; None if something can.

    It is tried, and nothing is left behind.
    """
    try:
        there = next((above for above in (folder, *folder.absolute().parents) if above.exists()), folder)
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"


def canonical(value: Any) -> str:
    """The one JSON text of a plain value: a tuple is a list, 1 is not true, the order of keys does not count."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """32 hexadecimal digits that stand for a plain value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:32]


@cache
def sources(folder: Path = Path(__file__).parent) -> str:
    """A hash of every module beside this one: an edited kernel is another kernel."""
    found = [[path.name, path.read_text(encoding="utf-8")] for path in sorted(folder.glob("*.py"))]
    return digest(found)


@cache
def environment(device: torch.device) -> dict[str, Any]:
    """What a timing on this device depends on besides the launch. In the interpreter the device is "interpreter"."""
    import torch
    import triton

    from ..machine import interpreting

    common = {
        "schema": SCHEMA,
        "moefactory": __version__,
        "sources": sources(),
        "triton": triton.__version__,
        "torch": torch.__version__,
    }
    if interpreting() or device.type != "cuda":
        return {**common, "backend": "interpreter", "device": "interpreter" if interpreting() else device.type}
    properties = torch.cuda.get_device_properties(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)
    return {
        **common,
        "backend": str(triton.runtime.driver.active.get_current_target()),
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "shared_memory": getattr(properties, "shared_memory_per_block_optin", None),
        "driver": driver(),
    }


def path_of(environment: Mapping[str, Any], key: Mapping[str, Any]) -> Path | None:
    """Where the value of `key` is kept."""
    base = root()
    return base and base / digest(environment) / f"{key['pass_name']}-{key['gemm']}-{digest(key)}.json"


def anything() -> bool:
    """Whether a search for a value can find one: false where nothing was ever tuned."""
    base = root()
    if _kept or base is None:
        return bool(_kept)
    try:
        if stat.S_ISDIR(base.stat().st_mode):
            return True
        problem = "not a folder"
    except FileNotFoundError:
        return False
    except OSError as error:
        problem = str(error)
    _warn(str(base), f"{problem}; {_MEMORY_ONLY}")
    return False


def load(environment: Mapping[str, Any], key: Mapping[str, Any], read: Callable[[Any], _T]) -> _T | None:
    """What `read` makes of the stored value, or None where there is none or it has a defect.

    Args:
        environment, key: plain values, compared field by field with those in the file.
        read: turns the value into what the caller wants; whatever it raises is a defect of the file.
    """
    path = path_of(environment, key)
    try:
        if (name := canonical([environment, key])) in _kept:
            return read(_kept[name])
        return None if path is None else read(_checked(_parsed(path), environment, key))
    except (FileNotFoundError, NotADirectoryError):  # the second: `anything` has warned of it
        return None
    except Exception as error:  # whatever is wrong with a file, a training step goes on without it
        problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        _warn(str(path), f"{problem}; the file is not used, tuning again replaces it")
        return None


def _parsed(path: Path) -> Any:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    return json.loads(text.decode("utf-8"), parse_constant=_no_constant)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _checked(entry: Any, environment: Mapping[str, Any], key: Mapping[str, Any]) -> Any:
    """The value of a file that is about this environment and this key; ValueError names the field that is not."""
    if not isinstance(entry, dict) or set(entry) != {"environment", "key", "value"}:
        raise ValueError("needed: an object with environment, key and value")
    for part, wanted in (("environment", environment), ("key", key)):
        found = entry[part]
        if not isinstance(found, dict) or set(found) != set(wanted):
            raise ValueError(f"{part}: needed: an object with {', '.join(wanted)}")
        for field, value in wanted.items():
            if canonical(found[field]) != canonical(value):
                raise ValueError(f"{part}.{field}: got {canonical(found[field])[:60]}; needed: {canonical(value)[:60]}")
    return entry["value"]


def store(environment: Mapping[str, Any], key: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Keep a value: in memory, and on disk where that is possible (else False and one warning)."""
    _kept[canonical([environment, key])] = json.loads(canonical(value))
    path = path_of(environment, key)
    if path is None:
        _warn("MOEFACTORY_CACHE", f"not set, and there is no home directory; {_MEMORY_ONLY}")
        return False
    text = json.dumps({"environment": environment, "key": key, "value": value}, indent=1, allow_nan=False)
    try:
        _replace(path, text.encode())
    except OSError as error:
        _warn(str(root()), f"cannot be written ({error}); {_MEMORY_ONLY}")
        return False
    return True


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step: beside its place, to the disk, then moved over the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def milliseconds(value: Any) -> float:
    """A time that was read from a file. ValueError unless it is a positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"ms: got {value!r}; needed: a positive number")
    return float(value)


def forget() -> None:
    """Drop what this process keeps in memory, warnings given included; files stay."""
    _kept.clear()
    _warned.clear()


def _warn(subject: str, problem: str) -> None:
    """One RuntimeWarning for each subject."""
    if subject not in _warned:
        _warned.add(subject)
        warnings.warn(f"tuning cache: {subject}: {problem}", RuntimeWarning, stacklevel=2)
