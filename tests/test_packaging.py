"""The house seen from outside: what the wheel carries, that it works where the repository is not, what an import costs,
which module may import which, and that no committed file knows a machine or a package index.

The wheel is built without a network from a copy of the sources and installed into an empty folder. Programs run with
that folder first on the path and with ``-S``: site-packages is on the path too, but its .pth files, and with them an
editable install of this repository, are not read.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "moefactory", "conf", "hydra_plugins")
HEAVY = {"torch", "triton", "transformers", "numpy", "safetensors"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sources as they are now, built in a copy so that nothing is left behind in the repository."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    _pip("wheel", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the wheel installed into it."""
    folder = tmp_path_factory.mktemp("site")
    _pip("install", "--no-compile", "--target", str(folder), str(wheel))
    return folder


def _pip(verb: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--no-deps", "--no-index", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def outside(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run python in `cwd` with the installed wheel first on the path and the repository not on it."""
    libraries = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON", "PYTEST", "COVERAGE"))}
    env["PYTHONPATH"] = os.pathsep.join([str(site), *libraries])
    return subprocess.run(
        [sys.executable, "-S", *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )


def run_code(site: Path, cwd: Path, code: str, *flags: str) -> str:
    """What `code` prints, run outside; it must end well and warn of nothing."""
    done = outside(site, cwd, "-W", "error", *flags, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def example(site: Path, tmp_path: Path, name: str, *overrides: str) -> str:
    """What a copy of ``examples/<name>/app.py`` prints."""
    shutil.copytree(ROOT / "examples" / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    done = outside(site, tmp_path / name, "-W", "error", "app.py", *overrides)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- what the wheel carries


def test_the_wheel_holds_every_module_and_preset_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = (".py", ".yaml", ".json", "py.typed")
    wanted = {f"moefactory/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*") if p.name.endswith(data)}
    for folder in ("moefactory", "hydra_plugins"):
        wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.name.endswith(data)}
    assert held == wanted


def test_the_wheel_states_licence_typing_plugin_and_no_other_hard_dependency(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
        assert "moefactory/py.typed" in archive.namelist()
        assert "hydra_plugins/__init__.py" not in archive.namelist()  # it would hide every other plugin
    assert "License-Expression: Apache-2.0" in metadata
    assert "hydra_plugins.moefactory_searchpath:MoefactorySearchPath" in entry_points
    hard = {re.split(r"[^\w-]", line.split(": ")[1])[0] for line in re.findall("Requires-Dist: .*", metadata)
            if "extra ==" not in line}  # fmt: skip
    assert hard == {"hydra-core", "omegaconf", "rich", "safetensors", "torch", "transformers", "triton"}


# ---------------------------------------------------------------- the examples, where the repository is not


def test_the_plain_example_runs_outside(site: Path, tmp_path: Path) -> None:
    printed = example(site, tmp_path, "plain")
    assert printed == (
        "Qwen3MoeGroupedGEMMBlock: (1, 16, 64), router (16, 8), gradients ['gate', 'gate_up_proj', 'down_proj']\n"
    )


def test_the_plain_example_takes_presets_and_refuses_typos(site: Path, tmp_path: Path) -> None:
    printed = example(site, tmp_path, "plain", "moe/model=tiny", "moe.model.hidden_size=32", "moe.dtype=float64")
    assert "(1, 16, 32), router (16, 8)" in printed
    done = outside(site, tmp_path / "plain", "app.py", "moe.permute_z=true")
    assert done.returncode == 1
    assert "Key 'permute_z' not in 'MoeNode'" in done.stderr
    done = outside(site, tmp_path / "plain", "app.py", "+moe.model.hiden_size=32")
    assert done.returncode == 1
    assert "did you mean 'hidden_size'?" in done.stderr


def test_the_two_blocks_example_runs_outside(site: Path, tmp_path: Path) -> None:
    printed = example(site, tmp_path, "two_blocks")
    assert printed.splitlines() == [
        "a: Qwen3MoeGroupedGEMMBlock, 2 of 8 experts, gradients []",
        "b: Qwen3MoeGroupedGEMMBlock, 1 of 4 experts, gradients ['gate', 'gate_up_proj', 'down_proj']",
    ]


def test_the_users_own_preset_wins_over_a_shipped_one_of_the_same_name(site: Path, tmp_path: Path) -> None:
    own = tmp_path / "plain" / "conf" / "moe"
    shutil.copytree(ROOT / "examples" / "plain", tmp_path / "plain")
    (own / "model").mkdir(parents=True)
    (own / "model" / "tiny.yaml").write_text("hidden_size: 16\n")
    done = outside(site, tmp_path / "plain", "app.py", "moe/model=tiny")
    assert done.returncode == 0, done.stderr
    assert "(1, 16, 16)" in done.stdout


def test_the_command_runs_outside(site: Path, tmp_path: Path) -> None:
    done = outside(site, tmp_path, "-m", "moefactory", "show")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "show leaves nothing behind"


def test_asserts_are_for_ourselves_only(site: Path, tmp_path: Path) -> None:
    """``python -O`` drops every assert: the block must still run, and each refusal must still come, word for word."""
    code = """
import torch, moefactory
from moefactory.matrix import config_from
from moefactory.rules import RULES
print(moefactory.__file__)
block = moefactory.build()
print(tuple(block(torch.randn(2, 3, 64))[0].shape))

def refusal(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        print(type(error).__name__, error)
    else:
        print("accepted", arguments)

for rule in RULES:
    refusal(moefactory.build, config_from([f"moe.{key}={value}" for key, value in rule.example.items()]))
for node in ({"tok_k": 1}, {"model": 3}, {"backend": {"_target_": "os.getcwd"}}, {"model": {"top_k": "two"}},
             {"weights": {"source": "checkpoint", "path": "nowhere", "layer": 0}}, {"weights": {"source": "live"}}):
    refusal(moefactory.build, node)
refusal(block, torch.randn(2, 3, 65))
refusal(block, torch.randn(2, 3, 64, dtype=torch.float64))
refusal(moefactory.make_plan, torch.zeros(3), 8)
refusal(moefactory.read_hf_block, torch.nn.Linear(2, 2))
refusal(moefactory.Qwen3MoeGroupedGEMMBlock, block.model, block.gate, block.gate_up_proj, block.gate)
"""
    printed = run_code(site, tmp_path, code)
    assert run_code(site, tmp_path, code, "-O") == printed
    file, shape, *refusals = printed.splitlines()
    assert Path(file).is_relative_to(site), "the installed one, not the repository's"
    assert shape == "(2, 3, 64)"
    assert len(refusals) > 25
    assert not [line for line in refusals if not re.match("(ConfigError|WeightsError|ValueError) ", line)]


# ---------------------------------------------------------------- what an import costs


def test_import_is_light_and_quick(site: Path, tmp_path: Path) -> None:
    code = """
import sys, time
begin = time.perf_counter()
import moefactory
print(time.perf_counter() - begin, *sys.modules)
"""
    runs = [run_code(site, tmp_path, code).split() for _ in range(3)]
    assert not {name.split(".")[0] for name in runs[0][1:]} & (HEAVY | {"hydra", "omegaconf", "rich"})
    assert min(float(run[0]) for run in runs) < 0.1  # seconds, the best of three: the machine may be busy


@pytest.mark.parametrize("module", ["config", "rules", "schema", "cli"])
def test_configs_and_rules_need_no_heavy_library(site: Path, tmp_path: Path, module: str) -> None:
    code = f"import sys, moefactory.{module}; print(*sys.modules)"
    assert not {name.split(".")[0] for name in run_code(site, tmp_path, code).split()} & HEAVY


def test_composing_the_preset_in_a_foreign_application_loads_no_heavy_library(site: Path, tmp_path: Path) -> None:
    code = """
import sys
from hydra import compose, initialize
with initialize(version_base="1.3", config_path=None):
    cfg = compose(overrides=["+moe=qwen3", "moe/model=qwen3_30b_a3b"])
print(cfg.moe.model.num_experts, *sys.modules)
"""
    experts, *modules = run_code(site, tmp_path, code).split()
    assert experts == "128"
    assert not {name.split(".")[0] for name in modules} & HEAVY


def test_importing_the_package_sets_nothing_up(site: Path, tmp_path: Path) -> None:
    """No handler on the root logger, no change of the environment, no thread setting: those belong to the program."""
    code = """
import logging, os, warnings
before = dict(os.environ), list(logging.root.handlers), logging.root.level, list(warnings.filters)
import moefactory
for name in moefactory.__all__:
    getattr(moefactory, name)
print((dict(os.environ), list(logging.root.handlers), logging.root.level) == before[:3])
"""
    assert run_code(site, tmp_path, code).strip() == "True"


# ---------------------------------------------------------------- which module may import which

LAYERS = (
    ("_version", "config", "covering", "progress", "report"),
    ("rules", "schema", "refusals", "overrides"),
    ("routing",),
    ("reference", "triton", "machine"),
    ("weights", "matrix", "measure", "plot"),
    ("block",),
    ("factory",),
    ("numerics", "peers", "describe"),
    ("check", "provenance", "bench_rows"),
    ("bench_report", "bench_sweep", "bench_files"),
    ("bench", "tune", "compose"),
    ("cli", "usage"),
    ("__main__",),
)
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}


def _imports(path: Path) -> set[str]:
    """The top-level modules of moefactory that a file imports when it runs, inside functions too."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # for type checkers only
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("moefactory.")}
    return found


def _modules() -> list[Path]:
    """Every source file but the package's face, which imports from all of them."""
    return [p for p in sorted((ROOT / "moefactory").rglob("*.py")) if p != ROOT / "moefactory" / "__init__.py"]


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "moefactory").parts[0].removesuffix(".py")
    assert own in RANK, f"moefactory/{own} has no place in LAYERS yet: give it one"
    upward = {name for name in _imports(path) if RANK.get(name, 0) > RANK[own]}
    assert not upward, f"{own} is below {', '.join(sorted(upward))}"


def test_every_layer_exists() -> None:
    assert set(RANK) == {p.relative_to(ROOT / "moefactory").parts[0].removesuffix(".py") for p in _modules()}


# ---------------------------------------------------------------- what a committed file may not know

_MACHINE = r"(?<![\w.~$}-])/(?:home|root|opt|work|Users|mnt|scratch)/\w|[A-Z]:\\\\?Users"
_REGISTRY = r"py(?:pi\.org|thonhosted)|download\.pytorch|index-url|find-links|registry\.\w+\.\w+"


def _committed() -> list[Path]:
    """What git tracks or would add; without git (a release archive) every file of the folders we know."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False) if (ROOT / ".git").exists() else None
    if listed and listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    folders = ("moefactory", "conf", "hydra_plugins", "tests", "examples", "tools", "benchmarks", ".github")
    return [p for folder in folders for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]


def test_no_committed_file_names_a_machine_or_an_index() -> None:
    files = [p for p in _committed() if p.is_file() and p != Path(__file__)]
    assert len(files) > 40
    found = []
    for path in files:
        text = path.read_text(errors="replace")
        hits = re.findall(f"{_MACHINE}|{_REGISTRY}", text)
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in hits]
    assert not found


@pytest.mark.parametrize("text", ["/home/x", 'open("/root/a")', "see /opt/b", "https://pypi.org/simple", "--index-url"])
def test_that_search_finds(text: str) -> None:
    assert re.search(f"{_MACHINE}|{_REGISTRY}", text)


# ---------------------------------------------------------------- the pins


def test_every_requirement_is_pinned_within_its_range() -> None:
    """constraints.txt holds one exact version of each thing that pyproject.toml names, and the range allows it."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name != "moefactory":
            assert requirement.specifier.contains(pins[name]), requirement


# ---------------------------------------------------------------- the workflows


@pytest.mark.parametrize("path", [".github/workflows/ci.yml", "examples/ci/workflow.yml"])
def test_a_workflows_jobs_come_from_the_matrix(path: str, tmp_path: Path) -> None:
    """The plan step's own command gives GitHub at most 256 jobs, and the shard step runs with what they hold."""
    jobs = yaml.safe_load((ROOT / path).read_text())["jobs"]
    assert jobs["shard"]["strategy"]["matrix"] == "${{ fromJson(needs.plan.outputs.matrix) }}"
    assert jobs["plan"]["outputs"]["matrix"] == "${{ steps.plan.outputs.matrix }}"
    output = tmp_path / "output"
    _step(jobs["plan"], "plan", tmp_path, {"GITHUB_OUTPUT": str(output)})
    name, text = output.read_text().rstrip("\n").split("=", 1)
    include = json.loads(text)["include"]
    assert name == "matrix"
    assert 1 <= len(include) <= 256
    shards = [job["shard"] for job in include]
    assert shards == [f"{i}/{len(shards)}" for i in range(1, len(shards) + 1)]
    assert len({job["name"] for job in include}) == len(shards)


def test_a_workflows_shard_checks_rows_and_refuses_illegal_ones(tmp_path: Path) -> None:
    job = yaml.safe_load((ROOT / "examples/ci/workflow.yml").read_text())["jobs"]["shard"]
    (tmp_path / "ci").mkdir()
    shutil.copy(ROOT / "examples" / "ci" / "run_shard.py", tmp_path / "ci")
    printed = _step(job, "shard", tmp_path, {"XDG_CACHE_HOME": str(tmp_path)}, shard="7/400")
    assert re.search(r"^ +\d+  refused$", printed, flags=re.MULTILINE)
    assert re.search(r"^ +\d+  checked$", printed, flags=re.MULTILINE)
    assert "FAILED" not in printed
    ours = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["shard"]
    assert ours["env"] == job["env"]
    assert ours["steps"][-1]["run"] == job["steps"][-1]["run"].replace("ci/", "examples/ci/")


@pytest.mark.parametrize(
    "words", [[], ["x"], ["1/0"], ["0/14"], ["15/14"], ["-1/3"], ["1/14", "2/14"], ["1/2/3"], ["/"]]
)
def test_a_shard_that_there_is_not(words: list[str]) -> None:
    """One line and exit status 1 before any row is run: no shard is taken for an empty one."""
    script = [sys.executable, str(ROOT / "examples" / "ci" / "run_shard.py"), *words]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"run_shard.py: got {' '.join(words)!r}; needed: NUMBER/COUNT, 1/12 to 12/12\n"


def _step(job: dict[str, Any], name: str, cwd: Path, env: dict[str, str], shard: str = "") -> str:
    """Run the command of a workflow's step as GitHub does."""
    (command,) = (step["run"] for step in job["steps"] if step.get("id") == name)
    command = command.replace("${{ matrix.shard }}", shard)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    full = {**os.environ, "PATH": path, **job.get("env", {}), **env}
    shell = ["bash", "-eo", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=cwd, env=full, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
