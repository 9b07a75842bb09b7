"""Floor 1: what a transformer is to us: its parts, weights, tokens, scores and continuations."""
