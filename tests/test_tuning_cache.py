"""The tuning cache alone: whatever happens to its files, a miss and one warning (cases A1, A2 and A4 of the design)."""

# mypy: allow-untyped-defs
# No torch here: the processes of `test_eight_processes` import this file anew.

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest

from moefactory.triton import cache

ENVIRONMENT = {"schema": 1, "triton": "3.7", "device": "H200", "capability": [9, 0], "multiprocessors": 132}
KEY = {"pass_name": "fwd", "gemm": "up", "experts": 128, "permute_x": True, "dtype": "bfloat16", "rows_per_expert": 64}
VALUE = {"winner": {"block_m": 64}, "ms": 0.5}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of its own; nothing is remembered from before."""
    monkeypatch.setenv("MOEFACTORY_CACHE", str(tmp_path / "cache"))
    cache.forget()
    yield tmp_path / "cache"
    cache.forget()


def plain(value):
    return value


def loaded(environment=ENVIRONMENT, key=KEY):
    """What another process would read now."""
    kept = dict(cache._kept)
    cache._kept.clear()
    try:
        return cache.load(environment, key, plain)
    finally:
        cache._kept.update(kept)


def stored(value=VALUE) -> Path:
    assert cache.store(ENVIRONMENT, KEY, value)
    path = cache.path_of(ENVIRONMENT, KEY)
    assert path is not None
    return path


def test_round_trip(folder):
    """One file for a value, no temporary beside it, and the value comes back from it."""
    assert loaded() is None
    path = stored()
    assert loaded() == VALUE
    assert [p for p in folder.rglob("*") if p.is_file()] == [path]
    assert path.name.startswith("fwd-up-")


def test_where(monkeypatch, tmp_path):
    """$MOEFACTORY_CACHE, else $XDG_CACHE_HOME, else the home, read at each use; a relative XDG path is ignored."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOEFACTORY_CACHE", "~/mine")
    assert cache.root() == tmp_path / "mine"
    monkeypatch.delenv("MOEFACTORY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "moefactory"
    for other in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert cache.root() == tmp_path / ".cache" / "moefactory"


@pytest.mark.parametrize("field", ENVIRONMENT)
def test_another_environment_misses(field):
    """A4: each field of the environment changed, one at a time, finds nothing, without a warning."""
    stored()
    assert loaded({**ENVIRONMENT, field: "other"}) is None
    assert loaded() == VALUE


@pytest.mark.parametrize("field", [name for name in KEY if name not in {"pass_name", "gemm"}])
def test_another_key_misses(field):
    """A4: likewise each field of the key; True and 1 are two values."""
    stored()
    assert loaded(key={**KEY, field: 1}) is None
    assert loaded() == VALUE


@pytest.mark.parametrize("part", ["key", "environment"])
def test_a_file_of_another_launch_is_refused(part):
    """A file that was copied to another key's place is not about that key: the field is named."""
    path = stored()
    environment, key = ENVIRONMENT, {**KEY, "experts": 64}
    if part == "environment":
        environment, key = {**ENVIRONMENT, "triton": "3.8"}, KEY
    other = cache.path_of(environment, key)
    assert other is not None
    other.parent.mkdir(exist_ok=True)
    shutil.copy(path, other)
    with pytest.warns(RuntimeWarning, match=r"key\.experts: got 128; needed: 64|environment\.triton: got \"3\.7\""):
        assert loaded(environment, key) is None


def test_tuples_are_lists():
    """A tuple in the environment hits the list that JSON made of it: the predecessor's cache never hit for that."""
    stored()
    assert loaded({**ENVIRONMENT, "capability": (9, 0)}) == VALUE


def test_order_of_fields_does_not_count():
    stored()
    assert loaded(dict(reversed(ENVIRONMENT.items())), dict(reversed(KEY.items()))) == VALUE


def entry(**changes) -> bytes:
    return json.dumps({"environment": ENVIRONMENT, "key": KEY, "value": VALUE, **changes}).encode()


DEFECTS = {
    "empty": b"",
    "truncated": entry()[:-20],
    "bytes": bytes(range(128, 256)),
    "null": b"null",
    "list": b"[]",
    "number": b"7",
    "no key": json.dumps({"environment": ENVIRONMENT, "value": VALUE}).encode(),
    "one field more": entry(extra=1),
    "key is a list": entry(key=list(KEY)),
    "key lacks a field": entry(key={k: v for k, v in KEY.items() if k != "dtype"}),
    "key has a field more": entry(key={**KEY, "more": 1}),
    "not a number": entry().replace(b"0.5", b"NaN"),
    "deep": b"[" * 200_000,
    "a long integer": b"1" * 100_000,
    "large": b" " * (cache.MAX_BYTES + 1),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_a_miss_and_one_warning(defect):
    """A1: no exception, no value, one warning for the file; storing again repairs it."""
    path = stored()
    path.write_bytes(DEFECTS[defect])
    with pytest.warns(RuntimeWarning, match=f"tuning cache: {path}") as caught:
        assert loaded() is None
    assert len(caught) == 1
    assert loaded() is None  # and silently, since a second warning would be an error here
    stored()
    assert loaded() == VALUE


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_a_miss(kind):
    """A1: a folder in a file's place, or a pipe, on which reading would wait for ever."""
    path = stored()
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.warns(RuntimeWarning, match="not a regular file"):
        assert loaded() is None


def test_what_the_reader_refuses_is_a_miss():
    """A1: an exception of the caller's own check is a defect of the file."""
    stored()
    cache._kept.clear()
    with pytest.warns(RuntimeWarning, match="KeyError: 'absent'"):
        assert cache.load(ENVIRONMENT, KEY, lambda value: value["absent"]) is None


def test_unwritable_folder_keeps_results_in_memory(tmp_path, monkeypatch):
    """A1: one warning for the folder, and this process finds its values; another one starts afresh."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEFACTORY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot be written") as caught:
        assert not cache.store(ENVIRONMENT, KEY, VALUE)
        assert not cache.store(ENVIRONMENT, {**KEY, "gemm": "down"}, VALUE)
    assert len(caught) == 1
    assert cache.anything()
    assert cache.load(ENVIRONMENT, KEY, plain) == VALUE
    assert cache.load(ENVIRONMENT, {**KEY, "gemm": "down"}, plain) == VALUE


def test_a_root_that_is_no_folder_is_named_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEFACTORY_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="not a folder"):
        assert not cache.anything()
    assert not cache.anything()


def test_nothing_stored_is_nothing_to_look_for(folder):
    """The first step of somebody who never tuned makes no folder and asks no further."""
    assert not cache.anything()
    assert not folder.exists()
    stored()
    cache._kept.clear()
    assert cache.anything()


def test_written_to_the_disk_before_it_is_moved(monkeypatch):
    """A power cut after the move must not leave an empty file: content, fsync, replace, in this order."""
    events = []
    fsync, move = os.fsync, os.replace
    monkeypatch.setattr(cache.os, "fsync", lambda number: (events.append("fsync"), fsync(number)))
    monkeypatch.setattr(cache.os, "replace", lambda a, b: (events.append(f"move {a.stat().st_size > 0}"), move(a, b)))
    stored()
    assert events == ["fsync", "move True"]


def test_a_write_that_fails_leaves_the_old_file(monkeypatch, folder):
    """A busy network folder: the former value stays on disk, nothing beside it, the new one in memory."""
    stored()

    def busy(a, b):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(cache.os, "replace", busy)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert not cache.store(ENVIRONMENT, KEY, {**VALUE, "ms": 1.0})
    assert loaded() == VALUE
    assert cache.load(ENVIRONMENT, KEY, plain)["ms"] == 1.0
    assert len([p for p in folder.rglob("*") if p.is_file()]) == 1


def test_an_edited_kernel_is_another_environment(tmp_path):
    """The hash of the sources moves with a name and with a byte, and with nothing else."""
    hashes = []
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "x = 2"), ("b.py", "x = 2")):
        made = tmp_path / str(len(hashes))
        made.mkdir()
        (made / name).write_text(text)
        (made / "notes.txt").write_text(str(len(hashes)))
        hashes.append(cache.sources(made))
    assert len(set(hashes)) == 3
    assert hashes[2] == hashes[3]


def _tune_again_and_again(number: int, rounds: int) -> None:
    """Store and read in turn; whatever is read must be a whole value of some process, or this one fails."""
    warnings.simplefilter("error")
    for turn in range(rounds):
        cache.store(ENVIRONMENT, KEY, {"process": number, "turn": turn, "padding": "x" * 50_000})
        cache.forget()
        value = cache.load(ENVIRONMENT, KEY, plain)
        if value is None or set(value) != {"process", "turn", "padding"} or len(value["padding"]) != 50_000:
            sys.exit(f"read {str(value)[:80]}")


def _stop_in_the_middle(ready) -> None:
    """Store, and stand still between writing the content and moving it to its place."""

    def stand_still(number: int) -> None:
        ready.set()
        time.sleep(600)

    cache.os.fsync = stand_still
    cache.store(ENVIRONMENT, KEY, {"process": -1})


def test_eight_processes_and_one_killed_in_the_middle(folder):
    """A2: seven write and read the same file at once, one is killed (SIGKILL) mid-write; no half file is ever read."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    victim = spawn.Process(target=_stop_in_the_middle, args=(ready,))
    others = [spawn.Process(target=_tune_again_and_again, args=(number, 30)) for number in range(7)]
    for process in (victim, *others):
        process.start()
    assert ready.wait(60)
    os.kill(victim.pid, signal.SIGKILL)
    for process in (victim, *others):
        process.join(60)
    assert victim.exitcode == -signal.SIGKILL
    assert [process.exitcode for process in others] == [0] * 7
    assert loaded()["turn"] == 29
    left = [p.suffix for p in folder.rglob("*") if p.is_file()]
    assert sorted(left) == [".json", ".tmp"]  # the killed one's temporary shows that it was in the middle
