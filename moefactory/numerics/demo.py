"""A small but real Qwen3-MoE checkpoint, written by transformers' own `save_pretrained` into a cache folder.

Three layers, the middle one dense. The weights are drawn at unit scale, N(0, 1/fan_in): what transformers initialises
itself (0.02, or nothing at all for experts) would hide faults behind tiny numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from .._version import __version__
from ..config import ConfigError, ResolvedModel
from ..weights import hf_config
from .theirs import quiet_transformers

LAYERS, DENSE, CHECKED = 3, (1,), 2
SHARDS = 3  # the checked layer's tensors lie in at least that many files
MAX_BYTES = 2**30
MANIFEST = "moefactory.json"
_FORMAT = 1


@dataclass(frozen=True)
class Demo:
    """Where the checkpoint is, which layer to check, and what the reader should know."""

    path: str
    layer: int
    note: str


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/moefactory`` or ``~/.cache/moefactory``."""
    stated = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(stated) if os.path.isabs(stated) else Path.home() / ".cache") / "moefactory"


def demo_checkpoint(model: ResolvedModel, seed: int, cache: str | None, stack: ExitStack) -> Demo:
    """The checkpoint for these sizes, written unless it is there already.

    Args:
        model: sizes and routing.
        seed: of the weights.
        cache: the folder to keep it in; None is `cache_folder`, or a temporary folder where that cannot be written.
        stack: removes the temporary folder.

    Raises:
        ConfigError: a stated cache folder that cannot be written, or a model that is too large for a demonstration.
    """
    _check_size(model)
    key = _key(model, seed)
    try:
        root = Path(cache).expanduser() if cache else cache_folder()
        return Demo(str(_written(root / "demo" / key, model, seed)), CHECKED, "")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if cache:
            raise ConfigError(f"cache: got {cache!r}: {reason}; needed: a folder that can be written") from None
    temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moefactory-")))
    note = f"the cache folder cannot be written ({reason}): the checkpoint is in a temporary folder"
    return Demo(str(_written(temporary / key, model, seed)), CHECKED, note)


def _check_size(model: ResolvedModel) -> None:
    need = 2 * _layer_bytes(model)
    if need > MAX_BYTES:
        came = f"a demonstration checkpoint of these sizes takes {need / 2**30:.1f} GiB"
        raise ConfigError(f"weights.source: {came}; choose moe/weights=random or moe/weights=checkpoint")


def _layer_bytes(model: ResolvedModel) -> int:
    return 4 * model.num_experts * model.hidden_size * (3 * model.moe_intermediate_size + 1)


def _key(model: ResolvedModel, seed: int) -> str:
    """A name that changes with whatever the files depend on."""
    import torch
    import transformers

    versions = [_FORMAT, __version__, torch.__version__, transformers.__version__]
    stated = json.dumps([versions, asdict(model), seed], sort_keys=True)
    return hashlib.sha256(stated.encode()).hexdigest()[:16]


def _written(folder: Path, model: ResolvedModel, seed: int) -> Path:
    """The folder, complete: either it was, or it is put into place in one step."""
    if _complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save(scratch / "new", model, seed)
        if folder.exists():  # damaged, or written by another version of this file
            os.replace(folder, scratch / "old")
        try:
            os.replace(scratch / "new", folder)
        except OSError:
            if not _complete(folder):  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _complete(folder: Path) -> bool:
    """Whether every file is there in its size and the layer is spread as promised."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _save(folder: Path, model: ResolvedModel, seed: int) -> None:
    """Draw the weights and let transformers write them."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    config = hf_config(
        model, num_hidden_layers=LAYERS, mlp_only_layers=list(DENSE), vocab_size=32, intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    with quiet_transformers():
        shell = Qwen3MoeForCausalLM(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in shell.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        shell.save_pretrained(folder, max_shard_size=max(1, _layer_bytes(model) // SHARDS))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file for name, file in index.items() if name.startswith(f"model.layers.{CHECKED}.mlp.")}
    if len(shards) < SHARDS:
        raise RuntimeError(f"{folder}: layer {CHECKED} lies in {len(shards)} files, {SHARDS} were wanted")
    files = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
