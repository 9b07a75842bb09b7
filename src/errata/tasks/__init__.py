"""Floor 4: benchmarks as objects: how records are read, which requests are scored, and the resulting numbers."""
