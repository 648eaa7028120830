"""Every error that jaxserve raises on purpose. It knows nothing of HTTP: `server` maps classes to status codes.

JaxserveError
├── ConfigError            a flag, YAML key or value that cannot be honoured: names it, the bound and the fix
├── ModelError             a model folder that cannot be served exactly
│   ├── UnsupportedModelError   an architecture or config attribute that is not implemented
│   └── WeightsError            a weight file or tensor that is missing, extra, mis-shaped or malformed
├── CapacityError          what was asked for does not fit the device: carries the table of what needs what
├── RequestError           one request is at fault; nobody else suffers
│   ├── UnknownModelError       the request names a model that is not served
│   └── UnsupportedFieldError   a known field that this server does not support (yet)
└── EngineError            the engine cannot go on, or not now
    ├── EngineBusyError         the queue is full: try again later
    ├── EngineNotReadyError     still starting: says the phase
    ├── EngineDeadError         the engine process is gone: says why
    └── StepAllocationError     one step ran out of device memory: the loop rebuilds the pool and goes on

Invariant: a message is complete on its own — value, bound, fix — and carries no path or secret of the host
beyond what the user typed.
"""

from __future__ import annotations


class JaxserveError(Exception):
    """The root; catch it to catch everything this package raises on purpose."""


class ConfigError(JaxserveError):
    """A flag, YAML key or value that cannot be honoured."""


class ModelError(JaxserveError):
    """A model folder that cannot be served exactly."""


class UnsupportedModelError(ModelError):
    """An architecture or config attribute that is not implemented; served wrong is worse than refused."""


class WeightsError(ModelError):
    """A weight file or tensor that is missing, extra, mis-shaped or malformed."""


class CapacityError(JaxserveError):
    """What was asked for does not fit the device."""


class RequestError(JaxserveError):
    """One request is at fault. `param` and `value` name the field as the client spelt it."""

    def __init__(self, message: str, *, param: str | None = None, value: object = None) -> None:
        self.param = param
        self.value = value
        if param is not None and value is not None:
            message = f"{message} (parameter={param}, value={value})"
        super().__init__(message)


class UnknownModelError(RequestError):
    """The request names a model that is not served."""


class UnsupportedFieldError(RequestError):
    """A known field that this server does not support (yet); refused, never ignored."""


class EngineError(JaxserveError):
    """The engine cannot go on, or not now."""


class EngineBusyError(EngineError):
    """The queue is full; a later try may succeed."""


class EngineNotReadyError(EngineError):
    """The engine is still starting; the message says the phase."""


class EngineDeadError(EngineError):
    """The engine process is gone; the message says why."""


class StepAllocationError(EngineError):
    """One step ran out of device memory; the KV pool must be rebuilt before the next."""
