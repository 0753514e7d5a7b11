"""The help texts, made from the primary configs, the groups and the schema: nothing is said twice. Needs no torch."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from .cli import VERBS

_CODES = "exit codes: 0 good, 1 a mismatch, 2 a bad configuration, 3 anything else (no GPU, out of memory, ...)\n"
_EXAMPLES = {
    "show": ("", "moe/backend=triton moe.permute_x=false", "moe/model=qwen3_30b_a3b format=json"),
    "build": ("moe/model=tiny", "moe/weights=checkpoint moe.weights.path=FOLDER moe.weights.layer=12"),
    "check": (
        "",
        "moe/backend=triton moe.device=cuda",
        "moe/model=qwen3_30b_a3b moe/weights=random moe.dtype=bfloat16 moe.device=cuda",
        "moe/weights=checkpoint moe.weights.path=FOLDER moe.weights.layer=12 format=json",
    ),
    "tune": (
        "moe/backend=triton moe.device=cuda moe/model=qwen3_30b_a3b moe/weights=random moe.dtype=bfloat16",
        "moe/backend=triton moe.device=cuda moe.dtype=bfloat16 tokens=[4096,16384] redo=true format=json",
    ),
    "bench": (
        "",
        "moe/backend=triton moe.device=cuda moe.dtype=bfloat16 models=[qwen3_30b_a3b] tokens=[1024,16384] graph=true",
        "backends=[torch,triton] peers=[] moe.device=cuda format=csv out=bench.json plot=bench.png",
    ),
    "matrix": ("format=csv", "format=github"),
    "doctor": ("",),
}


def _primary(verb: str) -> tuple[str, str]:
    """(what the verb does, its settings) as its primary config has them."""
    lines = files("moefactory.conf").joinpath(f"moefactory_{verb}.yaml").read_text().splitlines()
    about = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    settings = [line for line in lines if line[:1].isalpha() and not line.startswith("defaults:")]
    about[0] = about[0].removeprefix(f"moefactory {verb}: ")
    return "\n".join(about), "\n".join(f"  {line.replace(': ', '=', 1)}" for line in settings)


def overview() -> str:
    """``moefactory --help``."""
    verbs = "\n".join(f"  {verb:<8}{_primary(verb)[0].splitlines()[0]}" for verb in VERBS)
    return (
        "usage: moefactory COMMAND [group=option ...] [key=value ...]\n\n"
        "Mixture-of-Experts blocks from a configuration. Settings are Hydra overrides: a slash chooses an option of a\n"
        "group (moe/backend=triton), a dot sets a value (moe.permute_x=false).\n\n"
        f"commands:\n{verbs}\n\n"
        "`moefactory COMMAND --help` lists the settings. `moefactory check` is the place to start.\n\n"
        f"{_CODES}"
    )


def verb_help(verb: str) -> str:
    """``moefactory VERB --help``."""
    about, settings = _primary(verb)
    with_block = verb not in {"matrix", "doctor"}
    usage = f"usage: moefactory {verb} " + ("[group=option ...] [key=value ...]" if with_block else "[key=value]")
    examples = "\n".join(f"  moefactory {verb} {words}".rstrip() for words in _EXAMPLES[verb])
    block = f"\n\n{_groups()}\n\n{_keys()}" if with_block else ""
    return f"{usage}\n\n{about}\n\nsettings of this command:\n{settings}{block}\n\nexamples:\n{examples}\n\n{_CODES}"


def _groups() -> str:
    """The options of each group, and which one is the preset's."""
    folder = files("moefactory.conf").joinpath("moe")
    preset = folder.joinpath("qwen3.yaml").read_text()
    lines = ["groups, one option each (the preset qwen3 has the one in brackets):"]
    for group in sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and "__" not in entry.name):
        options = sorted(
            f.name.removesuffix(".yaml") for f in folder.joinpath(group).iterdir() if f.name.endswith(".yaml")
        )
        shown = ", ".join(f"[{name}]" if f"- {group}: {name}\n" in preset else name for name in options)
        lines.append(f"  moe/{group}={'':<{max(0, 9 - len(group))}} {shown}")
    return "\n".join(lines)


def _keys() -> str:
    """The keys of the schema with what is allowed and their defaults; of the kernels' the names, shared ones once."""
    from dataclasses import fields

    from omegaconf import OmegaConf

    from .config import GEMMS, PASSES, KernelTiles, MoeConfig, allowed_values, field_paths

    schema: Any = OmegaConf.structured(MoeConfig)
    lines = ["keys of the block, with their defaults (null: the weights' source decides):"]
    for path in field_paths():
        node = OmegaConf.select(schema, path)
        if not path.startswith("kernels") and not OmegaConf.is_dict(node):
            default = str(getattr(node, "name", "null" if node is None else node))
            default = default.lower() if isinstance(node, bool) else default
            allowed = allowed_values(path).removeprefix("; allowed: ")
            lines.append(f"  {f'moe.{path}={default}':<40}{allowed}")
    shared = [f.name for f in fields(KernelTiles)]
    lines += [
        f"  moe.kernels.PASS[.{'|.'.join(GEMMS)}].KEY  with moe.autotune=false; KEY is, of all passes or of one",
        f"    {'all':<8}{', '.join(shared)}",
    ]
    for name, kernel in PASSES.items():
        lines.append(f"    {name:<8}{', '.join(f.name for f in fields(kernel) if f.name not in shared)}")
    return "\n".join(lines)
