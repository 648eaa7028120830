"""Readers of quantised weight formats, one file each: from stored tensors to `quantization.codes`."""
