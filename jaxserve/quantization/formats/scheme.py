"""What every format tells the loader, and what their files share: checks of stored tensors, bit strings, config keys.

Knows numpy and names; no file, no device. Invariant: a stored tensor that is not what its format says is refused by
its name, with what it is and what it should be.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxserve.core.errors import ModelError, UnsupportedModelError, WeightsError
from jaxserve.quantization.codes import Codes, Form, Host

Stored = Mapping[str, Host]     # tensors of one module by what stands behind its name: "qweight", "scales"
WORD_BITS = 32


class Scheme(abc.ABC):
    """One format with a checkpoint's own settings."""

    __slots__ = ()

    method: str                     # vLLM's name
    suffixes: tuple[str, ...]       # of tensors that belong to a packed module
    marks: tuple[str, ...]          # a module that has one of them is packed
    joint = "."                     # between a module's name and a suffix
    is_of_stacks = False            # tensors are stacks of modules, shown as one array [E, in, out]
    needs_packed = True             # a checkpoint without any such module is not what its config says

    @abc.abstractmethod
    def shape(self, module: str, stored: Stored) -> tuple[int, int]:
        """(out, in) of a packed module, its tensors checked. Raises WeightsError."""

    @abc.abstractmethod
    def form(self, module: str, stored: Stored) -> Form:
        """How the module is kept."""

    @abc.abstractmethod
    def codes(self, module: str, stored: Stored) -> Codes:
        """The module's codes. Raises WeightsError where values are out of bounds."""


def tensor(module: str, stored: Stored, suffix: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> Host:
    """A module's tensor, which must have one of the dtypes and the shape (None: any size)."""
    if suffix not in stored:
        raise WeightsError(f"{module}.{suffix} is missing; {module} has {', '.join(sorted(stored))}")
    found = stored[suffix]
    fits = len(found.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, found.shape, strict=True)
    )
    if not fits or found.dtype.name not in dtypes:
        wanted = [("any" if size is None else size) for size in shape]
        raise WeightsError(
            f"{module}.{suffix} is {found.dtype.name} {list(found.shape)}; expected {' or '.join(dtypes)} {wanted}"
        )
    return found


def finite(module: str, suffix: str, values: Host) -> Host:
    """The values; WeightsError where one is infinite or no number."""
    if not np.isfinite(values.astype(np.float32)).all():
        raise WeightsError(f"{module}.{suffix} holds infinities or NaN")
    return values


def scale_dtype(stored: Host) -> Literal["float16", "float32"]:
    """What scales are kept in: float16 as it is, anything else as float32."""
    return "float16" if stored.dtype == np.float16 else "float32"


def unpack(words: Host, bits: int) -> Host:
    """Codes, uint8, of a string of bits that runs along the last axis of int32 words, lowest bits first."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    if bits in (2, 4):
        shift = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (raw[..., None] >> shift) & np.uint8((1 << bits) - 1)
        return codes.reshape(*raw.shape[:-1], -1)
    lines = np.unpackbits(raw, axis=-1, bitorder="little")     # codes of 3, 5, 6 bits straddle bytes and words
    values = lines.reshape(*lines.shape[:-1], -1, bits) @ (1 << np.arange(bits)).astype(np.uint8)
    return values.astype(np.uint8)


def groups(ins: int, size: int, where: str) -> int:
    """How many groups of `size` inputs there are; -1 is one of all. Raises WeightsError where they do not divide."""
    if size == -1:
        return 1
    if ins % size:
        raise WeightsError(f"{where}: {ins} inputs are no multiple of the group size {size}")
    return ins // size


class Settings:
    """A `quantization_config` on its way to a scheme; remembers what was taken. Mutable."""

    def __init__(self, method: str, content: Mapping[str, Any]) -> None:
        self._method, self._content, self._taken = method, content, {"quant_method"}

    def take(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of one of the kinds, or the default where it is absent or null."""
        self._taken.add(name)
        value = self._content.get(name)
        if value is None:
            return default
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join(kind.__name__ for kind in allowed)
            raise ModelError(f"quantization_config: {name} is {value!r}; expected {names}")
        return value

    def choice(self, name: str, choices: tuple[Any, ...], default: Any = None) -> Any:
        """A value out of a few."""
        self._taken.add(name)
        value = self._content.get(name, default)
        if value is None:
            value = default
        if value not in choices or isinstance(value, bool) is not isinstance(choices[0], bool):
            raise UnsupportedModelError(
                f"quantization_config: {name} {value!r} of {self._method} is not supported; "
                f"supported are {', '.join(map(repr, choices))}"
            )
        return value

    def finish(self, harmless: frozenset[str]) -> None:
        """Whatever was not taken must be known to change nothing, or be null, false or empty."""
        for name, value in self._content.items():
            if name not in self._taken and name not in harmless and value not in (None, False, [], {}, ""):
                raise UnsupportedModelError(
                    f"quantization_config: {name} = {value!r} of {self._method} is not supported; if you know that it "
                    f"changes nothing, pass --hf-overrides '{{\"quantization_config\": {{\"{name}\": null}}}}'"
                )


def is_named(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether a list of names has a module: whole names, their last parts, or "re:" and a regular expression."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], module):
                return True
        elif module == pattern or module.endswith("." + pattern):
            return True
    return False
