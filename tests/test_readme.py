"""The README is true: its commands and snippets run as written, print what it shows, and its tables are up to date.

A fenced block that opens with a file name in a comment (``# app.py``) is that file. Every other ``sh`` and ``python``
block runs in a folder of its own, with those files in it and a copy of the repository around it. A ``text`` block shows
what the block before it prints; numbers in it are examples, everything else must be equal.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# Set-up, the suite itself, and what needs a GPU (benchmarks/results/check_h200.json has its run).
NOT_RUN_HERE = {
    "make run",
    "make test",
    "moefactory check moe/backend=triton moe.device=cuda moe/model=qwen3_30b_a3b moe/weights=random moe.dtype=bfloat16",
}


class Block(NamedTuple):
    """A fenced block: its language, its text, the output shown after it, and the line where it stands."""

    language: str
    text: str
    shown: str | None
    line: int


def _blocks() -> list[Block]:
    found: list[Block] = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL):
        language, text = match.groups()
        if language == "text" and found:
            found[-1] = found[-1]._replace(shown=text)
        else:
            found.append(Block(language, text, None, README[: match.start()].count("\n") + 1))
    return found


BLOCKS = _blocks()
FILES = {name[1]: block.text for block in BLOCKS if (name := re.match(r"# ([\w./]+\.(?:py|yaml))\n", block.text))}
PROGRAMS = [block for block in BLOCKS if block.language in {"sh", "python"} and block.text not in FILES.values()]


def _commands(block: Block) -> list[str]:
    """The commands of a shell block, one a line, without comments."""
    return [line.split("  #")[0].strip() for line in block.text.splitlines() if line.strip()]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands see of the repository."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "tools", "conf", "moefactory", "README.md", "Makefile"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
        else:
            shutil.copy(source, folder / name)
    return folder


def _run(folder: Path, *command: str) -> str:
    dropped = ("TRITON", "PYTEST", "COVERAGE", "MAKE", "MFLAGS")  # the tests' own make would speak up in ours
    env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["XDG_CACHE_HOME"] = str(folder / "cache")  # the README's commands leave the user's own alone
    env |= {"COLUMNS": "120", "PYTHONWARNINGS": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _plain(text: str) -> str:
    """Text without what differs from run to run: numbers, and the width of columns."""
    text = re.sub(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", "0", text)
    return re.sub(r"[ \t─━-]+", " ", text).strip()


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: f"line{block.line}")
def test_blocks_run_as_written(block: Block, clone: Path, tmp_path: Path) -> None:
    if block.language == "sh" and set(_commands(block)) <= NOT_RUN_HERE:
        return
    folder = tmp_path / "work"
    shutil.copytree(clone, folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = ("bash", "-euo", "pipefail", "-c") if block.language == "sh" else (sys.executable, "-c")
    printed = _run(folder, *command, block.text)
    if block.shown is not None:
        assert _plain(printed) == _plain(block.shown)


def test_the_readme_opens_with_the_two_commands() -> None:
    assert _commands(BLOCKS[0]) == ["make run", "make test"]
    assert README.index("```sh") < README.index("\n## ")


def test_nothing_but_the_declared_commands_is_left_out() -> None:
    commands = {command for block in BLOCKS if block.language == "sh" for command in _commands(block)}
    assert commands >= NOT_RUN_HERE
    left = [b for b in PROGRAMS if b.language == "sh" and set(_commands(b)) & NOT_RUN_HERE]
    assert all(set(_commands(b)) <= NOT_RUN_HERE for b in left), "a block mixes commands that run here with others"


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} <= {"sh", "python", "yaml"}
    for block in BLOCKS:
        if block.language == "yaml":
            assert block.text in FILES.values() or yaml.safe_load(block.text), f"line {block.line}"


def test_generated_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_that_check_sees_a_stale_table(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "readme.py", tmp_path / "tools")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "README.md").write_text(README.replace("| `num-warps` |", "| `number-of-warps` |"))
    command = [sys.executable, "tools/readme.py", "--check"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_every_option_has_a_meaning() -> None:
    """The option table's meanings are written by hand: they name every key of the schema but the kernels'."""
    from moefactory.config import field_paths

    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import readme
    finally:
        sys.path.pop(0)
    groups = {"backend", "model", "weights", "kernels"}
    assert set(readme.MEANINGS) == {k for k in field_paths() if k not in groups and not k.startswith("kernels.")}
