"""Run the GPU tests and write down what passed: `python benchmarks/gpu_tests.py OUT.json [pytest arguments]`.

Names of every case by file, the outcomes, what the tests measured themselves, and the sanitizers' verdicts
(`benchmarks/sanitize.py`) unless the arguments contain `--no-sanitizer`. Why a test failed is printed. Told to end
(SIGTERM, as by `timeout`), it writes down what has passed until then, and that it was cut off.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels import versions

SANITIZER_SECONDS = 240
ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "tests/test_triton_*.py",
    "tests/test_few_tokens.py",
    "tests/test_tuning*.py",
    "tests/test_bench.py",
    "tests/test_tune_verb.py",
)
RACE = re.compile(r"(Race reported|hazard).* at ")  # how racecheck says between which lines of a kernel
HEADING = re.compile(r"^=+ (.*?) =+$")
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
OUTCOME = re.compile(rf"({OUTCOMES}) (tests/\S+?\.py)::(.*?) *$")  # of several workers, and at the end
ALONE = re.compile(rf"^(tests/\S+?\.py)::(.*?) ({OUTCOMES}) .*\[ *\d+%\]$")


def parsed(log: str) -> dict[str, dict[str, list[str]]]:
    """outcome -> file -> names of the cases, from pytest's verbose output."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in log.splitlines():
        if match := OUTCOME.search(line):  # of a failure the last lines say once more that it is one, and why
            found[match[1].lower()][match[2]].add(match[3].partition(" - ")[0])
        elif match := ALONE.search(line):
            found[match[3].lower()][match[1]].add(match[2])
    return {outcome: {file: sorted(names) for file, names in files.items()} for outcome, files in found.items()}


def sanitizers() -> dict[str, str]:
    """Tool -> verdict on `benchmarks/sanitize.py`; both run at once."""
    script = str(ROOT / "benchmarks" / "sanitize.py")
    subprocess.run(
        [sys.executable, script], check=True, capture_output=True
    )  # compiles outside the tools: they are slow
    command = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    running = {
        tool: subprocess.Popen([*command, tool, sys.executable, script], stdout=subprocess.PIPE, text=True)
        for tool in ("memcheck", "racecheck")
    }
    verdicts = {}
    for tool, process in running.items():
        try:
            text = process.communicate(timeout=SANITIZER_SECONDS)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            verdicts[tool] = f"cut off after {SANITIZER_SECONDS} s"
            continue
        summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
        races = Counter(re.sub(r"0x[0-9a-f]+", "", line).strip("= ") for line in text.splitlines() if RACE.search(line))
        where = [f"{count} times {line}" for line, count in sorted(races.items())]
        verdicts[tool] = "; ".join((f"exit code {process.returncode}", *(summary or ["no summary"]), *where))
    return verdicts


def main() -> int:
    out, *arguments = sys.argv[1:]
    sanitize = "--no-sanitizer" not in arguments
    arguments = [argument for argument in arguments if argument != "--no-sanitizer"]
    files = sorted(str(path.relative_to(ROOT)) for pattern in FILES for path in ROOT.glob(pattern))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as beside:
        sanitized = beside.submit(sanitizers) if sanitize else None
        measured = Path(folder) / "report.jsonl"
        environment = {**os.environ, "MOEFACTORY_TEST_GPU": "1", "MOEFACTORY_GPU_REPORT": str(measured)}
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:benchmark", "-p", "no:cacheprovider", "--tb=short"]
        lines: list[str] = []
        cut_off: list[int] = []
        with subprocess.Popen(
            [*command, *arguments, *files],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # its workers end with it
        ) as run:

            def end(number: int, frame: object) -> None:
                cut_off.append(number)
                os.killpg(run.pid, signal.SIGKILL)

            signal.signal(signal.SIGTERM, end)
            assert run.stdout is not None
            why = False
            for line in run.stdout:
                lines.append(line)
                if heading := HEADING.search(line):
                    why = heading[1] in {"FAILURES", "ERRORS"}
                if why or ("PASSED" not in line and "::" in line):
                    print(line, end="", flush=True)
        verdicts = sanitized.result() if sanitized and not cut_off else None
        reported = measured.read_text().splitlines() if measured.exists() else []
        figures = [json.loads(line) for line in reported if line.endswith("}")]  # the last one may be cut off, too
    outcomes = parsed("".join(lines))
    record = {
        "versions": versions(),
        "summary": next((line.strip("= \n") for line in reversed(lines) if " in " in line and "=" in line), None),
        "counts": {outcome: sum(map(len, files.values())) for outcome, files in outcomes.items()},
        "cut_off": bool(cut_off),
        "sanitizer": verdicts,
        "measured": figures,
        **outcomes,
    }
    Path(out).write_text(json.dumps(record, indent=1) + "\n")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
