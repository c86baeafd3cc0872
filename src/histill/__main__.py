"""``python -m histill``."""

from histill.cli import main

main()
