"""Who waits, who runs, and what they hold: rows, shaping slots, pages. Mutable.

Both queues are sorted by rank, best first. A sequence that loses its row gives back row and slot at once (steps run
in launch order on the device, so the next owner's admission comes after) but its pages only when no step in flight
writes them any more: until that step has landed nobody knows whether what it wrote is finite.
It knows no plan, no budget and no clock.
Invariant (`check`): a live sequence is in exactly one of the two queues; every page reference belongs to a running
or leaving sequence.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise
from operator import attrgetter

from jaxserve.core.plan import RunnerShape
from jaxserve.engine.kv_groups import KvGroups
from jaxserve.engine.prefix_cache import PrefixCache
from jaxserve.engine.sequence import Sequence

_rank = attrgetter("rank")


class Roster:
    """Queues and holdings of all live sequences."""

    def __init__(self, shape: RunnerShape, *, row_count: int, enable_prefix_caching: bool) -> None:
        self.kv = KvGroups(shape.groups, page_size=shape.page_size)
        self.cache = PrefixCache(self.kv, is_enabled=enable_prefix_caching)
        self.live: dict[str, Sequence] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.leaving: set[Sequence] = set()
        self._row_count, self._slot_count = row_count, shape.slot_count
        self._make_places()

    @property
    def free_row_count(self) -> int:
        return len(self._free_rows)

    def has_place(self, sequence: Sequence) -> bool:
        """Whether a row and, if it needs one, a shaping slot is free."""
        return bool(self._free_rows) and (bool(self._free_slots) or not sequence.params.needs_shaping)

    def enter(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        self.live[sequence.request.request_id] = sequence
        insort(self.waiting, sequence, key=_rank)

    def seat(self, sequence: Sequence) -> None:
        """A waiting sequence takes a row, and a slot if it needs one."""
        self._leave_queue(sequence)
        sequence.row = self._free_rows.pop()
        if sequence.params.needs_shaping:
            sequence.slot = self._free_slots.pop()
        insort(self.running, sequence, key=_rank)

    def unseat(self, sequence: Sequence) -> None:
        """A running sequence waits again, to be computed anew from what is known."""
        self._vacate(sequence)
        sequence.may_split |= sequence.known > sequence.prompt_length
        insort(self.waiting, sequence, key=_rank)

    def end(self, sequence: Sequence) -> None:
        """A live sequence is over."""
        sequence.has_ended = True
        del self.live[sequence.request.request_id]
        if sequence.row >= 0:
            self._vacate(sequence)
        else:
            self._leave_queue(sequence)

    def land(self, sequence: Sequence) -> None:
        """No step in flight touches a leaving sequence any more."""
        self.leaving.remove(sequence)
        sequence.is_leaving = False
        self._let_go(sequence)

    def restart(self) -> None:
        """The device state is gone: everybody waits, nothing is held, cached, promised or in flight."""
        for sequence in (*self.running, *self.waiting, *self.leaving):
            sequence.row = sequence.slot = -1
            sequence.pending = sequence.in_flight = sequence.drafted = 0
            sequence.is_leaving = False
            sequence.may_split |= sequence.known > sequence.prompt_length
            sequence.rewind()
        self.waiting = sorted(self.running + self.waiting, key=_rank)
        self.running.clear()
        self.leaving.clear()
        self.cache.reset()
        self.kv.reset()
        self._make_places()

    def check(self) -> None:
        """Asserts the invariants; linear in pages and sequences."""
        queued = self.running + self.waiting
        assert len(queued) == len(self.live) and set(queued) == set(self.live.values())
        for queue in (self.running, self.waiting):
            assert all(a.rank < b.rank for a, b in pairwise(queue)), "a queue lost its order"
        rows = [sequence.row for sequence in self.running] + self._free_rows
        assert sorted(rows) == list(range(self._row_count)), "a row is lost or taken twice"
        slots = [sequence.slot for sequence in self.running if sequence.params.needs_shaping] + self._free_slots
        assert sorted(slots) == list(range(self._slot_count)), "a slot is lost or taken twice"
        for sequence in self.waiting:
            assert sequence.row == sequence.slot == -1
            assert sequence.is_leaving == (sequence in self.leaving) == (sequence.in_flight > 0)
        for sequence in self.running:
            assert 0 <= sequence.computed <= sequence.planned <= sequence.capacity and not sequence.is_leaving
            assert sequence.known + sequence.pending <= sequence.stop.length_max
            decoded = sequence.known + sequence.pending - 1 + sequence.drafted
            assert sequence.planned <= max(decoded, sequence.prefill_end)
        self.kv.check([*self.running, *self.leaving])
        self.cache.check(set(self.running))

    def _make_places(self) -> None:
        self._free_rows = list(range(self._row_count - 1, -1, -1))
        self._free_slots = list(range(self._slot_count - 1, -1, -1))

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.cache.withdraw(sequence)
        self._free_rows.append(sequence.row)
        sequence.row = -1
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1
        if sequence.in_flight:
            sequence.is_leaving = True
            self.leaving.add(sequence)
        else:
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self.kv.release(sequence)
        sequence.rewind()

    def _leave_queue(self, sequence: Sequence) -> None:
        index = bisect_left(self.waiting, sequence.rank, key=_rank)
        assert self.waiting[index] is sequence
        del self.waiting[index]
