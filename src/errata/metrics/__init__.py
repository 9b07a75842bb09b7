"""Floor 3: numbers about a model. A metric cannot tell whether the model is edited."""
