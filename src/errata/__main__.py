"""`python -m errata`: the command line."""

from errata.cli.app import main

main()
