"""The command line: verbs, exit codes, and one line for whatever goes wrong. Starts without torch.

0  good       1  a mismatch       2  a bad configuration       3  anything else: no GPU, out of memory, ...
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

OK, MISMATCH, BAD_CONFIG, FAILED = 0, 1, 2, 3
VERBS = ("show", "build", "check", "tune", "bench", "matrix", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, ``sys.argv[1:]`` unless given, and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:  # `help show` is `show --help`
        words = [*(word for word in words[1:2] if word != "help"), "--help"]
    return _guarded(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    """Help and version, or the verb's own work."""
    verb = words[0] if words else "--help"
    if verb in {"-h", "--help"}:
        from .usage import overview

        return _write(overview(), OK)
    if verb in {"-V", "--version"}:
        from ._version import __version__

        return _write(f"moefactory {__version__}\n", OK)
    if verb not in VERBS:
        from .config import brief

        return _fail(f"{brief(verb)}: no such command; allowed: {', '.join(VERBS)}{_nearest_verb(verb)}", BAD_CONFIG)
    if {"-h", "--help"} & set(words[1:]):
        from .usage import verb_help

        return _write(verb_help(verb), OK)
    return _run(verb, words[1:])


def _nearest_verb(verb: str) -> str:
    if "=" in verb:
        from .config import brief

        return f" (the command comes first: moefactory check {brief(verb)})"
    close = difflib.get_close_matches(verb[:80], VERBS, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _run(verb: str, words: Sequence[str]) -> int:
    """Compose, do what the verb says, print; the exit code."""
    from .compose import compose
    from .config import ConfigError, MachineError, WeightsError
    from .refusals import prefixed

    try:
        os.getcwd()
    except FileNotFoundError:
        return _fail("the working directory was deleted; change to a folder that exists", FAILED)
    request = compose(verb, words)
    action: Callable[[Any], tuple[str, int]] = globals()[f"_{verb}"]
    try:
        return _write(*action(request))
    except (ConfigError, WeightsError) as error:
        # The library speaks of model.top_k, which is moe.model.top_k here.
        if isinstance(error, MachineError):
            raise
        raise type(error)(prefixed(str(error))) from error


def _show(request: Any) -> tuple[str, int]:
    from . import report
    from .describe import describe_config
    from .refusals import prefixed_rule

    facts = describe_config(request.config, request.options["tokens"])
    for rule in facts["broken_rules"]:
        rule.update({name: prefixed_rule(rule["id"], rule[name]) for name in ("found", "repair")})
    text = report.as_json(facts) if request.options["format"] == "json" else report.show(facts)
    for rule in facts["broken_rules"]:
        _fail(f"{rule['id']}: {rule['found']}; {rule['repair']}", BAD_CONFIG)
    return text, OK if facts["legal"] else BAD_CONFIG


def _build(request: Any) -> tuple[str, int]:
    from . import report
    from .describe import describe_block, require_here
    from .rules import check_rules, make_case

    check_rules(make_case(request.config))
    require_here(request.config, numbers=False)
    from .factory import build

    facts = describe_block(build(request.config), request.options["tokens"])
    return (report.as_json(facts) if request.options["format"] == "json" else report.block(facts)), OK


def _check(request: Any) -> tuple[str, int]:
    from . import report
    from .describe import require_here
    from .rules import check_rules, make_case

    options = dict(request.options)
    wanted = options.pop("format")
    check_rules(make_case(request.config))
    require_here(request.config)
    from .check import run_check

    found = run_check(request.config, **options)
    text = report.as_json(found.plain()) if wanted == "json" else report.check(found)
    return text, OK if found.status == "ok" else MISMATCH


def _tune(request: Any) -> tuple[str, int]:
    from .tune import tune_verb

    return _with_complaint(*tune_verb(request.config, **request.options))


def _bench(request: Any) -> tuple[str, int]:
    from .bench import bench_verb

    return _with_complaint(*bench_verb(request.config, **request.options))


def _with_complaint(text: str, status: str, complaint: str) -> tuple[str, int]:
    """(text, exit code), the complaint said: there is something to print although not all is well."""
    code = {"ok": OK, "mismatch": MISMATCH, "refused": BAD_CONFIG, "failed": FAILED}[status]
    return text, _fail(complaint, code) if complaint else code


def _matrix(request: Any) -> tuple[str, int]:
    from . import report
    from .matrix import github_shards, judge, rows

    wanted = request.options["format"]
    if wanted == "github":
        return report.as_json(github_shards(), indent=None), OK
    found = [judge(row) for row in rows()]
    return {"json": report.matrix_json, "csv": report.matrix_csv, "table": report.matrix}[wanted](found), OK


def _doctor(request: Any) -> tuple[str, int]:
    from . import report
    from .describe import describe_machine

    facts = describe_machine()
    return (report.as_json(facts) if request.options["format"] == "json" else report.machine(facts)), OK


def _guarded(action: Callable[[], int]) -> int:
    """The action's exit code, or that of what it raised, said in one line."""
    try:
        with _quiet_libraries():
            return action()
    except KeyboardInterrupt:
        return _fail("interrupted", FAILED)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            import traceback

            traceback.print_exc()
        return _fail(*_verdict(error))


def _verdict(error: Exception) -> tuple[str, int]:
    """(one line, exit code) for an exception."""
    from .config import ConfigError, MachineError, WeightsError
    from .refusals import one_line

    if isinstance(error, ConfigError | WeightsError):
        return " ".join(str(error).split()), FAILED if isinstance(error, MachineError) else BAD_CONFIG
    text = one_line(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return f"out of memory: {text}; choose smaller sizes, fewer tokens, or another moe.device", FAILED
    return f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows the traceback)", FAILED


def _fail(line: str, code: int) -> int:
    """Say it in one line on stderr."""
    with suppress(OSError):  # stderr is closed: the exit code is all that is left
        print(f"moefactory: {line}", file=sys.stderr, flush=True)
    return code


def _write(text: str, code: int) -> int:
    """Print to stdout; a reader that has gone (``| head``) is no error, and the exit code stays what it is."""
    if sys.stdout is None:  # closed from the start
        return code
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would try to flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Only our own warnings are shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"moefactory(\.|$)")
        yield
