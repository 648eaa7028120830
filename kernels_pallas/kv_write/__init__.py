"""New keys and values into pages."""

from kernels_pallas.kv_write.api import kv_write as kv_write
