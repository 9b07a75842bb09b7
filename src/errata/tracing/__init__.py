"""Causal tracing: where in a model is a fact, measured by what restores it."""
