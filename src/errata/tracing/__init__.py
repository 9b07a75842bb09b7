"""Floor 3: causal tracing, which finds the activations that carry a fact by restoring them."""
