"""The control plane of the engine: sequences, pages, plans and commits. Token ids only: no text, no device, no jax."""
