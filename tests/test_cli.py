"""The command line: what each verb prints, its exit codes, and that whatever goes wrong is said in one line.

`main` runs in this process, for speed; what only a process can show (start-up time, closed pipes) runs in one.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

import moefactory.check
import moefactory.compose
from moefactory.cli import VERBS, main
from moefactory.config import ModelConfig, field_paths, resolve_model
from moefactory.matrix import config_from, rows
from moefactory.numerics.demo import CHECKED, DENSE, demo_checkpoint
from moefactory.rules import RULES, Rule, make_case

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ever written to the home of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, stdout, stderr) of a command line."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration checkpoint: layer 1 is dense."""
    with ExitStack() as stack:
        demo = demo_checkpoint(resolve_model(ModelConfig()), 0, str(tmp_path_factory.mktemp("cache")), stack)
    return Path(demo.path)


def spawn(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m moefactory` in a process of its own."""
    command = [sys.executable, "-m", "moefactory", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSALS = [
    # overrides, the key, more that the line must say
    (("moe.permute_x=maybe",), "moe.permute_x:", ("'maybe'", "true or false")),
    (("moe.top_kk=2",), "moe.top_kk:", ("did you mean 'moe.model.top_k'?",)),
    (("+moe.typo=1",), "moe.typo:", ("no such key", "permute_x")),
    (("moe/backend=cuda",), "moe/backend:", ("'cuda'", "torch, triton")),
    (("++moe.backend._target_=os.system",), "moe.backend._target_:", ("choose backend and weights by name",)),
    (("moe._target_=os.system",), "moe._target_:", ("moe/backend=triton",)),
    (("moe.backend=triton",), "moe.backend:", ("did you mean moe/backend=triton?",)),
    (("moe.weights=checkpoint",), "moe.weights:", ("did you mean moe/weights=checkpoint?",)),
    (("moe/backends=torch",), "moe/backends:", ("did you mean 'moe/backend'?",)),
    (("moe/permute_x=false",), "moe/permute_x:", ("did you mean moe.permute_x=false?",)),
    (("moe/model=qwen3_30b",), "moe/model:", ("did you mean 'qwen3_30b_a3b'?",)),
    (("moe=qwen",), "moe:", ("'qwen'", "qwen3")),
    (("backend=triton",), "backend:", ("moe/backend",)),
    (("permute_x=false",), "permute_x:", ("did you mean 'moe.permute_x'?",)),
    (("tokns=3",), "tokns:", ("did you mean 'tokens'?",)),
    (("+tokns=3",), "tokns:", ("did you mean 'tokens'?",)),
    (("tokens=0",), "tokens:", ("1 to",)),
    (("tokens=many",), "tokens:", ("'many'", "an integer")),
    (("seed=-1",), "seed:", ("0 or more",)),
    (("format=jsn",), "format:", ("table, json", "did you mean 'json'?")),
    (("moe.dtype=float33",), "moe.dtype:", ("bfloat16",)),
    (("moe.device=gpu",), "moe.device:", ("'gpu'", "cuda")),
    (("moe.permute_x=true,false",), "moe.permute_x:", ("one configuration at a time",)),
    (("hydra.run.dir=x",), "hydra.run.dir:", ("hydra.searchpath",)),
    (("--multirun",), "--multirun: no such flag; allowed: --help;", ("`moefactory show` prints what would run",)),
    (("-cn", "mine"), "-cn: no such flag; allowed: --help;", ("sweeps belong in an application of your own",)),
    (("moe.model.top_k=99999999999999999999",), "moe.model.top_k: got an integer of 67 bits;",
     ("allowed: an integer, or null; the largest is 9223372036854775807",)),
    (("nonsense",), "'nonsense' is no override; allowed: key=value or group=option", ()),
    ((" ",), "' ' is no override; allowed: key=value or group=option", ()),
    (("=3",), "'=3' is no override;", ()),
    (("+++moe.device=",), "'+++moe.device=' is no override;", ()),
    (("moe..permute_x=false",), "'moe..permute_x=false' is no override;", ()),
    (("cache=~/x",), "cache: got '~/x', which needs quotes; allowed:", ("\"cache='~/x'\"",)),
    (("moe.permute_x=~",), "moe.permute_x: got '~'; allowed: true or false", ()),
    (("moe/model=~",), "moe/model: got '~'; allowed: auto", ()),
    (("moe.model.topk=~",), "moe.model.topk: no such key; allowed here: hidden_size", ()),
    (("tokens=[16",), "tokens: got '[16'; allowed: an integer", ()),
    (("cache='~/x",), "cache:", ("allowed: \"cache='~/x'\"",)),
    (("hydra.run.dir=~/x",), "hydra.run.dir:", ("hydra.searchpath",)),
    (("hydra.searchpath=~/x",), "hydra.searchpath: got '~/x'; allowed: a list", ()),
    (("moe/model=tiny,auto",), "moe/model: got several values; allowed: one (", ()),
    (("~moe",), "moe: this command line deletes nothing; allowed: key=value, or group=option", ("moe=qwen3",)),
    (("~moe.permute_x",), "moe.permute_x: this command line deletes nothing;", ()),
    (("~moe/backend",), "moe/backend: this command line deletes nothing;", ()),
    (("+moe.permute_x=false",), "moe.permute_x: this command line adds nothing; allowed: moe.permute_x=false", ()),
    (("+tokens=3",), "tokens: this command line adds nothing; allowed: tokens=3", ()),
    (("+moe=qwen3",), "moe: this command line adds nothing; allowed: moe=qwen3", ()),
    (("++moe/backend=torch",), "moe/backend: this command line adds nothing; allowed: moe/backend=torch", ()),
    (("++moe.permute_x=false", "moe.topk=2"), "moe.topk: no such key", ()),
    (("moe@foo=qwen3",), "moe@foo: this command line moves no group to another place; allowed: moe=qwen3", ()),
    (("moe/model@moe.model=tiny",), "moe/model@moe.model: this command line moves no group", ("moe/model=tiny",)),
    (("moe/model@moe.model:foo=tiny",), "moe/model@moe.model:foo: this command line moves no group", ()),
    (("moe.device=${nope}",), "moe.device: got '${nope}', which brings no such value; allowed: a string, or null", ()),
    (("moe.device=${moe.model}",), "moe.device: got '${moe.model}', which brings no such value;", ()),
    (("moe.device=${moe.device}",), "moe.device: got '${moe.device}', which brings no such value;", ()),
    (("moe.device=${nope",), "moe.device: got '${nope', which cannot be read;", ()),
    (("tokens=${nope}",), "tokens: got '${nope}', which brings no such value; allowed: an integer from 1", ()),
    (("moe.nope=${moe.dtype}",), "moe.nope: no such key", ()),
    (("tokens=${moe.model.top_k}", "moe.nope=1"), "moe.nope: no such key", ()),
    (("moe/backend=triton", "moe.kernels.fwd=null"), "moe.kernels.fwd: got null; allowed: a mapping with block_m", ()),
    (("moe.kernels.fwd=[a,b]",), "moe.kernels.fwd: got ['a', 'b']; allowed: a mapping with block_m", ()),
    (("moe=null",), "moe: got null; allowed: qwen3", ()),
    (("moe.model.top_k=9",), "top-k:", ("num_experts=8",)),
    (("moe.dW_only=true", "moe.dX_only=true"), "dW_only-dX_only:", ("set at most one",)),
    (("moe.weights.layer=2",), "unread-weights:", ("moe.weights.layer stated", "moe/weights=checkpoint")),
    (("moe/backend=triton", "moe/kernels=small"), "autotune-kernels: moe.autotune=true", ("moe.autotune=false",)),
    (("moe.saved=x",), "saved: moe.saved=x with", ("set moe.saved=h;",)),
    (("moe.saved=y",), "moe.saved:", ("'y'", "h, h_reused, x")),
    (("moe.model.hidden_act=sillu",), "moe.model.hidden_act:", ("did you mean 'silu'?",)),
    (("moe/weights=live",), "moe.weights.source:", ("no block was given",)),
    (("moe/model=qwen3_235b_a22b",), "moe.weights.source:", ("GiB", "moe/weights=random")),
    (("moe/weights=checkpoint", "moe.weights.path=/nonexistent", "moe.weights.layer=0"), "moe.weights.path=", ()),
]  # fmt: skip


@pytest.mark.parametrize(("words", "key", "more"), REFUSALS, ids=[" ".join(words) for words, *_ in REFUSALS])
def test_a_bad_config_ends_in_one_line_and_exit_code_2(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], key: str, more: tuple[str, ...]
) -> None:
    """The line begins with the key and says what came or what is allowed; nothing is printed, nothing is called."""
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("os.system was called"))
    code, out, err = run("check", *words)
    assert code == 2
    assert out == ""
    assert err.startswith(f"moefactory: {key}")
    assert err.count("\n") == 1
    for text in more:
        assert text in err


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "word",
    [
        LONG, f"-{LONG}", f"{LONG}=1", f"{LONG}=1,2", f"{LONG}=~", f"moe.{LONG}=1", f"+moe.{LONG}=1", f"moe/{LONG}=1",
        f"moe@{LONG}=1", f"~{LONG}", f"hydra.{LONG}=1", f"{LONG}=${{oc.env:HOME}}", f"moe={LONG}", f"moe@a={LONG}",
        f"moe/backend={LONG}", f"moe/permute_x={LONG}", f"+moe/backend={LONG}", f"moe.permute_x={LONG}",
        f"tokens={LONG}", f"tokens=[{LONG}]", f"moe.device={LONG},a", f"moe.device=~{LONG}", f"moe.device=${{{LONG}}}",
        f"format={LONG}",
    ],
    ids=lambda word: word.replace(LONG, "LONG"),
)  # fmt: skip
def test_what_came_is_cut_to_a_line(run: Run, word: str) -> None:
    code, out, err = run("show", word)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert len(err) < 600


def test_a_long_command_is_cut_to_a_line(run: Run) -> None:
    for word in (LONG, f"{LONG}=1"):
        code, _, err = run(word)
        assert code == 2
        assert len(err) < 300


@pytest.mark.parametrize(
    "path", ["~/x", "/tmp/modèle", "/tmp/a(b", "/tmp/a=b", "/tmp/[a", "a,b", "/tmp/it's é", '~/$HOME "a"', "~/`a`\\\\"]
)
def test_a_value_that_needs_quotes_says_how_to_type_them(run: Run, path: str) -> None:
    """What the line shows is given to a shell as it stands, and what the shell passes on is the path."""
    code, out, err = run("show", f"moe.weights.path={path}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("moefactory: moe.weights.path: got ")
    shown = re.search(r"""["']moe\.weights\.path=.*["']""", err)
    assert shown is not None
    typed = subprocess.run(["sh", "-c", f"printf %s {shown[0]}"], capture_output=True, text=True, check=True).stdout
    request = moefactory.compose.compose("show", [typed])
    assert request.config is not None
    assert request.config.weights.path == path


@pytest.mark.parametrize("key", ["moe.device", "moe/backend", "moe.permute_x", "+moe.extra", "tokens", "format"])
def test_a_resolver_is_refused_and_its_value_never_shown(run: Run, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("MOEFACTORY_SECRET", "hunter2")
    code, out, err = run("check", f"{key}=${{oc.env:MOEFACTORY_SECRET}}")
    assert code == 2
    assert "resolvers" in err
    assert err.startswith(f"moefactory: {key.lstrip('+')}:")
    assert "hunter2" not in out + err


def test_a_resolver_in_a_users_own_file_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hydra.searchpath brings the user's presets; their values are checked like everything else."""
    monkeypatch.setenv("MOEFACTORY_SECRET", "hunter2")
    (tmp_path / "moe").mkdir()
    preset = "defaults: [qwen3, _self_]\npermute_x: false\n"
    (tmp_path / "moe" / "mine.yaml").write_text(preset)
    words = ("show", f"hydra.searchpath=[file://{tmp_path}]", "moe=mine", "format=json")
    code, out, _ = run(*words)
    assert code == 0
    assert json.loads(out)["config"]["permute_x"] is False
    (tmp_path / "moe" / "mine.yaml").write_text(preset + "device: ${oc.env:MOEFACTORY_SECRET}\n")
    code, out, err = run(*words)
    assert code == 2
    assert err.startswith("moefactory: moe.device: resolvers")
    assert "hunter2" not in out + err


def test_a_dense_layer_is_refused_and_the_sparse_ones_named(run: Run, checkpoint: Path) -> None:
    path = f"moe.weights.path={checkpoint}"
    code, out, err = run("check", "moe/weights=checkpoint", path, f"moe.weights.layer={DENSE[0]}")
    assert (code, out) == (2, "")
    assert err.startswith("moefactory: moe.weights.layer=1 is dense")
    assert "allowed: 0, 2" in err
    assert err.count("\n") == 1


def test_a_truncated_shard_is_refused_and_named(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    index = json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index[f"model.layers.{CHECKED}.mlp.gate.weight"]
    (broken / shard).write_bytes((broken / shard).read_bytes()[:-8])
    path = f"moe.weights.path={broken}"
    code, out, err = run("check", "moe/weights=checkpoint", path, f"moe.weights.layer={CHECKED}")
    assert (code, out) == (2, "")
    assert shard in err
    assert err.count("\n") == 1


def test_sizes_that_contradict_the_checkpoint_are_refused(run: Run, checkpoint: Path) -> None:
    words = ("moe/weights=checkpoint", f"moe.weights.path={checkpoint}", "moe.weights.layer=2", "moe.model.top_k=3")
    code, _, err = run("check", *words)
    assert code == 2
    assert err.startswith("moefactory: moe.model.top_k: the config states 3, the weights bring 2")


@pytest.mark.parametrize("verb", ["matrix", "doctor"])
def test_a_verb_without_a_block_takes_no_setting_of_one(run: Run, verb: str) -> None:
    for word in ("moe.permute_x=false", "moe/backend=triton", "moe=qwen3"):
        code, _, err = run(verb, word)
        assert code == 2
        assert "allowed: format" in err


# --- exit code 3 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["build", "check"])
def test_no_gpu_is_exit_code_3(run: Run, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run(verb, "moe.device=cuda")
    assert (code, out) == (3, "")
    assert err.startswith("moefactory: this machine cannot run it:")
    assert "GPU" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("something\nodd"), "RuntimeError: something odd"),
        (KeyboardInterrupt(), "interrupted"),
    ],
    ids=["cuda", "host", "other", "interrupt"],
)
def test_anything_else_is_exit_code_3_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(moefactory.check, "run_check", fail)
    code, out, err = run("check")
    assert (code, out) == (3, "")
    assert words in err
    assert err.count("\n") == 1


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_overview_names_every_verb(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    for verb in VERBS:
        assert f"\n  {verb} " in out


def test_the_help_of_a_verb_lists_settings_groups_and_keys(run: Run) -> None:
    code, out, err = run("check", "--help")
    assert (code, err) == (0, "")
    for text in ("tokens=64", "[torch], triton", "moe.permute_x=true", "moe.model.top_k=null", "exit codes"):
        assert text in out
    for verb in VERBS:
        assert run(verb, "--help")[1].startswith(f"usage: moefactory {verb}")


@pytest.mark.parametrize("verb", ["tune", "bench"])
def test_the_help_of_a_verb_lists_the_keys_of_each_kernel_config(run: Run, verb: str) -> None:
    """Some keys are every pass's, some are of one: of bwd_dX, say, use_tma_load_dy and no use_tma_load_x."""
    lines = run(verb, "--help")[1].splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("  moe.kernels.PASS[.up|.down].KEY "))
    shared = lines[first + 1].removeprefix("    all     ").split(", ")
    for line in lines[first + 2 : first + 5]:
        name, own = line.split(maxsplit=1)
        assert not {*shared} & {*own.split(", ")}
        listed = {f"kernels.{name}{gemm}.{key}" for key in [*shared, *own.split(", ")] for gemm in ("", ".up", ".down")}
        gemms = {f"kernels.{name}.up", f"kernels.{name}.down"}
        assert listed == {path for path in field_paths() if path.startswith(f"kernels.{name}.")} - gemms
    assert [line.split()[0] for line in lines[first + 2 : first + 5]] == ["fwd", "bwd_dX", "bwd_dW"]
    assert lines[first + 5] == ""


def test_help_of_a_verb_is_the_verbs_help(run: Run) -> None:
    for verb in VERBS:
        assert run("help", verb) == run(verb, "--help")
    code, out, err = run("help", "chekc")
    assert (code, out) == (2, "")
    assert "did you mean 'check'?" in err


@pytest.mark.parametrize(("word", "hint"), [("chekc", "did you mean 'check'?"), ("moe.trace=true", "moefactory check")])
def test_an_unknown_verb_is_exit_code_2_with_a_hint(run: Run, word: str, hint: str) -> None:
    code, out, err = run(word)
    assert (code, out) == (2, "")
    assert hint in err
    assert err.count("\n") == 1


def test_help_loads_neither_torch_nor_hydra() -> None:
    """Start-up is what the imports cost: none of the slow ones happens before there is work to do."""
    code = (
        "import sys; from moefactory.cli import main; main(['--help']); main(['check', '--help']); main(['nonsense']);"
        "print(sorted({'torch', 'triton', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- the verbs --------------------------------------------------------------------------------------------------------


def test_show_says_what_is_legal_and_what_would_run(run: Run) -> None:
    code, out, err = run("show", "moe.model.num_experts=4", "tokens=10", "format=json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["legal"] is True
    assert facts["runs_here"] is True
    assert facts["config"]["backend"] == {"name": "torch"}
    assert facts["model"]["num_experts"] == 4
    assert "20 rows" in facts["would_run"]
    assert "20 rows" in run("show", "moe.model.num_experts=4", "tokens=10")[1]


def test_show_of_the_fused_block(run: Run) -> None:
    """Its launches, of weights that have no memory: on the CPU as the interpreter would run them."""
    code, out, err = run("show", "moe/backend=triton", "format=json")
    facts = json.loads(out)
    assert (code, err, facts["runs_here"]) == (0, "", True)
    assert facts["would_run"].startswith("backend triton: 128 rows, 16 per expert")
    assert facts["would_run"].count("(shipped)") == 6


def test_show_allocates_no_weights(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """235B's layer takes gigabytes: what would run is told from the sizes."""
    monkeypatch.setattr(torch, "randn", lambda *_, **__: pytest.fail("drew weights"))
    code, out, _ = run("show", "moe/model=qwen3_235b_a22b", "format=json")
    assert code == 0
    assert json.loads(out)["model"]["hidden_size"] == 4096


def test_show_of_an_illegal_config_names_the_rule(run: Run) -> None:
    code, out, err = run("show", "moe.dW_only=true", "moe.dX_only=true", "format=json")
    facts = json.loads(out)
    assert code == 2
    assert facts["legal"] is False
    assert [rule["id"] for rule in facts["broken_rules"]] == ["dW_only-dX_only"]
    assert err.startswith("moefactory: dW_only-dX_only:")


@pytest.mark.parametrize("rule", RULES, ids=[rule.id for rule in RULES])
def test_a_rule_names_the_keys_as_they_are_typed(run: Run, rule: Rule) -> None:
    """Whatever a rule says can be typed: no key of the schema stands there without ``moe.``, as it does in Python."""
    words = [f"moe.{key}={str(value).lower()}" for key, value in rule.example.items()]
    code, out, err = run("show", *words, "format=json")
    facts = json.loads(out)["broken_rules"][0]
    said = f"{facts['found']}; {facts['repair']}"
    assert (code, facts["id"]) == (2, rule.id)
    assert err == f"moefactory: {rule.id}: {said}\n"
    assert said in " ".join(run("show", *words)[1].split())
    keys = [key for key in field_paths() if key not in {"backend", "model", "weights", "kernels"}]  # words as well
    assert re.findall(rf"(?<![\w./])(?:{'|'.join(map(re.escape, keys))})(?!\w)", said) == []
    in_python = rule.broken(make_case(config_from(words)))
    assert said.replace("moe.", "") == f"{in_python}; {rule.repair}"


def test_show_says_why_it_does_not_run_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, _ = run("show", "moe.device=cuda", "format=json")
    facts = json.loads(out)
    assert code == 0
    assert facts["legal"] is True
    assert facts["runs_here"] is False
    assert "no GPU" in facts["reason"]
    assert facts["would_run"] is None


def test_show_reads_the_sizes_of_a_checkpoint(run: Run, checkpoint: Path) -> None:
    words = ("moe/weights=checkpoint", f"moe.weights.path={checkpoint}", "moe.weights.layer=2")
    code, out, _ = run("show", *words, "format=json")
    facts = json.loads(out)
    assert code == 0
    assert facts["model"]["num_experts"] == 8
    assert facts["sizes_from"].endswith("config.json")


def test_build_prints_the_parameters_and_their_sizes(run: Run, device: str) -> None:
    """gate [E,H], gate_up_proj [E,2I,H], down_proj [E,H,I]."""
    words = ("moe.model.num_experts=4", "moe.model.hidden_size=16", "moe.dtype=bfloat16", f"moe.device={device}")
    code, out, err = run("build", *words, "format=json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    shapes = {p["name"]: (p["shape"], p["elements"], p["bytes"]) for p in facts["parameters"]}
    assert shapes == {
        "gate": ([4, 16], 64, 128),
        "gate_up_proj": ([4, 64, 16], 4096, 8192),
        "down_proj": ([4, 16, 32], 2048, 4096),
    }
    assert facts["bytes"] == 12416
    assert "4 x 64 x 16" in run("build", *words)[1]


def test_matrix_prints_every_row_of_the_generator(run: Run) -> None:
    code, out, _ = run("matrix", "format=json")
    found = json.loads(out)
    assert code == 0
    assert [row["id"] for row in found] == [row.id for row in rows()]
    assert {"id", "overrides", "valid", "rule", "runnable", "reason"} <= set(found[0])
    refused = [row for row in found if not row["valid"]]
    assert refused
    assert all(row["rule"] for row in refused)
    assert all(row["runnable"] in {True, False} for row in found if row["valid"])


def test_matrix_as_csv_table_and_github_shards(run: Run) -> None:
    table = list(csv.DictReader(io.StringIO(run("matrix", "format=csv")[1])))
    assert [row["id"] for row in table] == [row.id for row in rows()]
    assert f"{len(rows())} rows" in run("matrix")[1]
    code, out, _ = run("matrix", "format=github")
    assert code == 0
    assert out.count("\n") == 1
    assert set(json.loads(out)["include"][0]) == {"name", "shard"}


def test_doctor_says_what_runs_and_why_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run("doctor", "format=json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert torch.__version__.startswith(facts["packages"]["torch"])
    assert facts["gpus"] == []
    answers = {(row["backend"], row["device"]): row for row in facts["runs"]}
    assert answers["torch", "cpu"]["runs"] is True
    assert answers["torch", "cuda"]["runs"] is False
    assert "GPU" in answers["torch", "cuda"]["reason"]
    assert "torch sees no GPU" in run("doctor")[1]


def test_doctor_names_both_caches(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demonstration's and that of tuned configs, which a variable may put elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MOEFACTORY_CACHE", "/proc/nowhere")
    facts = json.loads(run("doctor", "format=json")[1])
    assert facts["cache"] == {"path": str(tmp_path / "moefactory"), "writable": True}
    assert facts["tuning_cache"]["path"] == "/proc/nowhere"
    assert "/proc/nowhere" in run("doctor")[1]


def test_show_of_sizes_beyond_an_address(run: Run) -> None:
    """Said in numbers of ours, whatever torch would say of such a tensor."""
    code, out, err = run("show", *(f"moe.model.{name}=1000000000" for name in ("hidden_size", "moe_intermediate_size")))
    assert (code, out) == (2, "")
    assert err.endswith("model: its weights take 192000000000000000000 bytes as float64; choose smaller sizes\n")


@pytest.mark.parametrize("verb", ["check", "bench"])
def test_meta_is_for_building_only(run: Run, verb: str) -> None:
    assert run("build", "moe.device=meta")[0] == 0
    code, out, err = run(verb, "moe.device=meta")
    assert (code, out) == (3, "")
    assert (
        err == "moefactory: this machine cannot run it: device=meta holds no numbers; allowed: cpu, cuda, cuda:0, ...\n"
    )


# --- manners ----------------------------------------------------------------------------------------------------------


def test_a_hydra_application_keeps_its_own_hydra(run: Run) -> None:
    """`main` may be called from an application: its Hydra is as it was, whatever the outcome."""
    with initialize_config_module("moefactory.conf", version_base="1.3"):
        mine = GlobalHydra.instance().hydra
        assert run("show")[0] == 0
        assert run("show", "moe.nope=1")[0] == 2
        assert GlobalHydra.instance().hydra is mine
        assert compose("moefactory_show").tokens == 64
    assert not GlobalHydra.instance().is_initialized()


def test_check_in_a_process_leaves_nothing_behind_and_prints_json_alone(tmp_path: Path) -> None:
    """`python -m moefactory`, its cache by XDG_CACHE_HOME: no output folder, no log, no warnings, no progress bars."""
    here, cache = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    done = spawn("check", "format=json", cwd=here, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["status"] == "ok"
    assert list(here.iterdir()) == []
    assert [p.name for p in (cache / "moefactory").iterdir()] == ["demo"]
    assert spawn("check", "moe.nope=1", cwd=here, env=environment).returncode == 2


def test_a_deleted_working_directory_is_one_line_and_exit_code_3(tmp_path: Path) -> None:
    """Hydra asks for it; whoever is in it is told to leave."""
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'cd "$1" && rmdir "$1" && exec "$2" -P -m moefactory show'
    words = ["sh", "-c", script, "sh", str(gone), sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(Path(moefactory.__file__).parent.parent)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "moefactory: the working directory was deleted; change to a folder that exists\n"


def test_the_console_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("moefactory")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("moefactory ")


def test_a_closed_stdout_changes_no_exit_code() -> None:
    """`moefactory show >&-`."""
    code = "import sys; sys.stdout = None; from moefactory.cli import main; sys.exit(main(['show', 'moe.nope=1']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 2
    assert subprocess.run([sys.executable, "-c", code.replace("nope=1", "trace=true")], check=False).returncode == 0


@pytest.mark.parametrize("words", ["--help", "--version", "help show", "check --help", "show", "matrix format=csv"])
def test_a_full_stdout_is_one_line_and_exit_code_3(words: str) -> None:
    """`moefactory --help > /dev/full`: whatever could not be written is an error of the machine, and no mismatch."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "moefactory", *words.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert re.fullmatch(r"moefactory: OSError: .*No space left on device.*\n", done.stderr)


def test_a_reader_that_goes_early_causes_no_traceback() -> None:
    """`moefactory show | head -0`: the pipe is closed before the first byte is written."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as out:
        words = [sys.executable, "-m", "moefactory", "check", "--help"]
        done = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
