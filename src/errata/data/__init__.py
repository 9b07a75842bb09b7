"""Floor 1: records on disk and in memory, independent of any model."""
