"""Raw values to the frozen configuration: types, bounds, what must fit together. Flag beats YAML beats default."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.core.config import (
    CacheConfig,
    CompilationConfig,
    EngineConfig,
    FrontendConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    ServeConfig,
)
from jaxserve.core.errors import ConfigError
from jaxserve.flags.nodes import check_nodes, placed
from jaxserve.flags.speculative import speculative_config
from jaxserve.flags.table import BY_NAME
from jaxserve.flags.values import convert

_PARTS: dict[str, type] = {
    "model": ModelConfig, "load": LoadConfig, "cache": CacheConfig, "scheduler": SchedulerConfig,
    "parallel": ParallelConfig, "compilation": CompilationConfig, "frontend": FrontendConfig,
}


def serve_config(raw: Mapping[str, Any]) -> ServeConfig:
    """A server's configuration from raw values by flag name."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in _PARTS}
    for name, value in raw.items():
        flag = BY_NAME[name]
        parts[flag.part][flag.field] = convert(flag, value)
    if "model" not in parts["model"]:
        raise ConfigError(
            "model is missing: name a folder or a hub model, as in `jaxserve serve Qwen/Qwen2.5-3B-Instruct`"
            f"{_taken(raw)}"
        )
    key = os.environ.get("JAXSERVE_API_KEY")
    if key and "api_key" not in parts["frontend"]:
        parts["frontend"]["api_key"] = (key,)
    drafting = parts["scheduler"].get("speculative_config")
    if drafting is not None:
        parts["scheduler"]["speculative_config"] = speculative_config(drafting)
    parts["parallel"] = placed(parts["parallel"], os.environ)
    made = {name: _PARTS[name](**values) for name, values in parts.items()}
    frontend = made.pop("frontend")
    config = ServeConfig(engine=EngineConfig(**made), frontend=frontend)
    _check_engine(config.engine)
    _check_frontend(config.frontend)
    if config.engine.model.skip_tokenizer_init and config.frontend.chat_template is not None:
        raise ConfigError("chat-template has no effect with skip-tokenizer-init; give one of them")
    if config.frontend.uds is not None and (idle := {"host", "port"} & raw.keys()):
        raise ConfigError(f"{min(idle)} has no effect with uds: a server listens on a Unix socket or on a port")
    return config


def _taken(raw: Mapping[str, Any]) -> str:
    """Where the model may have gone: `--api-key KEY MODEL` gives two keys."""
    for name, value in raw.items():
        if isinstance(value, list) and len(value) > 1:
            return f"; {name} takes every word up to the next flag, so put the model first"
    return ""


def _check_engine(config: EngineConfig) -> None:
    size, scheduler = config.cache.block_size, config.scheduler
    if size & (size - 1):
        raise ConfigError(f"block-size must be a power of two, got {size}; use {1 << size.bit_length() - 1}")
    rows, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    if rows is not None and tokens is not None and tokens < rows:
        raise ConfigError(f"max-num-batched-tokens {tokens} is less than max-num-seqs {rows}; raise it to that")
    if scheduler.itl_target_ms is not None and not scheduler.enable_chunked_prefill:
        raise ConfigError("itl-target-ms needs chunks of prompts; leave enable-chunked-prefill on")
    check_nodes(config)
    if config.parallel.data_parallel_size > 1 and config.parallel.nnodes > 1:
        raise ConfigError("data-parallel-size: engines over several machines are not built yet; use it with nnodes 1")
    if config.model.skip_tokenizer_init and config.model.tokenizer is not None:
        raise ConfigError("tokenizer has no effect with skip-tokenizer-init; give one of them")
    folder = config.model.generation_config
    if folder not in ("auto", "vllm") and not Path(folder).expanduser().is_dir():
        raise ConfigError(f"generation-config must be auto, vllm or a folder, and there is no folder {folder!r}")


def _check_frontend(config: FrontendConfig) -> None:
    if (config.ssl_keyfile is None) != (config.ssl_certfile is None):
        raise ConfigError("ssl-keyfile and ssl-certfile go together; give both or neither")
    for name in ("ssl_keyfile", "ssl_certfile"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{name.replace('_', '-')}: there is no file {path!r}")
    if config.root_path and not config.root_path.startswith("/"):
        raise ConfigError(f"root-path must start with '/', got {config.root_path!r}")


def default(name: str) -> Any:
    """What a flag's field holds when nobody says anything."""
    flag = BY_NAME[name]
    for field in dataclasses.fields(_PARTS[flag.part]):
        if field.name == flag.field:
            return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    raise AssertionError(f"flag {name} has no field")
