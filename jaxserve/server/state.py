"""What every route shares: the engine, the text engine once there is one, names, metrics. Mutable: `text_engine`.

Invariant: a route gets the text engine only through `serving()`, which raises while it may not be used.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from jaxserve.core.config import ServeConfig
from jaxserve.core.errors import EngineDeadError, EngineNotReadyError, UnknownModelError
from jaxserve.core.request import EngineStats
from jaxserve.server.metrics import Metrics
from jaxserve.server.request_metrics import RequestMetrics

if TYPE_CHECKING:
    from jaxserve.text_engine import TextEngine


class StatusPort(Protocol):
    """Where the engine's life stands."""

    @property
    def phase(self) -> str: ...

    @property
    def detail(self) -> str: ...

    @property
    def is_serving(self) -> bool: ...


class OneEnginePort(Protocol):
    """How one engine is and what it counts."""

    @property
    def status(self) -> StatusPort: ...

    @property
    def stats(self) -> EngineStats: ...


class EngineLifePort(OneEnginePort, Protocol):
    """The engines together, as far as HTTP itself looks at them, and each by itself."""

    @property
    def engines(self) -> Sequence[OneEnginePort]: ...

    async def profile(self, folder: str | None) -> None: ...


def package_version() -> str:
    """The installed version; a source tree that was never installed says so."""
    try:
        return metadata.version("jaxserve")
    except metadata.PackageNotFoundError:
        return "0+source"


@dataclass(kw_only=True)
class ServerState:
    """One server. `text_engine` is set by the composition root when the engine serves."""

    config: ServeConfig
    engine: EngineLifePort
    text_engine: TextEngine | None = None
    live_ids: set[str] = field(default_factory=set)
    live_count: int = 0               # HTTP requests that compute, for /load
    created_s: int = field(default_factory=lambda: int(time.time()))
    version: str = field(default_factory=package_version)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self)

    @property
    def served_names(self) -> tuple[str, ...]:
        return self.config.frontend.served_model_name or (self.config.engine.model.model,)

    @property
    def model_name(self) -> str:
        """The name in replies and labels, whichever alias was asked for."""
        return self.served_names[0]

    @cached_property
    def request_metrics(self) -> RequestMetrics:
        """Made when the first request runs: its buckets end at the context length."""
        return RequestMetrics(
            self.metrics.registry, self.model_name, self.serving().info.max_model_len, len(self.engine.engines)
        )

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal answers: version, model and configuration of the engine, without secrets."""
        engine = self.config.engine
        shown = repr(replace(engine, model=replace(engine.model, hf_token=None)))
        return f"jaxserve-{self.version}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}"

    @property
    def why_not_serving(self) -> str | None:
        """A sentence for people, None while all is well."""
        status = self.engine.status
        if status.is_serving and self.text_engine is not None:
            return None
        if status.is_serving:
            return "The server is starting: loading the tokenizer"
        detail = f": {status.detail}" if status.detail else ""
        life = {"dead": "The engine is dead", "draining": "The server takes no new requests"}
        return f"{life.get(status.phase, f'The server is starting ({status.phase})')}{detail}"

    def serving(self) -> TextEngine:
        """The text engine. Raises EngineNotReadyError or EngineDeadError with the reason."""
        reason = self.why_not_serving
        if reason is None:
            assert self.text_engine is not None
            return self.text_engine
        raise EngineDeadError(reason) if self.engine.status.phase == "dead" else EngineNotReadyError(reason)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModelError unless `name` is served or not given."""
        if name and name not in self.served_names:
            aliases = ", ".join(self.served_names)
            raise UnknownModelError(f"The model `{name}` does not exist. Valid aliases: {aliases}.", param="model")

    def claim_id(self, wanted: str) -> str:
        """`wanted`, varied while another live request has that id. Give it back: `live_ids.discard`."""
        unique, tries = wanted, 1
        while unique in self.live_ids:
            tries += 1
            unique = f"{wanted}-{tries}"
        self.live_ids.add(unique)
        return unique
