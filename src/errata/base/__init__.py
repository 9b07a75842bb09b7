"""Floor 0: facts, errors, files, fingerprints, seeds. Imports nothing of ours and no torch."""
