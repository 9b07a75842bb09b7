"""Floor 4: editors turn a rewrite into an `Edit`. The model is, byte for byte, the same afterwards."""
