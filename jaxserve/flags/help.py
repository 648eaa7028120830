"""--help: an overview that fits one screen, one screen a group, one flag, or everything. Plain text, nothing imported."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.flags.build import default
from jaxserve.flags.names import find
from jaxserve.flags.table import FLAGS, PARTS, Flag

_WIDTH = 110

_USAGE = """\
usage: python -m jaxserve.serve [MODEL] [--config FILE.yaml] [flags]
       jaxserve serve [MODEL] [--config FILE.yaml] [flags]

Serves a language model through the OpenAI API. Flags beat the YAML file, whose keys are the same long names.

  jaxserve serve Qwen/Qwen2.5-3B-Instruct --max-model-len 8K --api-key SECRET
  jaxserve serve --config qwen3b.yaml
"""


def render(topic: str) -> str:
    """Help on "" (overview), "all", a group, or a flag. Raises ConfigError for anything else."""
    if topic == "":
        return f"{_USAGE}\n{_overview()}\n\n--help=GROUP, --help=FLAG and --help=all say more; --version prints the version."
    if topic == "all":
        return "\n\n".join([_USAGE.rstrip(), *map(_group, PARTS)])
    if topic in PARTS:
        return _group(topic)
    try:
        flag, _ = find(topic.lstrip("-").replace("_", "-"), where="flag", prefix="--")
    except ConfigError as error:
        raise ConfigError(f"no help on {topic!r} ({error}); groups are {', '.join(PARTS)}") from error
    return "\n".join(_entry(flag))


def _overview() -> str:
    lines = []
    for part, about in PARTS.items():
        names = "  ".join(_switches(flag) for flag in FLAGS if flag.part == part)
        lines.append(f"{part}: {about}")
        lines += textwrap.wrap(names, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def _group(part: str) -> str:
    lines = [f"{part}: {PARTS[part]}"]
    for flag in FLAGS:
        if flag.part == part:
            lines += _entry(flag)
    return "\n".join(lines)


def _entry(flag: Flag) -> list[str]:
    names = "  " + ", ".join(filter(None, [_switches(flag), flag.short])) + _metavar(flag)
    held = _default_text(default(flag.name))
    about = flag.help + (f" [{held}]" if held else "")
    return [names, *textwrap.wrap(about, _WIDTH, initial_indent="      ", subsequent_indent="      ")]


def _switches(flag: Flag) -> str:
    return f"--[no-]{flag.name}" if flag.kind == "bool" else f"--{flag.name}"


def _metavar(flag: Flag) -> str:
    if flag.choices:
        return " " + "|".join(flag.choices)
    words = {"text": "TEXT", "texts": "TEXT ...", "int": "N", "float": "X", "bool": "", "length": "N", "bytes": "N", "json": "JSON"}
    return (" " + words[flag.kind]).rstrip()


def _default_text(value: Any) -> str:
    if value is dataclasses.MISSING or value is None or value in ((), {}, ""):
        return ""
    return "on" if value is True else "off" if value is False else str(value)
