"""Which of several engines has computed a prompt's beginning: remembered, not asked, and forgotten by age.

Shared by the router over one machine's engines and by the one over Ray's replicas. Knows keys, not what they are of.
Invariant: a wrong guess costs a prefill and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

IMBALANCE_ROWS = 4      # a familiar engine may have this part of its rows more to do than the idlest, and at least
IMBALANCE_MIN = 2       # this many sequences

Engine = TypeVar("Engine")


class PrefixMemory:
    """Keys of the prompts that an engine got, the newest last. A key stands for everything before it, too. Mutable."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def known(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are remembered."""
        for count, key in enumerate(keys):
            if key not in self._keys:
                return count
        return len(keys)

    def note(self, keys: Sequence[bytes], most: int) -> None:
        """Remembers them, and of all no more than the newest `most`."""
        for key in keys:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > most:
            self._keys.popitem(last=False)

    def clear(self) -> None:
        self._keys.clear()


def imbalance_max(rows: int) -> int:
    """How many sequences more than the idlest a familiar engine of so many rows may have."""
    return max(IMBALANCE_MIN, rows // IMBALANCE_ROWS)


def familiar_first(
    order: Sequence[Engine], known: Mapping[Engine, int], load: Callable[[Engine], int], rows: Callable[[Engine], int]
) -> list[Engine]:
    """The engines of `order`, the idlest first, with the most familiar one moved to the front where that is fair."""
    familiar = max(order, key=lambda engine: known[engine])     # of equally familiar ones the idlest
    ahead = load(familiar) - load(order[0])
    if not known[familiar] or ahead > imbalance_max(rows(familiar)):
        return list(order)
    return [familiar, *(engine for engine in order if engine != familiar)]
