"""One query token a sequence over its paged context."""

from kernels_pallas.paged_decode.api import paged_decode as paged_decode
