"""From the words of a command line to a checked configuration: Hydra composes, every refusal is one line.

Hydra is used to compose and for nothing else: no output folder, no logging, no instantiate. An override may not bring a
resolver (``${oc.env:...}``): what it resolves to would end up in an error message or a report.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from .config import ConfigError, MoeConfig, allowed_values, field_paths, from_mapping, nearest, shorten
from .overrides import RESOLVER, parse, refuse_adding
from .refusals import came, check_interpolation, diagnose, one_line, prefixed, unknown_key

_NODE_KEYS = {"_target_": "moefactory.factory.from_nodes", "_recursive_": False}  # of the schema, for instantiate
MAX_TOKENS = 2**20


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        options: the verb's own settings, such as tokens and format.
        config: of the block; None for a verb that needs none.
    """

    options: dict[str, Any]
    config: MoeConfig | None


@dataclass(frozen=True)
class Option:
    """One of a verb's own settings: its type and what is allowed, in words.

    With `many` it is a list of such values, each once, and one value stands for a list of one.
    """

    kind: type
    allowed: str
    choices: tuple[str, ...] = ()
    least: int = 0
    most: int = 2**31
    optional: bool = False
    many: bool = False
    empty: bool = False

    def fits(self, value: Any) -> bool:
        """Whether a value is allowed."""
        if value is None:
            return self.optional
        if self.many and isinstance(value, list):
            return all(map(self.fits_one, value)) and len(set(value)) == len(value) and (self.empty or bool(value))
        return self.fits_one(value)

    def fits_one(self, value: Any) -> bool:
        """Whether a single value is allowed."""
        if type(value) is not self.kind:  # a bool is an int to isinstance
            return False
        if isinstance(value, int):
            return self.least <= value <= self.most
        return not self.choices or value in self.choices


def _list_of(*choices: str, optional: bool = False, empty: bool = False) -> Option:
    allowed = f"a list of {', '.join(choices)}, each once{', or null' if optional else ''}"
    return Option(str, allowed, choices, optional=optional, many=True, empty=empty)


_TABLE_JSON = Option(str, "table, json", ("table", "json"))
_SWITCH = Option(bool, "true, false")
_TOKENS = Option(int, f"an integer from 1 to {MAX_TOKENS}", least=1, most=MAX_TOKENS)
_TOKEN_LIST = Option(int, f"a list of integers from 1 to {MAX_TOKENS}, each once", least=1, most=MAX_TOKENS, many=True)
OPTIONS: dict[str, dict[str, Option]] = {
    "show": {"tokens": _TOKENS, "format": _TABLE_JSON},
    "build": {"tokens": _TOKENS, "format": _TABLE_JSON},
    "check": {
        "tokens": _TOKENS,
        "seed": Option(int, "an integer of 0 or more"),
        "cache": Option(str, "a folder, or null", optional=True),
        "format": _TABLE_JSON,
    },
    "tune": {
        "tokens": _TOKEN_LIST,
        "passes": _list_of("fwd", "bwd_dX", "bwd_dW"),
        "redo": _SWITCH,
        "format": _TABLE_JSON,
    },
    "bench": {
        "tokens": _TOKEN_LIST,
        "models": _list_of("tiny", "qwen3_30b_a3b", "qwen3_235b_a22b", optional=True),
        "backends": _list_of("torch", "triton", optional=True),
        "peers": _list_of("hf_eager", "hf_grouped_mm", "hf_grouped_mm_compiled", optional=True, empty=True),
        "graph": _SWITCH,
        "routing": Option(str, "random, balanced, zipf, one", ("random", "balanced", "zipf", "one")),
        "seed": Option(int, "an integer of 0 or more"),
        "ms": Option(int, "an integer from 1 to 60000", least=1, most=60_000),
        "format": Option(str, "table, json, csv", ("table", "json", "csv")),
        "out": Option(str, "a file, or null", optional=True),
        "plot": Option(str, "a file, or null", optional=True),
    },
    "matrix": {"format": Option(str, "table, json, csv, github", ("table", "json", "csv", "github"))},
    "doctor": {"format": _TABLE_JSON},
}
WITHOUT_BLOCK = ("matrix", "doctor")


def compose(verb: str, overrides: Sequence[str]) -> Request:
    """Compose the primary config of a verb with the overrides, and check all of it.

    Raises:
        ConfigError: anything that cannot be: one line with the key, what came, what is allowed, the nearest name.
    """
    # With hydra.searchpath there may be groups and options that the loader does not know of.
    own_files = any(text.lstrip("+").startswith("hydra.searchpath") for text in overrides)
    with _hydra() as loader:
        from hydra import compose as hydra_compose

        judge = partial(_diagnose, verb, loader, own_files)
        parsed = [parse(text, judge) for text in overrides]
        for override in parsed:
            if override.input_line.startswith("+"):
                judge(override.key_or_group, override.value())
                refuse_adding(override, own_files)
        try:
            nodes = _plain(verb, hydra_compose(f"moefactory_{verb}", overrides=list(overrides)))
        except Exception as error:
            # Hydra's own words are for an application that runs under hydra.main: they advise +key for a typo.
            for override in parsed:
                judge(override.key_or_group, override.value())
            raise ConfigError(one_line(error)) from error
    _check_root(verb, nodes)
    options = {name: _checked(name, option, nodes.get(name)) for name, option in OPTIONS[verb].items()}
    return Request(options, None if verb in WITHOUT_BLOCK else _moe_config(nodes))


@contextmanager
def _hydra() -> Iterator[Any]:
    """Hydra's config loader, ready to compose from our presets; an application's own Hydra is put aside meanwhile."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    from .schema import register

    former, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    before_1_4 = tuple(int(n) for n in hydra.__version__.split(".")[:2]) < (1, 4)
    try:
        with hydra.initialize_config_module("moefactory.conf", **({"version_base": "1.3"} if before_1_4 else {})):
            if "moefactory" not in ConfigStore.instance().repo:  # our plugin was not found: an editable install, say
                register()
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = former  # by now another instance: Hydra restores a copy


def _plain(verb: str, config: Any) -> dict[str, Any]:
    """The composed config as plain containers, interpolations resolved, resolvers refused."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    leaves = _leaves(OmegaConf.to_container(config, resolve=False), "")
    brought = [(path, value) for path, value in leaves if isinstance(value, str) and "${" in value]
    for path, value in brought:
        if RESOLVER.search(value):
            raise ConfigError(f"{path}: resolvers such as ${{oc.env:NAME}} are not accepted; write the value itself")
    for path, value in brought:  # now none of them leads to a resolver
        try:
            OmegaConf.select(config, path)
        except (OmegaConfBaseException, RecursionError):
            own = OPTIONS[verb].get(path.split(".", maxsplit=1)[0])
            allowed = f"; allowed: {own.allowed}" if own else allowed_values(path.removeprefix("moe."))
            raise ConfigError(f"{path}: got {shorten(value)}, which brings no such value{allowed}") from None
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield f"{prefix}{key}", value
        yield from _leaves(value, f"{prefix}{key}.")


def _root_keys(verb: str) -> list[str]:
    return [*([] if verb in WITHOUT_BLOCK else ["moe"]), *OPTIONS[verb]]


def _check_root(verb: str, nodes: dict[str, Any]) -> None:
    allowed = _root_keys(verb)
    for key in nodes:
        if key not in allowed:
            raise unknown_key(key, allowed)
    if "moe" in allowed and not isinstance(nodes.get("moe"), dict):
        raise ConfigError(f"moe: got {came(nodes.get('moe'))}; allowed: a preset such as moe=qwen3")


def _checked(name: str, option: Option, value: Any) -> Any:
    values = value if isinstance(value, list) and option.many else [value]
    if not option.fits(value):
        unfit = [v for v in values if not option.fits_one(v)]
        hint = nearest(str(unfit[0]), list(option.choices)) if option.choices and unfit else ""
        raise ConfigError(f"{name}: got {came(value)}; allowed: {option.allowed}{hint}")
    return values if option.many and value is not None else value


def _moe_config(nodes: dict[str, Any]) -> MoeConfig:
    moe = dict(nodes["moe"])
    for key, value in _NODE_KEYS.items():
        if moe.pop(key, value) != value:
            raise ConfigError(f"moe.{key}: is fixed; choose backend and weights by name, such as moe/backend=triton")
    try:
        return from_mapping(moe)
    except ConfigError as error:
        raise ConfigError(prefixed(str(error))) from None


def _diagnose(verb: str, loader: Any, own_files: bool, key: str, value: Any) -> None:
    """Raise the ConfigError that says what is wrong with a key and its value, if something is."""
    if key == "hydra.searchpath":
        return
    is_group = key == "moe" or "/" in key
    if is_group and own_files:
        return
    head = key if is_group and verb in WITHOUT_BLOCK else re.split(r"[./]", key, maxsplit=1)[0]
    if head not in _root_keys(verb) or head not in {"moe", key}:
        raise unknown_key(key, _root_keys(verb))
    if "${" in str(value) and not is_group:
        check_interpolation(key, value)
        if head != "moe" or key.removeprefix("moe.") in field_paths():
            return  # what it brings is seen when all is composed
    if head != "moe":
        _checked(head, OPTIONS[verb][head], value)
    else:
        diagnose(key, value, loader)
