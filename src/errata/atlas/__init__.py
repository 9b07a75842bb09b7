"""The embedded model and its world: a small GPT-2 for which it is known where facts are read from."""
