"""What a sequence may say next, guessed from its own text or by a second model: drafts that a step verifies.

Knows tokens and how earlier drafts fared; no budget, no page, no step. A draft that is wrong costs time, never a wrong
token: the step samples at every drafted position and keeps the samples up to the first that differs.
Invariant: a proposal depends on the sequence's known tokens and its own record alone.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jaxserve.core.config import SpeculativeConfig
from jaxserve.core.plan import I32, DraftPlan, DraftPort, PageUpdates
from jaxserve.engine.sequence import Sequence

MEMORY = 0.7        # weight of the past in a sequence's trust
TRUST_MIN = 0.25    # below it, drafts are probes
PROBE_TOKENS = 16   # tokens between two probes

_NONE: I32 = np.zeros(0, np.int32)


class Speculation(Protocol):
    """Whoever drafts; tests bring their own."""

    @property
    def tokens_max(self) -> int:
        """Most tokens of a draft."""
        ...

    def propose(self, sequence: Sequence) -> I32:
        """The tokens that may follow the known ones, possibly none."""
        ...

    def learn(self, sequence: Sequence, *, drafted: int, accepted: int) -> None:
        """How a draft of the sequence fared."""
        ...


class ModelSpeculation:
    """A second, smaller model drafts. `propose` says how many tokens it would be asked for; `write` asks for them."""

    def __init__(self, config: SpeculativeConfig, port: DraftPort) -> None:
        self.tokens_max = config.num_speculative_tokens
        self._port = port

    def propose(self, sequence: Sequence) -> I32:
        return np.zeros(_length(sequence, self.tokens_max), np.int32)

    def learn(self, sequence: Sequence, *, drafted: int, accepted: int) -> None:
        _learn(sequence, drafted=drafted, accepted=accepted)

    def write(self, drafts: dict[Sequence, I32], pages: PageUpdates) -> dict[Sequence, I32]:
        """The drafts' tokens, as many of each as `drafts` has; their sequences hold the pages to compute them."""
        if not drafts:
            return {}
        count_N = np.array([draft.shape[0] for draft in drafts.values()], np.int32)
        plan = DraftPlan(
            row_N=np.array([sequence.row for sequence in drafts], np.int32),
            start_N=np.array([sequence.planned for sequence in drafts], np.int32),
            token_N=np.array([sequence.token_ids[sequence.planned] for sequence in drafts], np.int32),
            count_N=count_N, pages=pages,
        )
        token_NI = self._port.draft(plan)
        return {s: token_NI[entry, : count_N[entry]] for entry, s in enumerate(drafts)}


class NgramSpeculation:
    """Continues the sequence as it went on after the newest earlier place that ends alike (prompt lookup)."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self.tokens_max = config.num_speculative_tokens
        self._shortest, self._longest = config.prompt_lookup_min, config.prompt_lookup_max

    def propose(self, sequence: Sequence) -> I32:
        count = _length(sequence, self.tokens_max)
        if not count:
            return _NONE
        return lookup(sequence.token_ids[: sequence.known], count, shortest=self._shortest, longest=self._longest)

    def learn(self, sequence: Sequence, *, drafted: int, accepted: int) -> None:
        _learn(sequence, drafted=drafted, accepted=accepted)


def _length(sequence: Sequence, tokens_max: int) -> int:
    """Tokens to draft: fewer where the sequence's drafts came to little, and none between two probes."""
    if sequence.trust < TRUST_MIN and sequence.known < sequence.probe_at:
        return 0
    return max(1, round(tokens_max * sequence.trust))


def _learn(sequence: Sequence, *, drafted: int, accepted: int) -> None:
    sequence.trust = MEMORY * sequence.trust + (1 - MEMORY) * accepted / drafted
    sequence.probe_at = sequence.known + PROBE_TOKENS


def lookup(token_K: I32, count: int, *, shortest: int, longest: int) -> I32:
    """`count` tokens that followed the newest earlier occurrence of the longest suffix n-gram; none without one.

    A text that repeats itself sooner than after `count` tokens is taken to go on so.

    >>> lookup(np.array([1, 2, 3, 4, 1, 2], np.int32), 3, shortest=2, longest=4).tolist()
    [3, 4, 1]
    >>> lookup(np.array([9, 7, 7, 7], np.int32), 3, shortest=2, longest=4).tolist()
    [7, 7, 7]
    """
    known = token_K.shape[0]
    last_M = np.flatnonzero(token_K[:-1] == token_K[-1])     # where an n-gram that matches so far ends
    found_M: I32 | NDArray[np.intp] = _NONE
    for size in range(1, longest + 1):
        if size > 1:
            last_M = last_M[last_M >= size - 1]
            last_M = last_M[token_K[last_M - size + 1] == token_K[known - size]]
        if not last_M.shape[0]:
            break
        if size >= shortest:
            found_M = last_M
    if not found_M.shape[0]:
        return _NONE
    begin = int(found_M[-1]) + 1
    return token_K[begin + np.arange(count) % (known - begin)]
