"""Finds stop strings in a text that arrives in parts. Knows no tokens. Mutable: one instance reads one text.

Invariant: the match that ends first wins (of two that end together, the longer), however the text is split; no
character of a match is ever given away (unless it is to be included), and nothing is held back that cannot become
part of a match.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Gives text on until one of `strings` appears in it."""

    def __init__(self, strings: Sequence[str], *, included: bool) -> None:
        self._strings, self._included = tuple(strings), included
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Takes more text.

        Returns: the text that is certain to stay, and the stop string found; after one, nothing may follow.
        Where `may_stop` is False, strings that end in this text do not count.
        """
        if not self._strings:
            return text, None
        buffer, old = self._held + text, len(self._held)
        found = self._find(buffer, old) if may_stop else None
        if found is not None:
            end, begin, string = found
            self._held = ""
            return buffer[: end if self._included else begin], string
        kept = len(buffer) - self._partial(buffer)
        self._held = buffer[kept:]
        return buffer[:kept], None

    def flush(self) -> str:
        """What was held back, when the text ends without a match."""
        held, self._held = self._held, ""
        return held

    def _find(self, buffer: str, old: int) -> tuple[int, int, str] | None:
        """(end, begin, string) of the first match that ends after `old` characters."""
        matches = []
        for string in self._strings:
            begin = buffer.find(string, max(0, old - len(string) + 1))
            if begin >= 0:
                matches.append((begin + len(string), begin, string))
        return min(matches, default=None)

    def _partial(self, buffer: str) -> int:
        """How many last characters may be the beginning of a stop string."""
        longest = 0
        for string in self._strings:
            for size in range(min(len(string) - 1, len(buffer)), longest, -1):
                if buffer.endswith(string[:size]):
                    longest = size
                    break
        return longest
