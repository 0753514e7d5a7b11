"""What is wrong with an override of the block's configuration: one line, with the nearest name."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import ConfigError, MoeConfig, allowed_values, brief, field_paths, from_mapping, nearest, shorten
from .rules import RULES


def diagnose(key: str, value: Any, loader: Any) -> None:
    """Raise the ConfigError that says what is wrong with ``moe/group=option`` or ``moe.key=value``, if something is.

    Args:
        key: as on the command line, without ``+``.
        value: as Hydra reads it.
        loader: Hydra's config loader, which knows the groups and their options.
    """
    if key == "moe" or "/" in key:
        _diagnose_group(key.split("@", 1)[0], value, loader)
        return
    below = key.split(".")[1:]
    nodes = value
    for part in reversed(below):
        nodes = {part: nodes}
    if not isinstance(nodes, dict):
        return
    allowed = allowed_values(".".join(below))
    if not isinstance(value, dict) and "a mapping" in allowed:  # in Python a node of the kernels may be None or a pair
        raise ConfigError(f"{key}: got {came(value)}{allowed}{_group_hint('.'.join(below), value, loader)}")
    try:
        from_mapping(nodes)
    except ConfigError as error:
        raise ConfigError(prefixed(str(error))) from None


def check_interpolation(key: str, value: Any) -> None:
    """Raise ConfigError for an interpolation that cannot be read."""
    try:
        OmegaConf.create([value])
    except OmegaConfBaseException:
        raise ConfigError(f"{key}: got {shorten(value)}, which cannot be read; allowed: ${{KEY}}, or a value") from None


def _group_hint(name: str, value: Any, loader: Any) -> str:
    """`moe.backend=triton` was meant to be `moe/backend=triton`."""
    if name not in loader.list_groups("moe"):
        return ""
    options = loader.get_group_options(f"moe/{name}")
    return f" (did you mean moe/{name}={value if value in options else 'NAME'}?)"


def _diagnose_group(group: str, value: Any, loader: Any) -> None:
    groups = ["moe", *(f"moe/{name}" for name in loader.list_groups("moe"))]
    if group not in groups:
        path = group.replace("/", ".").removeprefix("moe.")
        text = brief(str(value).lower() if isinstance(value, bool) else str(value))
        hint = f" (did you mean moe.{path}={text}?)" if path in field_paths() else nearest(group, groups)
        raise ConfigError(f"{group}: no such group; allowed: {', '.join(groups)}{hint}")
    options = loader.get_group_options(group)
    if not isinstance(value, str) or value not in options:
        hint = nearest(str(value), options)
        raise ConfigError(f"{group}: got {came(value)}; allowed: {', '.join(options)}{hint}")


def came(value: Any) -> str:
    """A value as the command line has it, in short."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return brief(str(value)) if isinstance(value, list) else shorten(value)


def prefixed(message: str) -> str:
    """A message about a key of the block, such as ``model.top_k: ...``, with the key as the command line has it.

    That of a broken rule begins with the rule's id, and its keys stand anywhere behind it. A rule's id may be a key
    too, as ``saved`` is; the message about a key says what it got.
    """
    for rule in RULES:
        if message.startswith(f"{rule.id}: ") and not message.startswith(f"{rule.id}: got "):
            return f"{rule.id}: {prefixed_rule(rule.id, message.removeprefix(f'{rule.id}: '))}"
    names = "|".join(f.name for f in fields(MoeConfig))
    message = re.sub(rf"^({names})(?=[.:= ])", r"moe.\1", message)
    message = re.sub(r"^(layer|path)(?==)", r"moe.weights.\1", message)
    message = re.sub(rf"\(did you mean '({names})(?=['.])", r"(did you mean 'moe.\1", message)
    # What from_mapping says about a key that the schema lacks, or that begins with '_'.
    unknown = re.match(r"[\w.]+(?=: (?:no such key|keys that begin))", message)
    return f"moe.{message}" if unknown and not message.startswith("moe.") else message


def prefixed_rule(rule_id: str, text: str) -> str:
    """What a rule found, or its repair, with the keys that the rule reads as the command line has them."""
    keys = next(rule.keys for rule in RULES if rule.id == rule_id)
    return re.sub(rf"(?<![\w./'])({'|'.join(map(re.escape, keys))})(?!\w)", r"moe.\1", text)


def unknown_key(key: str, allowed: list[str]) -> ConfigError:
    """An unknown key at the root; the hint may be a key of the block that was written without ``moe``."""
    hint = nearest(key, allowed)
    if "moe" in allowed:
        last = key.rsplit(".", 1)[-1]
        inside = next((path for path in field_paths() if last in {path, path.split(".")[-1]}), None)
        if key in {"backend", "model", "weights", "kernels"}:
            hint = f" (did you mean 'moe/{key}=...'?)"
        elif inside:
            hint = f" (did you mean 'moe.{inside}'?)"
    return ConfigError(f"{key}: no such key; allowed: {', '.join(allowed)}{hint}")


def one_line(error: BaseException, limit: int = 400) -> str:
    """An error's message as one line, with its cause's where that says more."""
    parts = [" ".join(str(e).split()) for e in (error, error.__cause__) if e is not None]
    text = "; ".join(dict.fromkeys(p for p in parts if p)) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
