"""One override of the command line, as Hydra reads it; what cannot be read or is not for us is refused in one line.

Hydra's grammar is for applications that compose, sweep and relocate. Here a configuration is there as a whole: its
values are set, its options are chosen, and nothing is added, deleted or moved.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

from .config import ConfigError, brief, shorten

RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)
MAX_KEY = 200  # characters; the longest key of the schema has 35


def parse(text: str, judge: Callable[[str, Any], None]) -> Any:
    """One override as Hydra reads it. ConfigError for what a command line of ours does not take.

    `judge` raises it for a key or a value that cannot be.
    """
    typed, _, value = text.partition("=")
    key = typed.lstrip("+~")
    if text.startswith("-"):
        raise ConfigError(
            f"{brief(key)}: no such flag; allowed: --help; settings are written key=value, `moefactory show` prints "
            "what would run, and sweeps belong in an application of your own"
        )
    if len(key) > MAX_KEY:
        raise ConfigError(f"{brief(key)}: no such key; allowed: at most {MAX_KEY} characters, see --help")
    if RESOLVER.search(text):
        raise ConfigError(f"{key}: resolvers such as ${{oc.env:NAME}} are not accepted; write the value itself")
    if re.match(r"hydra[./=]", text.lstrip("+~")) and key != "hydra.searchpath":
        raise ConfigError(f"{key}: Hydra's own settings do nothing here; allowed: hydra.searchpath")
    if text.startswith("~"):
        raise ConfigError(f"{key}: this command line deletes nothing; allowed: key=value, or group=option (moe=qwen3)")
    if "@" in key[1:] and value:
        group = key.partition("@")[0]
        raise ConfigError(f"{key}: this command line moves no group to another place; allowed: {group}={brief(value)}")
    override = _read(text)
    if override is None or not override.key_or_group:
        raise _unreadable(text, judge)
    key = override.key_or_group
    if override.is_sweep_override():
        several = f"{key}: got several values; allowed: one (moefactory runs one configuration at a time)"
        more = f"; a list is [a,b], and text with a comma needs quotes, {_quoted(key, value)}"
        raise ConfigError(several if key == "moe" or "/" in key else several + more)
    return override


def refuse_adding(override: Any, own_files: bool) -> None:
    """Raise ConfigError for a ``+`` before what is there: of ours all is, the user's own files may bring groups."""
    group = "/" in override.key_or_group or override.key_or_group == "moe"
    if (override.is_add() or (override.is_force_add() and group)) and not (group and own_files):
        typed = brief(override.input_line.lstrip("+"))
        raise ConfigError(f"{override.key_or_group}: this command line adds nothing; allowed: {typed}, without a plus")


def _read(text: str) -> Any:
    """An override as Hydra reads it, or None where it cannot."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except HydraException:
        return None


def _unreadable(text: str, judge: Callable[[str, Any], None]) -> ConfigError:
    """What to say of an override that Hydra cannot read: where its key is good, mostly that the value needs quotes.

    Hydra reads letters, digits and some signs without quotes, but not a ``~``, an accent, a bracket or a ``=``.
    """
    typed, _, value = text.partition("=")
    key = typed.lstrip("+")
    no_override = ConfigError(f"{shorten(text)} is no override; allowed: key=value or group=option")
    if not key or "=" not in text or _read(f"{typed}=0") is None:
        return no_override
    if key == "hydra.searchpath":
        return ConfigError(f"{key}: got {shorten(value)}; allowed: a list such as \"{key}=['file:///folder/conf']\"")
    judge(key, value)  # where no text is allowed, quotes would not help
    if "/" in key or key == "moe":  # a group of the user's own files
        return no_override
    quoted = _quoted(key, value.strip(value[0]) if value[:1] in {"'", '"'} else value)  # quotes of its own do not match
    return ConfigError(f"{key}: got {shorten(value)}, which needs quotes; allowed: {quoted} (as typed in a shell)")


def _quoted(key: str, text: str) -> str:
    """How to type ``key=text`` in a shell where Hydra needs quotes around the text."""
    from hydra.core.override_parser.types import Quote, QuotedString

    override = f"{key}={QuotedString(text if len(text) < 200 else '...', Quote.single).with_quotes()}"
    special = re.search(r'["$`!]|\\\\', override)  # to a shell, within double quotes
    return shlex.quote(override) if special else f'"{override}"'
