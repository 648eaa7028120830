"""Command-line words to raw values by flag name. Knows the flags' names and shapes, not their bounds.

Accepted: `--flag value`, `--flag=value`, underscores for dashes, `--no-flag` for booleans, several values for
"texts", `--flag.key value` for JSON objects, short flags, and one bare word: the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.flags.names import find
from jaxserve.flags.table import BY_SHORT, Flag


@dataclass(slots=True)
class CommandLine:
    """What was typed. Mutable while it is read. `help` is None, "" for the overview, or a topic."""

    values: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    help: str | None = None
    version: bool = False


def read(words: Sequence[str]) -> CommandLine:
    """Raises ConfigError for words that are no flag, and flags that lack a value."""
    line = CommandLine()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            if "model" in line.values:
                raise ConfigError(f"{word!r} is one word too many: the model is {line.values['model']!r} already")
            line.values["model"] = word
            continue
        name, equals, inline = word.partition("=")
        if equals:
            rest.insert(0, inline)
        if name in ("--help", "-h", "--version", "-v", "--config"):
            _own(line, name, bool(equals), rest)
        else:
            _flag(line, name, bool(equals), rest)
    return line


def _own(line: CommandLine, name: str, has_inline: bool, rest: list[str]) -> None:
    """The three words that are about the command line itself."""
    if name in ("--version", "-v"):
        line.version = True
    elif name == "--config":
        if line.config is not None:
            raise ConfigError("config is given twice: one YAML file is read")
        if not rest:
            raise ConfigError("config needs a YAML file")
        line.config = rest.pop(0)
    else:
        line.help = rest.pop(0) if has_inline else ""


def _flag(line: CommandLine, word: str, has_inline: bool, rest: list[str]) -> None:
    key = ""
    if word in BY_SHORT:
        flag, is_off = BY_SHORT[word], False
    else:
        if not word.startswith("--"):
            raise ConfigError(f"unknown flag {word!r}; see --help")
        name, _, key = word[2:].partition(".")
        flag, is_off = find(name.replace("_", "-"), where="flag", prefix="--")
    if key and flag.kind != "json":
        raise ConfigError(f"unknown flag {word!r}: {flag.name} is no JSON object")
    if flag.kind == "bool":
        line.values[flag.name] = _switch(flag, is_off, has_inline, rest)
    elif flag.kind == "texts":
        line.values[flag.name] = _several(flag, has_inline, rest)
    else:
        value = _one(flag, has_inline, rest)
        line.values[flag.name] = _merged(line.values.get(flag.name), key, value) if key else value


def _switch(flag: Flag, is_off: bool, has_inline: bool, rest: list[str]) -> Any:
    if not has_inline:
        return not is_off
    if is_off:
        raise ConfigError(f"no-{flag.name} takes no value")
    return rest.pop(0)


def _several(flag: Flag, has_inline: bool, rest: list[str]) -> list[str]:
    if has_inline:
        return [rest.pop(0)]
    values = []
    while rest and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    if not values:
        raise ConfigError(f"{flag.name} needs at least one value")
    return values


def _one(flag: Flag, has_inline: bool, rest: list[str]) -> str:
    if not rest or (not has_inline and rest[0].startswith("--")):
        raise ConfigError(f"{flag.name} needs a value")
    return rest.pop(0)


def _merged(held: Any, key: str, value: str) -> dict[str, Any]:
    """`--flag.a.b value` into a nested object; the value is JSON where it reads as such, else text."""
    content = dict(json.loads(held) if isinstance(held, str) else held or {})
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    *path, last = key.split(".")
    place = content
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{key!r} goes into {part!r}, which holds {place!r}")
    place[last] = parsed
    return content
