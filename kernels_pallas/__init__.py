"""Attention kernels over a paged KV cache; imports jax and numpy only, usable without jaxserve.

`native` (kernels for this host's CPU) needs llvmlite, and is left alone where there is none.
One folder an op: `api.py` (contract and choice of implementation), `reference.py` (plain jnp: the specification),
`xla.py` (loops whose trip counts are data, fast on CPUs), `mosaic_gpu.py` (NVIDIA Hopper), `cases.py` (named shapes of
real models).
"""
