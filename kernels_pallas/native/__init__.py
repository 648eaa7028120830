"""CPU kernels in LLVM's own language, for what XLA's CPU backend cannot be talked into.

Compiled in milliseconds for this host by llvmlite and called from XLA programs through its foreign function interface.
Nothing here is needed: without llvmlite, or on a CPU without bfloat16 instructions, XLA's own products serve.

`host.py` compiles and registers; `runtime.py` is what every kernel shares (arguments, threads); then one file a kernel.
"""
