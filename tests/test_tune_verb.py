"""`moefactory tune`: its report, its exit codes, and that it goes on where it was. The search is test_tuning.py's."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moefactory.cli import main
from moefactory.config import Backend, BackendConfig, ConfigError, MachineError, MoeConfig
from moefactory.factory import build
from moefactory.progress import bar
from moefactory.triton import lookup, tuning
from moefactory.tune import run_tune, table

Run = Callable[..., tuple[int, str, str]]
TOKENS = 16
LAUNCHES = 6  # three passes of two GEMMs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own; nothing is remembered from before."""
    monkeypatch.setenv("MOEFACTORY_CACHE", str(tmp_path / "cache"))
    lookup.forget()
    yield tmp_path / "cache"
    lookup.forget()


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was timed. Nothing runs: every candidate is right, the first one of a launch takes 2 ms, the others 1 ms."""
    seen: list[Any] = []
    monkeypatch.setattr(tuning, "runner", lambda problem, config: (problem.launch, config))
    monkeypatch.setattr(tuning, "complaint", lambda problem, config, expected: None)

    def timer(run: Any) -> float:
        shipped = all(run[0] != launch for launch, _ in seen) or run == next(r for r in seen if r[0] == run[0])
        seen.append(run)
        return 2.0 if shipped else 1.0

    monkeypatch.setattr(tuning, "_default_timer", lambda device: timer)
    return seen


@pytest.fixture
def config(device: str) -> MoeConfig:
    return MoeConfig(backend=BackendConfig(Backend.triton), device=device)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, stdout, stderr) of a command line."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def origins(found: Any) -> list[set[str]]:
    """The statuses in each report."""
    return [{row.status for row in report.rows} for report in found.reports]


@pytest.mark.parametrize("format", ["table", "json"])
def test_results_that_could_not_be_kept(run: Run, monkeypatch: pytest.MonkeyPatch, device: str, format: str) -> None:
    """A cache that cannot be written is said before the search, in one line: its results would end with the process."""
    monkeypatch.setenv("MOEFACTORY_CACHE", "/proc/nowhere/tuned")
    monkeypatch.setattr(tuning, "tune", lambda *args, **more: pytest.fail("searched"))
    code, out, err = run("tune", "moe/backend=triton", f"moe.device={device}", "tokens=[8]", f"format={format}")
    assert (code, out) == (3, "")
    assert re.fullmatch(
        r"moefactory: this machine cannot run it: tuning cache: /proc/nowhere/tuned cannot be written \(.+\); "
        r"name another folder in MOEFACTORY_CACHE\n",
        err,
    )


def test_nothing_to_tune(run: Run, device: str) -> None:
    """Of a block without gradients of the weights, the one pass that makes them: refused, not an empty success."""
    words = ("moe/backend=triton", f"moe.device={device}", "moe.dX_only=true", "tokens=[8]", "passes=[bwd_dW]")
    code, out, err = run("tune", *words)
    assert (code, out) == (2, "")
    assert "passes: got bwd_dW, which does not run with dX_only=true; allowed: fwd, bwd_dX" in err


def test_each_token_count_is_tuned_and_later_blocks_use_the_results(config: MoeConfig, folder: Path) -> None:
    found = run_tune(config, [TOKENS, 64 * TOKENS])
    assert (found.status, found.cache) == ("ok", str(folder))
    assert [report.num_tokens for report in found.reports] == [TOKENS, 64 * TOKENS]
    assert [len(report.winners) for report in found.reports] == [LAUNCHES, LAUNCHES]
    block: Any = build(config)
    assert block.explain(TOKENS).count("(tuned)") == LAUNCHES
    assert block.explain(64 * TOKENS).count("(tuned)") == LAUNCHES
    assert block.explain(8 * TOKENS).count("(shipped)") == LAUNCHES


def test_what_is_done_is_not_done_again_unless_asked(config: MoeConfig, timed: list[Any]) -> None:
    run_tune(config, [TOKENS], ["fwd"])
    searched = len(timed)
    assert origins(run_tune(config, [TOKENS], ["fwd"])) == [{"cached"}]
    assert len(timed) == searched
    assert origins(run_tune(config, [TOKENS], ["fwd"], redo=True)) == [{"ok"}]
    assert len(timed) == 2 * searched


def test_redo_searches_a_bucket_of_token_counts_once(config: MoeConfig) -> None:
    """16 and 15 tokens have the same rows per expert, as a power of two: the second count takes the first one's."""
    assert origins(run_tune(config, [TOKENS, TOKENS - 1], ["fwd"], redo=True)) == [{"ok"}, {"cached"}]


def test_an_interrupted_search_goes_on_where_it_was(config: MoeConfig) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == f"{TOKENS} tokens, fwd down":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tune(config, [TOKENS], ["fwd"], tell=interrupt)
    rows = run_tune(config, [TOKENS], ["fwd"]).reports[0].rows
    assert {(row.launch.gemm, row.status) for row in rows} == {("up", "cached"), ("down", "ok")}


def test_the_bar_hears_of_every_candidate(config: MoeConfig) -> None:
    heard: list[tuple[str, int, int]] = []
    run_tune(config, [TOKENS], ["fwd"], tell=lambda *event: heard.append(event))
    assert [done for _, done, _ in heard] == list(range(1, heard[0][2] + 1))
    assert {what for what, _, _ in heard} == {f"{TOKENS} tokens, fwd up", f"{TOKENS} tokens, fwd down"}


def test_the_command_prints_json_alone_in_a_pipe(run: Run, device: str, folder: Path) -> None:
    words = ("moe/backend=triton", f"moe.device={device}", f"tokens=[{TOKENS},{64 * TOKENS}]", "format=json")
    code, out, err = run("tune", *words)
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert set(facts) == {"status", "config", "model", "cache", "seconds", "reports", "notes"}
    assert (facts["status"], facts["cache"]) == ("ok", str(folder))
    assert facts["config"]["dtype"] == "float32"
    assert [report["num_tokens"] for report in facts["reports"]] == [TOKENS, 64 * TOKENS]
    rows = facts["reports"][0]["rows"]
    assert sum(row["winner"] for row in rows) == LAUNCHES
    assert {row["ms"] for row in rows if row["winner"]} == {1.0}


def test_the_table_names_each_launch_its_gain_and_the_cache(run: Run, device: str, folder: Path) -> None:
    words = ("tune", "moe/backend=triton", f"moe.device={device}", f"tokens={TOKENS}", "passes=[fwd,bwd_dW]")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    for name in ("fwd up", "fwd down", "bwd_dW up", "bwd_dW down"):
        assert out.count(f" {name} ") == 1
    assert "bwd_dX" not in out
    assert out.count(" 2.00x ") == 4
    assert out.count(" search ") == 4
    assert str(folder) in out.replace("\n", "")
    assert run(*words)[1].count(" cache ") >= 4


def test_a_launch_without_a_right_config_is_a_mismatch(
    run: Run, device: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(tuning, "complaint", lambda problem, config, expected: "3 elements differ")
    words = ("tune", "moe/backend=triton", f"moe.device={device}", f"tokens={TOKENS}", "passes=[fwd]")
    with pytest.warns(RuntimeWarning, match="computed a wrong result"):
        code, out, err = run(*words)
    assert code == 1
    assert "the shipped choice stays in use" in err
    assert "struck out: fwd up, wrong: 3 elements differ" in out
    assert not folder.exists()


def test_a_launch_that_cannot_run_is_a_failure(
    run: Run, device: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def broken(problem: Any, config: Any, expected: Any) -> None:
        raise RuntimeError("out of resource")

    monkeypatch.setattr(tuning, "complaint", broken)
    words = ("tune", "moe/backend=triton", f"moe.device={device}", f"tokens={TOKENS}", "passes=[fwd]", "format=json")
    with pytest.warns(RuntimeWarning, match="could not run"):
        code, out, _ = run(*words)
    assert code == 3
    assert json.loads(out)["status"] == "failed"


def test_without_a_home_the_results_end_with_the_process(config: MoeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefactory.triton.cache.root", lambda: None)
    with pytest.warns(RuntimeWarning, match="MOEFACTORY_CACHE"):
        found = run_tune(config, [TOKENS], ["fwd"])
    assert found.cache is None
    assert "the results end with this process" in table(found)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ((), "moe.backend: got torch"),
        (("moe/backend=triton", "moe.autotune=false"), "moe.autotune: got false"),
        (("moe/backend=triton", "moe.model.hidden_act=gelu"), "triton-activation:"),
        (("moe/backend=triton", "tokens=[]"), "tokens: got []"),
        (("moe/backend=triton", "tokens=[16,16]"), "tokens: got [16, 16]"),
        (("moe/backend=triton", "tokens=[16,0]"), "tokens: got [16, 0]"),
        (("moe/backend=triton", "passes=[fwd,bwd]"), "passes: got ['fwd', 'bwd']"),
        (("moe/backend=triton", "redo=1"), "redo: got 1"),
    ],
)
def test_a_bad_config_is_exit_code_2_with_the_key(run: Run, timed: list[Any], words: tuple[str, ...], key: str) -> None:
    code, out, err = run("tune", *words)
    assert (code, out, timed) == (2, "", [])
    assert err.startswith(f"moefactory: {key}")
    assert err.count("\n") == 1


def test_without_a_gpu_and_not_interpreting_it_is_exit_code_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, err = run("tune", "moe/backend=triton")
    assert (code, out) == (3, "")
    assert err.startswith("moefactory: this machine cannot run it: ")
    assert err.count("\n") == 1
    with pytest.raises(MachineError):
        run_tune(MoeConfig(backend=BackendConfig(Backend.triton)), [TOKENS])
    with pytest.raises(ConfigError, match="no kernels to tune"):
        run_tune(MoeConfig(), [TOKENS])


def test_the_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with bar() as tell:
            tell("16 tokens, fwd up", 3, 40)
        shown[type(stream)] = stream.getvalue()
    assert "16 tokens, fwd up" in shown[Terminal]
    assert "3/40" in shown[Terminal]
    assert shown[io.StringIO] == ""
