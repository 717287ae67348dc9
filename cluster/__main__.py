"""`python -m cluster` is `bora`."""

from cluster.cli import main

main()
