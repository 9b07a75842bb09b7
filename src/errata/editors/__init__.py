"""Floor 5: editors, which turn a rewrite into an `Edit`. The model stays unchanged, byte for byte."""
