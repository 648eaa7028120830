"""From a name that somebody wrote to its flag, or an error with the nearest name."""

from __future__ import annotations

import difflib
from typing import Literal

from jaxserve.core.errors import ConfigError
from jaxserve.flags.table import BY_NAME, FLAGS, Flag
from jaxserve.flags.unsupported import UNSUPPORTED

Where = Literal["flag", "key", "argument"]   # on the command line, in YAML, of LLM(...)

_SWITCHES = [f"no-{flag.name}" for flag in FLAGS if flag.kind == "bool"]


def find(written: str, *, where: Where) -> tuple[Flag, bool]:
    """The flag of `written` (no leading dashes), and whether it was written as its `no-` form.

    Raises ConfigError for every other name: with its own sentence if it is vLLM's, else with the nearest name.
    """
    name = written.replace("_", "-")
    flag = BY_NAME.get(name)
    if flag is not None:
        return flag, False
    positive = name.removeprefix("no-")
    if positive != name and positive in BY_NAME:
        if BY_NAME[positive].kind != "bool":
            raise ConfigError(f"unknown {where} {spelt(name, where)!r}: {spelt(positive, where)} takes a value")
        return BY_NAME[positive], True
    reason = UNSUPPORTED.get(name) or UNSUPPORTED.get(positive)
    if reason is not None:
        raise ConfigError(f"{spelt(name, where)}: {reason}.")
    near = difflib.get_close_matches(name, [*BY_NAME, *_SWITCHES], 1)
    hint = f"did you mean {spelt(near[0], where)!r}?" if near else "see `jaxserve serve --help`"
    raise ConfigError(f"unknown {where} {spelt(name, where)!r}; {hint}")


def spelt(name: str, where: Where) -> str:
    """A flag's name as it is written on the command line, in YAML or in Python."""
    return {"flag": f"--{name}", "key": name, "argument": name.replace("-", "_")}[where]
