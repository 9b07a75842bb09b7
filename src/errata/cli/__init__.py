"""Floor 8: the command line. One file for each command."""
