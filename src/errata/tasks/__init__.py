"""Benchmarks as objects: how records are read, what is asked, and the numbers that come of it."""
