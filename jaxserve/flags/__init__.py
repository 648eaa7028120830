"""Flags and YAML in, frozen configuration out. Light: nothing here imports more than the standard library and YAML."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jaxserve.core.config import EngineConfig, ServeConfig
from jaxserve.core.errors import ConfigError
from jaxserve.flags import command_line
from jaxserve.flags.build import serve_config
from jaxserve.flags.config_file import read_config
from jaxserve.flags.names import find


def parse_serve_args(words: Sequence[str]) -> ServeConfig:
    """The configuration that a command line means. Prints and exits for --help and --version; raises ConfigError."""
    line = command_line.read(words)
    if line.help is not None:
        from jaxserve.flags.help import render

        print(render(line.help))
        sys.exit(0)
    if line.version:
        from jaxserve import __version__

        print(__version__)
        sys.exit(0)
    raw = read_config(line.config) if line.config is not None else {}
    return serve_config(raw | line.values)


def engine_config_from_kwargs(model: str, **options: Any) -> EngineConfig:
    """The same flags as Python arguments: `engine_config_from_kwargs("m", max_model_len=4096)`.

    None is the default. Raises ConfigError, also for flags of the HTTP side, which no offline engine has; only
    `chat_template` passes, which `LLM` reads itself.
    """
    raw: dict[str, Any] = {"model": model}
    for name, value in options.items():
        flag, is_off = find(name, where="argument")
        if is_off:
            raise ConfigError(f"unknown argument {name!r}; write {flag.field}=False")
        if flag.part == "frontend" and flag.name != "chat-template":
            raise ConfigError(f"{name} is about the HTTP server; LLM(...) has none")
        if value is not None:
            raw[flag.name] = value
    return serve_config(raw).engine
