"""Floor 0: facts, errors, files, fingerprints, seeds. Imports no other part of errata, and no torch."""
