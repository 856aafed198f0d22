"""`python -m bkpool`: the same program as the console scripts, for where those are not on PATH."""

from bkpool.cli import main

main()
