"""--help: an overview that fits one screen, one screen a group, one flag, or everything. Plain text."""

from __future__ import annotations

import dataclasses
import textwrap

from jaxserve.core.errors import ConfigError
from jaxserve.flags.build import default
from jaxserve.flags.names import find
from jaxserve.flags.table import FLAGS, PARTS, Flag, Kind

_WIDTH = 110
_METAVARS: dict[Kind, str] = {
    "text": "TEXT", "texts": "TEXT ...", "bool": "", "json": "JSON",
    "int": "N", "float": "X", "length": "N", "bytes": "N",
}

_USAGE = """\
usage: python -m jaxserve.serve [MODEL] [--config FILE.yaml] [flags]
       jaxserve serve [MODEL] [--config FILE.yaml] [flags]

Serves a language model through the OpenAI API. Flags beat the YAML file, whose keys are the same long names.

  jaxserve serve Qwen/Qwen2.5-3B-Instruct --max-model-len 8K --api-key SECRET
  jaxserve serve --config qwen3b.yaml
"""
_MORE = "--help=GROUP, --help=FLAG and --help=all say more; --version prints the version."


def render(topic: str) -> str:
    """Help on "" (overview), "all", a group, or a flag. Raises ConfigError for anything else."""
    if topic == "":
        return f"{_USAGE}\n{_overview()}\n\n{_MORE}"
    if topic == "all":
        return "\n\n".join([_USAGE.rstrip(), *map(_group, PARTS)])
    if topic in PARTS:
        return _group(topic)
    try:
        flag, _ = find(topic.lstrip("-"), where="flag")
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
    names = "  " + ", ".join(filter(None, [_switches(flag), flag.short])) + metavar(flag)
    held = default_text(flag)
    about = flag.help + (f" [{held}]" if held else "")
    return [names, *textwrap.wrap(about, _WIDTH, initial_indent="      ", subsequent_indent="      ")]


def _switches(flag: Flag) -> str:
    return f"--[no-]{flag.name}" if flag.kind == "bool" else f"--{flag.name}"


def metavar(flag: Flag) -> str:
    """What stands for the value, after a space; "" for switches."""
    if flag.choices:
        return " " + "|".join(flag.choices)
    return (" " + _METAVARS[flag.kind]).rstrip()


def default_text(flag: Flag) -> str:
    """The default as a reader would write it; "" where there is none, or where it depends on the machine."""
    value = default(flag.name)
    if value is None and flag.nothing:
        return flag.nothing[0]
    if value is dataclasses.MISSING or value is None or value in ((), {}, ""):
        return ""
    return "on" if value is True else "off" if value is False else str(value)
