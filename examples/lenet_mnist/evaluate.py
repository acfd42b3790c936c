"""Load an artifact and measure it: no source of the model is needed. Usage: python evaluate.py DIR"""

from __future__ import annotations

import sys

import fxcompress
from digits import accuracy, digits


def main() -> None:
    module = fxcompress.load(sys.argv[1])
    print(f"{accuracy(module, digits()[1]):.4f}")


if __name__ == "__main__":
    main()
