"""Floor 1: records on disk and in memory. They know no model."""
