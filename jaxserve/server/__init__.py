"""HTTP: OpenAI-shaped routes over a text engine. Knows nothing of devices, schedulers or token internals."""
