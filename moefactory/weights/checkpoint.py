"""One layer of a checkpoint folder: config.json, then model.safetensors, or the shards that its index names.

The folder is not trusted. Everything is checked before anything large is allocated: the config before any weights file
is opened, every header before any tensor is read, every shape against the config and the bytes that are really there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..config import ResolvedModel, WeightsError
from .layout import CONFIG_KEYS, FLOATS, BlockWeights, check_names, check_shape, one_of, resolve_sizes, shapes, show
from .shard import BUFFER_BYTES, DTYPES, MAX_JSON_BYTES, Shard, parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIXES = ("model.layers.", "model.language_model.layers.")
MAX_CONFIG_BYTES = 2**20
MAX_LAYERS = 10_000
_PICKLE = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_REFUSED_KEYS = {
    "auto_map": "code that comes with a checkpoint is never run",
    "trust_remote_code": "code that comes with a checkpoint is never run",
    "quantization_config": "quantised checkpoints are not supported",
    "compression_config": "quantised checkpoints are not supported",
    "transformers_weights": f"only {SINGLE} and {INDEX} are read",
}


def read_checkpoint_layer(
    path: str | os.PathLike[str], layer: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> BlockWeights:
    """The weights of one layer's experts and router, read from a folder that `save_pretrained` wrote.

    Only this layer's tensors are read, and each shard that holds some is opened once. The peak is the layer and a
    buffer of a few MiB, for every dtype and device. Like transformers, a model.safetensors goes before an index.

    Args:
        path: the folder, local: nothing is downloaded.
        layer: number of the decoder layer, from 0.
        dtype: None keeps the checkpoint's own.
        device: where the weights go.

    Raises:
        WeightsError: the layer is dense or out of range, the checkpoint is quantised, incomplete, contradicts its
            config.json, brings code, or is damaged, or a file lies outside the folder.
    """
    folder = _folder(path)
    if dtype is not None and dtype not in FLOATS:
        raise WeightsError(f"dtype={show(dtype)}; allowed: None, {', '.join(map(str, FLOATS))}")
    where = str(folder / "config.json")
    config = _read_config(folder, where)
    model = resolve_sizes({key: config[key] for key in CONFIG_KEYS if key in config}, where)
    _check_layer(layer, config, where)
    with ExitStack() as stack:
        sources = _open_layer(folder, layer, model, stack)
        return _read(sources, model, dtype, device, f"{folder}: layer {layer}")


def _folder(path: str | os.PathLike[str]) -> Path:
    try:
        folder = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        came = f"path={show(str(path))} does not exist"
        raise WeightsError(f"{came}; needed: a local folder (nothing is downloaded)") from None
    if not folder.is_dir():
        raise WeightsError(f"path={show(str(path))} is a file; needed: the folder that holds config.json")
    return folder


def _check_file_name(name: str, where: str) -> None:
    if name in {"", ".", ".."} or any(c in name for c in "/\\:") or not name.isprintable():
        raise WeightsError(f"{where}: the file name {show(name)} is not allowed; needed: a plain name in the folder")


def _file_in(folder: Path, name: str, where: str) -> Path:
    """The regular file of that name in the folder. WeightsError where the name or a link leads anywhere else."""
    _check_file_name(name, where)
    try:
        real = (folder / name).resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except FileNotFoundError:
        raise WeightsError(f"{where}: {show(name)} does not exist") from None
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{where}: {show(name)} cannot be read: {show(str(error))}") from None
    # The hub's cache keeps a snapshot as links into its own blobs, next to it: snapshots/REVISION/name -> blobs/HASH.
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if real.parent not in {folder, blobs}:
        raise WeightsError(f"{where}: {show(name)} is a link that leaves the folder")
    if not regular:
        raise WeightsError(f"{where}: {show(name)} is not a regular file")
    return real


def _read_json(folder: Path, name: str, limit: int) -> dict[str, Any]:
    path = _file_in(folder, name, str(folder))
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise WeightsError(f"{folder / name}: cannot be read: {error.strerror}") from None
    if len(raw) > limit:
        raise WeightsError(f"{folder / name}: has more than {limit} bytes")
    return parse_json(raw, str(folder / name))


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    """The part of config.json that describes the text layers, refused if it brings code or quantisation."""
    whole = _read_json(folder, "config.json", MAX_CONFIG_BYTES)
    text = whole.get("text_config", whole)
    if not isinstance(text, dict):
        raise WeightsError(f"{where}: text_config={show(text)}; needed: an object")
    for config in (whole, text):
        for key, value in config.items():
            if key in _REFUSED_KEYS and value not in (None, False):
                raise WeightsError(f"{where}: {key} is set: {_REFUSED_KEYS[key]}")
            if "_implementation" in key and isinstance(value, str) and any(c in value for c in "/:"):
                raise WeightsError(f"{where}: {show(key)}={show(value)} names code on a hub, which is never run")
    return text


def _check_layer(layer: int, config: Mapping[str, Any], where: str) -> None:
    """WeightsError unless `layer` is a layer of the model, and one with experts."""
    layers, step = config.get("num_hidden_layers"), config.get("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise WeightsError(f"{where}: num_hidden_layers={show(layers)}; allowed: 1 to {MAX_LAYERS}")
    if type(step) is not int or step < 1:
        raise WeightsError(f"{where}: decoder_sparse_step={show(step)}; needed: an integer of 1 or more")
    if not isinstance(dense, list) or not all(type(n) is int for n in dense):
        raise WeightsError(f"{where}: mlp_only_layers={show(dense)}; needed: a list of integers")
    if type(layer) is not int or not 0 <= layer < layers:
        raise WeightsError(f"layer={show(layer)}; allowed: 0 to {layers - 1} ({where}: num_hidden_layers={layers})")
    without = set(dense)
    sparse = [n for n in range(layers) if n not in without and (n + 1) % step == 0]
    if layer not in sparse:
        raise WeightsError(f"layer={layer} is dense, it has no experts; allowed: {_ranges(sparse)} ({where})")


def _ranges(numbers: list[int]) -> str:
    """``0-2, 4, 6-8`` for sorted numbers; the first dozen of such runs if there are many."""
    if not numbers:
        return "none, no layer of this model has experts"
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(parts[:12]) + (", ..." if len(parts) > 12 else "")


def _weight_map(folder: Path) -> dict[str, str]:
    """Name of each tensor -> name of its shard, from the index. WeightsError unless every shard has a harmless name."""
    where = str(folder / INDEX)
    found = _read_json(folder, INDEX, MAX_JSON_BYTES).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise WeightsError(f"{where}: weight_map={show(found)}; needed: an object of tensor name to shard name")
    for name in sorted(set(found.values())):
        _check_file_name(name, where)
        if not name.endswith(".safetensors"):
            raise WeightsError(f"{where}: shard {show(name)}; only .safetensors files are read, never pickle")
    return found


def _open_layer(folder: Path, layer: int, model: ResolvedModel, stack: ExitStack) -> dict[str, tuple[Shard, str]]:
    """Where each of the layer's tensors is: name in the block -> (open shard, full name). `stack` closes the shards."""
    opened: dict[str, Shard] = {}

    def shard(name: str) -> Shard:
        if name not in opened:
            path = _file_in(folder, name, str(folder))
            opened[name] = stack.enter_context(Shard(path, str(folder / name)))
        return opened[name]

    if os.path.lexists(folder / SINGLE):
        file_of = dict.fromkeys(shard(SINGLE).tensors, SINGLE)
    elif os.path.lexists(folder / INDEX):
        file_of = _weight_map(folder)
    else:
        raise WeightsError(f"{folder}: has neither {SINGLE} nor {INDEX}{_other_files(folder)}")
    where = f"{folder}: layer {layer}"
    start = _prefix(file_of, layer, where)
    own = {name.removeprefix(start): file for name, file in file_of.items() if name.startswith(start)}
    layout = check_names(own, model, where)
    for file in sorted(set(own.values())):
        _check_promise(shard(file), start, {start + name for name, f in own.items() if f == file})
    for name, shape in shapes(model, layout):
        holder = opened[own[name]]
        entry = holder.tensors[start + name]
        if entry.dtype not in DTYPES:
            what = f"{holder.where}: {start}{name} is {entry.dtype}, quantised experts are not supported"
            raise WeightsError(f"{what}; allowed: {', '.join(DTYPES)}")
        check_shape(start + name, entry.shape, shape, holder.where)
    return {name: (opened[file], start + name) for name, file in own.items()}


def _prefix(names: Iterable[str], layer: int, where: str) -> str:
    """What the names of the layer's tensors begin with. WeightsError unless that is one thing."""
    starts = tuple(f"{prefix}{layer}.mlp." for prefix in PREFIXES)
    found = sorted({start for name in names for start in starts if name.startswith(start)})
    if len(found) != 1:
        raise WeightsError(
            f"{where}: has tensors under {' and '.join(found) or 'none'} of {', '.join(starts)}; needed: one"
        )
    return found[0]


def _check_promise(shard: Shard, start: str, promised: set[str]) -> None:
    """WeightsError unless a shard holds what the index says of this layer, and no more: transformers would load it."""
    present = {name for name in shard.tensors if name.startswith(start)}
    for name in sorted(promised ^ present):
        what = "is there, but not according to the index" if name in present else "is missing"
        raise WeightsError(f"{shard.where}: tensor {show(name)} {what}")


def _other_files(folder: Path) -> str:
    """What else may have been meant, for the message."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, 1000))
    if pickles := [name for name in names if name.endswith(_PICKLE)]:
        return f"; {show(pickles[0])} is pickle, which is never read: convert it to safetensors"
    others = [name for name in names if name.endswith(".safetensors")]
    return f"; {show(others[0])} is not a checkpoint that transformers would read" if others else ""


def _read(
    sources: Mapping[str, tuple[Shard, str]],
    model: ResolvedModel,
    dtype: torch.dtype | None,
    device: torch.device | str,
    where: str,
) -> BlockWeights:
    """Allocate the three tensors once and fill them in place, file by file and in the files' order."""
    if dtype is None:
        kept = {full: shard.tensors[full].dtype for shard, full in sources.values()}
        dtype = DTYPES[one_of("dtype", kept, f"{where}, dtype=None")]
    fused = {n: torch.empty(shape, dtype=dtype, device=device) for n, shape in shapes(model, "fused")}
    gate, gate_up, down = fused.values()
    half = model.moe_intermediate_size

    def target(name: str) -> torch.Tensor:
        """The rows [R, C] of the fused tensors that this tensor of the file fills."""
        if name in fused:
            return fused[name].flatten(0, -2)
        expert, part = name.split(".")[1:3]
        if part == "down_proj":
            return down[int(expert)]
        return gate_up[int(expert), :half] if part == "gate_proj" else gate_up[int(expert), half:]

    row = max(model.hidden_size, model.moe_intermediate_size) * 8
    buffer = bytearray(max(BUFFER_BYTES, row))
    in_order = sorted(sources.items(), key=lambda item: (item[1][0].where, item[1][0].tensors[item[1][1]].begin))
    for name, (shard, full) in in_order:
        shard.copy_into(full, target(name), buffer)
    return BlockWeights(model, gate, gate_up, down)
