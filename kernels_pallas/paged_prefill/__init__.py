"""Chunks of query tokens over their paged context."""

from kernels_pallas.paged_prefill.api import paged_prefill as paged_prefill
