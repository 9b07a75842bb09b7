"""Floor 3: scores of a model. A metric cannot tell whether the model is edited."""
