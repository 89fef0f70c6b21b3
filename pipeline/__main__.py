"""`python -m pipeline` is `nightlabel`."""

from pipeline.cli import main

main()
