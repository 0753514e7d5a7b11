"""Write the README's generated tables anew: options, presets, rules, times, speed. ``--check`` changes nothing.

Each table stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``. Options come from the schema, presets from
``conf/``, rules from `moefactory.rules`, times and speed from ``benchmarks/results``: a number or a name is never typed
into the README by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from moefactory.config import PASSES, MoeConfig
from moefactory.matrix import config_from
from moefactory.rules import RULES, make_case

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
STARTUP = ROOT / "benchmarks" / "results" / "startup.json"
SPEED = {  # GPU -> its results of block.py and of first_forward.py
    gpu: tuple(ROOT / "benchmarks" / "results" / f"{name}{end}.json" for name in ("block", "first_forward"))
    for gpu, end in (("H200", ""), ("H100", "_h100"))
}
BESIDE = ROOT / "benchmarks" / "results" / "beside.json"
BENCH = ROOT / "benchmarks" / "results" / "bench_30b.json"

MEANINGS = {
    "backend.name": "which implementation computes the experts",
    "model.hidden_size": "H, the width of a token",
    "model.moe_intermediate_size": "I, the width inside one expert",
    "model.num_experts": "E",
    "model.top_k": "K, experts per token",
    "model.norm_topk_prob": "whether a token's K routing weights are divided by their sum",
    "model.hidden_act": "the activation, by its name in transformers; backend triton knows silu",
    "weights.source": "null: the live block that was given, else random weights",
    "weights.seed": "of random weights; the same seed gives the same bits on every backend",
    "weights.path": "folder of a safetensors checkpoint",
    "weights.layer": "which layer of the checkpoint",
    "permute_x": "the up GEMM gathers token rows itself: no permuted copy of X",
    "permute_y": "the down GEMM scatters its rows to token order itself",
    "fuse_swiglu": "the activation is the up GEMM's epilogue",
    "fuse_combine": "one kernel unpermutes and sums",
    "dW_only": "weight gradients only",
    "dX_only": "the input's gradient only",
    "autotune": "tuned kernel configs where the cache has them, the shipped table elsewhere; false: the shipped table",
    "saved": "what a training forward keeps besides x and the routing: h, the pre-activation; h_reused, the same, "
    "written over by the one backward; x, nothing, the backward computes it again",
    "sm_margin": "multiprocessors that the GEMMs leave to what runs beside them, such as a collective; see "
    "[beside a collective](#beside-a-collective)",
    "trace": "forward returns every intermediate",
    "dtype": "null: the source's own, float32 for random weights",
    "device": "null: the source's own, cpu for random weights",
}


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    rows = [head, tuple("---" for _ in head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def options() -> str:
    """Every key of the schema but the kernels', and one table of those."""
    schema: Any = OmegaConf.structured(MoeConfig)
    lines = []
    for key, meaning in MEANINGS.items():
        node = schema
        for part in key.split("."):
            node = node._get_node(part)
        lines.append((f"`moe.{key}`", f"`{_text(node._value())}`", _allowed(node), meaning))
    kernels = []
    for name, kind in PASSES.items():
        keys = ", ".join(f"`{f.name}`" for f in fields(kind))
        defaults = kind()
        default = ", ".join(_text(getattr(defaults, f.name)) for f in fields(kind))
        kernels.append((f"`moe.kernels.{name}`", keys, default))
    return (
        table(("key", "default", "allowed", "meaning"), lines)
        + "\n\nKernel configs. `moe.kernels.fwd.block_m` holds for both GEMMs, `moe.kernels.fwd.up.block_m` for one.\n"
        + "Nothing stated: the shipped choice. Stated in part: the rest takes the default.\n\n"
        + table(("node", "keys", "defaults, in that order"), kernels)
    )


def _allowed(node: Any) -> str:
    kind = node._metadata.ref_type
    null = ", `null`" if node._metadata.optional else ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.name}`" for member in kind) + null
    return {bool: "`true`, `false`", int: "an integer", str: "text"}[kind] + null


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def presets() -> str:
    """Every group and option of ``conf/moe``, with the comment that opens its file or else what it states."""
    lines = []
    for group in sorted(p for p in (ROOT / "conf" / "moe").iterdir() if p.is_dir()):
        for path in sorted(group.glob("*.yaml")):
            text = path.read_text()
            stated = ", ".join(f"{key}: {_text(value)}" for key, value in yaml.safe_load(text).items())
            comment = re.match(r"# (.*)", text)
            lines.append((f"`moe/{group.name}={path.stem}`", comment[1] if comment else f"`{stated}`"))
    return table(("choice", "what it is"), lines)


def rules() -> str:
    """The table of rules, each with the smallest config that breaks it and the answer that it gets."""
    lines = []
    for rule in RULES:
        example = [f"moe.{key}={_text(value)}" for key, value in rule.example.items()]
        found = rule.broken(make_case(config_from(example)))
        lines.append((f"`{rule.id}`", f"`{' '.join(example)}`", f"{found}; {rule.repair}"))
    return table(("rule", "an example that breaks it", "the answer"), lines)


def times() -> str:
    """What starting costs, from the committed result."""
    result = json.loads(STARTUP.read_text())
    lines = [
        (name, *(f"{seconds[key]:.4f}" if seconds["median"] < 0.1 else f"{seconds[key]:.2f}" for key in _COLUMNS))
        for name, seconds in result["seconds"].items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    note = (
        f"{result['repeats']} fresh processes each, {result['cores']} cores, no GPU, {result['system']}.\n{versions}."
    )
    made = f"Commit `{result['commit']}`, measured by `make startup`."
    return f"{table(('seconds', *_COLUMNS), lines)}\n\n{note}\n{made}"


def _versions(result: dict[str, Any]) -> str:
    """Versions, GPU and commit of a result."""
    of = dict(result["versions"])
    commit = of.pop("commit")[:7]
    return ", ".join(f"{name} {number}" for name, number in of.items()) + f", commit `{commit}`"


def speed() -> str:
    """The block on each GPU, from the committed results of ``benchmarks/block.py``."""
    head = ("model", "tokens", "saved", "forward ms", "share", "step ms", "share", "held MiB", "peak of a step MiB")
    parts = []
    for path, _ in SPEED.values():
        result = json.loads(path.read_text())
        lines = [
            (
                row["model"], f"{row['tokens']:,}", row.get("saved", "h"),
                f"{row['forward_ms']:.3f}", f"{row['forward_share']:.2f}",
                f"{row['step_ms']:.3f}", f"{row['step_share']:.2f}", f"{row['held_mib']:.0f}", f"{row['peak_mib']:.0f}",
            )
            for row in result["rows"]
        ]  # fmt: skip
        parts.append(f"{_versions(result)}:\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def more_speed() -> str:
    """Decoding, host, skew and the first forward, from ``benchmarks/block.py`` and ``first_forward.py``."""
    columns = [_more_speed(*(json.loads(path.read_text()) for path in paths)) for paths in SPEED.values()]
    assert all(list(column) == list(columns[0]) for column in columns)
    lines = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return table(("30B model", *SPEED), lines)


def _more_speed(result: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
    decode = [row for row in result["decode"] if row["model"] == result["rows"][0]["model"]]
    balanced, *skewed = result["skew"]
    worst = max(row[ms] / balanced[ms] for row in skewed for ms in ("forward_ms", "step_ms"))
    found = {
        f"forward, one CUDA graph replay, tokens: {row['tokens']} (reading its experts' weights and nothing else)": (
            f"{row['graph_us']:.0f} us ({row['read_us']:.0f})"
        )
        for row in decode
    }
    found["host time of an eager forward of 1 token"] = f"{result['host']['forward_1_us'] / 1e3:.2f} ms"
    found["host time of an eager step of 256 tokens"] = f"{result['host']['step_256_us'] / 1e3:.2f} ms"
    kinds = ", ".join(row["routing"] for row in skewed)
    found[f"skewed routing over balanced, at worst ({kinds})"] = f"{worst:.2f}"
    for cache in ("warm", "cold"):
        found[f"first forward of a process, {cache} Triton cache"] = f"{first[cache]['forward_s']:.1f} s"
    return found


def peers() -> str:
    """The block beside Hugging Face's, from the committed result of ``moefactory bench``, at its most tokens."""
    rows = json.loads(BENCH.read_text())["rows"]
    tokens = max(row["tokens"] for row in rows)
    found = {(row["runs"], row["measure"]): row for row in rows if row["tokens"] == tokens}
    lines = [
        (
            runner,
            f"{found[runner, 'forward']['p50_ms']:.2f}",
            f"{step['p50_ms']:.2f}",
            f"{step['held_mib']:.0f}",
            f"{step['peak_mib']:.0f}",
        )
        for (runner, measure), step in found.items()
        if measure == "step"
    ]
    return table((f"{tokens:,} tokens", "forward ms", "step ms", "held MiB", "peak of a step MiB"), lines)


def beside() -> str:
    """Block and dense products beside a kernel that holds multiprocessors, at the most tokens of ``beside.py``."""
    result = json.loads(BESIDE.read_text())
    most = max(row["tokens"] for row in result["rows"])
    lines = [
        (
            row["model"], str(row["held"]), str(row["margin"]),
            f"{row['forward_ms']:.2f}", f"{row['step_ms']:.2f}", f"{row['dense_step_ms']:.2f}",
        )
        for row in result["rows"] if row["tokens"] == most
    ]  # fmt: skip
    head = ("model", "held", "`sm_margin`", "forward ms", "step ms", "dense ms")
    return f"{_versions(result)}:\n\n{table(head, lines)}"


_COLUMNS = ("median", "least", "most")
TABLES = {
    "options": options,
    "presets": presets,
    "rules": rules,
    "times": times,
    "speed": speed,
    "more-speed": more_speed,
    "peers": peers,
    "beside": beside,
}


def rewritten(text: str) -> str:
    """The README's text with every generated part made anew. ValueError if a part's markers are missing."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f"README.md has no <!-- {name}:begin --> ... <!-- {name}:end -->")
        made = make()
        text = re.sub(pattern, lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    """Rewrite, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README is out of date")
    check = parser.parse_args().check
    old = README.read_text()
    new = rewritten(old)
    if check and new != old:
        print("README.md is out of date: make docs", file=sys.stderr)
        return 1
    if not check:
        README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
