"""One raw value, from a flag or a YAML key, to the type its flag wants; or a ConfigError that says what would do."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.flags.table import Flag

_SUFFIXES = {
    "": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4,
    "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4,
    "Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "Ti": 1024**4, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]*)")


def convert(flag: Flag, raw: Any) -> Any:
    """The value of `flag`. Strings come from the command line, typed values from YAML; both obey the same rules."""
    if str(raw) in flag.nothing:
        return None
    value: Any = _CONVERT[flag.kind](flag, raw)
    if flag.choices and value not in flag.choices:
        raise ConfigError(f"{flag.name} must be one of {', '.join(flag.choices)}, got {raw!r}")
    if flag.low is not None and flag.high is not None and not flag.low <= value <= flag.high:
        raise ConfigError(f"{flag.name} must be in [{flag.low}, {flag.high}], got {raw}")
    return value


def _text(flag: Flag, raw: Any) -> str:
    if not isinstance(raw, str) and raw is not None:   # YAML reads 0123 as 83 and 1e5 as a float: never guess back
        raise ConfigError(f"{flag.name} must be a text, got {raw!r}; put it in quotes")
    if not raw:
        raise ConfigError(f"{flag.name} must be a text that is not empty, got {raw!r}")
    return raw


def _texts(flag: Flag, raw: Any) -> tuple[str, ...]:
    items = raw if isinstance(raw, (list, tuple)) else [raw]
    if not items:
        raise ConfigError(f"{flag.name} needs at least one value")
    return tuple(_text(flag, item) for item in items)


def _int(flag: Flag, raw: Any) -> int:
    try:
        if isinstance(raw, str):
            return int(raw)
        if isinstance(raw, int) and not isinstance(raw, bool):
            return raw
    except ValueError:
        pass
    raise ConfigError(f"{flag.name} must be a whole number, got {raw!r}")


def _float(flag: Flag, raw: Any) -> float:
    try:
        value = math.nan if isinstance(raw, bool) else float(raw)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{flag.name} must be a number, got {raw!r}")
    return value


def _bool(flag: Flag, raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in ("true", "false"):
        return raw.lower() == "true"
    raise ConfigError(f"{flag.name} must be true or false, got {raw!r}")


def _size(flag: Flag, raw: Any) -> int:
    """Numbers with a suffix: k, m, g are powers of 1000; K, M, G (Ki, KiB ...) powers of 1024, as in vLLM."""
    if isinstance(raw, str):
        match = _SIZE.fullmatch(raw.strip())
        if match and match[2] in _SUFFIXES:
            value = float(match[1]) * _SUFFIXES[match[2]]
            if value == int(value):
                return int(value)
        raise ConfigError(f"{flag.name} must be a number like 4096, 8k or 8K, got {raw!r}")
    return _int(flag, raw)


def _json(flag: Flag, raw: Any) -> dict[str, Any]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{flag.name} must be a JSON object, got {raw!r}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{flag.name} must be a JSON object, got {raw!r}")
    return raw


_CONVERT = {
    "text": _text, "texts": _texts, "int": _int, "float": _float, "bool": _bool, "length": _size, "bytes": _size,
    "json": _json,
}
