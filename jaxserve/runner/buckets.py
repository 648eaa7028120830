"""The closed set of shapes that are compiled: token buckets T of the forward, row buckets B of the sampler.

Knows nothing of programs or devices. Invariant: both tuples rise, and their last members are the configured maxima,
so every legal step has a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

BUCKET_MIN = 2         # one-row dots take a scalar path 20-40 times slower on XLA's CPU backend
SERVING_TOKENS = 64    # tokens a step while the rest is still being compiled
EAGER_TOKENS = 64      # below this, --enforce-eager has one bucket for everything


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """Attributes:
    tokens: T, packed tokens of a forward.  rows: B, rows of a sampling.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        for sizes in (self.tokens, self.rows):
            assert sizes and list(sizes) == sorted(set(sizes)) and sizes[0] >= BUCKET_MIN, sizes

    @property
    def tokens_max(self) -> int:
        return self.tokens[-1]

    @property
    def rows_max(self) -> int:
        return self.rows[-1]

    def serving(self, *, whole_prompts: bool) -> Buckets:
        """The one bucket of each kind that can serve any request, however slowly.

        Args:
          whole_prompts: prompts are not split into chunks, so that the largest step is needed from the start.
        """
        tokens = self.tokens_max if whole_prompts else holder(self.tokens, min(SERVING_TOKENS, self.tokens_max))
        return Buckets(tokens=(tokens,), rows=(holder(self.rows, min(8, self.rows_max)),))


def holder(sizes: tuple[int, ...], count: int) -> int:
    """The smallest size that holds `count`; sizes rise."""
    for size in sizes:
        if size >= count:
            return size
    raise ValueError(f"{count} is above the largest bucket {sizes[-1]}")


def choose_buckets(*, tokens_max: int, rows_max: int, is_eager: bool) -> Buckets:
    """Powers of two, thinned where a neighbour costs about the same; `--enforce-eager` keeps two and one.

    >>> choose_buckets(tokens_max=512, rows_max=64, is_eager=False)
    Buckets(tokens=(2, 8, 16, 32, 64, 128, 256, 512), rows=(2, 8, 16, 32, 64))
    """
    tokens_max, rows_max = max(tokens_max, BUCKET_MIN), max(rows_max, BUCKET_MIN)
    if is_eager:
        tokens = (tokens_max,) if tokens_max <= EAGER_TOKENS else (EAGER_TOKENS, tokens_max)
        return Buckets(tokens=tokens, rows=(rows_max,))
    return Buckets(tokens=_powers(tokens_max), rows=_powers(rows_max))


def _powers(size_max: int) -> tuple[int, ...]:
    """2, then every power of two from 8 (two to eight rows cost nearly the same), then the maximum itself."""
    sizes = [2, *(1 << bit for bit in range(3, size_max.bit_length()))]
    return tuple(sorted({size for size in sizes if size < size_max} | {size_max}))
