"""The closed set of shapes that are compiled: token buckets T of the forward, row buckets B of the sampler.

Knows nothing of programs or devices. Invariant: both tuples rise, and their last members are the configured maxima,
so every legal step has a bucket.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from jaxserve.core.config import QuantizationBackend
from jaxserve.core.errors import ConfigError
from jaxserve.core.model_spec import LatentAttention, ModelSpec, MoeMlp
from kernels_pallas import lanes
from kernels_pallas.native import api as native

SERVING_TOKENS = 64    # tokens a step while the rest is still being compiled
EAGER_TOKENS = 64      # below this, --enforce-eager has one bucket for everything

ROUND_SIZES = (1, *sorted(size << bit for size in (2, 3) for bit in range(20)))    # what kernels like


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a step costs by the tokens (or rows) it has and is padded to.

    Attributes:
      points: (size, cost) of full steps; straight in between and after the last.
      padding: of one more token of padding; None where it costs what a real one does.
      saving_min: what a bucket must save against the next larger one, to be worth compiling and loading.
    """

    points: tuple[tuple[int, float], ...]
    padding: float | None = None
    saving_min: float = 0.2

    def of(self, count: int, bucket: int) -> float:
        """A step of `count`, padded to `bucket`."""
        if self.padding is None:
            return self._full(bucket)
        return self._full(count) + self.padding * (bucket - count)

    def _full(self, size: int) -> float:
        """Interpolated."""
        points = self.points
        index = min(max(1, bisect.bisect_left(points, (size, 0.0))), len(points) - 1)
        (size_a, cost_a), (size_b, cost_b) = points[index - 1], points[index]
        return cost_a + (size - size_a) * (cost_b - cost_a) / (size_b - size_a)


# Milliseconds of SmolLM2 on two CPU cores (docs/log.md); other dense models differ by a factor.
CPU_TOKENS = Costs(points=(
    (1, 13), (2, 18), (3, 31), (8, 33), (16, 40), (32, 50), (64, 80), (128, 136), (256, 253), (512, 518)
))
# Products leave padding out, so that a size saves little; but what streams wait for is worth a twentieth.
NATIVE_TOKENS = Costs(
    points=((1, 11.5), (4, 12), (16, 18), (32, 28), (64, 46), (128, 86), (256, 167)), padding=0.07, saving_min=0.05
)
# With AMX's tile registers; padding is what XLA's own operations take.
TILE_TOKENS = Costs(
    points=((1, 13), (6, 13.5), (16, 16), (32, 19.5), (64, 29), (128, 39), (256, 58), (512, 111)), padding=0.035,
    saving_min=0.05,
)
CPU_ROWS = Costs(points=((1, 15), (2, 21), (3, 35), (8, 39), (16, 47), (64, 102)))     # forward and sampling
# Computed, not measured: weights read once, and 206 16-bit tokens take a Hopper as long to multiply as to read them.
GPU = Costs(points=((1, 1 + 1 / 206), (206, 2)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """Attributes:
    tokens: T, packed tokens of a forward.  rows: B, rows of a sampling.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        for sizes in (self.tokens, self.rows):
            assert sizes and list(sizes) == sorted(set(sizes)) and sizes[0] >= 1, sizes

    @property
    def tokens_max(self) -> int:
        return self.tokens[-1]

    @property
    def rows_max(self) -> int:
        return self.rows[-1]

    def of_decodes(self, row_count: int) -> tuple[int, ...]:
        """The T that a step of one token a row may get."""
        largest = holder(self.tokens, min(row_count, self.tokens_max))
        return tuple(size for size in self.tokens if size <= largest)

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


def choose_buckets(
    *, tokens_max: int, rows_max: int, size_min: int, is_cpu: bool, is_eager: bool, skips_padding: bool = False,
    has_tiles: bool = False,
) -> Buckets:
    """As many sizes as save time, by the measured cost of a step; `--enforce-eager` keeps two and one.

    >>> choose_buckets(tokens_max=512, rows_max=64, size_min=1, is_cpu=True, is_eager=False)
    Buckets(tokens=(1, 2, 4, 16, 32, 64, 96, 128, 192, 256, 384, 512), rows=(1, 2, 6, 16, 32, 64))
    >>> choose_buckets(tokens_max=256, rows_max=16, size_min=1, is_cpu=True, is_eager=False, skips_padding=True)
    Buckets(tokens=(1, 6, 16, 32, 64, 128, 256), rows=(1, 2, 6, 16))

    Args:
      size_min: of any bucket, see `smallest_size`.
      skips_padding: whether products leave padding out, see the function of this name.
      has_tiles: whether those go through AMX's tile registers.
    """
    tokens_max, rows_max = max(tokens_max, size_min), max(rows_max, size_min)
    if is_eager:
        tokens = (tokens_max,) if tokens_max <= EAGER_TOKENS else (EAGER_TOKENS, tokens_max)
        return Buckets(tokens=tokens, rows=(rows_max,))
    return Buckets(
        tokens=_worthwhile(size_min, tokens_max, _cpu_tokens(skips_padding, has_tiles) if is_cpu else GPU),
        rows=_worthwhile(size_min, rows_max, CPU_ROWS if is_cpu else GPU),
    )


def _cpu_tokens(skips_padding: bool, has_tiles: bool) -> Costs:
    if not skips_padding:
        return CPU_TOKENS
    return TILE_TOKENS if has_tiles else NATIVE_TOKENS


def smallest_size(spec: ModelSpec, *, itemsize: int, is_cpu: bool, batch_invariant: bool) -> int:
    """The smallest bucket of tokens and rows.

    One row of bfloat16 is a trap of XLA's CPU dots (20-40 times slower), which `kernels_pallas.lanes` avoids for up to
    two rows of a linear layer, and nobody for the products of latent attention and of experts. Lanes add in another
    order than dots: bit-equal results need sizes beyond them. Native products give a row the same bits at every size.
    """
    if batch_invariant and not is_cpu:
        raise ConfigError("batch-invariant: bit-equal results are not built yet for GPUs; leave the flag away")
    if not is_cpu or itemsize != 2:
        return 2
    if batch_invariant and native.refusals():
        return lanes.ROWS_MAX + 1
    return 1 if _is_linear(spec) else 2


def skips_padding(spec: ModelSpec, *, itemsize: int, is_cpu: bool, products: QuantizationBackend = "auto") -> bool:
    """Whether a step's large products are native ones, which leave rows of zeros at the end out.

    Args:
      products: who multiplies packed weights; another one by name multiplies padding, too.
    """
    return is_cpu and itemsize == 2 and _is_linear(spec) and products in ("auto", "native") and not native.refusals()


def _is_linear(spec: ModelSpec) -> bool:
    """Whether all weights are met by `layers.linear`: neither latent attention nor experts."""
    return not any(
        isinstance(layer.attention, LatentAttention) or isinstance(layer.mlp, MoeMlp) for layer in spec.layers
    )


def _worthwhile(size_min: int, size_max: int, costs: Costs) -> tuple[int, ...]:
    """From the largest downwards, each saves enough of the one before for steps that just fit; and the smallest."""
    sizes = [size_max]
    while True:
        smaller = [
            size for size in ROUND_SIZES
            if size_min <= size < sizes[-1]
            and costs.of(size, size) <= (1 - costs.saving_min) * costs.of(size, sizes[-1])
        ]
        if not smaller:
            return tuple(sorted({size_min, *sizes}))
        sizes.append(smaller[-1])
