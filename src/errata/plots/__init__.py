"""Floor 1: pictures of results, from arrays and labels alone, so that a result on disk can draw itself."""
