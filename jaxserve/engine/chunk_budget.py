"""How many prompt tokens a step may hold while streams wait for it: `--itl-target-ms`. Mutable.

A control loop, not a model of the machine: a mixed step that took longer than the target shrinks the next ones in
proportion, one that filled its budget in less time lets them grow. Steps without decodes are never cut, because nobody
waits for them.
Invariant: at least TOKENS_MIN prompt tokens a step, so that a long prompt always comes to its end.
"""

from __future__ import annotations

TOKENS_MIN = 16
TOKENS_START = 64
SHRINK_MIN, GROW_MAX = 0.5, 1.25    # by one step: a single slow one on a busy machine must not stop prompts
FULL = 0.8                          # of the budget that a step must have used to say anything about more


class ChunkBudget:
    """Prompt tokens a step, for a target of seconds between tokens.

    >>> budget = ChunkBudget(0.05)
    >>> budget.observe(tokens=64, seconds=0.1)
    >>> budget.tokens
    32
    """

    __slots__ = ("_target_s", "tokens")

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s
        self.tokens = TOKENS_START

    def observe(self, *, tokens: int, seconds: float) -> None:
        """A step with decodes beside `tokens` prompt tokens took `seconds`."""
        ratio = self._target_s / max(seconds, 1e-6)
        if ratio < 1:
            self.tokens = max(TOKENS_MIN, int(min(tokens, self.tokens) * max(ratio, SHRINK_MIN)))
        elif tokens >= FULL * self.tokens:
            self.tokens = max(self.tokens, int(tokens * min(ratio, GROW_MAX)))
