"""Which replica takes a request: where its beginning was computed, unless that one has much more to do.

The rule is `engine.familiar`'s, of keys over the prompt's text. Each front remembers what it sent itself.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from jaxserve.engine.familiar import PrefixMemory, familiar_first
from jaxserve.replicas.forwarding import KEY_BYTES, Forwarded

TOKEN_BYTES = 4             # of English text, about
SLOTS, ROWS = 65_536, 64    # of a replica that has not said yet
MEANT_S_MAX = 10.0


class PrefixRouter(RequestRouter):
    """Familiar first where that is fair, then by ongoing requests. Mutable: what each replica was sent."""

    def initialize_state(self, **options: Any) -> None:
        self._follows_prefixes = bool(options.get("follows_prefixes", True))
        self._memories: defaultdict[ReplicaID, PrefixMemory] = defaultdict(PrefixMemory)
        self._ongoing: defaultdict[ReplicaID, int] = defaultdict(int)
        self._given: defaultdict[ReplicaID, int] = defaultdict(int)
        self._meant: dict[str, tuple[ReplicaID, float]] = {}     # request -> what was chosen for it, and when

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank: where the first does not accept, the next is asked."""
        there = {replica.replica_id: replica for replica in candidate_replicas}
        if not there:
            return []
        load = self._loads()
        order = sorted(there, key=lambda name: (load[name], self._given[name]))
        keys = _keys(pending_request) if self._follows_prefixes else ()
        if keys:
            known = {name: self._memories[name].known(keys) for name in order}
            order = familiar_first(order, known, load.__getitem__, lambda name: _stat(there[name], "rows", ROWS))
        if pending_request is not None:
            self._meant[pending_request.metadata.internal_request_id] = order[0], time.monotonic()
        return [[there[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._meant.pop(pending_request.metadata.internal_request_id, None)
        self._ongoing[replica_id] += 1
        self._given[replica_id] += 1
        keys, replica = _keys(pending_request), self.curr_replicas.get(replica_id)
        if keys and replica is not None:
            slots = _stat(replica, "slots", SLOTS)
            self._memories[replica_id].note(keys, max(1, slots * TOKEN_BYTES // KEY_BYTES))

    def _loads(self) -> Counter[ReplicaID]:
        """Ongoing requests, and those on their way: of many that come at once all choose before any is routed."""
        long_ago = time.monotonic() - MEANT_S_MAX
        while self._meant and (oldest := next(iter(self._meant.items())))[1][1] < long_ago:
            del self._meant[oldest[0]]      # it was cancelled
        return Counter(self._ongoing) + Counter(name for name, _ in self._meant.values())

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._ongoing[replica_id] = max(0, self._ongoing[replica_id] - 1)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        for of_each in (self._memories, self._ongoing, self._given):
            of_each.pop(replica_id, None)   # type: ignore[attr-defined]


def _keys(pending: PendingRequest | None) -> tuple[bytes, ...]:
    request = pending.args[0] if pending is not None and pending.args else None
    return request.keys if isinstance(request, Forwarded) else ()


def _stat(replica: RunningReplica, name: str, otherwise: int) -> int:
    return int((replica.routing_stats or {}).get(name, otherwise))
