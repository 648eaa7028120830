"""One request as the engine sees it: its tokens, how far they are computed, and what it holds. Mutable.

Positions of a sequence, each bound at or after the one before it:

    0 ........ computed ........ planned ...... known ...... known + pending ...... stop.length_max
    | committed | in step in flight |  not planned  | sampled, on the device only |

    (while decoding with overlap `planned` runs up to `known + pending - 1`: the token there never left the device)

It knows no other sequence and no page pool: `Roster` and `KvGroups` change what it holds.
Invariant: `row < 0` means no step may be planned for it; its tables are empty unless it `is_leaving`.
"""

from __future__ import annotations

import numpy as np

from jaxserve.core.plan import I32
from jaxserve.core.request import EngineRequest, SequenceTimes, TokenLogprob
from jaxserve.engine.policy import Rank
from jaxserve.engine.stop import StopRule

NO_PAGE = -1   # in a page table: slid out of the group's window, never looked at again


class Sequence:
    """Mutable state of one request between `add` and its last output.

    Attributes:
      token_ids: buffer, of which `known` tokens are on the host: prompt, then committed output.
      prefill_end: known tokens when the row was taken; from there on the sequence decodes.
      pending: samples in flight, a draft's count as one.  drafted: draft tokens in flight.
      trust: share of its drafts that came true lately.  probe_at: length from which a distrusted one may draft again.
      in_flight: steps in flight that hold an entry of it.
      tables: for each KV group the pages from page index 0, NO_PAGE where they slid out of the window.
      slid: for each KV group how many leading pages have left.
      capacity: positions that the tables cover.
      page_keys: content keys of the full pages, as far as they were needed yet.
      published: leading pages known to the prefix cache.  promised: leading pages it has promised to compute.
      may_split: whether its prefill may take several steps: always with chunked prefill; without it only the
        recomputation of a sequence that has output, which may be longer than any step.
      is_long: longer, when it took its row, than the model's first context: its keys turn another way.
      is_leaving: has no row any more, but keeps its pages until the step in flight has landed.
      scores: prompt logprobs by position so far; None where they were not asked for.
    """

    __slots__ = (
        "cached_token_count",
        "capacity",
        "computed",
        "drafted",
        "failure_count",
        "first_token_s",
        "has_ended",
        "in_flight",
        "is_leaving",
        "is_long",
        "known",
        "may_split",
        "page_keys",
        "params",
        "pending",
        "planned",
        "preemption_count",
        "prefill_end",
        "probe_at",
        "promised",
        "prompt_length",
        "published",
        "rank",
        "request",
        "row",
        "scheduled_s",
        "scores",
        "slid",
        "slot",
        "stop",
        "tables",
        "token_ids",
        "trust",
    )

    def __init__(
        self, request: EngineRequest, *, rank: Rank, length_max: int, group_count: int, may_split: bool
    ) -> None:
        self.request = request
        self.params = request.params
        self.rank = rank
        self.stop = StopRule.of(request, length_max=length_max)
        self.token_ids: I32 = np.array(request.prompt_token_ids, np.int32)
        self.known = self.prompt_length = len(request.prompt_token_ids)
        self.prefill_end = self.planned = self.computed = self.capacity = 0
        self.pending = self.in_flight = self.drafted = self.probe_at = 0
        self.trust = 1.0
        self.row = self.slot = -1
        self.tables: list[list[int]] = [[] for _ in range(group_count)]
        self.slid = [0] * group_count
        self.page_keys: list[bytes] = []
        self.published = self.promised = 0
        self.may_split = may_split
        self.is_leaving = self.has_ended = self.is_long = False
        self.cached_token_count = -1    # until the first admission
        self.preemption_count = self.failure_count = 0
        self.scheduled_s = self.first_token_s = 0.0
        self.scores: list[TokenLogprob | None] | None = None if request.params.prompt_logprobs is None else [None]

    @property
    def is_scoring(self) -> bool:
        """Whether prompt logprobs are still to be collected."""
        return self.scores is not None and self.known == self.prompt_length

    @property
    def is_ending(self) -> bool:
        """Whether what is in flight makes it as long as it may become."""
        return self.known + self.pending >= self.stop.length_max

    def append(self, token: int) -> None:
        """One more token is known."""
        if self.known == self.token_ids.shape[0]:
            room = min(max(64, self.known), self.stop.length_max - self.known)
            self.token_ids = np.concatenate([self.token_ids, np.zeros(max(room, 1), np.int32)])
        self.token_ids[self.known] = token
        self.known += 1

    def rewind(self) -> None:
        """Nothing is computed and nothing held; what is known stays."""
        self.prefill_end = self.planned = self.computed = self.capacity = 0
        self.published = self.promised = 0
        for group, table in enumerate(self.tables):
            table.clear()
            self.slid[group] = 0

    def times(self, now_s: float) -> SequenceTimes:
        return SequenceTimes(
            arrival_s=self.request.arrival_s,
            scheduled_s=self.scheduled_s,
            first_token_s=self.first_token_s,
            last_token_s=now_s,
        )
