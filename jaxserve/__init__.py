"""jaxserve: an LLM server whose data plane is JAX. Importing it is light: names load what they need at first use.

Type checkers read `__init__.pyi`, so that the control plane, which needs the version, does not seem to import jax.
"""

from __future__ import annotations

__version__ = "0.1.0"

_HOMES = {
    "LLM": "jaxserve.llm",
    "SamplingParams": "jaxserve.core.sampling_params",
    "RequestOutput": "jaxserve.outputs",
    "CompletionOutput": "jaxserve.outputs",
}

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
