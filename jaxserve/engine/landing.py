"""When the step in flight lands, and how long the next plan may wait for newcomers. Mutable.

A plan that is made the moment the step before it begins leaves out who comes while that one runs: they wait for its end
and for all of the next. A step with prompts is long enough to wait with: its successor is planned shortly before it
ends, and takes them along. The device is not left idle for that: the forecast is the least that recent steps of that
size took, less a margin for the host's work. Steps of decodes only are planned at once: they are short, and the host's
time counts most there.
"""

from __future__ import annotations

import math
from collections import deque

RECENT = 8              # steps of a size whose shortest is the forecast: a slow one on a busy machine changes nothing
SIZES_AN_OCTAVE = 4
MARGIN = 0.1            # of the forecast
HOST_MARGIN = 4         # host times of a step (plan, pack, dispatch), the largest of late, that it must begin before
HOST_FORGET = 0.9       # a step


class LandingForecast:
    """What steps with prompts take, by their tokens.

    >>> forecast = LandingForecast()
    >>> forecast.observe(tokens=256, seconds=0.2, host_s=0.002)
    >>> round(forecast.launch_by(tokens=256), 3)
    0.172
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._host_s = 0.0

    def observe(self, *, tokens: int, seconds: float, host_s: float) -> None:
        """A step with prompts took `seconds` to land, and the host `host_s` to launch one."""
        self._host_s = max(host_s, HOST_FORGET * self._host_s)
        self._seconds.setdefault(_size(tokens), deque(maxlen=RECENT)).append(seconds)

    def launch_by(self, *, tokens: int) -> float:
        """Seconds after a step's begin by which its successor is to be planned; 0 where nothing is known."""
        recent = self._seconds.get(_size(tokens))
        if not recent:
            return 0.0
        return max(0.0, (1 - MARGIN) * min(recent) - HOST_MARGIN * self._host_s)


def _size(tokens: int) -> int:
    return int(SIZES_AN_OCTAVE * math.log2(max(1, tokens)))
