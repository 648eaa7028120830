"""Command-line words to raw values by flag name. Knows the flags' names and shapes, not their bounds.

Accepted: `--flag value`, `--flag=value`, underscores for dashes, `--no-flag` for switches, several values for
"texts" (also by repeating the flag), `--flag.key value` for JSON objects, short flags, and one bare word: the model.
A flag given twice holds its last value, as in every shell script that appends its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.flags.names import find
from jaxserve.flags.table import BY_SHORT, Flag
from jaxserve.flags.unsupported import SHORT_UNSUPPORTED

_OWN = ("--help", "-h", "--version", "-v", "--config")
_OPTIMIZATION = re.compile(r"-O\d?")


@dataclass(slots=True)
class CommandLine:
    """What was typed. Mutable while it is read. `help` is None, "" for the overview, or a topic."""

    values: dict[str, Any] = field(default_factory=dict)
    model_word: str | None = None
    config: str | None = None
    help: str | None = None
    version: bool = False


def read(words: Sequence[str]) -> CommandLine:
    """Raises ConfigError for words that are no flag, and flags that lack a value."""
    line = CommandLine()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            _model(line, word)
            continue
        name, equals, inline = word.partition("=")
        if equals:
            rest.insert(0, inline)
        if name in _OWN:
            _own(line, name, bool(equals), rest)
        else:
            _flag(line, name, bool(equals), rest)
    if line.model_word is not None:
        if "model" in line.values:
            raise ConfigError(f"the model is named twice: {line.model_word!r}, and --model {line.values['model']!r}")
        line.values["model"] = line.model_word
    return line


def _model(line: CommandLine, word: str) -> None:
    """The one bare word."""
    if word.lower() in ("true", "false"):
        raise ConfigError(f"{word!r} belongs to no flag: write a switch as --flag, --no-flag or --flag={word.lower()}")
    if line.model_word is not None:
        raise ConfigError(f"{word!r} is one word too many: the model is {line.model_word!r} already")
    line.model_word = word


def _own(line: CommandLine, name: str, has_inline: bool, rest: list[str]) -> None:
    """The three flags that are about the command line itself."""
    if name in ("--version", "-v"):
        if has_inline:
            raise ConfigError("version takes no value")
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
    flag, key, is_off = _named(word)
    if flag.kind == "bool":
        line.values[flag.name] = _switch(flag, is_off, has_inline, rest)
    elif flag.kind == "texts":
        line.values[flag.name] = [*line.values.get(flag.name, ()), *_several(flag, has_inline, rest)]
    else:
        value = _one(flag, has_inline, rest)
        line.values[flag.name] = _merged(flag, line.values.get(flag.name), key, value) if key else value


def _named(word: str) -> tuple[Flag, str, bool]:
    """The flag of a word that begins with a dash, the key after its dot, and whether it is a `--no-` form."""
    name, dot, key = word.partition(".")
    if name in BY_SHORT:
        flag, is_off = BY_SHORT[name], False
    elif _is_short(name):
        flag, is_off = find(SHORT_UNSUPPORTED.get(name, "optimization-level"), where="flag")
    elif name.startswith("--"):
        flag, is_off = find(name[2:], where="flag")
    else:
        raise ConfigError(f"unknown flag {word!r}; long flags begin with two dashes, see `jaxserve serve --help`")
    if dot and (flag.kind != "json" or not all(key.split("."))):
        raise ConfigError(f"unknown flag {word!r}: a dot and a name follow flags that take a JSON object")
    return flag, key, is_off


def _is_short(word: str) -> bool:
    return word in BY_SHORT or word in SHORT_UNSUPPORTED or _OPTIMIZATION.fullmatch(word) is not None


def _is_flag(word: str) -> bool:
    """Whether a word begins the next flag; `-1` does not."""
    return word.startswith("--") or word in _OWN or _is_short(word.partition("=")[0])


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
    while rest and not _is_flag(rest[0]):
        values.append(rest.pop(0))
    if not values:
        raise ConfigError(f"{flag.name} needs at least one value")
    return values


def _one(flag: Flag, has_inline: bool, rest: list[str]) -> str:
    if not rest or (not has_inline and _is_flag(rest[0])):
        raise ConfigError(f"{flag.name} needs a value")
    return rest.pop(0)


def _merged(flag: Flag, held: Any, key: str, value: str) -> dict[str, Any]:
    """`--flag.a.b value` into a nested object; the value is JSON where it reads as such, else text."""
    content = _read_json(held) if isinstance(held, str) else held or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{flag.name} must be a JSON object, got {held!r}")
    *path, last = key.split(".")
    place = content
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{flag.name}: {key!r} goes into {part!r}, which holds {place!r}")
    place[last] = _read_json(value)
    return content


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
