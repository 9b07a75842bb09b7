"""Floor 7: words typed -> calls, and results -> words. One file a command."""
