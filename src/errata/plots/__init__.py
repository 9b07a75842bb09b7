"""Floor 1: figures of results, from arrays and labels alone, so that a result on disk can draw itself."""
