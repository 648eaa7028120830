"""Several processes, one on each machine, that run one model in step. Plain sockets and numpy; no jax."""
