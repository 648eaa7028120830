"""Products of rows with packed weights: codes of 4 or 8 bits with scales a group, tables, or 8-bit floats."""

from kernels_pallas.quantized_matmul.api import quantized_matmul as quantized_matmul
from kernels_pallas.quantized_matmul.weights import PackedWeight as PackedWeight
