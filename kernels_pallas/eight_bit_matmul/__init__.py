"""Products of 8-bit rows with 8-bit weights: integers, or floats with scales by groups of inputs."""

from kernels_pallas.eight_bit_matmul.api import eight_bit_matmul as eight_bit_matmul
from kernels_pallas.eight_bit_matmul.api import refusals as refusals
