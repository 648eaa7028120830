"""Plain data and rules that both planes share: stdlib and numpy only, no jax, no I/O, no threads."""
