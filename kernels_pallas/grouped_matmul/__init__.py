"""Products of rows, sorted by group, with the weights of their group: the experts of a mixture."""

from kernels_pallas.grouped_matmul.api import grouped_matmul as grouped_matmul
