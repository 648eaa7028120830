"""The pickle inside a PyTorch file, interpreted: the opcodes and globals that build a dict of tensors, no others.

Source: pickle's protocol 2, which torch.save writes; `pickletools` splits the bytes into opcodes, everything they do is
below. Globals are names here, never imported. Knows no files: tensors come out as descriptions of views.
Invariant: what is built is plain data whose memory is bounded by the pickle's length; anything else raises PickleError
with the opcode or global and its offset.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

PROTOCOL = 2
STACK_MAX = 100_000      # torch sets a thousand items at a time
MEMO_MAX = 4_000_000

CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
VALUES = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"})
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleError(Exception):
    """The pickle is not one of a dict of tensors; the message says where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """The bytes that tensors look at: an entry of the zip, `count` elements of a type that torch names."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorView:
    """A tensor as torch describes it, unchecked; counts are elements. `dtype` None: the storage's."""

    storage: Storage
    offset: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle refers to."""

    name: str


class _Mark:
    """Where a run of items on the stack begins."""


_MARK = _Mark()


def interpret(data: bytes, dtypes: frozenset[str]) -> dict[str, TensorView]:
    """The tensors by name. `dtypes` are the storage classes and scalar types that may be named."""
    machine = _Machine(dtypes)
    try:
        for opcode, argument, offset in pickletools.genops(data):
            machine.step(opcode.name, argument, offset or 0)
    except ValueError as error:
        raise PickleError(f"the pickle is malformed or cut off: {str(error)[:120]}") from error
    return machine.result()


class _Machine:
    """Stack and memo of a pickle that is being read. Mutable."""

    def __init__(self, dtypes: frozenset[str]) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._dtypes = dtypes
        self._at = 0
        self._calls: dict[str, Callable[[tuple[Any, ...]], Any]] = {
            "collections.OrderedDict": self._ordered_dict,
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": self._parameter,
        }
        self._actions: dict[str, Callable[[Any], None]] = {
            "PROTO": self._proto, "GLOBAL": self._global, "BINPERSID": self._storage, "REDUCE": self._reduce,
            "BINPUT": self._put, "LONG_BINPUT": self._put, "BINGET": self._get, "LONG_BINGET": self._get,
            "MARK": lambda _: self._push(_MARK), "EMPTY_DICT": lambda _: self._push({}),
            "TUPLE": lambda _: self._push(tuple(self._items())),
            "SETITEM": lambda _: self._set([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda _: self._set(self._items()), "BUILD": self._build, "STOP": lambda _: None,
        }

    def step(self, name: str, argument: Any, offset: int) -> None:
        """One opcode."""
        self._at = offset
        if name in VALUES:
            self._push(argument)
        elif name in CONSTANTS:
            self._push(CONSTANTS[name])
        elif name in TUPLES:
            self._push(tuple([self._pop() for _ in range(TUPLES[name])][::-1]))
        elif name in self._actions:
            self._actions[name](argument)
        else:
            raise self._error(f"opcode {name} is refused: only dicts of tensors are read, and nothing is executed")

    def result(self) -> dict[str, TensorView]:
        """What the pickle built."""
        if len(self._stack) != 1 or not isinstance(self._stack[0], dict):
            raise self._error("it does not end with one dict of tensors")
        found = {name: value for name, value in self._stack[0].items() if not _is_count(name, value)}
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, TensorView):
                raise self._error(f"{str(name)[:80]!r} is {_kind(value)}; expected a dict of names to tensors")
        return cast(dict[str, TensorView], found)

    def _error(self, what: str) -> PickleError:
        return PickleError(f"pickle, byte {self._at}: {what}")

    def _push(self, value: Any) -> None:
        if len(self._stack) >= STACK_MAX:
            raise self._error(f"more than {STACK_MAX} values wait on its stack")
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._error("a value is missing from its stack")
        return self._stack.pop()

    def _items(self) -> list[Any]:
        """Everything above the last mark."""
        items: list[Any] = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        if not self._stack:
            raise self._error("a mark is missing from its stack")
        self._stack.pop()
        return items[::-1]

    def _proto(self, version: int) -> None:
        if version != PROTOCOL:
            raise self._error(f"protocol {version} is not read; torch.save writes {PROTOCOL}")

    def _put(self, index: int) -> None:
        if not self._stack or self._stack[-1] is _MARK or len(self._memo) >= MEMO_MAX:
            raise self._error(f"memo {index} cannot be set")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self._error(f"memo {index} was never set")
        self._push(self._memo[index])

    def _global(self, argument: str) -> None:
        name = ".".join(argument.split(" ", 1))
        if name not in self._calls and name not in self._dtypes:
            raise self._error(
                f"global {name[:120]!r} is refused: files of weights refer to tensors, storages and OrderedDict only; "
                "nothing was imported or executed"
            )
        self._push(_Global(name))

    def _storage(self, _: Any) -> None:
        """('storage', class, key, device, count)"""
        match self._pop():
            case ("storage", _Global(name), str(key), str(), int(count)) if name in self._dtypes and count >= 0:
                self._push(Storage(dtype=name, key=key, count=count))
            case _:
                raise self._error("a persistent id must be ('storage', class, key, device, count)")

    def _reduce(self, _: Any) -> None:
        arguments, call = self._pop(), self._pop()
        if not isinstance(call, _Global) or call.name not in self._calls or not isinstance(arguments, tuple):
            raise self._error(f"{call.name if isinstance(call, _Global) else _kind(call)} is called; it is no function")
        self._push(self._calls[call.name](arguments))

    def _ordered_dict(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        if arguments:
            raise self._error("OrderedDict is called with arguments")
        return {}

    def _tensor_v2(self, arguments: tuple[Any, ...]) -> TensorView:
        """(storage, offset, shape, strides, requires_grad, hooks[, metadata])"""
        match arguments:
            case (Storage() as storage, offset, tuple(shape), tuple(strides), bool(), {}) if not arguments[5]:
                return TensorView(storage=storage, offset=offset, shape=shape, strides=strides)
            case _:
                raise self._error("_rebuild_tensor_v2 is called with other arguments than torch gives it")

    def _tensor_v3(self, arguments: tuple[Any, ...]) -> TensorView:
        """(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])"""
        if len(arguments) == 7 and isinstance(arguments[6], _Global) and "Storage" not in arguments[6].name:
            view = self._tensor_v2(arguments[:6])
            return TensorView(
                storage=view.storage, offset=view.offset, shape=view.shape, strides=view.strides,
                dtype=arguments[6].name,
            )
        raise self._error("_rebuild_tensor_v3 is called with other arguments than torch gives it")

    def _parameter(self, arguments: tuple[Any, ...]) -> TensorView:
        """(tensor, requires_grad, hooks)"""
        match arguments:
            case (TensorView() as tensor, bool(), {}) if not arguments[2]:
                return tensor
            case _:
                raise self._error("_rebuild_parameter is called with other arguments than torch gives it")

    def _set(self, items: list[Any]) -> None:
        """Keys and values in turn, into the dict below them."""
        target = self._stack[-1] if self._stack else None
        if not isinstance(target, dict) or len(items) % 2:
            raise self._error("items are set in what is no dict, or a value is missing")
        for name, value in zip(items[::2], items[1::2], strict=True):
            # Only text: hashing nested tuples that share their parts would take forever.
            if not isinstance(name, str):
                raise self._error(f"a dict's key is {_kind(name)}; expected text")
            if name in target:
                raise self._error(f"{name[:80]!r} is set twice")
            target[name] = value

    def _build(self, _: Any) -> None:
        """An OrderedDict's attributes: the versions of modules, which loading does not need."""
        state = self._pop()
        if not isinstance(state, dict) or not self._stack or not isinstance(self._stack[-1], dict):
            raise self._error("BUILD of something other than a dict of tensors")


def _is_count(name: object, value: object) -> bool:
    """SqueezeLLM's numbers of sparse values, which the tensors' shapes say too."""
    return isinstance(name, str) and name.startswith("sparse_threshold.") and type(value) is int


def _kind(value: Any) -> str:
    """What a value is, in a word; never its content, which may unfold to more than fits."""
    return value.name if isinstance(value, _Global) else type(value).__name__.strip("_")
