"""Floor 1: models: their parts, weights, tokens, scores and continuations."""
