"""Run one shard of moefactory's test matrix on this machine: ``python run_shard.py 3/12``.

Every legal configuration of the shard that this machine can run is checked, forward and backward, beside Hugging
Face's block and beside float64; every illegal one must be refused by the id of its rule. Exit code 1 if anything is
otherwise. What the machine cannot run is counted by reason, never silently left out. With ``TRITON_INTERPRET=1`` in
the environment backend triton runs without a GPU.
"""

import sys
from collections import Counter
from dataclasses import replace

from moefactory import ConfigError, WeightsConfig, build
from moefactory.check import run_check
from moefactory.matrix import Row, config_of, judge, rows, shard_of


def outcome(row: Row) -> str:
    """One word, or a complaint that begins with FAILED."""
    config = config_of(row)
    if not row.valid:
        try:
            build(config)
        except ConfigError as error:
            return "refused" if str(error).startswith(f"{row.rule}:") else f"FAILED, refused otherwise: {error}"
        return f"FAILED, not refused by {row.rule}"
    if not row.runnable:
        return f"not here: {row.reason}"
    # The rows name no real checkpoint and bring no live block: all are checked on the demonstration checkpoint.
    config = replace(config, weights=WeightsConfig(seed=config.weights.seed))
    report = run_check(config, tokens=max(1, row.tokens))
    bad = [f"{c.problem} {c.tensor} {c.part}: {c.error:.3g} of {c.bound:.3g}" for c in report.comparisons if not c.ok]
    return "checked" if report.status == "ok" else f"FAILED, {'; '.join(bad[:3])}"


def shard(arguments: list[str]) -> tuple[int, int]:
    """(number, count) of the command line; SystemExit in one line for anything else than NUMBER/COUNT."""
    parts = arguments[0].split("/") if len(arguments) == 1 else []
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and 1 <= int(parts[0]) <= int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise SystemExit(f"run_shard.py: got {' '.join(arguments)!r}; needed: NUMBER/COUNT, 1/12 to 12/12")


def main() -> int:
    """Run the shard that the command line names."""
    number, count = shard(sys.argv[1:])
    tally: Counter[str] = Counter()
    for row in rows():
        if shard_of(row.id, count) == number:
            result = outcome(judge(row))
            tally[result] += 1
            if result.startswith("FAILED"):
                print(f"{row.id}: {result}", flush=True)
    for result, times in sorted(tally.items()):
        print(f"{times:5}  {result}")
    return 1 if not tally or any(result.startswith("FAILED") for result in tally) else 0


if __name__ == "__main__":
    sys.exit(main())
