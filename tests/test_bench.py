"""`moefactory bench`: its figures by a timer that is told what to say, its rows, its files, its exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefactory import bench_files, bench_report, bench_sweep, measure, peers, plot, provenance
from moefactory.bench import run_bench
from moefactory.bench_rows import BenchReport, BenchRow, Settings
from moefactory.bench_sweep import PRESETS
from moefactory.cli import main
from moefactory.compose import OPTIONS
from moefactory.config import Backend, BackendConfig, ConfigError, DType, ModelConfig, MoeConfig, as_dict, model_preset
from moefactory.factory import build
from moefactory.measure import Step, Times, chosen, inputs, products, steered_gate, time_calls
from moefactory.weights import to_hf_block

Run = Callable[..., tuple[int, str, str]]
TINY = model_preset("tiny")
FIXED = Times(1.0, 2.0, 4.0)
CPU = torch.device("cpu")
HEADER = (
    "model,tokens,runs,measure,status,reason,p20_ms,p50_ms,p80_ms,dense_ms,share,tflops,held_mib,peak_mib,load,kernels,"
    "flags,dtype,device,routing,seed,date,moefactory,commit,torch,triton,transformers,gpu,sm_mhz"
)


def fixed(run: Callable[[], Any], device: torch.device, ms: int) -> Times:
    """A timer that runs the call once and says 2 ms."""
    run()
    return FIXED


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit code, stdout, stderr) of `moefactory bench`; each figure is one call of the default timer's."""
    monkeypatch.setenv("MOEFACTORY_COMMIT", "abc1234")

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["bench", "tokens=16", "ms=1", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def bench(config: MoeConfig | None = None, **settings: Any) -> BenchReport:
    """A report by the fixed timer."""
    return run_bench(config or MoeConfig(), Settings(**{"tokens": (16,), "peers": (), **settings}), timer=fixed)


def by_measure(report: BenchReport, runs: str = "torch") -> dict[str, BenchRow]:
    return {row.measure: row for row in report.rows if row.runs == runs}


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "gemms"), [({}, 6), ({"dX_only": True}, 4), ({"dW_only": True}, 5)])
def test_share_is_the_time_of_the_dense_products_over_the_blocks(flags: dict[str, bool], gemms: int) -> None:
    """2 ms a call: a forward stands beside two products (4 ms), a step beside those whose gradients are asked for."""
    rows = by_measure(bench(MoeConfig(**flags)))
    assert (rows["forward"].dense_ms, rows["forward"].share) == (4.0, 2.0)
    assert (rows["step"].dense_ms, rows["step"].share) == (2.0 * gemms, float(gemms))
    assert (rows["step"].p20_ms, rows["step"].p50_ms, rows["step"].p80_ms) == (1.0, 2.0, 4.0)


def test_tflops_count_the_products_alone() -> None:
    """T*K rows: 2*M*2I*H for the up GEMM and 2*M*I*H for the down GEMM in a forward, three times that in a step."""
    rows = by_measure(bench())
    forward = 2 * 16 * TINY.top_k * 3 * TINY.moe_intermediate_size * TINY.hidden_size
    assert rows["forward"].tflops == pytest.approx(forward / 2e-3 / 1e12)
    assert rows["step"].tflops == pytest.approx(3 * forward / 2e-3 / 1e12)


def test_the_dense_products_have_the_sizes_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many multiplications as `flops` says, by the shapes that torch multiplies."""
    done: list[int] = []
    right = Tensor.__matmul__

    def counted(a: Tensor, b: Tensor) -> Tensor:
        done.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return right(a, b)

    monkeypatch.setattr(Tensor, "__matmul__", counted)
    found = measure.dense_ms(TINY, 16, torch.float32, torch.device("cpu"), fixed, 1)
    assert set(found) == set(products("step", MoeConfig()))
    assert [measure.flops(TINY, 16, [one]) for one in found] == done


@pytest.mark.parametrize("name", ["torch", "hf_eager", "hf_grouped_mm"])
@pytest.mark.parametrize(("flags", "count"), [({}, 4), ({"dX_only": True}, 1), ({"dW_only": True}, 3)])
def test_every_runner_computes_the_same_gradients(name: str, flags: dict[str, bool], count: int) -> None:
    """To x and all weights, as far as asked for: within 1e-4 of a backward of our block."""
    ours: Any = build(MoeConfig())
    x, dout = inputs(ours.gate, TINY, 16, "random", 0)
    leaf = x.clone().requires_grad_()
    ours(leaf)[0].backward(dout)
    expected = {tuple(t.shape): t.grad for t in (leaf, ours.gate, ours.gate_up_proj, ours.down_proj)}
    module: nn.Module = build(MoeConfig(**flags)) if name == "torch" else to_hf_block(ours)
    if name == "hf_grouped_mm" and hasattr(module.experts, "config"):
        module = peers.hf_grouped_mm(ours)
        assert module.experts.config._experts_implementation == "grouped_mm"  # type: ignore[union-attr]
    step = Step(module, x, dout, MoeConfig(**flags))
    assert not step.forward().requires_grad
    found = step.step()
    if tuple(ours.gate_up_proj.shape) in {tuple(p.shape) for p in module.parameters()}:  # else one tensor each expert
        assert len(found) == count
    for one in found:
        if tuple(one.shape) in expected:
            torch.testing.assert_close(one, expected[tuple(one.shape)], rtol=1e-4, atol=1e-4)


def test_block_and_dense_products_take_turns() -> None:
    """Clocks that fall with each call: one block of measurements after the other would make the second look slower.

    Both take as long, and each call takes 1 ms more than the one before: in turns the medians are a call apart.
    """
    clock = iter(range(1, 100))

    def timer(run: Callable[[], Any], device: torch.device, ms: int) -> Times:
        assert ms == 100 // measure.ROUNDS
        now = float(next(clock))
        return Times(now - 0.5, now, now + 0.5)

    def dense() -> float:
        return timer(lambda: None, CPU, 20).p50

    times, beside = measure.in_turns(lambda: None, dense, timer, CPU, 100)
    assert measure.ROUNDS == 5
    assert (beside, times) == (5.0, Times(5.5, 6.0, 6.5))
    assert measure.in_turns(lambda: None, lambda: None, fixed, CPU, 100) == (FIXED, None)


def test_the_default_timer_times_calls() -> None:
    calls = []

    def nap() -> None:
        calls.append(time.sleep(0.002))

    found = time_calls(nap, torch.device("cpu"), 20)
    assert 2.0 <= found.p20 <= found.p50 <= found.p80 < 100.0
    assert len(calls) > 5


def test_the_default_timer_leaves_torch_its_threads() -> None:
    """torch's own benchmark timer would time one thread."""
    before, seen = torch.get_num_threads(), set[int]()
    torch.set_num_threads(2)
    try:
        time_calls(lambda: seen.add(torch.get_num_threads()), torch.device("cpu"), 1)
    finally:
        torch.set_num_threads(before)
    assert seen == {2}


def test_a_traced_block_is_measured_like_any_other() -> None:
    assert {row.status for row in bench(MoeConfig(trace=True)).rows} == {"ok"}


@pytest.mark.gpu
def test_on_a_gpu_memory_clocks_graphs_and_all_peers_have_figures() -> None:
    """A step holds what backward needs and peaks above it; forward and its replay have times, which is all that can be
    asked of times here."""
    config = MoeConfig(backend=BackendConfig(Backend.triton), device="cuda", dtype=DType.bfloat16)
    report = run_bench(config, Settings(tokens=(64,), graph=True, ms=20))
    assert {(row.status, row.reason) for row in report.rows} == {("ok", "")}
    rows = by_measure(report, "triton")
    assert set(rows) == {"forward", "step", "graph"}
    assert rows["step"].held_mib is not None
    assert rows["step"].peak_mib is not None
    assert 0 < rows["step"].held_mib < rows["step"].peak_mib
    assert all(None not in (row.p20_ms, row.p50_ms, row.p80_ms) for row in rows.values())
    assert {row.runs for row in report.rows} == {"triton", *peers.PEERS}
    assert report.provenance["gpu"] == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_backend_torch_is_not_captured() -> None:
    rows = by_measure(run_bench(MoeConfig(device="cuda"), Settings(tokens=(16,), peers=(), graph=True, ms=1)))
    assert (rows["graph"].status, rows["step"].status) == ("skipped", "ok")


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["balanced", "zipf", "one"])
def test_the_router_selects_what_was_chosen(routing: str, dtype: torch.dtype) -> None:
    """Whatever the dtype: the chosen experts' logits stand far above the others'."""
    block: Any = build(MoeConfig())
    gate = steered_gate(block.gate.detach(), 0).to(dtype)
    x, _ = inputs(gate, TINY, 100, routing, 3)
    found = (x[0] @ gate.T).topk(TINY.top_k).indices.sort().values
    draw = torch.Generator().manual_seed(3)
    torch.randn(2 * 100, TINY.hidden_size, generator=draw)
    assert torch.equal(found, chosen(routing, 100, TINY.num_experts, TINY.top_k, draw).sort().values)


def test_the_loads_are_what_their_names_say() -> None:
    def counts(routing: str) -> list[int]:
        found = chosen(routing, 999, 8, 3, torch.Generator().manual_seed(0))
        assert all(len(set(row)) == 3 for row in found.tolist())
        return found.flatten().bincount(minlength=8).tolist()

    assert max(counts("balanced")) - min(counts("balanced")) <= 1
    assert counts("one") == [999] * 3 + [0] * 5
    zipf = counts("zipf")
    assert zipf == sorted(zipf, reverse=True)
    assert zipf[0] > 3 * zipf[-1]


def test_the_load_is_in_the_rows() -> None:
    assert {row.load for row in bench(routing="balanced").rows} == {1.0}
    assert {row.load for row in bench(routing="one").rows} == {TINY.num_experts / TINY.top_k}


def test_a_routing_that_cannot_be_steered_is_refused() -> None:
    rows = bench(MoeConfig(model=ModelConfig(hidden_size=16, num_experts=32)), routing="one").rows
    assert {(row.status, row.model) for row in rows} == {("refused", "config")}
    assert "hidden_size of num_experts or more, got 16 and 32" in rows[0].reason


def test_inputs_are_the_same_for_a_seed() -> None:
    gate = torch.zeros(8, 64)
    assert torch.equal(inputs(gate, TINY, 5, "random", 1)[0], inputs(gate, TINY, 5, "random", 1)[0])
    assert not torch.equal(inputs(gate, TINY, 5, "random", 1)[0], inputs(gate, TINY, 5, "random", 2)[0])


# --- rows -------------------------------------------------------------------------------------------------------------


def test_the_sweep_has_a_row_for_each_model_token_count_runner_and_measure() -> None:
    report = bench(tokens=(8, 16), models=("tiny",), peers=("hf_eager",))
    expected = [(t, r, m) for t in (8, 16) for r in ("torch", "hf_eager") for m in ("forward", "step")]
    assert [(row.tokens, row.runs, row.measure) for row in report.rows] == expected
    assert {(row.model, row.status, row.dtype, row.device) for row in report.rows} == {("tiny", "ok", "float32", "cpu")}


@pytest.mark.parametrize("stated", [ModelConfig(), ModelConfig(top_k=2), ModelConfig(**asdict(TINY))])
def test_a_stated_model_may_be_the_one_that_is_named(stated: ModelConfig) -> None:
    """Nothing, one size, or all sizes of tiny beside models=[tiny]: the report has the sizes that ran."""
    report = bench(MoeConfig(model=stated), models=("tiny",))
    assert {row.status for row in report.rows} == {"ok"}
    assert report.config["model"] == asdict(TINY)


def test_the_config_of_a_report_is_the_one_that_ran() -> None:
    """Sizes beside a stated one are tiny's, source, dtype and device of the weights are filled in."""
    config = bench(MoeConfig(model=ModelConfig(top_k=3), dX_only=True)).config
    assert config["model"] == {**asdict(TINY), "top_k": 3}
    assert (config["backend"], config["weights"]["source"]) == ({"name": "torch"}, "random")
    assert (config["dtype"], config["device"], config["dX_only"]) == ("float32", "cpu", True)
    assert config["kernels"] == as_dict(MoeConfig())["kernels"]


@pytest.mark.interpreter
def test_the_backend_of_a_report_is_the_one_that_ran() -> None:
    """`backends` goes before the configuration's own; of two there is none to name, the rows do."""
    assert bench(tokens=(4,), backends=("triton",)).config["backend"] == {"name": "triton"}
    assert bench(tokens=(4,), backends=("torch", "triton")).config["backend"] == {"name": None}


def test_a_report_of_two_models_states_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset that is tiny but for its hidden size stands in for the 30B model."""
    wide = replace(TINY, hidden_size=128)
    for module in ("bench", "bench_sweep"):
        monkeypatch.setattr(f"moefactory.{module}.model_preset", lambda name: TINY if name == "tiny" else wide)
    report = bench(MoeConfig(model=ModelConfig(top_k=2)), models=("tiny", "qwen3_30b_a3b"))
    assert [(row.model, row.status) for row in report.rows] == [("tiny", "ok")] * 2 + [("qwen3_30b_a3b", "ok")] * 2
    assert report.config["model"] == {**asdict(TINY), "hidden_size": None}


@pytest.mark.interpreter
def test_the_flags_of_the_configuration_are_those_of_the_rows() -> None:
    config = MoeConfig(backend=BackendConfig(Backend.triton), permute_x=False, fuse_combine=False)
    rows = bench(config, tokens=(4,), backends=("torch", "triton")).rows
    assert {(row.runs, row.flags, row.kernels) for row in rows} == {
        ("torch", "", ""),
        ("triton", "permute_y fuse_swiglu", "shipped"),
    }
    assert {row.status for row in rows} == {"ok"}


def test_a_refused_row_names_its_rule_and_the_others_are_measured(run: Run) -> None:
    code, out, err = run("backends=[triton,torch]", "peers=[]", "moe.model.hidden_act=gelu", "format=json")
    rows = json.loads(out)["rows"]
    assert [(row["runs"], row["status"]) for row in rows] == [("triton", "refused")] * 2 + [("torch", "ok")] * 2
    assert rows[0]["reason"].startswith("triton-activation:")
    assert rows[0]["p50_ms"] is None
    assert code == 2
    assert err.startswith("moefactory: 2 of 4 rows have no figures, first config, 16 tokens, triton forward: refused:")
    assert err.count("\n") == 1


@pytest.mark.interpreter
def test_what_this_machine_cannot_run_is_a_row_and_exit_code_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    code, out, _ = run("backends=[torch,triton]", "peers=[]", "graph=true", "format=json")
    found = {(row["runs"], row["measure"]): row for row in json.loads(out)["rows"]}
    assert code == 3
    assert found["torch", "step"]["status"] == "ok"
    assert found["torch", "graph"]["status"] == found["triton", "step"]["status"] == "refused"
    assert found["triton", "step"]["reason"].startswith("this machine cannot run it: backend triton")
    assert "moe.device=cuda" in found["torch", "graph"]["reason"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no kernel\nimage"), "error"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
)
def test_one_bad_runner_does_not_lose_the_table(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    monkeypatch.setitem(peers.PEERS, "hf_eager", lambda weights: Broken(1, 1))
    code, out, err = run("peers=[hf_eager]", "format=csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 3
    assert [(row["runs"], row["status"]) for row in rows] == [("torch", "ok")] * 2 + [("hf_eager", status)] * 2
    assert rows[-1]["p50_ms"] == ""
    assert "\n" not in rows[-1]["reason"]
    assert status in err


def test_weights_that_do_not_fit_lose_one_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """235B's rows say why, tiny's are measured."""
    right = bench_sweep.factory.load_weights

    def load(config: MoeConfig) -> Any:
        if config.model.hidden_size == 4096:
            raise ConfigError("model: its weights take too much")
        return right(config)

    monkeypatch.setattr(bench_sweep.factory, "load_weights", load)
    rows = bench(models=("qwen3_235b_a22b", "tiny")).rows
    assert [(row.model, row.status) for row in rows] == [("qwen3_235b_a22b", "refused")] * 2 + [("tiny", "ok")] * 2
    assert rows[0].reason.startswith("moe.model:")


def test_dense_products_that_fail_leave_rows_without_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(bench_sweep, "dense_ms", fail)
    report = bench()
    assert [(row.status, row.p50_ms, row.share) for row in report.rows] == [("ok", 2.0, None)] * 2
    assert report.notes == ("tiny, 16 tokens: no share, the dense products do not run: out of memory: out of memory",)


def test_a_peer_that_is_not_there_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 keeps one module for each expert, and has no experts implementations."""

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList()

    monkeypatch.setattr(peers, "to_hf_block", lambda weights: Old())
    report = bench(peers=("hf_grouped_mm", "hf_grouped_mm_compiled"))
    assert [row.status for row in report.rows] == ["ok"] * 2 + ["skipped"] * 4
    assert "has no experts implementation grouped_mm" in report.rows[-1].reason
    assert bench_report.complain(report) == ("ok", "")


def test_an_interrupt_keeps_the_rows_that_are_there() -> None:
    calls = iter(range(100))

    def timer(run: Callable[[], Any], device: torch.device, ms: int) -> Times:
        if next(calls) == 3 * measure.ROUNDS:  # as often two products and a forward, and now the step's first product
            raise KeyboardInterrupt
        return FIXED

    report = run_bench(MoeConfig(), Settings(tokens=(16,), peers=()), timer=timer)
    assert [row.measure for row in report.rows] == ["forward"]
    assert report.plain()["status"] == "incomplete"
    assert bench_report.complain(report) == ("failed", "interrupted: the 1 rows until then are printed")


def test_the_default_peers_are_all_on_a_gpu_and_one_elsewhere() -> None:
    assert peers.default_peers(torch.device("cpu")) == ("hf_eager",)
    assert peers.default_peers(torch.device("cuda")) == ("hf_eager", "hf_grouped_mm", "hf_grouped_mm_compiled")


def test_names_are_the_same_everywhere() -> None:
    """The presets are the shipped files, the command line knows all of them and all peers."""
    shipped = {f.name.removesuffix(".yaml") for f in files("moefactory.conf").joinpath("moe", "model").iterdir()}
    assert {*PRESETS, "auto"} == {name for name in shipped if "__" not in name}
    assert OPTIONS["bench"]["models"].choices == PRESETS
    assert OPTIONS["bench"]["peers"].choices == tuple(peers.PEERS)
    assert OPTIONS["bench"]["backends"].choices == tuple(backend.name for backend in Backend)


# --- what is printed and written --------------------------------------------------------------------------------------


def test_the_command_runs_on_a_cpu_and_prints_json_alone(run: Run) -> None:
    code, out, err = run("format=json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert set(found) == {"schema", "status", "settings", "config", "provenance", "rows", "notes", "interrupted"}
    assert (found["schema"], found["status"]) == (2, "ok")
    assert found["settings"]["peers"] == ["hf_eager"]
    known = found["provenance"]
    assert {"date", "commit", "packages", "gpu", "clocks", "threads"} <= set(known)
    assert (known["commit"], known["gpu"], known["packages"]["torch"]) == ("abc1234", None, torch.__version__)
    for row in found["rows"]:
        assert row["status"] == "ok"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["share"] == pytest.approx(row["dense_ms"] / row["p50_ms"])


def test_csv_has_its_header_and_says_where_each_row_is_from(run: Run) -> None:
    code, out, _ = run("format=csv", "peers=[]", "seed=7")
    assert code == 0
    assert out.splitlines()[0] == HEADER
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["measure"] for row in rows] == ["forward", "step"]
    for row in rows:
        assert None not in row
        assert (row["commit"], row["torch"], row["seed"]) == ("abc1234", torch.__version__, "7")


def test_the_table_has_a_line_for_each_row(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.startswith("tiny ")]
    assert [line[:4] for line in lines] == [
        ["tiny", "16", runs, measure] for runs in ("torch", "hf_eager") for measure in ("forward", "step")
    ]
    assert all(line[-1] == "ok" for line in lines)
    assert "commit abc1234" in out
    assert "peak MiB" not in out


def test_the_table_shows_memory_where_it_is_known() -> None:
    report = bench()
    report = replace(report, rows=tuple(replace(row, held_mib=12.0, peak_mib=34.0) for row in report.rows))
    text = bench_report.table(report)
    assert "peak MiB" in text
    assert text.count(" 34 ") == 2


def test_out_is_the_json_and_plot_a_picture(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(f"out={tmp_path}/b.json", f"plot={tmp_path}/b.png", "peers=[]", "format=csv")
    assert code == 0
    written = json.loads((tmp_path / "b.json").read_text())
    assert str(written["rows"][0]["p50_ms"]) in out
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_drawing_leaves_out_rows_without_a_share(tmp_path: Path) -> None:
    """Not even one row has to have one; titles and labels are in the file as text."""
    report = bench(tokens=(8, 16))
    rows = report.plain()["rows"]
    plot.draw(rows, str(tmp_path / "all.svg"), "a GPU")
    assert (tmp_path / "all.svg").stat().st_size > 5000
    plot.draw([{**row, "share": None} for row in rows], str(tmp_path / "none.png"))
    assert (tmp_path / "none.png").exists()


@pytest.mark.parametrize("key", ["out", "plot"])
def test_a_file_that_cannot_be_written_loses_no_figures(run: Run, tmp_path: Path, key: str) -> None:
    """A full disk shows when it is written to."""
    place = tmp_path / "full.png"
    place.symlink_to("/dev/full")
    code, out, err = run(f"{key}={place}", "peers=[]", "format=csv")
    assert (code, len(out.splitlines())) == (3, 3)
    said = f"{key}: got '{place}', which could not be written: [Errno 28] No space left on device"
    assert err == f"moefactory: {said}; the figures are printed\n"


def test_everything_that_is_missing_is_said_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows without figures, a full disk, and a drawing that fails in matplotlib; what was measured is printed."""

    def fail(*_: Any) -> None:
        raise ValueError("no font")

    monkeypatch.setattr(bench_files, "draw", fail)
    files = "out=/dev/full", f"plot={tmp_path}/b.png"
    code, out, err = run(*files, "backends=[torch,triton]", "moe.model.hidden_act=gelu", "peers=[]", "format=csv")
    assert code == 3
    assert [row["status"] for row in csv.DictReader(io.StringIO(out))] == ["ok"] * 2 + ["refused"] * 2
    rows, full, drawing, printed = err.rsplit("; ", 3)
    assert rows.startswith("moefactory: 2 of 4 rows have no figures")
    assert full == "out: got '/dev/full', which could not be written: [Errno 28] No space left on device"
    assert drawing == f"plot: got '{tmp_path}/b.png', which could not be written: no font"
    assert printed == "the figures are printed\n"
    assert "\n" not in rows


def earlier_results(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """b.json and b.png of an earlier run, in the working directory."""
    monkeypatch.chdir(folder)
    files = folder / "b.json", folder / "b.png"
    for file in files:
        file.write_text("before")
    return files


def interrupt_row(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the measurement of that row, counted from 0."""
    right, calls = bench_sweep.in_turns, iter(range(100))

    def in_turns(*args: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(bench_sweep, "in_turns", in_turns)


KEPT = "nothing to put into out='b.json', plot='b.png': left as before\n"


def test_an_interrupt_before_the_first_figure_leaves_files_as_they_are(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = earlier_results(tmp_path, monkeypatch)
    interrupt_row(0, monkeypatch)
    code, out, err = run("out=b.json", "plot=b.png", "peers=[]", "format=csv")
    assert (code, out) == (3, f"{HEADER}\n")
    assert err == f"moefactory: interrupted: the 0 rows until then are printed; {KEPT}"
    assert [file.read_text() for file in files] == ["before", "before"]


def test_an_interrupt_after_the_first_figure_writes_the_files(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    json_file, picture = earlier_results(tmp_path, monkeypatch)
    interrupt_row(1, monkeypatch)
    code, _, err = run("out=b.json", "plot=b.png", "peers=[]")
    assert (code, err) == (3, "moefactory: interrupted: the 1 rows until then are printed\n")
    written = json.loads(json_file.read_text())
    assert (written["status"], [row["measure"] for row in written["rows"]]) == ("incomplete", ["forward"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rows_that_all_failed_leave_files_as_they_are(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An illegal configuration: exit code 2, as without files. A file that was not there is made: it says why."""
    files = earlier_results(tmp_path, monkeypatch)
    words = "plot=b.png", "peers=[]", "backends=[triton]", "moe.model.hidden_act=gelu"
    code, out, err = run("out=b.json", *words, "format=csv")
    assert (code, len(out.splitlines())) == (2, 3)
    assert err.startswith("moefactory: 2 of 2 rows have no figures")
    assert err.endswith(f"; {KEPT}")
    assert err.count("\n") == 1
    assert [file.read_text() for file in files] == ["before", "before"]
    assert run("out=new.json", *words)[0] == 2
    assert [row["status"] for row in json.loads(Path("new.json").read_text())["rows"]] == ["refused"] * 2


def test_figures_without_a_share_leave_the_picture_as_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There is nothing to draw, and the picture that was asked for is missing: exit code 3."""
    json_file, picture = earlier_results(tmp_path, monkeypatch)
    monkeypatch.setattr(bench_sweep, "dense_ms", lambda *_: {})
    code, _, err = run("out=b.json", "plot=b.png", "peers=[]")
    assert (code, err) == (3, "moefactory: nothing to put into plot='b.png': left as before\n")
    assert json.loads(json_file.read_text())["status"] == "ok"
    assert picture.read_text() == "before"


@pytest.mark.parametrize("key", ["out", "plot"])
@pytest.mark.parametrize("place", ["locked/b.png", "locked.png", "circle.png", f"{'long' * 100}.png"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, place: str
) -> None:
    """A new file in a locked folder, a locked file, a link to itself, a name that no file system takes."""
    monkeypatch.setattr(bench_sweep.factory, "load_weights", lambda *_: pytest.fail("loaded weights"))
    monkeypatch.chdir(tmp_path)
    Path("locked").mkdir(mode=0o555)
    Path("locked.png").write_text("before")
    Path("locked.png").chmod(0o444)
    Path("circle.png").symlink_to("circle.png")
    if os.geteuid() == 0:  # root may write anywhere: what others are told stands in
        monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o200))
    code, out, err = run(f"{key}={place}")
    said = f"{key}: got '{place}', which cannot be written; allowed: a file that can be, or null"
    assert (code, out, err) == (2, "", f"moefactory: {said}\n")


def test_looking_at_a_place_leaves_no_trace(tmp_path: Path) -> None:
    """A file that is there keeps what is in it and when it was written, one that is not there is not made."""
    there = tmp_path / "b.json"
    there.write_text("before")
    os.utime(there, (1, 1))
    bench_files.check_files(str(there), str(tmp_path / "b.png"))
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
    assert (there.read_text(), there.stat().st_mtime) == ("before", 1)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd here")
def test_a_pipe_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """`out=/dev/stdout | jq` and `out=>(gzip)`: the link leads to a name that does not exist, its folder is locked."""
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith("/dev/fd/"))
    reader, writer = os.pipe()
    try:
        bench_files.check_files(f"/dev/fd/{writer}", None)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("words", "key", "more"),
    [
        ("out=nowhere/b.json", "out:", "a folder that exists"),
        ("plot=nowhere/b.png", "plot:", "a folder that exists"),
        ("plot=b.jpg", "plot:", ".png, .svg, .pdf"),
        ("tokens=[]", "tokens:", "a list of integers"),
        ("tokens=[16,16]", "tokens:", "each once"),
        ("tokens=[16,0]", "tokens:", "from 1 to"),
        ("tokens=16,32", "tokens:", "[a,b]"),
        ("models=[tiny,qwen3_30b]", "models:", "did you mean 'qwen3_30b_a3b'?"),
        ("backends=[cuda]", "backends:", "torch, triton"),
        ("peers=[hf]", "peers:", "hf_eager"),
        ("routing=uniform", "routing:", "balanced"),
        ("graph=1", "graph:", "true, false"),
        ("ms=0", "ms:", "1 to 60000"),
        ("format=xml", "format:", "csv"),
        ("moe.device=gpu", "moe.device:", "cuda"),
        ("models=[tiny] moe.model.top_k=3", "moe.model.top_k: got 3,", "names tiny, which has 2; allowed: the same"),
        ("models=[tiny] moe.model.norm_topk_prob=false", "moe.model.norm_topk_prob: got False,", "which has True"),
        ("models=[tiny] moe/model=qwen3_30b_a3b", "moe.model.hidden_size: got 2048,", "which has 64"),
        ("models=[qwen3_30b_a3b,tiny] moe.model.top_k=8", "moe.model.top_k: got 8,", "or models=null"),
    ],
)
def test_a_bad_setting_is_exit_code_2_before_anything_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: str, key: str, more: str
) -> None:
    monkeypatch.setattr(bench_sweep.factory, "load_weights", lambda *_: pytest.fail("loaded weights"))
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"moefactory: {key}")
    assert more in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("out", ["b.png", "./b.png", "../{folder}/b.png", "link.json"])
def test_out_and_plot_are_two_files(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str) -> None:
    """The same file by whatever name, there or not yet: the picture would take the place of the JSON."""
    monkeypatch.setattr(bench_sweep.factory, "load_weights", lambda *_: pytest.fail("loaded weights"))
    monkeypatch.chdir(tmp_path)
    Path("link.json").symlink_to("b.png")
    out = out.format(folder=tmp_path.name)
    code, printed, err = run(f"out={out}", f"plot={tmp_path}/b.png")
    said = f"plot: got '{tmp_path}/b.png', the same file as out='{out}'; allowed: another file, or null"
    assert (code, printed, err) == (2, "", f"moefactory: {said}\n")


def test_without_matplotlib_the_extra_is_named_before_anything_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_sweep.factory, "load_weights", lambda *_: pytest.fail("loaded weights"))
    code, out, err = run(f"plot={tmp_path}/b.png")
    assert (code, out) == (2, "")
    assert "pip install 'moefactory[plot]'" in err


def test_a_gpu_that_is_not_there_is_exit_code_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run("moe.device=cuda")
    assert (code, out) == (3, "")
    assert err.startswith("moefactory: this machine cannot run it:")


# --- where figures come from ------------------------------------------------------------------------------------------


def test_the_commit_is_that_of_our_own_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stated by the environment, else git's; never that of a repository that only contains the installation."""
    monkeypatch.setenv("MOEFACTORY_COMMIT", "abc1234")
    assert provenance.commit(tmp_path) == "abc1234"
    monkeypatch.delenv("MOEFACTORY_COMMIT")
    top = tmp_path

    def said(command: list[str]) -> str:
        return str(top) if "--show-toplevel" in command else "def5678-dirty"

    monkeypatch.setattr(provenance, "_said", said)
    assert provenance.commit(tmp_path) == "def5678-dirty"
    top = tmp_path.parent
    assert provenance.commit(tmp_path) is None


def test_clocks_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "0123"

    def said(command: list[str]) -> str | None:
        assert command[:3] == ["nvidia-smi", "-i", "GPU-0123"]
        return answer

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(provenance, "_said", said)
    answer: str | None = "1980, 1980, 3201, 114.52, [N/A]"
    found = provenance.clocks(torch.device("cuda", 0))
    assert found == {"sm_mhz": 1980, "sm_max_mhz": 1980, "memory_mhz": 3201, "power_w": 114.52, "celsius": None}
    answer = None
    assert provenance.clocks(torch.device("cuda", 0)) is None


def test_a_program_that_is_missing_or_fails_says_nothing() -> None:
    assert provenance._said(["moefactory-no-such-program"]) is None
    assert provenance._said(["false"]) is None
    assert provenance._said(["echo", "yes"]) == "yes"
