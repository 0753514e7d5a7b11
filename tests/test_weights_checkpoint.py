"""One layer of a checkpoint folder: what transformers itself saved is read bit for bit, and nothing else is touched.

The reference is the live model that was saved. Folders come from the installed transformers (`saved`, one layer over
three shards or more, layer 1 dense) and from `write_folder`: both layouts on every version, and the damaged ones.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moefactory.config import WeightsError
from moefactory.weights import BlockWeights, read_checkpoint_layer, read_hf_block, to_hf_state_dict

LAYERS, DENSE, E, H, N = 4, 1, 6, 16, 6
INDEX = "model.safetensors.index.json"
TENSORS = ("gate", "gate_up_proj", "down_proj")


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=H, intermediate_size=24, moe_intermediate_size=N, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=E, num_experts_per_tok=2,
        norm_topk_prob=True, mlp_only_layers=[DENSE], max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(dtype)


def block_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp


def write_folder(folder: Path, layout: str = "per_expert", shards: int = 3, dtype: torch.dtype = torch.float32) -> None:
    """A checkpoint of `make_model` by hand: its config as the hub's files state it, tensors dealt out over shards."""
    folder.mkdir()
    model = make_model(dtype)
    tensors = {"model.norm.weight": model.model.norm.weight.detach()}
    for layer in (0, 2):
        weights = read_hf_block(block_of(model, layer))
        tensors |= to_hf_state_dict(weights, f"model.layers.{layer}.mlp.", layout)  # type: ignore[arg-type]
    tensors["model.layers.1.mlp.gate_proj.weight"] = block_of(model, 1).gate_proj.weight.detach()
    write_config(folder, lambda c: None, {
        "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": N, "num_experts": E,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "hidden_act": "silu", "num_hidden_layers": LAYERS,
        "decoder_sparse_step": 1, "mlp_only_layers": [DENSE],
    })  # fmt: skip
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    files = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


def write_config(
    folder: Path, change: Callable[[dict[str, Any]], object], config: dict[str, Any] | None = None
) -> None:
    made = config or json.loads((folder / "config.json").read_text())
    change(made)
    (folder / "config.json").write_text(json.dumps(made))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module", params=[True, False], ids=["hub_format", "memory_format"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """Written by transformers, per expert (its default) and as its memory has it; small shards."""
    folder = tmp_path_factory.mktemp("saved")
    takes = "save_original_format" in inspect.signature(model.save_pretrained).parameters
    model.save_pretrained(folder, max_shard_size=1500, **({"save_original_format": request.param} if takes else {}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def assert_same(got: BlockWeights, wanted: BlockWeights, dtype: torch.dtype | None = None) -> None:
    """Bit for bit, in `dtype`."""
    assert got.model == wanted.model
    for name in TENSORS:
        theirs = getattr(wanted, name).detach()
        ours = getattr(got, name)
        assert ours.dtype == (dtype or theirs.dtype) and ours.is_contiguous() and not ours.requires_grad
        assert torch.equal(ours, theirs.to(ours.dtype))


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The header by the documented format, and where the tensors' bytes begin."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


# ----------------------------------------------------------------------------------------------- what is read, and how


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_layer_that_transformers_saved_is_read_bit_for_bit(saved: Path, model: Any, layer: int) -> None:
    files = json.loads((saved / INDEX).read_text())["weight_map"]
    assert len({file for name, file in files.items() if f"layers.{layer}.mlp." in name}) >= 3
    assert_same(read_checkpoint_layer(saved, layer), read_hf_block(block_of(model, layer)))


@pytest.mark.parametrize("shards", [1, 3, 7])
@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_both_layouts_are_read_from_one_file_and_from_shards(
    tmp_path: Path, model: Any, layout: str, shards: int
) -> None:
    write_folder(tmp_path / "c", layout, shards)
    assert_same(read_checkpoint_layer(str(tmp_path / "c"), 2), read_hf_block(block_of(model, 2)))


@pytest.mark.parametrize("wanted", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_the_files_or_the_one_asked_for(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype | None
) -> None:
    write_folder(tmp_path / "c", dtype=stored)
    assert_same(
        read_checkpoint_layer(tmp_path / "c", 0, wanted), read_hf_block(block_of(make_model(stored), 0)), wanted
    )


def test_torchs_default_device_is_not_asked(folder: Path, model: Any) -> None:
    with torch.device("meta"):
        read = read_checkpoint_layer(folder, 0)
    assert_same(read, read_hf_block(block_of(model, 0)))
    assert read_checkpoint_layer(folder, 0, device="meta").down_proj.is_meta


def test_a_multimodal_folder_nests_its_sizes_and_has_another_prefix(folder: Path, model: Any) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({n.replace("model.", "model.language_model."): t for n, t in load_file(path).items()}, path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {n.replace("model.", "model.language_model."): f for n, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    text = json.loads((folder / "config.json").read_text()) | {
        "model_type": "qwen3_vl_moe_text",
        "norm_topk_prob": False,
    }
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3_vl_moe", "text_config": text, "hidden_size": 3})
    )
    read = read_checkpoint_layer(folder, 2)
    assert_same(read, read_hf_block(block_of(model, 2)))
    assert read.model.norm_topk_prob is True  # its router renormalises whatever the config says


def test_a_single_file_goes_before_an_index(folder: Path, tmp_path: Path, model: Any) -> None:
    """As in transformers' from_pretrained."""
    write_folder(tmp_path / "other", shards=1)
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    (folder / INDEX).write_text("not even JSON")
    assert_same(read_checkpoint_layer(folder, 0), read_hf_block(block_of(model, 0)))


def test_the_hubs_cache_is_links_to_its_own_blobs(folder: Path, tmp_path: Path, model: Any) -> None:
    """snapshots/REVISION/name -> ../../blobs/HASH leaves the folder and is allowed; any other way out is not."""
    repository = tmp_path / "models--someone--something"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for n, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / f"hash{n}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{n}")
    assert_same(read_checkpoint_layer(snapshot, 2), read_hf_block(block_of(model, 2)))
    (repository / "blobs").rename(repository / "elsewhere")
    (repository / "blobs").symlink_to(repository / "elsewhere")
    with pytest.raises(WeightsError, match=r"config\.json' is a link that leaves the folder"):
        read_checkpoint_layer(snapshot, 2)


def test_links_inside_the_folder_and_to_the_folder_are_followed(folder: Path, tmp_path: Path, model: Any) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(folder / "real.safetensors")
    shard.symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert_same(read_checkpoint_layer(tmp_path / "link", 0), read_hf_block(block_of(model, 0)))


# --------------------------------------------------------------------------------------- counting openings and reads

_watching: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str | Path):
        _watching[-1].append(str(arguments[0]))


sys.addaudithook(_audit)  # cannot be taken back: it does nothing unless `opened` is in use


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that the process opens, by whatever means."""
    _watching.append([])
    yield _watching[-1]
    _watching.pop()


class Spy:
    """A raw file that notes which bytes are read, and may read `most` bytes at a time or end after `last` reads."""

    def __init__(self, path: Path, reads: list[tuple[Path, int, int]], most: int, last: int) -> None:
        self.path, self.reads, self.most, self.last = path, reads, most, last
        self.file = path.open("rb", buffering=0)

    def readinto(self, view: memoryview) -> int:
        start = self.file.tell()
        count = self.file.readinto(view[: self.most]) if len(self.reads) < self.last else 0
        self.reads.append((self.path, start, start + count))
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Path, int, int]]]:
    def install(most: int = 2**40, last: int = 2**40) -> list[tuple[Path, int, int]]:
        reads: list[tuple[Path, int, int]] = []
        monkeypatch.setattr(
            "moefactory.weights.shard.open", lambda path, *_, **__: Spy(path, reads, most, last), raising=False
        )
        return reads

    return install


def test_each_shard_of_the_layer_is_opened_once_and_no_other(saved: Path, opened: list[str]) -> None:
    read_checkpoint_layer(saved, 2)
    mine = [Path(path).name for path in opened if Path(path).parent == saved]
    files = json.loads((saved / INDEX).read_text())["weight_map"]
    needed = {file for name, file in files.items() if name.startswith("model.layers.2.mlp.")}
    assert sorted(mine) == sorted([*needed, "config.json", INDEX])
    assert needed < set(files.values())


def test_a_single_file_is_opened_once(tmp_path: Path, opened: list[str]) -> None:
    write_folder(tmp_path / "c", shards=1)
    opened.clear()
    read_checkpoint_layer(tmp_path / "c", 2)
    mine = [Path(path).name for path in opened if Path(path).parent == tmp_path / "c"]
    assert sorted(mine) == ["config.json", "model.safetensors"]


def test_only_the_layers_tensors_are_read_and_each_byte_of_them_once(saved: Path, spy: Any) -> None:
    reads = spy()
    read_checkpoint_layer(saved, 2)
    names, files = set(), json.loads((saved / INDEX).read_text())["weight_map"]
    for path in {path for path, _, _ in reads}:
        header, start = header_of(path)
        spans = {
            n: (start + v["data_offsets"][0], start + v["data_offsets"][1]) for n, v in header.items() if n[0] != "_"
        }
        data = sorted((a, b) for p, a, b in reads if p == path and a >= start)
        assert all(before[1] <= after[0] for before, after in pairwise(data))
        names |= {n for n, (a, b) in spans.items() for c, d in data if max(a, c) < min(b, d)}
        wanted = sum(b - a for n, (a, b) in spans.items() if n.startswith("model.layers.2.mlp."))
        assert sum(b - a for a, b in data) == wanted
    assert names == {name for name in files if name.startswith("model.layers.2.mlp.")}


@pytest.mark.parametrize("buffer", [1, 100, 3 * 16 * 8])
def test_a_small_buffer_reads_the_same(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch, buffer: int) -> None:
    """Less than a row, a row and a bit, three rows of float64: the pieces join without a seam."""
    monkeypatch.setattr("moefactory.weights.checkpoint.BUFFER_BYTES", buffer)
    assert_same(read_checkpoint_layer(folder, 0), read_hf_block(block_of(model, 0)))


def test_reads_that_stop_early_are_continued(folder: Path, model: Any, spy: Any) -> None:
    """Linux returns at most 2 GiB from one read: here 7 bytes."""
    spy(most=7)
    assert_same(read_checkpoint_layer(folder, 0), read_hf_block(block_of(model, 0)))


def test_a_file_that_shrinks_while_it_is_read_is_refused(folder: Path, spy: Any) -> None:
    """After the headers of three shards (two reads each) and one tensor."""
    reads = spy(last=7)
    with pytest.raises(WeightsError, match="the file ends early"):
        read_checkpoint_layer(folder, 0)
    assert len(reads) == 8


def test_no_file_stays_open(folder: Path) -> None:
    def held() -> list[str]:
        links = (f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd"))
        return [os.readlink(link) for link in links if os.path.islink(link) and str(folder) in os.readlink(link)]

    weights = read_checkpoint_layer(folder, 0)
    assert held() == [] and weights.gate.shape == (E, H)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(WeightsError):
        read_checkpoint_layer(folder, 0)
    assert held() == []


# ------------------------------------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (DENSE, r"layer=1 is dense.*; allowed: 0, 2-3"),
        (LAYERS, "layer=4; allowed: 0 to 3"),
        (-1, "layer=-1; allowed: 0 to 3"),
        (True, "layer=True; allowed: 0 to 3"),
        ("0", "layer='0'; allowed: 0 to 3"),
    ],
)
def test_a_dense_layer_or_none_is_refused_before_any_weights_file_is_opened(
    saved: Path, opened: list[str], layer: Any, message: str
) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint_layer(saved, layer)
    assert "\n" not in str(caught.value)
    assert [Path(path).name for path in opened if Path(path).parent == saved] == ["config.json"]


@pytest.mark.parametrize(
    ("dense", "step", "message"),
    [([1], 2, "allowed: none"), ([3, 4], 1, r"allowed: 0-2, 5$"), ([], 3, "allowed: 2, 5"), ([], 1, "")],
)
def test_the_sparse_layers_are_named(folder: Path, dense: list[int], step: int, message: str) -> None:
    """As transformers builds them: not listed as dense, and (layer + 1) a multiple of the step."""
    layers = 2 if message == "allowed: none" else 6
    change = {"mlp_only_layers": dense, "decoder_sparse_step": step, "num_hidden_layers": layers}
    write_config(folder, lambda c: c.update(change))
    config = Qwen3MoeConfig(vocab_size=8, hidden_size=H, num_attention_heads=2, num_key_value_heads=1, num_experts=E,
                            moe_intermediate_size=N, intermediate_size=8, **change)  # fmt: skip
    built = [hasattr(layer.mlp, "experts") for layer in Qwen3MoeForCausalLM(config).model.layers]
    for layer, sparse in enumerate(built):
        if not sparse:
            with pytest.raises(WeightsError, match=rf"layer={layer} is dense.*{message.removesuffix('$')}"):
                read_checkpoint_layer(folder, layer)
        elif layer in (0, 2):
            assert read_checkpoint_layer(folder, layer).model.num_experts == E


def test_paths_and_dtypes_that_cannot_be_are_refused(folder: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent", "does not exist; needed: a local folder"),
        ("Qwen/Qwen3-30B-A3B", "nothing is downloaded"),
        (folder / "config.json", "is a file; needed: the folder"),
        ("a\0b", "does not exist"),
    ):
        with pytest.raises(WeightsError, match=message):
            read_checkpoint_layer(path, 0)
    for dtype in (torch.int8, torch.float8_e4m3fn, "float32"):
        with pytest.raises(WeightsError, match=r"dtype=.*; allowed: None, torch\.float16"):
            read_checkpoint_layer(folder, 0, dtype)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- damaged folders

SECOND = "model-00002-of-00003.safetensors"
DOWN = "model.layers.0.mlp.experts.0.down_proj.weight"  # [16, 6] float32, in the second shard


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: write_config(folder, lambda c: c.update(values))


def drop_config(key: str) -> Callable[[Path], None]:
    return lambda folder: write_config(folder, lambda c: c.pop(key))


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def set_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def set_shard_name(name: Any) -> Callable[[Path], None]:
    """Tensor DOWN is said to be in a file of that name, and a good file of that name is outside the folder."""

    def apply(folder: Path) -> None:
        shutil.copy(folder / SECOND, folder.parent / "outside.safetensors")
        set_index(lambda index: index["weight_map"].update({DOWN: name}))(folder)

    return apply


def replace_file(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def link_out(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return apply


def only_pickle(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def set_tensors(change: Callable[[dict[str, Tensor]], object], listed: bool = True) -> Callable[[Path], None]:
    """Change the tensors of the second shard, and what the index says of them unless `listed` is false."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / SECOND)
        change(tensors)
        save_file(tensors, folder / SECOND)
        if listed:
            keep = {n: f for n, f in json.loads((folder / INDEX).read_text())["weight_map"].items() if f != SECOND}
            set_index(lambda index: index.update(weight_map=keep | dict.fromkeys(tensors, SECOND)))(folder)

    return apply


def add(name: str, tensor: Tensor, listed: bool = True) -> Callable[[Path], None]:
    return set_tensors(lambda t: t.update({name: tensor}), listed)


def put(tensor: Tensor) -> Callable[[Path], None]:
    return set_tensors(lambda tensors: tensors.update({DOWN: tensor}))


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    # config.json
    "no config": (lambda f: (f / "config.json").unlink(), "'config.json' does not exist"),
    "config is a folder": (replace_file("config.json", Path.mkdir), "'config.json' is not a regular file"),
    "config is a pipe": (replace_file("config.json", os.mkfifo), "'config.json' is not a regular file"),
    "config empty": (text("config.json", ""), "config.json: not valid JSON"),
    "config truncated": (text("config.json", '{"hidden_size": 1'), "config.json: not valid JSON"),
    "config not UTF-8": (text("config.json", b'{"\xff": 1}'), "config.json: not valid JSON"),
    "config UTF-16": (text("config.json", "{}".encode("utf-16")), "config.json: not valid JSON"),
    "config with NaN": (text("config.json", '{"hidden_size": NaN}'), "config.json: not valid JSON: NaN"),
    "config with a long number": (text("config.json", '{"a": ' + "9" * 5000 + "}"), "config.json: not valid JSON"),
    "config nested": (text("config.json", '{"a": ' + "[" * 200_000), "config.json: not valid JSON: nested too deeply"),
    "config twice": (text("config.json", '{"hidden_size": 16, "hidden_size": 16}'), "key 'hidden_size' appears twice"),
    "config too large": (text("config.json", '{"a": "' + "a" * 2**20 + '"}'), "config.json: has more than 1048576"),
    "config a list": (text("config.json", "[1]"), "needed: a JSON object"),
    "config linked out": (link_out("config.json"), "'config.json' is a link that leaves the folder"),
    "no hidden_size": (drop_config("hidden_size"), "hidden_size=None; needed: an integer"),
    "no norm_topk_prob": (drop_config("norm_topk_prob"), "norm_topk_prob=None; needed: true or false"),
    "no num_experts": (drop_config("num_experts"), "num_experts=None; needed"),
    "no num_hidden_layers": (drop_config("num_hidden_layers"), "num_hidden_layers=None; allowed: 1 to"),
    "hidden_size text": (set_config(hidden_size="16"), "hidden_size='16'; needed: an integer"),
    "hidden_size bool": (set_config(hidden_size=True), "hidden_size=True; needed: an integer"),
    "hidden_size float": (set_config(hidden_size=16.0), "hidden_size=16.0; needed: an integer"),
    "moe_intermediate_size 0": (set_config(moe_intermediate_size=0), "moe_intermediate_size=0; needed"),
    "norm a number": (set_config(norm_topk_prob=1), "norm_topk_prob=1; needed: true or false"),
    "activation a list": (set_config(hidden_act=["silu"]), "hidden_act=.*; needed: the name"),
    "top_k": (set_config(num_experts_per_tok=7), "num_experts_per_tok=7; allowed: 1 to num_experts=6"),
    "another count of experts": (set_config(num_local_experts=5), "num_experts=6 and num_local_experts=5 disagree"),
    "many layers": (set_config(num_hidden_layers=10**15), "num_hidden_layers=1000000000000000; allowed"),
    "step 0": (set_config(decoder_sparse_step=0), "decoder_sparse_step=0"),
    "dense layers a number": (set_config(mlp_only_layers=7), "mlp_only_layers=7"),
    "dense layers text": (set_config(mlp_only_layers="1"), "mlp_only_layers='1'"),
    "text_config a list": (set_config(text_config=[]), "text_config=.*; needed: an object"),
    "another family": (set_config(model_type="flint"), "model_type='flint'.*known: qwen3_moe"),
    "family a list": (set_config(model_type=["qwen3_moe"]), "model_type=.*known: qwen3_moe"),
    "auto_map": (set_config(auto_map={"AutoModel": "x.Y"}), "auto_map is set: code"),
    "trust_remote_code": (set_config(trust_remote_code=True), "trust_remote_code is set: code"),
    "quantised config": (set_config(quantization_config={"bits": 4}), "quantization_config is set: quantised"),
    "weights elsewhere": (set_config(transformers_weights="../x.safetensors"), "transformers_weights is set"),
    "hub implementation": (
        set_config(_attn_implementation_internal="someone/kernel"),
        "'_attn_implementation_internal'='someone/kernel' names code",
    ),
    "fewer experts": (set_config(num_experts=5), "unexpected tensor 'experts.5.down_proj.weight': not one of the 5"),
    "more experts": (set_config(num_experts=7), "experts.6.gate_proj.weight is missing"),
    "a trillion experts": (set_config(num_experts=10**12), "experts.6.gate_proj.weight is missing"),
    "another hidden_size": (set_config(hidden_size=10**9), "has shape .*, the config gives"),
    "another moe_intermediate_size": (set_config(moe_intermediate_size=9), "has shape .*, the config gives"),
    # the index
    "no weights": (lambda f: (f / INDEX).unlink(), "has neither model.safetensors nor .*; 'model-"),
    "pickle alone": (only_pickle, "'pytorch_model.bin' is pickle, which is never read"),
    "index empty": (text(INDEX, ""), "index.json: not valid JSON"),
    "index a list": (text(INDEX, "[]"), "index.json: holds .*needed: a JSON object"),
    "index without map": (text(INDEX, "{}"), "weight_map=None; needed: an object"),
    "map a list": (text(INDEX, '{"weight_map": ["a"]}'), "weight_map=.*; needed: an object"),
    "map empty": (text(INDEX, '{"weight_map": {}}'), "weight_map=.*; needed: an object"),
    "map to numbers": (set_shard_name(1), "weight_map=.*; needed: an object"),
    "tensor twice": (text(INDEX, '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'), "'a' appears twice"),
    "shard above": (set_shard_name("../outside.safetensors"), "'../outside.safetensors' is not allowed"),
    "shard below": (set_shard_name("sub/x.safetensors"), "'sub/x.safetensors' is not allowed"),
    "shard absolute": (
        lambda f: set_shard_name(str(f.parent / "outside.safetensors"))(f),
        r"/.*outside\.safetensors' is not allowed|is not allowed; needed: a plain name",
    ),
    "shard backslash": (set_shard_name("..\\x.safetensors"), "is not allowed; needed: a plain name"),
    "shard with a newline": (set_shard_name("a\nb.safetensors"), "is not allowed; needed: a plain name"),
    "shard with a null": (set_shard_name("a\0b.safetensors"), "is not allowed; needed: a plain name"),
    "shard with a drive": (set_shard_name("c:x.safetensors"), "is not allowed; needed: a plain name"),
    "shard unnamed": (set_shard_name(""), "is not allowed; needed: a plain name"),
    "shard the parent": (set_shard_name(".."), "is not allowed; needed: a plain name"),
    "shard of pickle": (set_shard_name("pytorch_model.bin"), "only .safetensors files are read, never pickle"),
    "shard linked out": (link_out(SECOND), f"'{SECOND}' is a link that leaves the folder"),
    "shard linked to itself": (replace_file(SECOND, lambda p: p.symlink_to(p.name)), "cannot be read"),
    "shard missing": (lambda f: (f / SECOND).unlink(), f"'{SECOND}' does not exist"),
    "shard a folder": (replace_file(SECOND, Path.mkdir), f"'{SECOND}' is not a regular file"),
    "shard a pipe": (replace_file(SECOND, os.mkfifo), f"'{SECOND}' is not a regular file"),
    "single file linked to nothing": (lambda f: (f / "model.safetensors").symlink_to("x"), "does not exist"),
    # the layer's tensors
    "tensor not listed": (set_index(lambda i: i["weight_map"].pop(DOWN)), "experts.0.down_proj.weight is missing"),
    "layer not listed": (
        set_index(lambda i: i.update(weight_map={n: f for n, f in i["weight_map"].items() if "layers.0" not in n})),
        "has tensors under none of model.layers.0.mlp.",
    ),
    "tensor missing in the shard": (set_tensors(lambda t: t.pop(DOWN), listed=False), f"tensor '{DOWN}' is missing"),
    "tensor hidden from the index": (
        add("model.layers.0.mlp.shared_expert.weight", torch.ones(1), listed=False),
        f"{SECOND}: tensor 'model.layers.0.mlp.shared_expert.weight' is there, but not according to the index",
    ),
    "two prefixes": (add("model.language_model.layers.0.mlp.gate.weight", torch.ones(1)), "under .* and .*needed: one"),
    "shared expert": (add("model.layers.0.mlp.shared_expert.up_proj.weight", torch.ones(1)), "with a shared expert"),
    "bias": (add("model.layers.0.mlp.experts.0.up_proj.bias", torch.ones(8)), "biases are not supported"),
    "another router": (add("model.layers.0.mlp.gate.e_score_correction_bias", torch.ones(6)), "not Qwen3's softmax"),
    "scale": (add(f"{DOWN}_scale_inv", torch.ones(1)), "quantised experts are not supported"),
    "both layouts": (add("model.layers.0.mlp.experts.down_proj", torch.ones(E, H, N)), "in the fused layout"),
    "a seventh expert": (add("model.layers.0.mlp.experts.6.up_proj.weight", torch.ones(N, H)), "not one of the 6"),
    "hostile name": (add("model.layers.0.mlp.\x1b[2J\n../x", torch.ones(1)), r"unexpected tensor '\\x1b\[2J\\n"),
    "float8": (put(torch.ones(H, N).to(torch.float8_e4m3fn)), "is F8_E4M3, quantised"),
    "int8": (put(torch.ones(H, N, dtype=torch.int8)), "is I8, quantised"),
    "shape": (put(torch.ones(H, N + 1)), r"has shape \[16, 7\], the config gives \[16, 6\]"),
    "transposed": (put(torch.ones(N, H)), r"has shape \[6, 16\], the config gives"),
    "flat": (put(torch.ones(H * N)), r"has shape \[96\], the config gives"),
    "mixed dtypes": (put(torch.ones(H, N).half()), "dtype=None: .* has dtype F.*needed: one dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_damaged_folder_is_refused(folder: Path, case: str) -> None:
    """In one line that names the file or the tensor. The same folder, undamaged, is read by the tests above."""
    damage, message = FOLDERS[case]
    damage(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        read_checkpoint_layer(folder, 0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and str(caught.value).isprintable()


def test_mixed_dtypes_are_read_once_a_dtype_is_stated(folder: Path, model: Any) -> None:
    set_tensors(lambda t: t.update({DOWN: t[DOWN].double()}))(folder)
    assert_same(read_checkpoint_layer(folder, 0, torch.float32), read_hf_block(block_of(model, 0)))


def test_the_transposed_layout_of_old_qwen3_vl_files_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "c", "fused", shards=1)
    path = tmp_path / "c" / "model.safetensors"
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({n: t.mT.contiguous() if n == name else t for n, t in load_file(path).items()}, path)
    with pytest.raises(WeightsError, match=r"gate_up_proj' has shape \[6, 16, 12\].*the transposed layout"):
        read_checkpoint_layer(tmp_path / "c", 0)


# ----------------------------------------------------------------------------------------------------- damaged shards


def set_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Change the header of a shard; what is returned goes in its place (bytes as they are)."""

    def apply(raw: bytes) -> bytes:
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        changed = change(header)
        made = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
        return struct.pack("<Q", len(made)) + made + raw[8 + length :]

    return apply


def entry(**values: Any) -> Callable[[bytes], bytes]:
    """Change the header's line of tensor DOWN; None takes a key away."""

    def change(header: dict[str, Any]) -> None:
        header[DOWN] = {key: value for key, value in {**header[DOWN], **values}.items() if value is not None}

    return set_header(change)


def offsets(begin: int, end: int) -> Callable[[bytes], bytes]:
    def change(header: dict[str, Any]) -> None:
        a, b = header[DOWN]["data_offsets"]
        header[DOWN]["data_offsets"] = [a + begin, b + end]

    return set_header(change)


def swap(header: dict[str, Any]) -> None:
    """Two tensors over the same bytes, the other's bytes unused."""
    other = next(n for n in header if n not in {DOWN, "__metadata__"} and header[n]["shape"] == header[DOWN]["shape"])
    header[other] = header[DOWN]


SHARDS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "the file ends early"),
    "seven bytes": (lambda raw: raw[:7], "the file ends early"),
    "length alone": (lambda raw: raw[:8], "is the file truncated"),
    "half a header": (lambda raw: raw[:100], "is the file truncated"),
    "one byte less": (lambda raw: raw[:-1], "truncated or corrupt"),
    "half the tensors": (lambda raw: raw[: len(raw) * 3 // 4], "truncated or corrupt"),
    "trailing byte": (lambda raw: raw + b"\0", "truncated or corrupt"),
    "no header": (lambda raw: struct.pack("<Q", 0) + raw[8:], "does not begin with"),
    "giant header": (lambda raw: struct.pack("<Q", 2**63) + raw[8:], "the header has 9223372036854775808 bytes"),
    "longer header": (lambda raw: struct.pack("<Q", len(raw)) + raw[8:], "is the file truncated"),
    "pickle": (lambda raw: pickle.dumps({"a": 1}) + bytes(100), "is the file truncated"),
    "text": (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is the file truncated"),
    "header a list": (set_header(lambda h: [1]), "does not begin with"),
    "header not JSON": (set_header(lambda h: b"{abc}"), "not valid JSON"),
    "header not UTF-8": (set_header(lambda h: b'{"\xff\xfe": 1}'), "not valid JSON"),
    "header with a tail": (set_header(lambda h: json.dumps(h).encode() + b"x"), "not valid JSON"),
    "header with NaN": (entry(shape=[float("nan")]), "not valid JSON: NaN"),
    "empty header": (set_header(lambda h: b"{}"), "truncated or corrupt"),
    "metadata of numbers": (set_header(lambda h: h.update(__metadata__={"a": 1})), "__metadata__ is not"),
    "metadata a list": (set_header(lambda h: h.update(__metadata__=["a"])), "__metadata__ is not"),
    "entry a list": (set_header(lambda h: h.update({DOWN: [1]})), "needs dtype, shape and data_offsets"),
    "no dtype": (entry(dtype=None), "needs dtype, shape and data_offsets"),
    "no shape": (entry(shape=None), "needs dtype, shape and data_offsets"),
    "no offsets": (entry(data_offsets=None), "needs dtype, shape and data_offsets"),
    "unknown dtype": (entry(dtype="F13"), "unknown dtype 'F13'"),
    "dtype a number": (entry(dtype=32), "unknown dtype 32"),
    "shape negative": (entry(shape=[-16, -6]), "has shape .*; needed: whole numbers"),
    "shape of floats": (entry(shape=[16.0, 6.0]), "has shape .*; needed: whole numbers"),
    "shape text": (entry(shape="8"), "has shape '8'; needed: whole numbers"),
    "shape too large": (entry(shape=[16, 7]), "which disagree"),
    "shape overflows": (entry(shape=[2**62, 2**62, 8]), "which disagree"),
    "another dtype": (entry(dtype="F16"), "which disagree"),
    "begin alone": (entry(data_offsets=[0]), "needed: .begin, end"),
    "end before begin": (entry(data_offsets=[384, 0]), "needed: .begin, end"),
    "negative offsets": (entry(data_offsets=[-384, 0]), "has data_offsets .*; needed: whole numbers"),
    "offsets of text": (entry(data_offsets=["0", "384"]), "has data_offsets .*; needed: whole numbers"),
    "offsets beyond the file": (entry(data_offsets=[2**40, 2**40 + 384]), "hole or overlap"),
    "shifted": (offsets(4, 4), "hole or overlap"),
    "shared bytes": (set_header(swap), "hole or overlap"),
    "two names for the same bytes": (set_header(lambda h: h.update(alias=h[DOWN])), "hole or overlap"),
}
# Refused by us and taken by safetensors: nobody writes them, and what they mean is a guess.
STRICTER: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "tensor twice": (
        set_header(lambda h: json.dumps(h)[:-1].encode() + b"," + json.dumps({DOWN: h[DOWN]})[1:].encode()),
        f"key '{DOWN}' appears twice",
    ),
    "more in an entry": (entry(more=1), "needs dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("case", [*SHARDS, *STRICTER])
def test_a_damaged_shard_is_refused_wherever_safetensors_refuses_it(folder: Path, case: str) -> None:
    """The message names the file. safetensors' own reader is the reference for what is damaged."""
    damage, message = {**SHARDS, **STRICTER}[case]
    path = folder / SECOND
    path.write_bytes(damage(path.read_bytes()))
    if case in SHARDS:
        with pytest.raises(SafetensorError):
            with safe_open(path, "pt"):
                pass
    with pytest.raises(WeightsError, match=f"{SECOND}: .*{message}") as caught:
        read_checkpoint_layer(folder, 0)
    assert "\n" not in str(caught.value)


def test_a_shard_cut_anywhere_is_refused(folder: Path) -> None:
    """Every length from 0 to all but one byte, in steps of a prime: never a crash, never a silent read."""
    path = folder / SECOND
    raw = path.read_bytes()
    for length in [*range(0, len(raw), 97), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(WeightsError, match=SECOND):
            read_checkpoint_layer(folder, 0)


def test_any_byte_of_a_header_may_be_wrong(folder: Path, model: Any) -> None:
    """400 times one byte changed: a WeightsError, or a change that this layer does not see and safetensors takes."""
    path = folder / SECOND
    raw = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(400):
        at = int(torch.randint(0, header_of_length(raw), (), generator=generator))
        value = int(torch.randint(0, 256, (), generator=generator))
        path.write_bytes(raw[:at] + bytes([value]) + raw[at + 1 :])
        try:
            read = read_checkpoint_layer(folder, 0)
        except WeightsError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert_same(read, read_hf_block(block_of(model, 0)))
            with safe_open(path, "pt"):
                pass
    assert refused > 300


def header_of_length(raw: bytes) -> int:
    return 8 + int(struct.unpack("<Q", raw[:8])[0])
