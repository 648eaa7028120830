"""From a name that somebody wrote to its flag, or an error with the nearest name."""

from __future__ import annotations

import difflib

from jaxserve.core.errors import ConfigError
from jaxserve.flags.table import BY_NAME, Flag
from jaxserve.flags.unsupported import UNSUPPORTED


def find(name: str, *, where: str, prefix: str = "") -> tuple[Flag, bool]:
    """The flag of `name` (dashes, no leading ones), and whether it was written as its `no-` form.

    Args:
      where: "flag" or "key", for the error.  prefix: what the user writes before it.
    """
    flag = BY_NAME.get(name)
    if flag is not None:
        return flag, False
    if name.startswith("no-"):
        switch = BY_NAME.get(name[3:])
        if switch is not None:
            if switch.kind != "bool":
                raise ConfigError(f"unknown {where} {prefix + name!r}: {prefix}{switch.name} takes a value")
            return switch, True
    reason = UNSUPPORTED.get(name) or UNSUPPORTED.get(name.removeprefix("no-"))
    if reason is not None:
        raise ConfigError(f"{prefix}{name}: {reason}.")
    near = difflib.get_close_matches(name, [*BY_NAME, *(f"no-{f.name}" for f in BY_NAME.values() if f.kind == "bool")], 1)
    hint = f"did you mean {prefix + near[0]!r}?" if near else "see --help"
    raise ConfigError(f"unknown {where} {prefix + name!r}; {hint}")
