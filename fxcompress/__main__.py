"""`python -m fxcompress`."""

from .cli import main

main()
